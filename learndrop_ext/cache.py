"""The rows of the activations at a cut, kept compactly by slot."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from learndrop_ext import ops


class ActivationCache:
    """R rows of one shape in one buffer [R, S] bytes; a row that was never written is never given out.

    shape: of one row, without the batch dimension. codec: how a row is stored. device: where; the same as the rows'.
    The dtype and the memory format of the rows given out are those of the first rows put in; with the codec "uint8" and
    for rows to be flipped or shifted (moving) 4-D batches come out channels-last.
    """

    def __init__(
        self, slots: int, shape: Sequence[int], *, codec: str, device: torch.device, moving: bool = False
    ) -> None:
        if slots < 0:
            raise ValueError(f"ActivationCache: slots must be >= 0, got {slots}")
        self.shape = tuple(shape)
        self.codec = codec
        self.device = device
        self.filled = torch.zeros(slots, dtype=torch.bool)
        self.dtype: torch.dtype | None = None
        self.moving = moving
        self._stored_shape = self.shape
        self._data: torch.Tensor | None = torch.empty(
            (slots, ops.row_stride(self.shape, codec)), dtype=torch.uint8, device=device
        )

    @property
    def row_bytes(self) -> int:
        """Bytes from one row to the next."""
        return int(self._open("row_bytes").shape[1])

    @property
    def nbytes(self) -> int:
        """Bytes of all rows."""
        return int(self._open("nbytes").numel())

    def append(self, slots: torch.Tensor, rows: torch.Tensor) -> None:
        """Store rows [B, *shape] at slots [B] int64 (CPU).

        Raises RuntimeError on a closed cache, ValueError for rows of another shape or dtype than the first, IndexError
        for a slot outside the cache; nothing is written then.
        """
        data = self._open("append")
        if tuple(rows.shape[1:]) != self.shape:
            raise ValueError(
                f"ActivationCache.append: rows must be [B, {', '.join(map(str, self.shape))}], got {list(rows.shape)}"
            )
        if self.dtype not in (None, rows.dtype):
            raise ValueError(f"ActivationCache.append: rows must be {self.dtype} as the first were, got {rows.dtype}")
        stored = self._layout(rows)
        ops.append_rows(data, rows.reshape(len(rows), *stored), slots, codec=self.codec)
        self.dtype, self._stored_shape = rows.dtype, stored
        self.filled[slots] = True

    def gather(
        self, slots: torch.Tensor, *, flip: torch.Tensor | None = None, shift: torch.Tensor | None = None
    ) -> torch.Tensor:
        """The rows at slots [B] int64 (CPU) as a batch [B, *shape].

        flip [B] bool and shift [B, 2] (dy, dx) move each sample of [C, H, W] rows on the way out. Raises RuntimeError
        on a closed cache, IndexError for a slot outside it or never written.
        """
        data = self._open("gather")
        if len(slots) and (int(slots.min()) < 0 or int(slots.max()) >= len(self.filled)):
            raise IndexError(
                f"ActivationCache.gather: slots must be within 0..{len(self.filled) - 1}, "
                f"got {int(slots.min())}..{int(slots.max())}"
            )
        if not bool(self.filled[slots].all()):
            missing = slots[~self.filled[slots]][0]
            raise IndexError(f"ActivationCache.gather: slots must have been written, got {int(missing)}, which was not")
        dtype = self.dtype or torch.float32
        rows = ops.gather_rows(data, slots, self._stored_shape, codec=self.codec, dtype=dtype, flip=flip, shift=shift)
        return rows.view(len(slots), *self.shape) if self._stored_shape != self.shape else rows

    def grow(self, slots: int) -> None:
        """Make room for `slots` rows in all; the rows that there are stay."""
        data = self._open("grow")
        if slots < len(self.filled):
            raise ValueError(f"ActivationCache.grow: slots must be at least {len(self.filled)}, got {slots}")
        bigger = data.new_empty((slots, data.shape[1]))
        bigger[: len(data)] = data
        self._data = bigger
        self.filled = torch.cat([self.filled, torch.zeros(slots - len(self.filled), dtype=torch.bool)])

    def close(self) -> None:
        """Free the rows; any later use raises RuntimeError."""
        self._data = None

    def _open(self, name: str) -> torch.Tensor:
        if self._data is None:
            raise RuntimeError(f"ActivationCache.{name}: the cache must be open, and it was closed")
        return self._data

    def _layout(self, rows: torch.Tensor) -> tuple[int, ...]:
        """The shape under which the row operations see a row: flat keeps the memory format of contiguous rows, so that
        training on the cache is bit-equal to training behind the live prefix; [C, H, W] means channels-last."""
        if self.dtype is not None:
            return self._stored_shape
        plain = len(self.shape) != 3 or rows.is_contiguous()
        return (
            self.shape if self.codec == "uint8" or self.moving or not plain else (int(torch.Size(self.shape).numel()),)
        )
