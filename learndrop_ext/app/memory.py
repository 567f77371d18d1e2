"""The peak memory of a run."""

from __future__ import annotations

import contextlib
import resource
from pathlib import Path

import torch

__all__ = ["peak_bytes", "reset_peak"]


def reset_peak(device: torch.device) -> None:
    """Reset the peak memory of a device to the memory in use now."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        return
    with contextlib.suppress(OSError):  # The peak is then that of the process since its start.
        Path("/proc/self/clear_refs").write_text("5", encoding="ascii")


def peak_bytes(device: torch.device) -> int:
    """Return the peak memory in bytes since `reset_peak`: of the allocator on a GPU, of the process on a CPU."""
    if device.type == "cuda":
        return int(torch.cuda.max_memory_allocated(device))
    for line in Path("/proc/self/status").read_text(encoding="ascii").splitlines():
        if line.startswith("VmHWM:"):
            return int(line.split()[1]) * 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
