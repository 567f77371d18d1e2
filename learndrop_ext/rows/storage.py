"""The memory and the file of a tier plan: rows as bytes by slot over device, host and disk.

R rows, S bytes from one row to the next, n rows in a call, T rows in each of two staging areas.
"""

from __future__ import annotations

import contextlib
import os
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor

from learndrop_ext.rows.disk import DiskTier
from learndrop_ext.rows.host import CopyStream, HostTier
from learndrop_ext.rows.layout import RowLayout
from learndrop_ext.rows.plan import TierPlan

HOST = 1


class TierMemoryError(Exception):
    """A tier is out of memory.

    Args:
        tier (str): "device" or "host".
        error (RuntimeError): the original error.
    """

    def __init__(self, tier: str, error: RuntimeError) -> None:
        super().__init__(tier)
        self.tier = tier
        self.error = error


@dataclass(frozen=True)
class TierStorage:
    """The memory and the file of a plan.

    Args:
        plan (TierPlan): which slots are in which tier.
        data (Tensor): [plan.device + 2 * T, S] uint8 on the device: its rows, then the staging areas.
        host (HostTier, optional): the rows in host memory.
        disk (DiskTier, optional): the rows in a file.
    """

    plan: TierPlan
    data: Tensor
    host: HostTier | None
    disk: DiskTier | None

    def read(self, slots: Tensor, into: Tensor) -> None:
        """Copy rows to the CPU.

        Args:
            slots (Tensor): [n] int64 (CPU), ascending.
            into (Tensor): [n, S] uint8 (CPU), written.

        Raises:
            OSError, CacheFileError: as `DiskTier.read`.
        """
        on_device, in_memory = self._ends(slots)
        if on_device:
            into[:on_device] = self.data[slots[:on_device].to(self.data.device)].cpu()
        if self.host is not None and in_memory > on_device:
            self.host.read(slots[on_device:in_memory] - self.plan.device, into[on_device:in_memory])
        if self.disk is not None and in_memory < len(slots):
            self.disk.read(slots[in_memory:], into[in_memory:])

    def write(self, slots: Tensor, rows: Tensor) -> None:
        """Store rows.

        Args:
            slots (Tensor): [n] int64 (CPU), ascending.
            rows (Tensor): [n, S] uint8, on any device.

        Raises:
            OSError: as `DiskTier.write`.
        """
        on_device, in_memory = self._ends(slots)
        if on_device:
            self.data[slots[:on_device].to(self.data.device)] = rows[:on_device].to(self.data.device)
        if self.host is not None and in_memory > on_device:
            self.host.write(slots[on_device:in_memory] - self.plan.device, rows[on_device:in_memory])
        if self.disk is not None and in_memory < len(slots):
            self.disk.write(slots[in_memory:], rows[in_memory:].cpu())

    def moved_from(self, other: TierStorage, slots: Tensor) -> Tensor:
        """Return those of the slots [n] that are elsewhere in `other`, except where both have them on the device or on
        disk: rows on the device are copied in one piece, and both storages have the same file."""
        ours, theirs = self._tier(slots), other._tier(slots)
        moved = ours != theirs
        if self.host is not other.host or self.plan.device != other.plan.device:
            moved |= ours == HOST
        return slots[moved]

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
        """End the thread, wait for the copies and close the file, each even if another fails."""
        if self.process != os.getpid():
            return
        with contextlib.ExitStack() as stack:  # calls the last one first
            if self.storage.disk is not None:
                stack.callback(self.storage.disk.close)
            if self.copy_stream is not None:
                stack.callback(self.copy_stream.stream.synchronize)
            if self.thread is not None:
                stack.callback(self.thread.shutdown, wait=False)


def allocate_storage(
    plan: TierPlan, layout: RowLayout, device: torch.device, *, old: TierStorage, path: Path | None
) -> TierStorage:
    """Return the memory and the file of a plan, without rows. Reuses parts of the old storage that stay the same.

    Raises:
        TierMemoryError: if the device or the host is out of memory.
        OSError: if the disk is full.
    """
    same_data = (plan.device, plan.staging) == (old.plan.device, old.plan.staging)
    same_host = (plan.device, plan.host) == (old.plan.device, old.plan.host)
    data = old.data if same_data else _device_rows(plan, layout, device)
    host = None
    if plan.host:
        host = old.host if same_host else _host_rows(plan, layout, device)
    disk = old.disk
    if plan.disk:
        if disk is None:
            assert path is not None
            disk = DiskTier(path, layout)
        try:
            disk.grow(plan.slots, first=plan.slots - plan.disk)
        except BaseException:
            if disk is not old.disk:
                disk.close()
            raise
    return TierStorage(plan, data, host, disk)


def _device_rows(plan: TierPlan, layout: RowLayout, device: torch.device) -> Tensor:
    try:
        return allocate(plan.device + 2 * plan.staging, layout.stride_bytes, device)
    except torch.OutOfMemoryError as error:
        raise TierMemoryError("device", error) from error


def _host_rows(plan: TierPlan, layout: RowLayout, device: torch.device) -> HostTier:
    try:
        return HostTier(plan.host, layout.stride_bytes, device)
    except torch.OutOfMemoryError as error:
        raise TierMemoryError("host", error) from error


def allocate(rows: int, stride_bytes: int, device: torch.device) -> Tensor:
    """Return memory [rows, stride_bytes] uint8. Raises torch.OutOfMemoryError on a CPU too."""
    try:
        return torch.empty((rows, stride_bytes), dtype=torch.uint8, device=device)
    except torch.OutOfMemoryError:
        raise
    except RuntimeError as error:
        if "allocate memory" not in str(error):
            raise
        raise torch.OutOfMemoryError(str(error)) from error
