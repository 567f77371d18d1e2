"""Triton kernels as machine code for sm_90."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest


def printed_by(made_once: Callable[[str, Callable[[Path], object]], Path], name: str, program: str) -> str:
    """What a program that compiles kernels prints.

    It runs in a process of its own: in this one Triton may be its interpreter. A warning there is an error.
    """
    pytest.importorskip("triton")

    def compiled(path: Path) -> None:
        inherited = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
        done = subprocess.run(
            [sys.executable, "-W", "error", "-c", program],
            env=inherited | {"TRITON_CACHE_DIR": f"{path}.cache"},
            capture_output=True,
            text=True,
            check=False,
        )
        assert done.returncode == 0, done.stderr
        assert not done.stderr
        path.write_text(done.stdout)

    return made_once(name, compiled).read_text()
