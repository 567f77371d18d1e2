"""Where rows live: on the device, in the host's memory, in a file; by budgets in bytes, in ranges of slots."""

from __future__ import annotations

import shutil
from dataclasses import dataclass
from pathlib import Path

import torch

from learndrop_ext.cache.config import CacheConfig
from learndrop_ext.cache.layout import RowLayout
from learndrop_ext.ops import free_bytes

#: Rows that are read ahead at once: a batch, unless their bytes go beyond STAGING_BYTES.
STAGING_ROWS = 256
STAGING_BYTES = 256 << 20


@dataclass(frozen=True)
class Budgets:
    """The most bytes of rows in each tier. device: None for no limit."""

    device: int | None = None
    host: int = 0
    disk: int = 0


@dataclass(frozen=True)
class TierPlan:
    """Slots of each tier: the first `device` on the device, the next `host` in the host's memory, the last `disk` in a
    file. staging: rows of each of the two areas on the device through which those of the slower tiers go."""

    device: int
    host: int = 0
    disk: int = 0
    staging: int = 0

    @property
    def slots(self) -> int:
        """Rows in all."""
        return self.device + self.host + self.disk

    def __str__(self) -> str:
        tiers = [(name, getattr(self, name)) for name in ("device", "host", "disk")]
        return ", ".join(f"{count} rows on {name}" for name, count in tiers if count) or "no rows"


def plan_tiers(
    slots: int, layout: RowLayout, budgets: Budgets, *, staging: int = STAGING_ROWS, kept: TierPlan | None = None
) -> TierPlan:
    """The slots of each tier that the budgets give, the fastest first.

    A row takes layout.stride_bytes in memory and its share of pages in a file. Where rows do not all fit on the device,
    two areas of `staging` rows each (fewer where slots are fewer, or they would take more than STAGING_BYTES) are part
    of its budget; they are there also where it is smaller. kept: a plan of these rows for fewer slots: its slower
    tiers stay where they begin, so that no row changes its tier. Raises ValueError where the budgets are too small.
    """
    row = layout.stride_bytes
    on_device = slots if budgets.device is None else budgets.device // row
    whole = kept is None or kept.device == kept.slots
    if slots <= on_device and whole:
        return TierPlan(slots)
    if kept is not None and kept.staging:
        area, device = kept.staging, kept.device
    else:
        area = max(1, min(staging, slots, STAGING_BYTES // row))
        device = min(slots, max(0, on_device - 2 * area))
    host = min(slots - device, budgets.host // row)
    if kept is not None and kept.disk:
        host = kept.host
    disk = slots - device - host
    taken = layout.end(slots) - layout.begin(device + host) if disk else 0
    if taken > budgets.disk:
        limit = "no" if budgets.device is None else f"{budgets.device:,}"
        raise ValueError(
            f"plan_tiers: budgets must hold {slots} rows of {row:,} bytes, got {limit} bytes on the device, "
            f"{budgets.host:,} on the host and {budgets.disk:,} on disk ({taken:,} wanted there)"
        )
    return TierPlan(device, host, disk, area)


def budgets_of(config: CacheConfig, device: torch.device) -> Budgets:
    """The budgets in bytes that a configuration means here and now; "auto" is half of what is free.

    A CPU model's device is the host's memory: it has no host tier of its own.
    """
    budget = config.budget_bytes
    on_device = budget if isinstance(budget, int) else free_bytes(device) // 2
    host = disk = 0
    if device.type != "cpu":
        host = config.host_bytes if isinstance(config.host_bytes, int) else free_bytes(torch.device("cpu")) // 2
    if config.disk_dir is not None:
        free = config.disk_bytes
        disk = free if isinstance(free, int) else shutil.disk_usage(Path(config.disk_dir)).free // 2
    return Budgets(on_device, host, disk)
