from __future__ import annotations

import subprocess
import sys

CODE = """
import sys
class Interrupt:
    def find_spec(self, name, path=None, target=None):
        if name == "torch":
            raise KeyboardInterrupt
sys.meta_path.insert(0, Interrupt())
from learndrop_ext.app.entry import main
sys.exit(main())
"""


def test_ctrl_c_while_torch_is_imported_is_said_in_a_line() -> None:
    run = subprocess.run([sys.executable, "-c", CODE], capture_output=True, text=True, check=False)
    assert (run.returncode, run.stdout, run.stderr) == (130, "", "interrupted\n")


def test_the_door_leads_to_the_command_line() -> None:
    code = "import sys; sys.argv = ['learndrop', 'info', '--json']; from learndrop_ext.app.entry import main; main()"
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert '"cpu_simd"' in run.stdout
