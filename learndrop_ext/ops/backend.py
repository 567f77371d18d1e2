"""Information on this build and this machine."""

from __future__ import annotations

import math
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import torch

from learndrop_ext import _C

#: The control group (v2) of this process, and the folder of all.
OWN_GROUP, GROUPS = Path("/proc/self/cgroup"), Path("/sys/fs/cgroup")


@dataclass(frozen=True)
class BackendInfo:
    """This build and this machine."""

    version: str  # of learndrop_ext
    cuda_compiled: bool  # whether it was built with CUDA
    cuda_architectures: tuple[str, ...]  # that it was built for
    cuda_runtime: str | None  # its CUDA version
    driver: str | None  # its CUDA version
    gpus: tuple[str, ...]  # their names
    triton: str | None  # its version
    torch: str  # its version
    cpu_simd: str  # "avx512", "avx2" or "portable"
    threads: int  # torch's number of CPU threads


def backend_info() -> BackendInfo:
    """Return information on CUDA, driver, GPUs, Triton, torch and CPU instructions."""
    build = _C.build_info()
    architectures = tuple(build["cuda_architectures"].split(",")) if build["cuda_architectures"] else ()
    try:
        triton = version("triton")
    except PackageNotFoundError:
        triton = None
    return BackendInfo(
        version=version("learndrop_ext"),
        cuda_compiled=bool(architectures),
        cuda_architectures=architectures,
        cuda_runtime=build["cuda_runtime"] or None,
        driver=build["driver"] or None,
        gpus=tuple(build["gpus"]),
        triton=triton,
        torch=torch.__version__,
        cpu_simd=build["cpu_simd"],
        threads=torch.get_num_threads(),
    )


def free_bytes(device: torch.device) -> int:
    """Return the free bytes of a GPU, or the available ones of the host: no more than a container may still take (cgroup
    v2). Raise RuntimeError if they are not reported."""
    if device.type == "cuda":
        return int(torch.cuda.mem_get_info(device)[0])
    with open("/proc/meminfo", encoding="ascii") as lines:
        for line in lines:
            if line.startswith("MemAvailable:"):
                return int(min(int(line.split()[1]) * 1024, _free_in_groups()))
    raise RuntimeError("free_bytes: /proc/meminfo must hold MemAvailable; give CacheConfig(budget_bytes=...) instead")


def _free_in_groups() -> float:
    """The bytes that the control groups of this process may still take; infinite without a limit. Pages of files that were
    not used lately are given back, and count as free."""
    try:
        own = next(line[3:] for line in OWN_GROUP.read_text().splitlines() if line.startswith("0::"))
    except (OSError, StopIteration):
        return math.inf
    free, group = math.inf, GROUPS / own.strip("/")
    for folder in (group, *group.parents):
        try:
            limit = (folder / "memory.max").read_text().strip()
            used = int((folder / "memory.current").read_text())
            stat = dict(line.split() for line in (folder / "memory.stat").read_text().splitlines())
        except OSError:  # the root has no limit
            continue
        if limit != "max":
            free = min(free, max(0, int(limit) - used + int(stat.get("inactive_file", 0))))
    return free
