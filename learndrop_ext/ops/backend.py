"""What this build and this machine have."""

from __future__ import annotations

from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version

import torch

from learndrop_ext import _C


@dataclass(frozen=True)
class BackendInfo:
    """What this build and this machine have.

    cuda_architectures: those that the CUDA code was compiled for. cuda_runtime, driver: CUDA versions, None where
    there is none. cpu_simd: "avx512", "avx2" or "portable". threads: torch's number of CPU threads.
    """

    version: str
    cuda_compiled: bool
    cuda_architectures: tuple[str, ...]
    cuda_runtime: str | None
    driver: str | None
    gpus: tuple[str, ...]
    triton: str | None
    torch: str
    cpu_simd: str
    threads: int


def backend_info() -> BackendInfo:
    """What this build and this machine have: CUDA, driver, GPUs, Triton, torch, CPU instructions."""
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
    """Free memory of a device in bytes: the GPU's, or the host's available memory for CPU."""
    if device.type == "cuda":
        return int(torch.cuda.mem_get_info(device)[0])
    with open("/proc/meminfo", encoding="ascii") as lines:
        for line in lines:
            if line.startswith("MemAvailable:"):
                return int(line.split()[1]) * 1024
    raise RuntimeError("free_bytes: /proc/meminfo must hold MemAvailable; give CacheConfig(budget_bytes=...) instead")
