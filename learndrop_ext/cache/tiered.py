"""Rows as bytes by slot over device, host and file, and the areas through which those of the slower tiers are read ahead.

R rows, S bytes from one row to the next, T rows in each of two areas. What the bytes mean is the cache's business.
"""

from __future__ import annotations

import contextlib
import itertools
import warnings
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor

from learndrop_ext.cache.file import DiskTier, Manifest, Sidecar
from learndrop_ext.cache.host import CopyStream, HostTier
from learndrop_ext.cache.layout import RowLayout
from learndrop_ext.cache.plan import STAGING_ROWS, Budgets, TierPlan, plan_tiers


@dataclass(frozen=True)
class TierStorage:
    """The memory and the file of a plan. data [plan.device + 2 * T, S] uint8: the device's rows, then the areas."""

    plan: TierPlan
    data: Tensor
    host: HostTier | None
    disk: DiskTier | None

    def read(self, slots: Tensor, into: Tensor) -> None:
        """Copy rows slots [n], ascending, to `into` [n, S] on the CPU."""
        first, last = self._ends(slots)
        if first:
            into[:first] = self.data[slots[:first].to(self.data.device)].cpu()
        if self.host is not None and last > first:
            self.host.read(slots[first:last] - self.plan.device, into[first:last])
        if self.disk is not None and last < len(slots):
            self.disk.read(slots[last:], into[last:])

    def write(self, slots: Tensor, rows: Tensor) -> None:
        """Keep rows [n, S] at slots [n], ascending."""
        first, last = self._ends(slots)
        if first:
            self.data[slots[:first].to(self.data.device)] = rows[:first].to(self.data.device)
        if self.host is not None and last > first:
            self.host.write(slots[first:last] - self.plan.device, rows[first:last])
        if self.disk is not None and last < len(slots):
            self.disk.write(slots[last:], rows[last:].cpu())

    def holds_same(self, other: TierStorage, slots: Tensor) -> Tensor:
        """Which of the slots [n] lie at the same place in both."""
        same = (slots < self.plan.device) & (slots < other.plan.device)
        if self.host is other.host and self.plan.device == other.plan.device:
            same |= (self._tier(slots) == 1) & (other._tier(slots) == 1)
        return same | ((self._tier(slots) == 2) & (other._tier(slots) == 2))

    def _tier(self, slots: Tensor) -> Tensor:
        return (slots >= self.plan.device).int() + (slots >= self.plan.device + self.plan.host).int()

    def _ends(self, slots: Tensor) -> tuple[int, int]:
        """How many of the slots are the device's, and how many the device's and the host's."""
        return int((slots < self.plan.device).sum()), int((slots < self.plan.device + self.plan.host).sum())


@dataclass(frozen=True)
class Piece:
    """Positions begin..end-1 of a batch: index [end - begin] into `data`; slow: its slots of the slower tiers,
    ascending, whose rows stand for them in the area."""

    begin: int
    end: int
    index: Tensor
    slow: Tensor
    area: int


