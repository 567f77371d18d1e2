"""The activations at a cut, stored compactly as rows by slot."""

from __future__ import annotations

import contextlib
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
    """R rows of one shape by slot. It never returns a row that was not written, or not as it was written.

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
        if slots < 0:
            raise ValueError(f"ActivationCache: slots must be >= 0, got {slots}")
        if budgets is not None and budgets.disk and disk is None:
            raise ValueError("ActivationCache: disk must be given with a disk budget, got None")
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
        """Store rows.

        Args:
            slots (Tensor): [B] int64 (CPU), the slots to write, none twice.
            rows (Tensor): [B, *shape] on the cache's device, of the dtype of the first rows.

        Raises:
            RuntimeError: in a forked process if rows are on disk.
            TypeError, ValueError, IndexError: if rows or slots are not as above; nothing is written then.
            OSError: if the disk is full; the rows being written are lost.
        """
        tiers = self._open("append")
        if tuple(rows.shape[1:]) != self.shape:
            raise ValueError(
                f"ActivationCache.append: rows must be [B, {', '.join(map(str, self.shape))}], got {list(rows.shape)}"
            )
        if rows.device != tiers.data.device:
            raise ValueError(
                f"ActivationCache.append: rows must be on the cache's device, {tiers.data.device}, got {rows.device}"
            )
        if self.dtype not in (None, rows.dtype):
            raise ValueError(f"ActivationCache.append: rows must be {self.dtype} as the first were, got {rows.dtype}")
        _check_slots("append", slots, len(self.filled))
        if len(rows) != len(slots):
            raise ValueError(f"ActivationCache.append: slots must be [{len(rows)}], got [{len(slots)}]")
        if (repeated := ops.first_repeated(slots)) is not None:
            raise ValueError(f"ActivationCache.append: slots must name no row twice, got {repeated} twice")
        tiers.discard_prefetch()
        form = self._form
        if self.dtype is None:
            there = None if self.disk is None else self.disk.form
            form = RowForm.of(rows, self.codec) if there is None else there.returned_as(rows)
        if self.disk is not None:
            self.disk.note_form(form, rows.dtype)
            self.disk.forget(slots, in_store=True)  # a row that is there stays there
        stored = form.to_store(rows)
        for part in tiers.staged(slots, load=False):
            ops.append_rows(tiers.data, stored[part.begin : part.end], part.index, codec=self.codec, distinct=True)
            self.dtype, self._form = rows.dtype, form
            if len(part.slow):
                self.filled[part.slow] = False
                tiers.write_back(part)
            self.filled[slots[part.begin : part.end]] = True
        self._note_saturation(rows)

    def gather(self, slots: torch.Tensor) -> torch.Tensor:
        """Return a batch of rows from all tiers, in the order of the slots.

        On a CPU the memory of a large batch is reused once nothing refers to it.

        Args:
            slots (Tensor): [B] int64 (CPU).

        Returns:
            Tensor: [B, *shape].

        Raises:
            TypeError, ValueError, IndexError: if slots are not as above, outside the cache, or were never written.
            DamagedRowError: if a row in the store has changed.
        """
        self._check_filled("gather", slots)
        return self.gather_known(slots)

    def gather_known(self, slots: torch.Tensor) -> torch.Tensor:
        """Do the same as `gather` with slots that the caller knows to be filled: they are not checked."""
        tiers, form, dtype = self._open("gather"), self._form, self.dtype or torch.float32
        shape = (len(slots), *form.shape)
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
        """Start reading slots [B] int64 (CPU) of the slower tiers for the next `gather`, in the background.

        If a row cannot be read, the next `gather` raises the error, or gives a RuntimeWarning if it asks for other rows.
        """
        tiers = self._open("prefetch")
        self._check_filled("prefetch", slots)
        if tiers.plan.staging:
            tiers.prefetch(slots)

    def grow(self, slots: int) -> None:
        """Make room for R = slots rows. Memory grows by at least a quarter, so calls can be frequent.

        Raises:
            ValueError, OSError, torch.OutOfMemoryError: as the constructor, or if R would shrink; nothing is changed then.
        """
        tiers = self._open("grow")
        if slots < len(self.filled):
            raise ValueError(f"ActivationCache.grow: slots must be at least {len(self.filled)}, got {slots}")
        if slots == len(self.filled):
            return
        tiers.grow(slots, self.filled)
        self._filled_table = lengthened(self._filled_table, slots)
        self.filled = self._filled_table[:slots]

    def forget(self, slots: torch.Tensor | None = None) -> None:
        """Treat slots [n] int64 (CPU), or all, as never written. Once no row is left, the next may be of another dtype.

        Raises:
            TypeError, ValueError, IndexError: if a slot is outside the cache; nothing is changed then.
        """
        tiers = self._open("forget")
        if slots is None:
            self.filled.zero_()
        else:
            _check_slots("forget", slots, len(self.filled))
            self.filled[slots] = False
        if self.disk is not None:
            tiers.discard_prefetch()
            self.disk.forget(torch.arange(len(self.filled)) if slots is None else slots)
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

    def _check_filled(self, name: str, slots: torch.Tensor) -> None:
        if slots.dtype == torch.int64 and slots.ndim == 1 and slots.device.type == "cpu":
            # The usual case takes one pass over the slots.
            with contextlib.suppress(IndexError, RuntimeError):
                if bool(self.filled.index_select(0, slots).all()):
                    return
        _check_slots(name, slots, len(self.filled))
        missing = int(slots[~self.filled[slots]][0])
        raise IndexError(f"ActivationCache.{name}: slots must have been written, got {missing}, which was not")

    def _open(self, name: str) -> TieredRows:
        if self._rows is None:
            raise RuntimeError(f"ActivationCache.{name}: the cache must be open, and it was closed")
        return self._rows


def _check_slots(name: str, slots: torch.Tensor, count: int) -> None:
    """Raise TypeError, ValueError or IndexError unless slots are [B] int64 on the CPU, within 0..count-1."""
    if slots.dtype != torch.int64:
        raise TypeError(f"ActivationCache.{name}: slots must be int64, got {slots.dtype}")
    if slots.ndim != 1 or slots.device.type != "cpu":
        raise ValueError(
            f"ActivationCache.{name}: slots must be [B] on the CPU, got {list(slots.shape)} on {slots.device}"
        )
    if len(slots) and (int(slots.min()) < 0 or int(slots.max()) >= count):
        raise IndexError(
            f"ActivationCache.{name}: slots must be within 0..{count - 1}, got {int(slots.min())}..{int(slots.max())}"
        )


def as_stored(rows: torch.Tensor, codec: str) -> torch.Tensor:
    """Return rows [B, ...] as a cache gives them back."""
    cache, every = ActivationCache(len(rows), rows.shape[1:], codec=codec, device=rows.device), torch.arange(len(rows))
    cache.append(every, rows)
    return cache.gather_known(every)
