"""The form of a row: its shape, and how its values lie in memory. B samples in a batch, D values in a row."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import torch


@dataclass(frozen=True)
class RowForm:
    """Shape and strides of a row, and the form in which its codec stores it.

    Values are stored in the order in which they lie in memory. Only uint8 rows [C, H, W] are stored channels last, as each
    channel has its scale.

    Args:
        shape (tuple of int): shape of a row.
        strides (tuple of int): strides of a row, dense in any order of its dimensions.
        codec (str): how a row is stored.
    """

    shape: tuple[int, ...]
    strides: tuple[int, ...]
    codec: str

    @classmethod
    def of(cls, rows: torch.Tensor, codec: str) -> RowForm:
        """Return the form of rows [B, *shape]. A row with gaps or overlap gets dense strides of the same order."""
        shape, strides = tuple(rows.shape[1:]), list(rows.stride()[1:])
        values = 1
        for d in reversed(_outermost_first(strides)):
            if shape[d] != 1:  # the stride of a single value has no meaning, and is kept
                strides[d] = values
                values *= shape[d]
        return cls(shape, tuple(strides), codec)

    @cached_property
    def values(self) -> int:
        """D."""
        return math.prod(self.shape)

    @cached_property
    def batch_strides(self) -> tuple[int, ...]:
        """The strides of rows [B, *shape]."""
        return self.values, *self.strides

    @cached_property
    def stored_shape(self) -> tuple[int, ...]:
        """Shape of a row for the row operations: [D], or [C, H, W] where channels matter."""
        return self.shape if self._has_channels else (self.values,)

    @cached_property
    def stored_strides(self) -> tuple[int, ...]:
        """The strides of rows [B, *stored_shape] as the row operations write them."""
        if not self._has_channels:
            return self.values, 1
        C, _, W = self.shape
        return self.values, 1, W * C, C

    @cached_property
    def is_stored_so(self) -> bool:
        """Whether the row operations write the values in the order in which they lie in a row of this form."""
        if not self._has_channels:
            return True
        pairs = zip(self.shape, self.strides, self.stored_strides[1:], strict=True)
        return all(size == 1 or stride == stored for size, stride, stored in pairs)

    def stored(self, rows: torch.Tensor) -> torch.Tensor:
        """Return rows [B, *shape] as [B, *stored_shape]. Makes no copy of rows of this form."""
        if self._has_channels:
            return rows
        order = (1 + d for d in _outermost_first(self.strides))
        return rows.permute(0, *order).reshape(len(rows), self.values)

    @property
    def _has_channels(self) -> bool:
        return self.codec == "uint8" and len(self.shape) == 3


def contiguous_form(shape: Sequence[int], codec: str) -> RowForm:
    """Return the form of contiguous rows."""
    return RowForm.of(torch.empty((1, *shape), device="meta"), codec)


def _outermost_first(strides: Sequence[int]) -> list[int]:
    return sorted(range(len(strides)), key=lambda d: -strides[d])
