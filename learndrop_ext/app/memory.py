"""Peak memory of a run."""

from __future__ import annotations

import resource
from pathlib import Path

import torch

__all__ = ["peak_bytes", "reset_peak"]


def reset_peak(device: torch.device) -> None:
    """Reset the peak of a device's memory to what is in use now."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        return
    try:
        Path("/proc/self/clear_refs").write_text("5", encoding="ascii")
    except OSError:
        return  # the peak will be that of the whole process


def peak_bytes(device: torch.device) -> int:
    """Return the peak memory in bytes since `reset_peak`: of the GPU's allocator, or of the process for a CPU."""
    if device.type == "cuda":
        return int(torch.cuda.max_memory_allocated(device))
    for line in Path("/proc/self/status").read_text(encoding="ascii").splitlines():
        if line.startswith("VmHWM:"):
            return int(line.split()[1]) * 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
