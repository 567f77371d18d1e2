"""setup.py: what LEARNDROP_CUDA and CMAKE_CUDA_ARCHITECTURES mean, and that sdist and wheel stand on their own."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
VERSION = re.search(r'^version = "(.+)"$', (ROOT / "pyproject.toml").read_text(), re.MULTILINE)
# setup.py asks for what it does when it is run; its functions are called without running it.
CALL = """
import sys, types
stub = types.ModuleType("setuptools"); stub.Extension = stub.setup = lambda *a, **k: None
command = types.ModuleType("setuptools.command"); build = types.ModuleType("setuptools.command.build_ext")
build.build_ext = object
sys.modules |= {"setuptools": stub, "setuptools.command": command, "setuptools.command.build_ext": build}
names = {"__file__": sys.argv[1], "__name__": "setup"}
exec(compile(open(sys.argv[1]).read(), sys.argv[1], "exec"), names)
print(eval(sys.argv[2], names))
"""


def call(expression: str, **environment: str) -> subprocess.CompletedProcess[str]:
    """Evaluates an expression among the functions of setup.py, under an environment of these variables alone."""
    return subprocess.run(
        [sys.executable, "-c", CALL, ROOT / "setup.py", expression],
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )


def fake_nvcc(folder: Path, *architectures: str) -> str:
    """An nvcc that lists these architectures and does nothing else."""
    lines = "".join(f"echo compute_{number}\n" for number in architectures)
    folder.mkdir(parents=True)
    (folder / "nvcc").write_text(f"#!/bin/sh\n{lines}")
    (folder / "nvcc").chmod(0o755)
    return str(folder / "nvcc")


def test_nvcc_to_use_without_nvcc(tmp_path: Path) -> None:
    nowhere = {"PATH": str(tmp_path), "CUDA_HOME": str(tmp_path)}
    hide = "globals().update(TOOLKIT='/nowhere') or nvcc_to_use()"
    assert call(hide, **nowhere).stdout == "None\n"
    done = call(hide, LEARNDROP_CUDA="1", **nowhere)
    assert done.returncode != 0
    assert "LEARNDROP_CUDA=1 needs the CUDA compiler nvcc, and none was found" in done.stderr
    assert "install the CUDA toolkit" in done.stderr


@pytest.mark.parametrize("where", ["PATH", "CUDA_HOME", "CUDACXX"])
def test_nvcc_to_use_finds_nvcc(tmp_path: Path, where: str) -> None:
    nvcc = fake_nvcc(tmp_path / "bin", "80")
    value = {"PATH": str(tmp_path / "bin"), "CUDA_HOME": str(tmp_path), "CUDACXX": nvcc}[where]
    environment = {"PATH": str(tmp_path), where: value}
    assert call("nvcc_to_use()", **environment).stdout == f"{nvcc}\n"
    assert call("nvcc_to_use()", LEARNDROP_CUDA="0", **environment).stdout == "None\n"


@pytest.mark.parametrize("value", ["", "yes", "2"])
def test_nvcc_to_use_refuses_another_value(value: str) -> None:
    done = call("nvcc_to_use()", LEARNDROP_CUDA=value)
    assert done.returncode != 0
    assert f"LEARNDROP_CUDA must be auto, 0 or 1, got {value!r}" in done.stderr


def test_nvcc_to_use_refuses_a_compiler_that_is_not_there() -> None:
    done = call("nvcc_to_use()", CUDACXX="/nowhere/nvcc")
    assert done.returncode != 0
    assert "CUDACXX must name a CUDA compiler that can be run, got '/nowhere/nvcc'" in done.stderr


@pytest.mark.parametrize(
    ("admitted", "chosen"),
    [(("75", "80", "90", "100", "120"), "80-real;90-real;100"), (("70", "80", "90"), "80-real;90"), (("80",), "80")],
)
def test_architectures(tmp_path: Path, admitted: tuple[str, ...], chosen: str) -> None:
    nvcc = fake_nvcc(tmp_path / "bin", *admitted)
    assert call(f"architectures({nvcc!r})").stdout == f"{chosen}\n"
    assert call(f"architectures({nvcc!r})", CMAKE_CUDA_ARCHITECTURES="86-real").stdout == "86-real\n"


def test_architectures_refuses_an_nvcc_that_has_none_of_them(tmp_path: Path) -> None:
    done = call(f"architectures({fake_nvcc(tmp_path / 'bin', '50', '60')!r})")
    assert done.returncode != 0
    assert "must admit one of the architectures ('80', '90', '100'), got ['compute_50', 'compute_60']" in done.stderr


def test_version_is_written_once() -> None:
    assert VERSION is not None
    tracked = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=False).stdout.split()
    if not tracked:
        pytest.skip("not a git checkout")
    code = [ROOT / name for name in tracked if name.endswith((".py", ".pyi", ".toml", ".txt", ".cpp", ".h", ".cu"))]
    literals = [path.name for path in code if f'"{VERSION[1]}"' in path.read_text()]
    assert literals == ["pyproject.toml"]


USE = """
import learndrop_ext, torch
from learndrop_ext import _C, ops
from learndrop_ext.kernels import reference
cache = torch.zeros(2, ops.row_stride((3, 4, 4), "fp16"), dtype=torch.uint8)
ops.append_rows(cache, torch.ones(1, 3, 4, 4), torch.tensor([1]))
print(learndrop_ext.__version__, int(ops.gather_rows(cache, torch.tensor([1]), (3, 4, 4)).sum()))
print(learndrop_ext.__file__, _C.__file__, reference.__file__, sep="\\n")
"""


@pytest.mark.slow
def test_sdist_builds_a_wheel_that_works_elsewhere(tmp_path: Path) -> None:
    def run(*command: str | Path, **environment: str) -> str:
        done = subprocess.run(
            [sys.executable, *command],
            cwd=tmp_path,
            env={**os.environ, **environment},
            capture_output=True,
            text=True,
            check=False,
        )
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout

    run("-m", "build", "--sdist", "--outdir", tmp_path, ROOT)
    (sdist,) = tmp_path.glob("*.tar.gz")
    with tarfile.open(sdist) as archive:
        held = {name.partition("/")[2] for name in archive.getnames()}
    assert {"CMakeLists.txt", "LICENSE", "csrc/row_ops.h", "csrc/cuda/row_ops.cuh", "kernels/reference.py"} <= held
    assert not [name for name in held if name.endswith(".so")]

    # Neither CUDA nor optimization, to be quick: both were there when the package under test was installed.
    run("-m", "pip", "wheel", "--no-deps", "--wheel-dir", tmp_path, sdist, LEARNDROP_CUDA="0", CMAKE_BUILD_TYPE="None")
    (wheel,) = tmp_path.glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        names = archive.namelist()
    tops = {name.partition("/")[0] for name in names}
    assert {top for top in tops if not top.endswith(".dist-info")} == {"learndrop_ext"}
    assert {"learndrop_ext/py.typed", "learndrop_ext/_C.pyi", "learndrop_ext/kernels/reference.py"} <= set(names)

    site = tmp_path / "site"
    run("-m", "pip", "install", "--no-deps", "--target", site, wheel)
    said = run("-c", USE, PYTHONPATH=str(site)).splitlines()
    assert VERSION is not None
    assert said[0] == f"{VERSION[1]} 48"
    assert all(Path(line).is_relative_to(site) for line in said[1:])
