"""Rows as bytes by slot over device, host and a store on disk; the slower tiers are read ahead through staging areas.

R rows, S bytes from one row to the next, B rows in a batch, n rows in a call, T rows in each of two staging areas.
"""

from __future__ import annotations

import contextlib
import functools
import itertools
import os
import weakref
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from learndrop_ext.rows.disk import DiskTier
from learndrop_ext.rows.host import CopyStream, HostTier, allocate
from learndrop_ext.rows.layout import RowLayout
from learndrop_ext.rows.plan import STAGING_ROWS, Budgets, TierPlan, plan_tiers, room_for
from learndrop_ext.warn import warn

HOST = 1


@dataclass(frozen=True)
class TierStorage:
    """The memory of a plan, and the store. data: [plan.device + 2 * T, S] uint8, the device's rows, then the areas."""

    plan: TierPlan
    data: Tensor
    host: HostTier | None
    disk: DiskTier | None

    def read(self, slots: Tensor, into: Tensor, bounce: Callable[[int], Tensor] | None = None) -> None:
        """Copy rows at slots [n], ascending, to `into` [n, S]. bounce: gives the memory [n, S] through which rows of the
        disk go to a GPU. Raises OSError or DamagedRowError."""
        on_device, in_memory = self._ends(slots)
        if on_device:
            into[:on_device] = self.data[slots[:on_device].to(self.data.device)].cpu()
        if self.host is not None and in_memory > on_device:
            self.host.read(slots[on_device:in_memory] - self.plan.device, into[on_device:in_memory])
        if self.disk is None or in_memory == len(slots):
            return
        from_disk = into[in_memory:]
        if bounce is None:
            self.disk.read(slots[in_memory:], from_disk)
        else:
            read = bounce(len(from_disk))
            self.disk.read(slots[in_memory:], read)
            from_disk.copy_(read, non_blocking=True)

    def write(self, slots: Tensor, rows: Tensor) -> None:
        """Store rows [n, S] of any device at slots [n], ascending. Raises OSError."""
        on_device, in_memory = self._ends(slots)
        if on_device:
            self.data[slots[:on_device].to(self.data.device)] = rows[:on_device].to(self.data.device)
        if self.host is not None and in_memory > on_device:
            self.host.write(slots[on_device:in_memory] - self.plan.device, rows[on_device:in_memory])
        if self.disk is not None and in_memory < len(slots):
            self.disk.write(slots[in_memory:], rows[in_memory:].cpu())

    def take(self, other: TierStorage, filled: Tensor) -> None:
        """Copy the rows in `filled` [R] that are elsewhere in another storage. Both have the same store, if any."""
        if self.data is other.data and self.host is other.host:
            return
        if self.data is not other.data:
            both = min(self.plan.device, other.plan.device)
            self.data[:both] = other.data[:both]
        slots = torch.nonzero(filled).flatten()
        ours = self._tier(slots)
        moved = ours != other._tier(slots)
        if self.host is not other.host:
            moved |= ours == HOST
        for part in slots[moved].split(STAGING_ROWS):
            self.write(part, other.rows(part))

    def rows(self, slots: Tensor) -> Tensor:
        """Return rows [n, S] on the CPU. Raises OSError or DamagedRowError."""
        rows = torch.empty((len(slots), self.data.shape[1]), dtype=torch.uint8)
        self.read(slots, rows)
        return rows

    def _tier(self, slots: Tensor) -> Tensor:
        """[n]: 0 on the device, 1 in host memory, 2 on disk."""
        return (slots >= self.plan.device).int() + (slots >= self.plan.device + self.plan.host).int()

    def _ends(self, slots: Tensor) -> tuple[int, int]:
        """The number of slots on the device, and the number on the device or in host memory."""
        return int((slots < self.plan.device).sum()), int((slots < self.plan.device + self.plan.host).sum())


@dataclass
class Resources:
    """What must be released when the rows are closed or garbage-collected."""

    storage: TierStorage
    copy_stream: CopyStream | None = None
    thread: ThreadPoolExecutor | None = None
    process: int = field(default_factory=os.getpid)

    def end(self) -> None:
        """End the thread, wait for the copies and close the store's file, each even if another fails."""
        if self.process != os.getpid():
            return
        with contextlib.ExitStack() as stack:  # calls the last one first
            if self.storage.disk is not None:
                stack.callback(self.storage.disk.close)
            if self.copy_stream is not None:
                stack.callback(self.copy_stream.stream.synchronize)
            if self.thread is not None:
                stack.callback(self.thread.shutdown, wait=False)


