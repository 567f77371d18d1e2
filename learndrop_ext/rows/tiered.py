"""Rows as bytes by slot over device, host and disk, with staging areas through which the slower tiers are read ahead.

R rows, S bytes from one row to the next, B rows in a batch, T rows in each of two staging areas.
"""

from __future__ import annotations

import itertools
import os
import warnings
import weakref
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from learndrop_ext.rows.disk import DiskTier
from learndrop_ext.rows.host import CopyStream
from learndrop_ext.rows.layout import RowLayout
from learndrop_ext.rows.plan import STAGING_ROWS, Budgets, TierPlan, add_reserve, plan_tiers, room_for
from learndrop_ext.rows.storage import Resources, TierMemoryError, TierStorage, allocate_storage
from learndrop_ext.rows.store.file import Manifest, Sidecar


@dataclass(frozen=True)
class StagedBatch:
    """A part of a batch with at most T rows of the slower tiers.

    Args:
        begin (int): its first position in the batch.
        end (int): the position after its last.
        index (Tensor): [end - begin] int64 (CPU), the positions of its rows in `TieredRows.data`.
        slow (Tensor): [n] int64 (CPU), its slots in the slower tiers, ascending: the first n rows of the area.
        area (int): 0 or 1, the staging area of these rows.
    """

    begin: int
    end: int
    index: Tensor
    slow: Tensor
    area: int


class _Prefetch(NamedTuple):
    """Rows `slow` [n] of the slower tiers that a thread is reading into an area."""

    slow: Tensor
    area: int
    future: Future[None]


