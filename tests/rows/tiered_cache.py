"""A cache whose rows lie on several tiers."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from learndrop_ext.rows.cache import ActivationCache
from learndrop_ext.rows.plan import Budgets
from learndrop_ext.rows.store.fingerprint import Fingerprint

CPU = torch.device("cpu")

PRINT = Fingerprint(weights="w", cut=1, codec="fp32", views=1, samples=9, dataset="d")


def ids(*values: int) -> Tensor:
    return torch.tensor(values, dtype=torch.int64)


def rows(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def tiered(
    slots: int, shape: tuple[int, ...], path: Path, *, device: int, host: int, staging: int = 256, **options: Any
) -> ActivationCache:
    """A cache with `device` rows there, none where the areas are too large for that, `host` there, the rest on disk."""
    row = ActivationCache(0, shape, codec=options.get("codec", "fp32"), device=CPU).row_bytes
    on_device = min(device + 2 * min(staging, slots), slots - 1)
    budgets = Budgets(on_device * row, host * row, 1 << 20, staging)
    options = {"codec": "fp32"} | options
    return ActivationCache(slots, shape, device=CPU, budgets=budgets, path=path, **options)
