"""A cache of rows of five values."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from tiered_cache import CPU, disk_in
from torch import Tensor

from learndrop_ext.rows.cache import ActivationCache
from learndrop_ext.rows.plan import Budgets

ROW = 128  # bytes of a row of 5 values


def rows(count: int, seed: int = 0) -> Tensor:
    return torch.randn(count, 5, generator=torch.Generator().manual_seed(seed))


def cache_of(slots: int, budgets: Budgets | None = None, folder: Path | None = None, **options: Any) -> ActivationCache:
    options = {"codec": "fp32", "disk": None if folder is None else disk_in(folder)} | options
    return ActivationCache(slots, (5,), device=CPU, budgets=budgets, **options)
