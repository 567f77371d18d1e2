"""A cache whose rows lie on several tiers, the last of them a store."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from learndrop_ext.rows.cache import ActivationCache
from learndrop_ext.rows.disk import DiskTier
from learndrop_ext.rows.plan import Budgets
from learndrop_ext.rows.store.fingerprint import Fingerprint
from learndrop_ext.rows.store.store import RowKeys, RowStore, StoredRows

CPU = torch.device("cpu")

#: How many rows have names.
SLOTS = 800
PRINT = Fingerprint(weights="w", cut=1, codec="fp32", layers="l", loop="", row="r", views="one")


def ids(*values: int) -> Tensor:
    return torch.tensor(values, dtype=torch.int64)


def rows(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def disk_in(folder: Path, *, private: bool = True) -> DiskTier:
    """The rows of a store in a folder; private ones are deleted when they are closed."""
    folder.mkdir(exist_ok=True)
    disk = DiskTier(private=private)
    disk.open(StoredRows(RowStore(folder), PRINT, private=private))
    names = [b"%d" % slot for slot in range(SLOTS)]
    disk.name(torch.arange(SLOTS), RowKeys(names, [0] * SLOTS, [None] * SLOTS))
    return disk


def reopened(
    folder: Path, slots: int, shape: tuple[int, ...], *, codec: str = "fp32", budgets: Budgets | None = None
) -> ActivationCache:
    """A cache of another run, with the rows that were left in the store."""
    disk = disk_in(folder, private=False)
    cache = ActivationCache(slots, shape, codec=codec, device=CPU, budgets=budgets, disk=disk)
    found = disk.stored.find({slot: b"%d" % slot for slot in range(slots)})
    order = found.sample.argsort()
    if len(order):
        cache.load(found.sample[order], found.place[order])
    return cache


def tiered(
    slots: int, shape: tuple[int, ...], folder: Path, *, device: int, host: int, staging: int = 256, **options: Any
) -> ActivationCache:
    """A cache with `device` rows there, none where the areas are too large for that, `host` there, the rest on disk."""
    row = ActivationCache(0, shape, codec=options.get("codec", "fp32"), device=CPU).row_bytes
    on_device = min(device + 2 * min(staging, slots), slots - 1)
    budgets = Budgets(on_device * row, host * row, 1 << 20, staging)
    options = {"codec": "fp32"} | options
    options.setdefault("disk", disk_in(folder))
    return ActivationCache(slots, shape, device=CPU, budgets=budgets, **options)
