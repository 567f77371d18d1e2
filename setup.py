"""Builds learndrop_ext._C with CMake and ninja; everything else about the package stands in pyproject.toml."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).resolve().parent
DEFAULT_ARCHITECTURES = ("80", "90", "100")
TOOLKIT = "/usr/local/cuda"


def find_nvcc() -> str | None:
    """The CUDA compiler: CUDACXX, then PATH, then CUDA_HOME, then /usr/local/cuda."""
    if named := os.environ.get("CUDACXX"):
        if found := shutil.which(named):
            return found
        raise SystemExit(f"CUDACXX must name a CUDA compiler that can be run, got {named!r}")
    homes = (os.environ.get("CUDA_HOME"), TOOLKIT)
    places = [f"{home}/bin/nvcc" for home in homes if home]
    return next((found for found in map(shutil.which, ["nvcc", *places]) if found), None)


def nvcc_to_use() -> str | None:
    """The CUDA compiler that LEARNDROP_CUDA (auto, 0 or 1) asks for, or None for a build without CUDA."""
    wanted = os.environ.get("LEARNDROP_CUDA", "auto")
    if wanted not in ("auto", "0", "1"):
        raise SystemExit(f"LEARNDROP_CUDA must be auto, 0 or 1, got {wanted!r}")
    nvcc = None if wanted == "0" else find_nvcc()
    if wanted == "1" and nvcc is None:
        raise SystemExit(
            "LEARNDROP_CUDA=1 needs the CUDA compiler nvcc, and none was found through CUDACXX, PATH, CUDA_HOME or "
            "/usr/local/cuda: install the CUDA toolkit 12 or newer (package cuda-nvcc or cuda-toolkit of "
            "developer.nvidia.com/cuda-downloads) and put its bin folder on PATH, or build without LEARNDROP_CUDA=1"
        )
    return nvcc


def architectures(nvcc: str) -> str:
    """CMAKE_CUDA_ARCHITECTURES of the environment, or those of the default that nvcc admits, the last with PTX."""
    if named := os.environ.get("CMAKE_CUDA_ARCHITECTURES"):
        return named
    listed = subprocess.run([nvcc, "--list-gpu-arch"], check=True, capture_output=True, text=True).stdout.split()
    admitted = [number for number in DEFAULT_ARCHITECTURES if f"compute_{number}" in listed]
    if not admitted:
        raise SystemExit(f"{nvcc} must admit one of the architectures {DEFAULT_ARCHITECTURES}, got {listed}")
    return ";".join([*(f"{number}-real" for number in admitted[:-1]), admitted[-1]])


def find_ninja() -> str:
    """The ninja of the build environment: on PATH under pip's build isolation, else where its package says."""
    import ninja

    found = shutil.which("ninja") or shutil.which("ninja", path=ninja.BIN_DIR)
    if found is None:
        raise SystemExit("the build needs ninja, and none was found on PATH or in the package ninja: pip install ninja")
    return found


class CMakeBuild(build_ext):
    """Configures and builds the CMake target _C in place of a compiler call."""

    def build_extension(self, ext: Extension) -> None:
        """Builds `ext` into the place that setuptools expects."""
        import cmake
        import pybind11

        target = Path(self.get_ext_fullpath(ext.name)).resolve()
        build = Path(self.build_temp).resolve() / "cmake"
        build.mkdir(parents=True, exist_ok=True)
        nvcc = nvcc_to_use()
        options = {
            "CMAKE_BUILD_TYPE": os.environ.get("CMAKE_BUILD_TYPE", "Release"),
            "CMAKE_MAKE_PROGRAM": find_ninja(),
            "Python_EXECUTABLE": sys.executable,
            "pybind11_DIR": pybind11.get_cmake_dir(),
            "LEARNDROP_OUTPUT_DIR": str(target.parent),
            "LEARNDROP_SANITIZE": os.environ.get("LEARNDROP_SANITIZE", ""),
            "LEARNDROP_CUDA": "OFF" if nvcc is None else "ON",
        }
        if nvcc is not None:
            options |= {"CMAKE_CUDA_COMPILER": nvcc, "CMAKE_CUDA_ARCHITECTURES": architectures(nvcc)}
        program = f"{cmake.CMAKE_BIN_DIR}/cmake"
        defines = [f"-D{name}={value}" for name, value in options.items()]
        subprocess.run([program, "-S", str(ROOT), "-B", str(build), "-G", "Ninja", *defines], check=True)
        subprocess.run([program, "--build", str(build), "--target", "_C"], check=True)


setup(ext_modules=[Extension("learndrop_ext._C", sources=[])], cmdclass={"build_ext": CMakeBuild})
