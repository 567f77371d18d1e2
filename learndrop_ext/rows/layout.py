"""How rows lie in memory and in a file. B samples in a batch, D values in a row, S bytes from one row to the next."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import torch

from learndrop_ext import ops
from learndrop_ext.ops.transfer import PAGE_BYTES, RowFile


@dataclass(frozen=True)
class RowLayout:
    """The offsets of rows in a file. Small rows share a page and never cross its end; each large row begins a page."""

    row_bytes: int  # without padding
    stride_bytes: int  # S, in memory and within a page

    @classmethod
    def of(cls, shape: Sequence[int], codec: str) -> RowLayout:
        """Return the layout of rows of a shape."""
        return cls(ops.row_bytes(shape, codec), ops.row_stride(shape, codec))

    @property
    def rows_per_group(self) -> int:
        """Rows that share a page; 1 for rows of more than half a page."""
        return max(1, PAGE_BYTES // self.stride_bytes)

    @property
    def group_bytes(self) -> int:
        """Bytes from one group of rows to the next, a multiple of the page size."""
        return -(-self.rows_per_group * self.stride_bytes // PAGE_BYTES) * PAGE_BYTES

    def begin(self, slot: int) -> int:
        """Return the file offset of the group that holds a slot. The first page of a file is its header."""
        return PAGE_BYTES + slot // self.rows_per_group * self.group_bytes

    def end(self, slots: int) -> int:
        """Return the file offset after the last of `slots` rows."""
        return PAGE_BYTES + -(-slots // self.rows_per_group) * self.group_bytes

    def file(self, descriptor: int) -> RowFile:
        """Return an open file with this layout for `transfer.read_rows` and `transfer.write_rows`."""
        return RowFile(
            descriptor=descriptor,
            rows_offset=PAGE_BYTES,
            rows_per_group=self.rows_per_group,
            group_bytes=self.group_bytes,
            place_bytes=self.stride_bytes,
            row_bytes=self.row_bytes,
        )


@dataclass(frozen=True)
class RowForm:
    """The order of a row's values, as they are stored and as they are returned.

    Values are stored in the order in which they lay in memory. Only uint8 rows [C, H, W] are stored channels last, as each
    channel has its scale. Strides are without gaps, in any order of the dimensions.
    """

    shape: tuple[int, ...]  # of a row
    codec: str
    stored: tuple[int, ...]  # strides of the stored values
    strides: tuple[int, ...]  # of the rows returned

    @classmethod
    def of(cls, rows: torch.Tensor, codec: str) -> RowForm:
        """Return the form of rows [B, *shape], which are stored and returned as they are."""
        shape, strides = tuple(rows.shape[1:]), _dense_strides(rows)
        form = cls(shape, codec, strides, strides)
        if not form.has_channels:
            return form
        C, _, W = shape
        return dataclasses.replace(form, stored=(1, W * C, C))

    def returned_as(self, rows: torch.Tensor) -> RowForm:
        """Return the form of the same stored rows, returned with the strides of `rows` [B, *shape]."""
        return dataclasses.replace(self, strides=_dense_strides(rows))

    def to_store(self, rows: torch.Tensor) -> torch.Tensor:
        """Return rows [B, *shape] as [B, *stored_shape], without a copy if they lie as stored."""
        if self.has_channels:
            return rows
        order = (1 + d for d in _outermost_first(self.stored))
        return rows.permute(0, *order).reshape(len(rows), self.values)

    @cached_property
    def layout(self) -> RowLayout:
        """The offsets of such rows."""
        return RowLayout.of(self.shape, self.codec)

    @property
    def has_channels(self) -> bool:
        """Whether each channel is stored with a scale of its own."""
        return self.codec == "uint8" and len(self.shape) == 3

    @cached_property
    def values(self) -> int:
        """D."""
        return math.prod(self.shape)

    @cached_property
    def stored_shape(self) -> tuple[int, ...]:
        """Shape of a row for the row operations: [D], or [C, H, W] where channels matter."""
        return self.shape if self.has_channels else (self.values,)

    @cached_property
    def is_returned_as_stored(self) -> bool:
        """Whether values are returned in the order in which they are stored."""
        pairs = zip(self.shape, self.strides, self.stored, strict=True)
        return all(size == 1 or stride == stored for size, stride, stored in pairs)


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
