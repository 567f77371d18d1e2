"""Checks of the slots that callers pass to the cache."""

from __future__ import annotations

import contextlib

import torch
from torch import Tensor

from learndrop_ext import ops


def check_form(name: str, slots: Tensor) -> None:
    """Raise TypeError or ValueError unless slots are [B] int64 on the CPU."""
    if slots.dtype != torch.int64:
        raise TypeError(f"ActivationCache.{name}: slots must be int64, got {slots.dtype}")
    if slots.ndim != 1 or slots.device.type != "cpu":
        raise ValueError(
            f"ActivationCache.{name}: slots must be [B] on the CPU, got {list(slots.shape)} on {slots.device}"
        )


def check_range(name: str, slots: Tensor, count: int) -> None:
    """Raise IndexError unless slots [B] are within 0..count-1."""
    if len(slots) and (int(slots.min()) < 0 or int(slots.max()) >= count):
        raise IndexError(
            f"ActivationCache.{name}: slots must be within 0..{count - 1}, got {int(slots.min())}..{int(slots.max())}"
        )


def check_unique(name: str, slots: Tensor) -> None:
    """Raise ValueError if slots [B] contain one twice."""
    if (repeated := ops.first_repeated(slots)) is not None:
        raise ValueError(f"ActivationCache.{name}: slots must name no row twice, got {repeated} twice")


def check_filled(name: str, slots: Tensor, filled: Tensor) -> None:
    """Raise TypeError, ValueError or IndexError unless slots are [B] int64 on the CPU and all are in `filled` [R] bool."""
    if slots.dtype == torch.int64 and slots.ndim == 1 and slots.device.type == "cpu":
        # The usual case takes one pass over the slots.
        with contextlib.suppress(IndexError, RuntimeError):
            if bool(filled.index_select(0, slots).all()):
                return
    check_form(name, slots)
    check_range(name, slots, len(filled))
    missing = slots[~filled[slots]][0]
    raise IndexError(f"ActivationCache.{name}: slots must have been written, got {int(missing)}, which was not")