@dataclass(frozen=True)
class StagedBatch:
    """Positions begin to end of a batch, with at most T rows of the slower tiers."""

    begin: int
    end: int
    index: Tensor  # [end - begin] int64 (CPU), the positions of its rows in `TieredRows.data`
    slow: Tensor  # [n] int64 (CPU), its slots in the slower tiers, ascending: the first n rows of the area
    area: int  # 0 or 1


class TieredRows:
    """R = slots rows in up to three tiers. Those of the faster ones may be in the store, `disk`, too.

    A batch is one index into `data`, whatever its tiers. If a tier cannot allocate its memory, the next one takes its rows,
    with a RuntimeWarning. A forked process can read the rows, but not write those on disk. Raises ValueError if the budgets
    are too small, OSError if the disk is full, torch.OutOfMemoryError if the next tier may not take the rows.
    """

    def __init__(
        self,
        slots: int,
        layout: RowLayout,
        device: torch.device,
        *,
        budgets: Budgets,
        disk: DiskTier | None,
    ) -> None:
        self.layout = layout
        self.device = device
        self.budgets = budgets
        # Rows [n] of the slower tiers that a thread is reading, and into which area.
        self._prefetch: tuple[Tensor, int, Future[None]] | None = None
        self._area = 0
        nothing = torch.empty(0, layout.stride_bytes, dtype=torch.uint8, device=device)
        self._resources = Resources(TierStorage(TierPlan(0), nothing, None, disk))
        self._finalizer = weakref.finalize(self, self._resources.end)
        self._process = os.getpid()
        self.arrange(slots, budgets, torch.zeros(slots, dtype=torch.bool))

    @property
    def storage(self) -> TierStorage:
        """The memory and the file."""
        return self._resources.storage

    @property
    def plan(self) -> TierPlan:
        """Where the slots are, including those reserved for later rows."""
        return self._resources.storage.plan

    @property
    def data(self) -> Tensor:
        """[plan.device + 2 * T, S] uint8, on the device."""
        return self._resources.storage.data

    def grow(self, slots: int, filled: Tensor) -> None:
        """Make room for R = slots rows, and some more, so that rows are rarely copied. Raises as the constructor."""
        if slots > self.plan.slots:
            self.arrange(slots, self.budgets, filled, kept=self.plan)

    def arrange(self, slots: int, budgets: Budgets, filled: Tensor, *, kept: TierPlan | None = None) -> None:
        """Move the rows in `filled` [R] bool to where `plan_tiers` puts them. Raises as the constructor; nothing is changed
        then."""
        plan_tiers(slots, self.layout, budgets, kept=kept)
        self.discard_prefetch()
        old, old_stream = self.storage, self._resources.copy_stream
        if old_stream is not None:
            old_stream.stream.synchronize()
        new, budgets = self._allocate(slots, budgets, kept)
        copy_stream = self._copy_stream_for(new)
        new.take(old, filled)
        self.budgets = budgets
        self._resources.storage, self._resources.copy_stream = new, copy_stream

    def staged(self, slots: Tensor, *, load: bool) -> Iterator[StagedBatch]:
        """Yield a batch of slots [B] int64 (CPU) in parts, each with an area for its rows of the slower tiers: they are read
        into it (`load`; raises OSError or DamagedRowError), or written there by the caller."""
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

    def prefetch(self, slots: Tensor) -> None:
        """Start reading the first T rows of the slower tiers of a batch [B] into an area, on a thread."""
        self.discard_prefetch()
        part = slots[: self._split(slots)[0][1]]
        slow = part[part >= self.plan.device].unique()
        if len(slow) == 0:
            return
        if self._resources.thread is None:
            self._resources.thread = ThreadPoolExecutor(1, thread_name_prefix="learndrop-rows")
        area = self._next_area()
        self._prefetch = slow, area, self._resources.thread.submit(self._load, slow, area)

    def discard_prefetch(self) -> None:
        """Wait for rows that are being read ahead, and discard them. If they could not be read, give a RuntimeWarning."""
        self._leave_parent()
        if self._prefetch is None:
            return
        (_, _, future), self._prefetch = self._prefetch, None
        try:
            future.result()
        except Exception as error:
            warn(f"ActivationCache: rows that were read ahead could not be read ({error}); nothing has used them")

    def load(self, slots: Tensor) -> None:
        """Copy rows [n] int64 (CPU), ascending, that are in the store to the faster tiers, where that is their place. Raises
        OSError or DamagedRowError."""
        assert self.storage.disk is not None
        for part in slots[slots < self.plan.device + self.plan.host].split(STAGING_ROWS):
            rows = torch.empty((len(part), self.layout.stride_bytes), dtype=torch.uint8)
            self.storage.disk.read(part, rows)
            self.storage.write(part, rows)

    def save(self, slots: Tensor) -> None:
        """Add those of the rows [n] int64 (CPU), ascending, to the store that are not in it. Raises OSError."""
        disk = self.storage.disk
        assert disk is not None
        missing = slots[~disk.has(slots)]
        for part in missing.split(STAGING_ROWS) if len(missing) else ():
            disk.write(part, self.storage.rows(part))

    def close(self) -> None:
        """Stop reading ahead and close the store's file, even if the GPU reports an error, which is then raised."""
        try:
            self.discard_prefetch()
        finally:
            self._finalizer()

    def _allocate(self, slots: int, budgets: Budgets, kept: TierPlan | None) -> tuple[TierStorage, Budgets]:
        """The memory for the slots, and the budgets it keeps to: 0 for a tier that is out of memory."""
        old, room = self.storage, 0 if kept is None else room_for(kept.slots)
        while True:
            plan = plan_tiers(slots, self.layout, budgets, kept=kept, room=room)
            data, host = old.data, old.host if plan.host else None
            tier = "device"
            try:
                if (plan.device, plan.staging) != (old.plan.device, old.plan.staging):
                    data = allocate(plan.device + 2 * plan.staging, self.layout.stride_bytes, self.device)
                tier = "host"
                if plan.host and (plan.device, plan.host) != (old.plan.device, old.plan.host):
                    host = HostTier(plan.host, self.layout.stride_bytes, self.device)
                return TierStorage(plan, data, host, old.disk), budgets
            except torch.OutOfMemoryError as error:
                if plan.slots == slots:
                    budgets, kept = self._without(tier, slots, budgets, error), None
                room = 0

    def _without(self, tier: str, slots: int, budgets: Budgets, error: torch.OutOfMemoryError) -> Budgets:
        """The budgets without a tier that is out of memory. Raises the error if they do not hold the rows."""
        fewer = replace(budgets, device=0) if tier == "device" else replace(budgets, host=0)
        try:
            plan = plan_tiers(slots, self.layout, fewer)
        except ValueError:
            raise error from None
        if fewer == budgets:
            raise error
        warn(
            f"ActivationCache: the rows that were to be kept on the {tier} did not fit into its memory; "
            f"now {plan} ({error})"
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
        self._wait_for(self._area)
        return self._area

    def _wait_for(self, area: int) -> None:
        """Let the current stream wait until an area is filled."""
        if self._resources.copy_stream is not None:
            torch.cuda.current_stream(self.device).wait_event(self._resources.copy_stream.filled[area])

    def _loaded_area(self, slow: Tensor) -> int:
        """The area that holds rows `slow`, read ahead or now."""
        if self._prefetch is not None and torch.equal(self._prefetch[0], slow):
            (_, area, future), self._prefetch = self._prefetch, None
            future.result()
        else:
            self.discard_prefetch()
            area = self._next_area()
            self._load(slow, area)
        self._wait_for(area)
        return area

    def _load(self, slow: Tensor, area: int) -> None:
        into, copy_stream = self._area_rows(area, len(slow)), self._resources.copy_stream
        if copy_stream is None:
            return self.storage.read(slow, into)
        with copy_stream.filling(area):
            self.storage.read(slow, into, functools.partial(copy_stream.bounce_rows, area))

    def _area_rows(self, area: int, count: int) -> Tensor:
        return self.data[self.plan.device + area * self.plan.staging :][:count]

    def _leave_parent(self) -> None:
        """In a forked process, drop the thread, which was not copied, and what it was reading."""
        if self._process != os.getpid():
            self._process = os.getpid()
            self._prefetch, self._resources.thread = None, None
