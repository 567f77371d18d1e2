"""The ids that batches carry. B samples in a batch."""

from __future__ import annotations

import operator
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch

Step = int | str
IdKey = Step | tuple[Step, ...]


def check_key(ids: IdKey) -> None:
    """Raise TypeError for anything but a position in a batch."""
    steps = ids if isinstance(ids, tuple) else (ids,)
    if not steps or not all(isinstance(step, int | str) and not isinstance(step, bool) for step in steps):
        raise TypeError(
            "DropScheduler: ids must be the position of the samples' ids in a batch, a key, an index or a tuple of these, "
            f"got {ids!r}"
        )


def ids_of(batch: Any, place: IdKey, count: int) -> list[int] | list[str]:
    """Return the ids at a position of a batch of `count` samples: a list or tuple of int or str, a numpy array or an integer
    tensor, [B] or [B, 1]. Raises ValueError if there is not one per sample, TypeError for ids of other types or of both."""
    found = batch
    for step in place if isinstance(place, tuple) else (place,):
        try:
            if not isinstance(found, Mapping | list | tuple):
                raise TypeError
            found = found[step]  # type: ignore[index]
        except (KeyError, IndexError, TypeError):
            parts = isinstance(found, list | tuple)
            has = list(found) if isinstance(found, Mapping) else f"{len(found)} entries" if parts else "no entries"
            raise ValueError(
                f"DropScheduler: ids must be the position of the samples' ids in a batch, got {place!r}; there is a "
                f"{type(found).__name__} with {has}"
            ) from None
    shape = list(getattr(found, "shape", [len(found)] if isinstance(found, list | tuple) else []))
    if shape not in ([count], [count, 1]):
        raise ValueError(
            f"DropScheduler: ids must be one per sample, wanted {count} at {place!r}, got a {type(found).__name__} {shape}"
        )
    values = found.reshape(-1).tolist() if isinstance(found, torch.Tensor | np.ndarray) else list(found)
    plain = [_plain(value) for value in values]
    kinds = {type(value) for value in plain}
    if len(kinds) > 1:
        raise TypeError(f"DropScheduler: ids must be all int or all str, got both at {place!r}")
    return plain  # type: ignore[return-value]


def _plain(value: Any) -> int | str:
    """An id as int or str."""
    if isinstance(value, str):
        return str(value)
    is_flag = isinstance(value, bool | np.bool_) or (isinstance(value, torch.Tensor) and value.dtype == torch.bool)
    try:
        if is_flag:
            raise TypeError
        return operator.index(value)
    except (TypeError, ValueError, RuntimeError):
        raise TypeError(f"DropScheduler: ids must be int or str, got {type(value).__name__} {value!r}") from None
