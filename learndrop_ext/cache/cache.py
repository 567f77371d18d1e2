"""The rows of the activations at a cut, kept compactly by slot."""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from pathlib import Path

import torch

from learndrop_ext import ops
from learndrop_ext.cache.file import Manifest, SavedRows, Sidecar, open_rows
from learndrop_ext.cache.fingerprint import Fingerprint
from learndrop_ext.cache.layout import RowLayout
from learndrop_ext.cache.output_pool import OutputPool
from learndrop_ext.cache.plan import STAGING_ROWS, Budgets, TierPlan
from learndrop_ext.cache.tiered import TieredRows


class ActivationCache:
    """R rows of one shape by slot; a row that was never written, or is no longer what was written, is never given out.

    shape: of one row, without the batch dimension. codec: how a row is stored. device: of the rows put in and given
    out. The dtype and the memory format of the rows given out are those of the first rows put in; with the codec
    "uint8" and for rows to be flipped or shifted (augmented) 4-D batches come out channels-last.

    budgets: bytes of rows in each tier, by default all on the device; see `plan_tiers`. path: of the file of those on
    disk, and of `save`; the file goes with a cache that is closed before it is saved. staging: rows of the slower tiers
    that are read ahead at once. saved: whether the file holds just these rows. sidecar: what else the file held.

    Raises ValueError where the budgets are too small or want a path, OSError where the disk is full; where memory
    cannot be had the next tier takes its rows, with a RuntimeWarning.
    """

    def __init__(
        self,
        slots: int,
        shape: Sequence[int],
        *,
        codec: str,
        device: torch.device,
        augmented: bool = False,
        budgets: Budgets | None = None,
        path: Path | None = None,
        staging: int = STAGING_ROWS,
        _saved: SavedRows | None = None,
    ) -> None:
        if slots < 0:
            raise ValueError(f"ActivationCache: slots must be >= 0, got {slots}")
        if budgets is not None and budgets.disk and path is None:
            raise ValueError("ActivationCache: path must be given with a disk budget, got None")
        self.shape = tuple(shape)
        self.codec = codec
        self.device = device
        self.filled = torch.zeros(slots, dtype=torch.bool) if _saved is None else _saved.filled
        self.saved = _saved is not None
        self.sidecar = Sidecar() if _saved is None else _saved.sidecar
        self.dtype: torch.dtype | None = None
        self.augmented = augmented
        self.path = path
        self._stored_shape = self.shape
        self._outputs = OutputPool(device)
        layout = RowLayout(ops.row_bytes(self.shape, codec), ops.row_stride(self.shape, codec))
        self._rows: TieredRows | None = TieredRows(
            slots,
            layout,
            device,
            budgets=budgets or Budgets(),
            path=path,
            staging=staging,
            saved=None if _saved is None else (_saved.disk, _saved.filled),
        )

    @classmethod
    def open(
        cls,
        path: Path,
        fingerprint: Fingerprint,
        *,
        device: torch.device,
        budgets: Budgets | None = None,
        staging: int = STAGING_ROWS,
    ) -> ActivationCache:
        """The cache that `save` made of these rows. Those of the faster tiers are read and checked now, those that stay
        on disk when they are gathered.

        Raises FileNotFoundError, or CacheFileError for a file that is damaged or of another cache, naming the first
        difference.
        """
        saved = open_rows(path, fingerprint)
        manifest = saved.manifest
        try:
            cache = cls(
                manifest.slots,
                manifest.shape,
                codec=manifest.codec,
                device=device,
                augmented=manifest.augmented,
                budgets=budgets,
                path=path,
                staging=staging,
                _saved=saved,
            )
        except BaseException:
            saved.disk.close()
            raise
        cache.dtype = getattr(torch, manifest.dtype) if manifest.dtype else None
        cache._stored_shape = manifest.stored_shape
        return cache

    @property
    def row_bytes(self) -> int:
        """Bytes from one row to the next."""
        return self._open("row_bytes").layout.stride_bytes

    @property
    def nbytes(self) -> int:
        """Bytes of all rows."""
        return self._open("nbytes").plan.slots * self.row_bytes

    @property
    def plan(self) -> TierPlan:
        """Which slots are in which tier."""
        return self._open("plan").plan

    @property
    def fits_file(self) -> bool:
        """Whether a file of all rows keeps the budget for the disk."""
        tiers = self._open("fits_file")
        return tiers.layout.end(tiers.plan.slots) <= tiers.budgets.disk

    def append(self, slots: torch.Tensor, rows: torch.Tensor) -> None:
        """Store rows [B, *shape] at slots [B] int64 (CPU).

        Raises RuntimeError on a closed cache, ValueError for rows of another shape or dtype than the first, TypeError
        or IndexError for slots that are none of the cache's; nothing is written then. OSError where the disk is full:
        the rows that were to be written are then not there.
        """
        tiers = self._open("append")
        self.saved = False
        if tuple(rows.shape[1:]) != self.shape:
            raise ValueError(
                f"ActivationCache.append: rows must be [B, {', '.join(map(str, self.shape))}], got {list(rows.shape)}"
            )
        if self.dtype not in (None, rows.dtype):
            raise ValueError(f"ActivationCache.append: rows must be {self.dtype} as the first were, got {rows.dtype}")
        self._check_slots("append", slots)
        stored = self._layout(rows)
        rows = rows.reshape(len(rows), *stored)
        if tiers.plan.staging:
            return self._append_tiered(tiers, slots, rows, stored)
        ops.append_rows(tiers.data, rows, slots, codec=self.codec)
        self.dtype, self._stored_shape = rows.dtype, stored
        self.filled[slots] = True

    def gather(
        self, slots: torch.Tensor, *, flip: torch.Tensor | None = None, shift: torch.Tensor | None = None
    ) -> torch.Tensor:
        """The rows at slots [B] int64 (CPU) as a batch [B, *shape], from all tiers in the order of the slots.

        flip [B] bool and shift [B, 2] (dy, dx) move each sample of [C, H, W] rows on the way out. On a CPU the memory of
        a large batch that nothing holds any more is used for a later one. Raises RuntimeError
        on a closed cache, TypeError or IndexError for slots outside it or never written, CacheFileError for a row on
        disk that is no longer what was written.
        """
        tiers = self._open("gather")
        self._check_readable("gather", slots)
        form, dtype = self._stored_shape, self.dtype or torch.float32
        out = self._outputs.take((len(slots), *form), dtype, ops.memory_format(form))
        if tiers.plan.staging:
            self._gather_tiered(tiers, slots, out, flip, shift)
        else:
            ops.gather_rows(tiers.data, slots, form, codec=self.codec, dtype=dtype, flip=flip, shift=shift, out=out)
        return out.view(len(slots), *self.shape) if form != self.shape else out

    def prefetch(self, slots: torch.Tensor) -> None:
        """Say which slots [B] int64 (CPU) the next `gather` will ask for: rows that are not on the device are read ahead,
        beside what the caller does meanwhile. Raises as `gather` does for such slots; it alone gives rows."""
        tiers = self._open("prefetch")
        self._check_readable("prefetch", slots)
        if tiers.plan.staging:
            tiers.prefetch(slots)

    def grow(self, slots: int) -> None:
        """Make room for `slots` rows in all; the rows that there are stay. Raises ValueError where the budgets are too
        small, and what the constructor raises; nothing is changed then."""
        tiers = self._open("grow")
        if slots < len(self.filled):
            raise ValueError(f"ActivationCache.grow: slots must be at least {len(self.filled)}, got {slots}")
        self.saved = False
        tiers.arrange(slots, tiers.budgets, self.filled, kept=tiers.plan)
        self.filled = torch.cat([self.filled, torch.zeros(slots - len(self.filled), dtype=torch.bool)])

    def spill(self, budgets: Budgets) -> None:
        """Move rows between the tiers so that other budgets are kept, as when the device's memory is wanted for more
        layers. Raises as the constructor does; nothing is changed then."""
        tiers = self._open("spill")
        if budgets.disk and self.path is None:
            raise ValueError("ActivationCache.spill: budgets must have no disk for a cache without a path")
        self.saved = False
        tiers.arrange(len(self.filled), budgets, self.filled)

    def save(self, fingerprint: Fingerprint, sidecar: Sidecar | None = None) -> None:
        """Write all rows to the file at `path`, synced and then renamed, to be found by `open` with this fingerprint.

        sidecar: what the opened cache's `sidecar` then is. Raises ValueError for a cache without a path, TypeError for
        values beside the rows that JSON does not have, OSError where the disk is full: what was at `path` then stays.
        """
        tiers = self._open("save")
        if self.path is None:
            raise ValueError("ActivationCache.save: the cache must have a path, got None")
        manifest = Manifest(
            codec=self.codec,
            shape=self.shape,
            stored_shape=self._stored_shape,
            dtype="" if self.dtype is None else str(self.dtype).removeprefix("torch."),
            augmented=self.augmented,
            slots=len(self.filled),
            row_bytes=tiers.layout.row_bytes,
            stride_bytes=tiers.layout.stride_bytes,
            fingerprint=fingerprint,
        )
        tiers.save(manifest, self.filled, sidecar or Sidecar())
        self.saved = True

    def close(self) -> None:
        """Free the rows; any later use raises RuntimeError. A file that `save` made stays."""
        if self._rows is not None:
            self._rows.close()
        self._rows = None

    def _append_tiered(
        self, tiers: TieredRows, slots: torch.Tensor, rows: torch.Tensor, stored: tuple[int, ...]
    ) -> None:
        if len(rows) != len(slots):
            raise ValueError(f"ActivationCache.append: slots must be [{len(rows)}], got [{len(slots)}]")
        values, counts = slots.unique(return_counts=True)
        if len(values) < len(slots):
            repeated = int(values[counts > 1][0])
            raise ValueError(f"ActivationCache.append: slots must name no row twice, got {repeated} twice")
        tiers.forget_prefetch()
        for piece in tiers.pieces(slots, load=False):
            ops.append_rows(tiers.data, rows[piece.begin : piece.end], piece.index, codec=self.codec)
            self.dtype, self._stored_shape = rows.dtype, stored
            self.filled[piece.slow] = False
            tiers.keep(piece)
            self.filled[slots[piece.begin : piece.end]] = True

    def _gather_tiered(
        self,
        tiers: TieredRows,
        slots: torch.Tensor,
        out: torch.Tensor,
        flip: torch.Tensor | None,
        shift: torch.Tensor | None,
    ) -> None:
        for piece in tiers.pieces(slots, load=True):
            part = slice(piece.begin, piece.end)
            ops.gather_rows(
                tiers.data,
                piece.index,
                self._stored_shape,
                codec=self.codec,
                dtype=out.dtype,
                flip=None if flip is None else flip[part],
                shift=None if shift is None else shift[part],
                out=out[part],
            )

    def _check_slots(self, name: str, slots: torch.Tensor) -> None:
        if slots.dtype != torch.int64:
            raise TypeError(f"ActivationCache.{name}: slots must be int64, got {slots.dtype}")
        if slots.ndim != 1 or slots.device.type != "cpu":
            raise ValueError(
                f"ActivationCache.{name}: slots must be [B] on the CPU, got {list(slots.shape)} on {slots.device}"
            )
        if len(slots) and (int(slots.min()) < 0 or int(slots.max()) >= len(self.filled)):
            raise IndexError(
                f"ActivationCache.{name}: slots must be within 0..{len(self.filled) - 1}, "
                f"got {int(slots.min())}..{int(slots.max())}"
            )

    def _check_readable(self, name: str, slots: torch.Tensor) -> None:
        if slots.dtype == torch.int64 and slots.ndim == 1 and slots.device.type == "cpu":
            # One look where all is well, as at each step.
            with contextlib.suppress(IndexError, RuntimeError):
                if bool(self.filled.index_select(0, slots).all()):
                    return
        self._check_slots(name, slots)
        if not bool(self.filled[slots].all()):
            missing = slots[~self.filled[slots]][0]
            raise IndexError(f"ActivationCache.{name}: slots must have been written, got {int(missing)}, which was not")

    def _open(self, name: str) -> TieredRows:
        if self._rows is None:
            raise RuntimeError(f"ActivationCache.{name}: the cache must be open, and it was closed")
        return self._rows

    def _layout(self, rows: torch.Tensor) -> tuple[int, ...]:
        """The shape under which the row operations see a row: flat keeps the memory format of contiguous rows, so that
        training on the cache is bit-equal to training behind the live prefix; [C, H, W] means channels-last."""
        if self.dtype is not None:
            return self._stored_shape
        plain = len(self.shape) != 3 or rows.is_contiguous()
        return (
            self.shape
            if self.codec == "uint8" or self.augmented or not plain
            else (int(torch.Size(self.shape).numel()),)
        )
