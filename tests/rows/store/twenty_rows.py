"""A cache of twenty rows, saved under a fingerprint, and a system that refuses."""

from __future__ import annotations

import dataclasses
import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from learndrop_ext.rows.cache import ActivationCache
from learndrop_ext.rows.plan import Budgets
from learndrop_ext.rows.store.fingerprint import Fingerprint

CPU = torch.device("cpu")

ON_DISK = Budgets(0, 0, 1 << 30)

PRINT = Fingerprint(weights="ab12", cut=2, codec="fp32", views=1, samples=20, dataset="Digits flip=True")

ROWS = torch.randn(20, 30, generator=torch.Generator().manual_seed(0))


def filled(path: Path, made_of: Fingerprint = PRINT, budgets: Budgets | None = None) -> ActivationCache:
    cache = ActivationCache(20, (30,), codec="fp32", device=CPU, path=path, budgets=budgets)
    cache.append(torch.arange(20), ROWS)
    cache.save(made_of)
    return cache


def other(number: int) -> Fingerprint:
    return dataclasses.replace(PRINT, weights=f"other {number}")


def refusing(number: int, *, only: str = "") -> Callable[..., Any]:
    def call(*arguments: Any, **_: Any) -> Any:
        raise OSError(number, os.strerror(number))

    return call


def aged(path: Path, seconds: float) -> None:
    os.utime(path, (time.time() - seconds, time.time() - seconds))
