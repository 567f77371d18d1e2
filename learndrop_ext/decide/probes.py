"""Measurements: the bandwidth of each tier."""

from __future__ import annotations

import math
import os
import statistics
import tempfile
from collections.abc import Callable
from pathlib import Path
from time import perf_counter

import torch

from learndrop_ext.rows.config import CacheConfig
from learndrop_ext.rows.plan import Budgets


def median_seconds(run: Callable[[], object], device: torch.device, *, repeats: int, warmup: int = 1) -> float:
    """Return the median seconds of `repeats` runs after `warmup` others, including the device's work."""
    times = []
    for _ in range(warmup + repeats):
        wait_for(device)
        begin = perf_counter()
        run()
        wait_for(device)
        times.append(perf_counter() - begin)
    return statistics.median(times[warmup:])


def copy_bytes_per_second(device: torch.device, *, size: int = 1 << 24, copies: int = 1) -> float:
    """Return bytes read plus bytes written per second by a copy of `size` bytes on the device: the limit of a gather.

    copies: number of copies in a row. The time of a single one on a GPU includes the launch and the synchronisation.
    """
    source = torch.ones(size, dtype=torch.uint8, device=device)
    target = torch.zeros_like(source)

    def copy_all() -> None:
        for _ in range(copies):
            target.copy_(source)

    return 2 * size * copies / median_seconds(copy_all, device, repeats=3)


def host_bytes_per_second(device: torch.device, *, size: int = 1 << 26) -> float:
    """Return the bytes per second that a GPU's copy engine reads from pinned host memory."""
    source = torch.ones(size, dtype=torch.uint8).pin_memory()
    target = torch.empty(size, dtype=torch.uint8, device=device)
    return size / median_seconds(lambda: target.copy_(source, non_blocking=True), device, repeats=3)


def disk_bytes_per_second(folder: Path, *, size: int = 1 << 25) -> float:
    """Return the bytes per second of reading a new file in a folder. Raise OSError if it cannot be written."""
    with tempfile.TemporaryFile(dir=folder, buffering=0) as file:
        file.write(bytes(size))
        file.flush()
        os.fsync(file.fileno())
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)  # not from the page cache

        def read() -> None:
            file.seek(0)
            while file.read(1 << 20):
                pass

        return size / median_seconds(read, torch.device("cpu"), repeats=1, warmup=0)


def tier_speeds(budgets: Budgets, config: CacheConfig, device: torch.device) -> tuple[float, float, float]:
    """Measure the bytes per second of device, host and disk; infinite for a tier without a budget.

    Raises OSError if the folder of the file cannot be written.
    """
    host = disk = math.inf
    if budgets.host and device.type != "cpu":
        host = host_bytes_per_second(device)
    if budgets.disk and config.store is not None:
        disk = disk_bytes_per_second(Path(config.store))
    return copy_bytes_per_second(device), host, disk


def wait_for(device: torch.device) -> None:
    """Wait for a GPU's work."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