class TieredRows:
    """R rows of S bytes by slot in up to three tiers; a batch is one `index` into `data`, whatever its tiers.

    layout: their size. budgets: of the tiers. path: of the file. staging: T. saved: a file that holds all rows, and which
    of them were written [R] bool. Where a tier's memory cannot be had the
    next one takes its rows, with a RuntimeWarning; where that is not allowed, torch.OutOfMemoryError is raised.
    """

    def __init__(
        self,
        slots: int,
        layout: RowLayout,
        device: torch.device,
        *,
        budgets: Budgets,
        path: Path | None,
        staging: int = STAGING_ROWS,
        saved: tuple[DiskTier, Tensor] | None = None,
    ) -> None:
        self.layout = layout
        self.device = device
        self.budgets = budgets
        self.path = path
        self.staging = staging
        self._thread: ThreadPoolExecutor | None = None
        self._ahead: tuple[Tensor, int, Future[None]] | None = None
        self._area = 0
        self._copy_stream: CopyStream | None = None
        disk, filled = saved if saved is not None else (None, torch.zeros(slots, dtype=torch.bool))
        nothing = torch.empty(0, layout.stride_bytes, dtype=torch.uint8, device=device)
        self.storage = TierStorage(TierPlan(0, 0, slots if disk is not None else 0), nothing, None, disk)
        self.arrange(slots, budgets, filled)

    @property
    def plan(self) -> TierPlan:
        """Where the slots are."""
        return self.storage.plan

    @property
    def data(self) -> Tensor:
        """[plan.device + 2 * T, S] uint8, on the device."""
        return self.storage.data

    def arrange(self, slots: int, budgets: Budgets, filled: Tensor, *, kept: TierPlan | None = None) -> None:
        """Move the filled [R] rows to where `plan_tiers` wants them for `slots` and `budgets`. Where that fails, all
        stays as it was."""
        self.forget_prefetch()
        if self._copy_stream is not None:
            self._copy_stream.stream.synchronize()
        old = self.storage
        while True:
            plan = plan_tiers(slots, self.layout, budgets, staging=self.staging, kept=kept)
            try:
                new = self._allocate_storage(plan, old)
                break
            except _NoMemoryError as error:
                budgets = self._without(error, slots, budgets)
                kept = None
        try:
            if new.data is not old.data:
                both = min(plan.device, old.plan.device)
                new.data[:both] = old.data[:both]
            moved = torch.nonzero(filled).flatten()
            moved = moved[~old.holds_same(new, moved)]
            for part in moved.split(STAGING_ROWS):
                new.write(part, self._read(old, part))
        except BaseException:
            if new.disk is not None and new.disk is not old.disk:
                new.disk.close()
            raise
        if new.disk is not None and not plan.disk:
            new.disk.close()
            new = replace(new, disk=None)
        self.storage, self.budgets = new, budgets
        if self.device.type == "cuda" and plan.staging:
            self._copy_stream = CopyStream(self.device, plan.staging, self.layout.stride_bytes, bounces=plan.disk > 0)

    def pieces(self, slots: Tensor, *, load: bool) -> Iterator[Piece]:
        """A batch's slots [B] in parts that have at most T rows of the slower tiers; load: bring these to the area."""
        plan = self.plan
        for begin, end in self._split(slots):
            index = slots[begin:end]
            slow, area = index[:0], 0
            behind = index >= plan.device
            if bool(behind.any()):
                slow, where = index[behind].unique(return_inverse=True)
                area = self._bring(slow) if load else self._next_area()
                index = index.masked_scatter(behind, where + plan.device + area * plan.staging)
            yield Piece(begin, end, index, slow, area)
            if self._copy_stream is not None and len(slow):
                self._copy_stream.free[area].record(torch.cuda.current_stream(self.device))

    def keep(self, piece: Piece) -> None:
        """Write the piece's rows of the slower tiers from the area to where they live. Raises OSError."""
        self.storage.write(piece.slow, self._rows_of_area(piece.area, len(piece.slow)))

    def prefetch(self, slots: Tensor) -> None:
        """Begin to bring the first T rows of the slower tiers of a batch's slots [B] to an area, on a thread."""
        self.forget_prefetch()
        for begin, end in self._split(slots)[:1]:
            part = slots[begin:end]
            slow = part[part >= self.plan.device].unique()
            if len(slow):
                if self._thread is None:
                    self._thread = ThreadPoolExecutor(1, thread_name_prefix="learndrop-rows")
                area = self._next_area()
                self._ahead = slow, area, self._thread.submit(self._load, slow, area)

    def forget_prefetch(self) -> None:
        """Wait for rows that are being read ahead, and use them for nothing: they are about to change."""
        if self._ahead is not None:
            _, _, future = self._ahead
            self._ahead = None
            # Whoever asks for these rows reads them again, and is told then.
            with contextlib.suppress(OSError, ValueError):
                future.result()

    def save(self, manifest: Manifest, filled: Tensor, sidecar: Sidecar) -> None:
        """Write the filled [R] rows of all tiers to the file at `path`. Raises OSError."""
        self.forget_prefetch()
        assert self.path is not None
        disk = self.storage.disk or DiskTier(self.path, self.layout)
        try:
            disk.grow(self.plan.slots, first=0)
            fast = torch.nonzero(filled[: self.plan.slots - self.plan.disk]).flatten()
            for part in fast.split(STAGING_ROWS):
                disk.write(part, self._read(self.storage, part))
            disk.commit(manifest, filled, sidecar)
        finally:
            if disk is not self.storage.disk:
                disk.close()

    def close(self) -> None:
        """Stop reading ahead and close the file."""
        self.forget_prefetch()
        if self._thread is not None:
            self._thread.shutdown()
        if self._copy_stream is not None:
            self._copy_stream.stream.synchronize()
        if self.storage.disk is not None:
            self.storage.disk.close()

    def _read(self, storage: TierStorage, slots: Tensor) -> Tensor:
        rows = torch.empty((len(slots), self.layout.stride_bytes), dtype=torch.uint8)
        storage.read(slots, rows)
        return rows

    def _allocate_storage(self, plan: TierPlan, old: TierStorage) -> TierStorage:
        same = (plan.device, plan.staging) == (old.plan.device, old.plan.staging)
        data = old.data if same else _device_rows(plan, self.layout, self.device)
        host = None
        if plan.host:
            same_host = old.host is not None and (plan.device, plan.host) == (old.plan.device, old.plan.host)
            host = old.host if same_host else _host_rows(plan, self.layout, self.device)
        disk = old.disk
        if disk is None and plan.disk:
            assert self.path is not None
            disk = DiskTier(self.path, self.layout)
        if disk is not None and plan.disk:
            try:
                disk.grow(plan.slots, first=plan.slots - plan.disk)
            except OSError:
                if disk is not old.disk:
                    disk.close()
                raise
        return TierStorage(plan, data, host, disk)

    def _without(self, error: _NoMemoryError, slots: int, budgets: Budgets) -> Budgets:
        fewer = replace(budgets, **{error.tier: 0})
        try:
            plan = plan_tiers(slots, self.layout, fewer, staging=self.staging)
        except ValueError:
            fewer = budgets
        if fewer == budgets:
            raise error.error
        warnings.warn(
            f"ActivationCache: the rows that were to be kept on the {error.tier} did not fit into its memory; "
            f"now {plan} ({error.error})",
            RuntimeWarning,
            stacklevel=5,
        )
        return fewer

    def _split(self, slots: Tensor) -> list[tuple[int, int]]:
        """Where a batch is cut so that no part has more than T rows of the slower tiers."""
        if not self.plan.staging:
            return [(0, len(slots))]
        behind = (slots >= self.plan.device).cumsum(0)
        part = (behind - 1).clamp(min=0) // self.plan.staging
        ends = [0, *part.unique_consecutive(return_counts=True)[1].cumsum(0).tolist()]
        return list(itertools.pairwise(ends)) or [(0, 0)]

    def _next_area(self) -> int:
        self._area = 1 - self._area
        if self._copy_stream is not None:
            torch.cuda.current_stream(self.device).wait_event(self._copy_stream.filled[self._area])
        return self._area

    def _bring(self, slow: Tensor) -> int:
        """The area that holds rows `slow`, read ahead or now."""
        if self._ahead is not None and torch.equal(self._ahead[0], slow):
            _, area, future = self._ahead
            self._ahead = None
            future.result()
        else:
            self.forget_prefetch()
            area = self._next_area()
            self._load(slow, area)
        if self._copy_stream is not None:
            torch.cuda.current_stream(self.device).wait_event(self._copy_stream.filled[area])
        return area

    def _load(self, slow: Tensor, area: int) -> None:
        into = self._rows_of_area(area, len(slow))
        if self._copy_stream is None:
            return self.storage.read(slow, into)
        plan, copy_stream = self.plan, self._copy_stream
        on_host = int((slow < plan.device + plan.host).sum())
        with torch.cuda.stream(copy_stream.stream):
            copy_stream.stream.wait_event(copy_stream.free[area])
            if self.storage.host is not None and on_host:
                self.storage.host.read(slow[:on_host] - plan.device, into[:on_host])
            if self.storage.disk is not None and on_host < len(slow):
                bounce = copy_stream.bounce_rows(area, len(slow) - on_host)
                self.storage.disk.read(slow[on_host:], bounce)
                into[on_host:].copy_(bounce, non_blocking=True)
            copy_stream.filled[area].record(copy_stream.stream)

    def _rows_of_area(self, area: int, count: int) -> Tensor:
        return self.data[self.plan.device + area * self.plan.staging :][:count]


class _NoMemoryError(Exception):
    """The memory of a tier cannot be had."""

    def __init__(self, tier: str, error: RuntimeError) -> None:
        super().__init__(tier)
        self.tier = tier
        self.error = error


def _device_rows(plan: TierPlan, layout: RowLayout, device: torch.device) -> Tensor:
    try:
        return allocate(plan.device + 2 * plan.staging, layout.stride_bytes, device)
    except torch.OutOfMemoryError as error:
        raise _NoMemoryError("device", error) from error


def _host_rows(plan: TierPlan, layout: RowLayout, device: torch.device) -> HostTier:
    try:
        return HostTier(plan.host, layout.stride_bytes, device)
    except torch.OutOfMemoryError as error:
        raise _NoMemoryError("host", error) from error


def allocate(rows: int, stride_bytes: int, device: torch.device) -> Tensor:
    """Memory [rows, stride_bytes] uint8; torch.OutOfMemoryError on every device where there is none."""
    try:
        return torch.empty((rows, stride_bytes), dtype=torch.uint8, device=device)
    except torch.OutOfMemoryError:
        raise
    except RuntimeError as error:
        if "allocate memory" not in str(error):
            raise
        raise torch.OutOfMemoryError(str(error)) from error
