"""The form of a row: its shape, and how its values lie in memory. B samples in a batch, D values in a row."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import torch


@dataclass(frozen=True)
class RowForm:
    """Shape of a row, and the order of its values in memory as they are stored and as they are returned.

    Values are stored in the order in which they lay in memory. Only uint8 rows [C, H, W] are stored channels last, as each
    channel has its scale.

    Args:
        shape (tuple of int): shape of a row.
        codec (str): how a row is stored.
        stored (tuple of int): strides of the stored values, without gaps in any order of the dimensions.
        strides (tuple of int): strides of the rows returned, without gaps in any order of the dimensions.
    """

    shape: tuple[int, ...]
    codec: str
    stored: tuple[int, ...]
    strides: tuple[int, ...]

    @classmethod
    def of(cls, rows: torch.Tensor, codec: str) -> RowForm:
        """Return the form of rows [B, *shape], which are stored and returned as they are."""
        shape, strides = tuple(rows.shape[1:]), _dense_strides(rows)
        if codec == "uint8" and len(shape) == 3:
            C, _, W = shape
            return cls(shape, codec, (1, W * C, C), strides)
        return cls(shape, codec, strides, strides)

    def returned_as(self, rows: torch.Tensor) -> RowForm:
        """Return the form of the same stored rows, returned with the strides of `rows` [B, *shape]."""
        return dataclasses.replace(self, strides=_dense_strides(rows))

    @cached_property
    def values(self) -> int:
        """D."""
        return math.prod(self.shape)

    @cached_property
    def stored_shape(self) -> tuple[int, ...]:
        """Shape of a row for the row operations: [D], or [C, H, W] where channels matter."""
        return self.shape if self._has_channels else (self.values,)

    @cached_property
    def is_returned_as_stored(self) -> bool:
        """Whether values are returned in the order in which they are stored."""
        pairs = zip(self.shape, self.strides, self.stored, strict=True)
        return all(size == 1 or stride == stored for size, stride, stored in pairs)

    def to_store(self, rows: torch.Tensor) -> torch.Tensor:
        """Return rows [B, *shape] as [B, *stored_shape] for the row operations, without a copy if they lie as stored."""
        if self._has_channels:
            return rows
        order = (1 + d for d in _outermost_first(self.stored))
        return rows.permute(0, *order).reshape(len(rows), self.values)

    def to_write(self, memory: torch.Tensor) -> torch.Tensor:
        """Return the memory of rows [B, *shape] with the strides `stored` as [B, *stored_shape], for the row operations."""
        if self._has_channels:
            return memory.as_strided(memory.shape, (self.values, *self.stored))
        return memory.as_strided((len(memory), self.values), (self.values, 1))

    @property
    def _has_channels(self) -> bool:
        return self.codec == "uint8" and len(self.shape) == 3


def contiguous_form(shape: Sequence[int], codec: str) -> RowForm:
    """Return the form of contiguous rows."""
    return RowForm.of(torch.empty((1, *shape), device="meta"), codec)


def _dense_strides(rows: torch.Tensor) -> tuple[int, ...]:
    """The strides of a row of [B, *shape]. If it has gaps or overlap, those without, in the same order."""
    shape, strides = rows.shape[1:], list(rows.stride()[1:])
    values = 1
    for d in reversed(_outermost_first(strides)):
        if shape[d] != 1:  # the stride of a single value has no meaning, and is kept
            strides[d] = values
            values *= shape[d]
    return tuple(strides)


def _outermost_first(strides: Sequence[int]) -> list[int]:
    return sorted(range(len(strides)), key=lambda d: -strides[d])