class TieredRows:
    """R rows of S bytes by slot in up to three tiers. A batch is one index into `data`, whatever its tiers.

    If a tier cannot allocate its memory, the next one takes its rows, with a RuntimeWarning. A forked process can read the
    rows, but not write those on disk.

    Args:
        slots (int): R.
        layout (RowLayout): size of the rows.
        device (torch.device): device of `data`.
        budgets (Budgets): limit of each tier.
        path (Path, optional): the file. Default: None
        saved (tuple, optional): a DiskTier that holds all rows, and which of them were written, [R] bool. Default: None

    Raises:
        ValueError: if the budgets are too small.
        OSError: if the disk is full.
        torch.OutOfMemoryError: if a tier is out of memory and the next one may not take its rows.
    """

    def __init__(
        self,
        slots: int,
        layout: RowLayout,
        device: torch.device,
        *,
        budgets: Budgets,
        path: Path | None,
        saved: tuple[DiskTier, Tensor] | None = None,
    ) -> None:
        self.layout = layout
        self.device = device
        self.budgets = budgets
        self.path = path
        self._prefetch: _Prefetch | None = None
        self._area = 0
        disk, filled = saved if saved is not None else (None, torch.zeros(slots, dtype=torch.bool))
        nothing = torch.empty(0, layout.stride_bytes, dtype=torch.uint8, device=device)
        # No row is in memory yet; slots beyond a plan count as on disk.
        self._resources = Resources(TierStorage(TierPlan(0), nothing, None, disk))
        self._finalizer = weakref.finalize(self, self._resources.end)
        self._process = os.getpid()
        self.arrange(slots, budgets, filled)

    @property
    def storage(self) -> TierStorage:
        """The memory and the file."""
        return self._resources.storage

    @property
    def plan(self) -> TierPlan:
        """Where the slots are, including those reserved for later rows."""
        return self.storage.plan

    @property
    def data(self) -> Tensor:
        """[plan.device + 2 * T, S] uint8, on the device."""
        return self.storage.data

    def grow(self, slots: int, filled: Tensor) -> None:
        """Make room for more slots. Memory grows by at least a quarter, so that rows added one by one are rarely copied.

        Args:
            slots (int): the new R.
            filled (Tensor): [R] bool, which rows were written.

        Raises:
            ValueError, OSError, torch.OutOfMemoryError: as the constructor; nothing is changed then.
        """
        plan = self.plan
        if slots <= plan.slots:
            return
        if plan.disk:
            wanted = plan_tiers(slots, self.layout, self.budgets, kept=plan)
            self.discard_prefetch()
            assert self.storage.disk is not None
            self.storage.disk.grow(slots, first=plan.slots)
            self._resources.storage = replace(self.storage, plan=wanted)
        else:
            self.arrange(slots, self.budgets, filled, kept=plan)

    def arrange(self, slots: int, budgets: Budgets, filled: Tensor, *, kept: TierPlan | None = None) -> None:
        """Move the rows to where `plan_tiers` puts them.

        Args:
            slots (int): the new R.
            budgets (Budgets): limit of each tier from now on.
            filled (Tensor): [R] bool, which rows were written.
            kept (TierPlan, optional): the current plan if rows are added to it, see `plan_tiers`; memory that grows is
                then reserved for more. Default: None

        Raises:
            ValueError, OSError, torch.OutOfMemoryError: as the constructor; nothing is changed then.
        """
        plan_tiers(slots, self.layout, budgets, kept=kept)
        self.discard_prefetch()
        old, old_stream = self.storage, self._resources.copy_stream
        if old_stream is not None:
            old_stream.stream.synchronize()
        new, budgets = self._allocate(slots, budgets, kept)
        try:
            copy_stream = self._copy_stream_for(new)
            if new.data is not old.data:
                both = min(new.plan.device, old.plan.device)
                new.data[:both] = old.data[:both]
            for part in new.moved_from(old, torch.nonzero(filled).flatten()).split(STAGING_ROWS):
                new.write(part, self._read_rows(old, part))
        except BaseException:
            if new.disk is not None and new.disk is not old.disk:
                new.disk.close()
            raise
        if new.disk is not None and not new.plan.disk:
            new.disk.close()
            new = replace(new, disk=None)
        self.budgets = budgets
        self._resources.storage, self._resources.copy_stream = new, copy_stream

    def staged(self, slots: Tensor, *, load: bool) -> Iterator[StagedBatch]:
        """Yield a batch in parts, each with an area for its rows of the slower tiers.

        Args:
            slots (Tensor): [B] int64 (CPU).
            load (bool): True to read these rows into the area; False if the caller writes them there.

        Raises:
            OSError, CacheFileError: as `DiskTier.read`.
        """
        self._leave_parent()
        plan = self.plan
        for begin, end in self._split(slots):
            index = slots[begin:end]
            slow, area = index[:0], 0
            behind = index >= plan.device
            if bool(behind.any()):
                slow, where = index[behind].unique(return_inverse=True)
                area = self._loaded_area(slow) if load else self._next_area()
                index = index.masked_scatter(behind, where + plan.device + area * plan.staging)
            try:
                yield StagedBatch(begin, end, index, slow, area)
            finally:
                copy_stream = self._resources.copy_stream
                if copy_stream is not None and len(slow):
                    copy_stream.free[area].record(torch.cuda.current_stream(self.device))

    def write_back(self, batch: StagedBatch) -> None:
        """Write rows from the area to their slower tiers. Raises OSError."""
        self.storage.write(batch.slow, self._area_rows(batch.area, len(batch.slow)))

    def check_writable(self) -> None:
        """Raise RuntimeError in a forked process, if rows are on disk."""
        if self.storage.disk is not None:
            self.storage.disk.check_owner()

    def prefetch(self, slots: Tensor) -> None:
        """Start reading the first T rows of a batch's slower tiers into an area, on a thread.

        Args:
            slots (Tensor): [B] int64 (CPU).
        """
        self.discard_prefetch()
        begin, end = self._split(slots)[0]
        part = slots[begin:end]
        slow = part[part >= self.plan.device].unique()
        if len(slow) == 0:
            return
        if self._resources.thread is None:
            self._resources.thread = ThreadPoolExecutor(1, thread_name_prefix="learndrop-rows")
        area = self._next_area()
        self._prefetch = _Prefetch(slow, area, self._resources.thread.submit(self._load, slow, area))

    def discard_prefetch(self) -> None:
        """Wait for rows that are being read ahead, and discard them. If they could not be read, give a RuntimeWarning."""
        self._leave_parent()
        if self._prefetch is None:
            return
        future, self._prefetch = self._prefetch.future, None
        try:
            future.result()
        except Exception as error:
            warnings.warn(
                f"ActivationCache: rows that were read ahead could not be read ({error}); nothing has used them",
                RuntimeWarning,
                stacklevel=3,
            )

    def save(self, manifest: Manifest, filled: Tensor, sidecar: Sidecar) -> None:
        """Write the rows of all tiers to the file at `path`.

        Args:
            manifest (Manifest): description of the rows.
            filled (Tensor): [R] bool, which rows were written.
            sidecar (Sidecar): other data to store.

        Raises:
            OSError: if the disk is full.
            TypeError: if the sidecar holds values that JSON cannot.
        """
        self.discard_prefetch()
        assert self.path is not None
        disk = self.storage.disk or DiskTier(self.path, self.layout)
        try:
            disk.grow(manifest.slots, first=0)
            in_memory = torch.nonzero(filled[: self.plan.device + self.plan.host]).flatten()
            for part in in_memory.split(STAGING_ROWS):
                disk.write(part, self._read_rows(self.storage, part))
            disk.commit(manifest, filled, sidecar)
        finally:
            if disk is not self.storage.disk:
                disk.close()

    def share(self, aside: Path) -> None:
        """Do not change the committed file from now on; later files go to `aside`."""
        self.path = aside
        if self.storage.disk is not None:
            self.storage.disk.aside = aside

    def close(self) -> None:
        """Stop reading ahead and close the file, even if the GPU reports an error, which is then raised."""
        try:
            self.discard_prefetch()
        finally:
            self._finalizer()

    def _read_rows(self, storage: TierStorage, slots: Tensor) -> Tensor:
        rows = torch.empty((len(slots), self.layout.stride_bytes), dtype=torch.uint8)
        storage.read(slots, rows)
        return rows

    def _allocate(self, slots: int, budgets: Budgets, kept: TierPlan | None) -> tuple[TierStorage, Budgets]:
        """Storage for the slots, and the budgets it keeps to: smaller than those given if a tier is out of memory."""
        reserve = 0 if kept is None else room_for(kept.slots)
        while True:
            exact = plan_tiers(slots, self.layout, budgets, kept=kept)
            plan = add_reserve(exact, self.layout, budgets, slots=reserve)
            try:
                return allocate_storage(plan, self.layout, self.device, old=self.storage, path=self.path), budgets
            except TierMemoryError as error:
                if plan == exact:
                    budgets, kept = self._budgets_without(error, slots, budgets), None
                reserve = 0

    def _budgets_without(self, error: TierMemoryError, slots: int, budgets: Budgets) -> Budgets:
        """The budgets without the tier that is out of memory. Raises the error if they do not hold the rows."""
        fewer = replace(budgets, **{error.tier: 0})
        try:
            plan = plan_tiers(slots, self.layout, fewer)
        except ValueError:
            raise error.error from None
        if fewer == budgets:
            raise error.error
        warnings.warn(
            f"ActivationCache: the rows that were to be kept on the {error.tier} did not fit into its memory; "
            f"now {plan} ({error.error})",
            RuntimeWarning,
            stacklevel=6,
        )
        return fewer

    def _copy_stream_for(self, storage: TierStorage) -> CopyStream | None:
        """The stream that fills the areas of a storage; None on a CPU or without areas."""
        plan, old = storage.plan, self._resources.copy_stream
        if self.device.type != "cuda" or not plan.staging:
            return None
        if old is None or old.staging != plan.staging or (old.bounce is None) == (plan.disk > 0):
            return CopyStream(storage.data, plan.staging, bounces=plan.disk > 0)
        if storage.data is not self.data:
            old.fill_areas_of(storage.data)
        return old

    def _split(self, slots: Tensor) -> list[tuple[int, int]]:
        """Split a batch so that no part has more than T rows of the slower tiers."""
        if not self.plan.staging:
            return [(0, len(slots))]
        behind = (slots >= self.plan.device).cumsum(0)
        part = (behind - 1).clamp(min=0) // self.plan.staging
        ends = [0, *part.unique_consecutive(return_counts=True)[1].cumsum(0).tolist()]
        return list(itertools.pairwise(ends)) or [(0, 0)]

    def _next_area(self) -> int:
        self._area = 1 - self._area
        copy_stream = self._resources.copy_stream
        if copy_stream is not None:
            torch.cuda.current_stream(self.device).wait_event(copy_stream.filled[self._area])
        return self._area

    def _loaded_area(self, slow: Tensor) -> int:
        """The area that holds rows `slow`, read ahead or now."""
        if self._prefetch is not None and torch.equal(self._prefetch.slow, slow):
            (_, area, future), self._prefetch = self._prefetch, None
            future.result()
        else:
            self.discard_prefetch()
            area = self._next_area()
            self._load(slow, area)
        copy_stream = self._resources.copy_stream
        if copy_stream is not None:
            torch.cuda.current_stream(self.device).wait_event(copy_stream.filled[area])
        return area

    def _load(self, slow: Tensor, area: int) -> None:
        into = self._area_rows(area, len(slow))
        storage, copy_stream = self.storage, self._resources.copy_stream
        if copy_stream is None:
            return storage.read(slow, into)
        on_host = int((slow < storage.plan.device + storage.plan.host).sum())
        with torch.cuda.stream(copy_stream.stream):
            copy_stream.stream.wait_event(copy_stream.free[area])
            try:
                if storage.host is not None and on_host:
                    storage.host.read(slow[:on_host] - storage.plan.device, into[:on_host])
                if storage.disk is not None and on_host < len(slow):
                    bounce = copy_stream.bounce_rows(area, len(slow) - on_host)
                    storage.disk.read(slow[on_host:], bounce)
                    into[on_host:].copy_(bounce, non_blocking=True)
            finally:
                # Even if a read fails: copies before it are in flight, and the next use of the area waits for them.
                copy_stream.filled[area].record(copy_stream.stream)

    def _area_rows(self, area: int, count: int) -> Tensor:
        return self.data[self.plan.device + area * self.plan.staging :][:count]

    def _leave_parent(self) -> None:
        """In a forked process, drop the thread, which was not copied, and what it was reading."""
        if self._process != os.getpid():
            self._process = os.getpid()
            self._prefetch, self._resources.thread = None, None
