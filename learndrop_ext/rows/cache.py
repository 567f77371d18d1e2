"""The activations at a cut, stored compactly as rows by slot."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from learndrop_ext import ops
from learndrop_ext.rows.disk import DiskTier
from learndrop_ext.rows.layout import RowForm, RowLayout
from learndrop_ext.rows.output_pool import OutputPool
from learndrop_ext.rows.plan import Budgets, TierPlan, lengthened
from learndrop_ext.rows.tiers import TieredRows

LARGEST_FP16 = torch.finfo(torch.float16).max
#: Batches in which to look for values out of fp16's range. Later batches of the same layers have the same range.
SATURATION_BATCHES = 16


class ActivationCache:
    """R rows of one shape by slot. A row that was written is returned as it was written.

    Rows are returned in the dtype and with the strides of the first rows stored, as the layers behind them may call `view`:
    contiguous, channels-last or any other order of a row's dimensions. Rows that are not dense come back dense, in the same
    order. If a tier cannot allocate its memory, the next tier takes its rows, with a RuntimeWarning. A forked process can
    read rows, except those in pinned memory. Every use after `close` raises RuntimeError.

    R = slots, and `shape` is that of a row without the batch dimension. Without budgets all rows are on the device. Raises
    ValueError if the budgets are too small, torch.OutOfMemoryError if a tier is out of memory and the next one may not take
    its rows.
    """

    def __init__(
        self,
        slots: int,
        shape: Sequence[int],
        *,
        codec: str,
        device: torch.device,
        budgets: Budgets | None = None,
        disk: DiskTier | None = None,
    ) -> None:
        self.shape = tuple(shape)
        self.codec = codec
        self.device = device
        self.filled = torch.zeros(slots, dtype=torch.bool)  # [R], which slots were written
        self.dtype: torch.dtype | None = None  # of the rows; None before the first
        self.disk = disk
        self._filled_table = self.filled  # `filled`, with room for more slots
        self._outputs = OutputPool(device)
        self._saturated: torch.Tensor | None = None
        self._saturation_batches = 0
        self._form = RowForm.of(torch.empty((1, *shape), device="meta"), codec)  # of the first rows
        self._rows: TieredRows | None = TieredRows(
            slots, RowLayout.of(self.shape, codec), device, budgets=budgets or Budgets(), disk=disk
        )

    @property
    def row_bytes(self) -> int:
        """Bytes from one row to the next."""
        return self._open("row_bytes").layout.stride_bytes

    @property
    def nbytes(self) -> int:
        """Bytes of all rows, without memory reserved for later ones."""
        return len(self.filled) * self._open("nbytes").layout.stride_bytes

    @property
    def plan(self) -> TierPlan:
        """Which slots are in which tier."""
        return self._open("plan").plan.first(len(self.filled))

    @property
    def fits_store(self) -> bool:
        """Whether the disk budget holds all rows."""
        tiers = self._open("fits_store")
        return tiers.layout.end(len(self.filled)) <= tiers.budgets.disk

    @property
    def saturated(self) -> bool:
        """Whether the codec "fp16" clamped finite values to +-65504 in the first batches. Waits for the device."""
        return self._saturated is not None and bool(self._saturated)

    def append(self, slots: torch.Tensor, rows: torch.Tensor) -> None:
        """Store rows [B, *shape] in slots [B] int64 (CPU), none twice.

        Raises:
            RuntimeError: in a forked process if rows are on disk.
            TypeError, ValueError: if rows are not on the cache's device or of the dtype of the first rows; nothing is
                written then.
            OSError: if the disk is full; the rows being written are lost.
        """
        tiers = self._open("append")
        if self.dtype not in (None, rows.dtype):
            raise ValueError(f"ActivationCache.append: rows must be {self.dtype} as the first were, got {rows.dtype}")
        tiers.discard_prefetch()
        form = self._form
        if self.dtype is None:
            there = self.disk.stored.form if self.disk is not None and self.disk.is_open else None
            form = RowForm.of(rows, self.codec) if there is None else there.returned_as(rows)
        if self.disk is not None:
            self.disk.note_form(form, rows.dtype)
            self.disk.forget(slots, in_store=True)  # a row that is there stays there
        stored = form.to_store(rows)
        for part in tiers.staged(slots, load=False):
            ops.append_rows(tiers.data, stored[part.begin : part.end], part.index, codec=self.codec)
            self.dtype, self._form = rows.dtype, form
            if len(part.slow):
                self.filled[part.slow] = False
                tiers.write_back(part)
            self.filled[slots[part.begin : part.end]] = True
        self._note_saturation(rows)

    def gather(self, slots: torch.Tensor) -> torch.Tensor:
        """Return rows [B, *shape] from all tiers, in the order of slots [B] int64 (CPU), which are filled.

        On a CPU the memory of a large batch is reused once nothing refers to it. Raises DamagedRowError if a row in the
        store has changed.
        """
        tiers, form, dtype = self._open("gather"), self._form, self.dtype or torch.float32
        shape = (slots.numel(), *form.shape)
        out = stored = self._outputs.take(shape, (form.values, *form.strides), dtype)
        if not form.is_returned_as_stored:
            stored = self._outputs.take(shape, (form.values, *form.stored), dtype)
        if not tiers.plan.staging:
            ops.gather_known_rows(tiers.data, slots, form.stored_shape, stored, codec=self.codec)
        else:
            for part in tiers.staged(slots, load=True):
                into = stored[part.begin : part.end]
                ops.gather_known_rows(tiers.data, part.index, form.stored_shape, into, codec=self.codec)
        return out if stored is out else out.copy_(stored)

    def prefetch(self, slots: torch.Tensor) -> None:
        """Start reading slots [B] int64 (CPU) of the slower tiers for the next `gather`, in the background. All are filled.

        If a row cannot be read, the next `gather` raises the error, or gives a RuntimeWarning if it asks for other rows.
        """
        tiers = self._open("prefetch")
        if tiers.plan.staging:
            tiers.prefetch(slots)

    def grow(self, slots: int) -> None:
        """Make room for R = slots rows. Memory grows by at least a quarter, so calls can be frequent.

        Raises:
            ValueError, OSError, torch.OutOfMemoryError: as the constructor; nothing is changed then.
        """
        tiers = self._open("grow")
        tiers.grow(slots, self.filled)
        self._filled_table = lengthened(self._filled_table, slots)
        self.filled = self._filled_table[:slots]

    def forget(self, slots: torch.Tensor | None = None) -> None:
        """Treat slots [n] int64 (CPU), or all, as never written. Once no row is left, the next may be of another dtype."""
        tiers = self._open("forget")
        slots = torch.arange(len(self.filled)) if slots is None else slots
        self.filled[slots] = False
        if self.disk is not None:
            tiers.discard_prefetch()
            self.disk.forget(slots)
        if not bool(self.filled.any()):
            self.dtype, self._saturated, self._saturation_batches = None, None, 0

    def load(self, slots: torch.Tensor, places: torch.Tensor, like: torch.Tensor | None = None) -> None:
        """Take the rows at places [n] int64 of the store to slots [n] int64 (CPU), ascending, none of them filled. They are
        returned with the strides of `like` [B, *shape], or those that they have in the store.

        Raises OSError or DamagedRowError if the store's file cannot be read, or a row has changed.
        """
        tiers, disk = self._open("load"), self.disk
        assert disk is not None
        form, dtype = disk.stored.form, disk.stored.dtype
        assert form is not None
        assert dtype is not None
        if self.dtype is None:
            self._form, self.dtype = form if like is None else form.returned_as(like), dtype
            disk.note_form(self._form, self.dtype)
        disk.take(slots, places)
        tiers.load(slots)
        self.filled[slots] = True

    def save(self) -> None:
        """Add all rows that are not in the store to it. Raises OSError."""
        self._open("save").save(torch.nonzero(self.filled).flatten())

    def close(self) -> None:
        """Free the rows. Those in a store stay there."""
        rows, self._rows = self._rows, None
        if rows is not None:
            rows.close()

    def _note_saturation(self, rows: torch.Tensor) -> None:
        if self.codec != "fp16" or rows.dtype == torch.float16 or self._saturation_batches >= SATURATION_BATCHES:
            return
        self._saturation_batches += 1
        # In fp32, since bf16 would round the limit itself to 65536.
        size = rows.detach().float().abs()
        clamped = ((size > LARGEST_FP16) & size.isfinite()).any()
        self._saturated = clamped if self._saturated is None else self._saturated | clamped

    def _open(self, name: str) -> TieredRows:
        if self._rows is None:
            raise RuntimeError(f"ActivationCache.{name}: the cache must be open, and it was closed")
        return self._rows


def as_stored(rows: torch.Tensor, codec: str) -> torch.Tensor:
    """Return rows [B, ...] as a cache gives them back."""
    cache, every = ActivationCache(len(rows), rows.shape[1:], codec=codec, device=rows.device), torch.arange(len(rows))
    cache.append(every, rows)
    return cache.gather(every)
