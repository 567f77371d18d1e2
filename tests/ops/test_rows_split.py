"""How the CUDA kernels divide rows among blocks: host code, compiled by nvcc and run without a GPU."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import pytest

HERE = Path(__file__).resolve().parent
NVCC = shutil.which("nvcc") or shutil.which("/usr/local/cuda/bin/nvcc")


@pytest.mark.skipif(NVCC is None, reason="needs nvcc")
def test_slices_cover_each_row_and_fill_the_waves(tmp_path: Path) -> None:
    assert NVCC is not None
    program = tmp_path / "rows_split"
    csrc = HERE.parents[1] / "csrc"
    build = [NVCC, "-std=c++20", f"-I{csrc}", "-arch=sm_90", str(HERE / "rows_split.cu"), "-o", str(program)]
    subprocess.run(build, check=True, capture_output=True, text=True)
    done = subprocess.run([program], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout
