"""How fast rows come from each tier: bandwidths, measured once."""

from __future__ import annotations

import math
import os
import statistics
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

import torch

from learndrop_ext.cache.config import CacheConfig
from learndrop_ext.cache.plan import Budgets
from learndrop_ext.decide.costs import TierCost, wait_for


def copy_bytes_per_second(device: torch.device, *, size: int = 1 << 26) -> float:
    """Bytes read plus bytes written per second by a copy of `size` bytes on the device: the limit of a gather."""
    source = torch.ones(size, dtype=torch.uint8, device=device)
    target = torch.zeros_like(source)
    times = []
    for _ in range(4):
        wait_for(source)
        begin = time.perf_counter()
        target.copy_(source)
        wait_for(source)
        times.append(time.perf_counter() - begin)
    return 2 * size / statistics.median(times[1:])


def host_bytes_per_second(device: torch.device, *, size: int = 1 << 26) -> float:
    """Bytes per second that a GPU's copy engine brings from pinned host memory."""
    source = torch.ones(size, dtype=torch.uint8).pin_memory()
    target = torch.empty(size, dtype=torch.uint8, device=device)
    times = []
    for _ in range(4):
        wait_for(target)
        begin = time.perf_counter()
        target.copy_(source, non_blocking=True)
        wait_for(target)
        times.append(time.perf_counter() - begin)
    return size / statistics.median(times[1:])


def disk_bytes_per_second(folder: Path, *, size: int = 1 << 25) -> float:
    """Bytes per second of a new file in a folder, read from begin to end after its pages were dropped from the page cache.

    Raises OSError where it cannot be written.
    """
    with tempfile.TemporaryFile(dir=folder) as file:
        file.write(bytes(1 << 20) * (size >> 20))
        file.flush()
        os.fsync(file.fileno())
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
        begin = time.perf_counter()
        read = 0
        while read < size:
            read += len(os.pread(file.fileno(), 1 << 20, read))
        return size / (time.perf_counter() - begin)


def tier_costs(budgets: Budgets, speeds: Sequence[float]) -> list[TierCost]:
    """What a row costs in each tier of the budgets; speeds: bytes per second of device, host and disk."""
    assert budgets.device is not None
    held = (budgets.device, budgets.host, budgets.disk)
    return [TierCost(budget, speed) for budget, speed in zip(held, speeds, strict=True)]


def tier_speeds(budgets: Budgets, config: CacheConfig, device: torch.device) -> tuple[float, float, float]:
    """Bytes per second of device, host and disk, measured now; infinite for a tier that holds nothing.

    Raises OSError where the folder of the file cannot be written.
    """
    host = disk = math.inf
    if budgets.host and device.type != "cpu":
        host = host_bytes_per_second(device)
    if budgets.disk and config.disk_dir is not None:
        disk = disk_bytes_per_second(Path(config.disk_dir))
    return copy_bytes_per_second(device), host, disk
