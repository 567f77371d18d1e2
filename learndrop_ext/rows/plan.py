"""Which rows are on the device, which in host memory and which in the store: budgets in bytes -> ranges of slots."""

from __future__ import annotations

import contextlib
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from learndrop_ext.ops import free_bytes
from learndrop_ext.rows.config import CacheConfig
from learndrop_ext.rows.layout import RowLayout

#: Rows of the slower tiers that are read ahead at once: a typical batch.
STAGING_ROWS = 256
#: Largest size of a staging area.
STAGING_BYTES = 256 << 20
#: Memory grows by at least 1 / GROWTH_SHARE. With a quarter, rows added one by one are each copied at most
#: 1 / (1 - 4/5) = 5 times.
GROWTH_SHARE = 4


@dataclass(frozen=True)
class Budgets:
    """Limits on the bytes of rows in each tier, read once for each decision."""

    device: int | None = None  # including the staging areas; None for no limit
    host: int = 0
    disk: int = 0
    staging_rows: int = STAGING_ROWS  # rows of the slower tiers that are read ahead at once
    beside: int = 0  # bytes that were taken off for what is kept beside the rows
    beside_on_host: bool = False  # off the host's, the device having no room for it


@dataclass(frozen=True)
class TierPlan:
    """How many slots each tier holds: the first are on the device, the next on the host, the last on disk."""

    device: int
    host: int = 0
    disk: int = 0
    staging: int = 0  # rows of each of two areas on the device, through which those of slower tiers pass; 0 without any

    @property
    def slots(self) -> int:
        """Slots of all tiers."""
        return self.device + self.host + self.disk

    def first(self, slots: int) -> TierPlan:
        """Return the plan of the first `slots` slots."""
        device = min(slots, self.device)
        host = min(slots - device, self.host)
        return TierPlan(device, host, min(slots - device - host, self.disk), self.staging)

    def __str__(self) -> str:
        tiers = [(name, getattr(self, name)) for name in ("device", "host", "disk")]
        return ", ".join(f"{count} rows on {name}" for name, count in tiers if count) or "no rows"


def plan_tiers(
    slots: int, layout: RowLayout, budgets: Budgets, *, kept: TierPlan | None = None, room: int = 0
) -> TierPlan:
    """Distribute slots over the tiers, the fastest first.

    If the rows do not all fit on the device, its budget also holds two staging areas of `budgets.staging_rows` rows each
    (fewer if there are fewer slots, or if an area would exceed STAGING_BYTES). They are needed even if the budget is too
    small for them. A row takes `stride_bytes` in memory, and its share of pages in a file.

    kept: the current plan for fewer slots. Slower tiers begin where they did, so that no row changes its tier.
    room: slots to reserve memory for in the last tier, as far as its budget allows. A file grows without being copied, and
    nothing is reserved in it. Raises ValueError if the budgets do not hold all rows.
    """
    row = layout.stride_bytes
    limit = max(slots, room) if budgets.device is None else budgets.device // row
    if slots <= limit and (kept is None or kept.device == kept.slots):
        return TierPlan(min(max(slots, room), limit))
    if kept is not None and kept.staging:
        area, device = kept.staging, kept.device
    else:
        area = max(1, min(budgets.staging_rows, slots, STAGING_BYTES // row))
        device = max(0, limit - 2 * area)
    host = min(slots - device, budgets.host // row)
    if kept is not None and kept.disk:
        host = kept.host
    disk = slots - device - host
    if not disk:
        host = min(max(slots, room) - device, budgets.host // row)
    taken = layout.end(slots) - layout.begin(device + host) if disk else 0
    if taken > budgets.disk:
        beside = f", and {budgets.beside:,} for labels and what else is in a batch" if budgets.beside else ""
        on_device = "no" if budgets.device is None else f"{budgets.device:,}"
        raise ValueError(
            f"plan_tiers: budgets must hold {slots} rows of {row:,} bytes, got {on_device} bytes on the device, "
            f"{budgets.host:,} on the host and {budgets.disk:,} on disk ({taken:,} wanted there){beside}"
        )
    return TierPlan(device, host, disk, area)


def plan_for(shape: Sequence[int], codec: str, rows: int, budgets: Budgets) -> TierPlan | None:
    """Return where a number of rows of a shape would lie; None if the budgets do not hold them."""
    try:
        return plan_tiers(rows, RowLayout.of(shape, codec), budgets)
    except ValueError:
        return None


def room_for(slots: int) -> int:
    """Return the number of slots to make room for when `slots` are too few."""
    return slots + -(-slots // GROWTH_SHARE)


def lengthened(table: Tensor, length: int) -> Tensor:
    """Return a table [R] with at least `length` values, new ones zero: the same table, or a longer copy."""
    if length <= len(table):
        return table
    longer = table.new_zeros(max(length, room_for(len(table))))
    longer[: len(table)] = table
    return longer


def lengthened_for(table: Tensor, index: Tensor) -> Tensor:
    """Return a table, `lengthened` so that it has the positions of an index [n] int64."""
    return lengthened(table, int(index.max()) + 1 if len(index) else 0)


def budgets_of(config: CacheConfig, device: torch.device, *, beside: int = 0, there: int = 0) -> Budgets:
    """Return a configuration's budgets in bytes; "auto" is half of what is free now.

    A CPU model has no host tier, since its device is host memory. What is kept beside the rows (`beside` bytes, of which as
    many as are `there` already are not free) lies on the device and is taken off its budget, or off the host's if it is too
    large.
    """
    budget = config.budget_bytes
    on_device = budget if isinstance(budget, int) else free_bytes(device) // 2
    host = disk = 0
    if device.type != "cpu":
        host = config.host_bytes if isinstance(config.host_bytes, int) else free_bytes(torch.device("cpu")) // 2
    if config.store is not None:
        limit = config.store_bytes
        with contextlib.suppress(OSError):  # the folder has gone: no more rows go there
            disk = limit if isinstance(limit, int) else shutil.disk_usage(Path(config.store)).free // 2
    if budget == "auto":
        beside = max(0, beside - there)
    if beside > on_device and host > 0:
        beside = min(beside, host)
        return Budgets(on_device, host - beside, disk, beside=beside, beside_on_host=True)
    beside = min(beside, on_device)
    return Budgets(on_device - beside, host, disk, beside=beside)
