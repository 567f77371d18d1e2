"""Rows in host memory, and the stream that copies them to a GPU while it trains.

R rows, S bytes from one row to the next, n rows in a call, T rows in a staging area.
"""

from __future__ import annotations

import contextlib
import mmap
import os
import weakref
from collections.abc import Iterator

import numpy as np
import torch
from torch import Tensor

from learndrop_ext.ops import transfer

#: Row bytes from which copy engines are used. A copy has an overhead of about 0.5 us, in which a link of 55 GB/s transfers
#: 28 KB. On an H200 a kernel is faster by 8 % at 32 KB and the copy engines by 6 % at 128 KB; on an H100 the kernel is by
#: 26 % at 32 KB, and from 128 KB on they differ by 2 %.
COPY_ENGINE_BYTES = 64 << 10


class PinnedRows:
    """Host memory `data` [count, stride_bytes] uint8 that the copy engines and kernels of a GPU can read.

    A forked process does not inherit its pages (MADV_DONTFORK). After a fork, the operating system copies a page that either
    process writes, and this process might be left with the copy, which the GPU does not see. Raises torch.OutOfMemoryError
    if the host is out of memory, or it cannot be pinned.
    """

    def __init__(self, count: int, stride_bytes: int, device: torch.device) -> None:
        size = count * stride_bytes
        self.data = torch.empty(size, dtype=torch.uint8) if size == 0 else self._map(size, device)
        self.data = self.data.view(count, stride_bytes)

    def _map(self, size: int, device: torch.device) -> Tensor:
        try:
            pages = mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
            data = torch.frombuffer(pages, dtype=torch.uint8)
            transfer.pin(data, device)
        except (OSError, OverflowError, RuntimeError) as error:
            raise torch.OutOfMemoryError(
                f"PinnedRows: the host must have {size:,} bytes of memory to pin, got {error}"
            ) from error
        pages.madvise(mmap.MADV_DONTFORK)
        weakref.finalize(self, _unpin, data, pages, os.getpid())
        return data


def _unpin(data: Tensor, pages: mmap.mmap, owner: int) -> None:
    if owner != os.getpid():
        return
    try:
        transfer.unpin(data)
    finally:
        pages.madvise(mmap.MADV_DOFORK)


class HostTier:
    """Rows `data` [count, stride_bytes] uint8 in host memory, pinned if they are read to a GPU.

    Raises torch.OutOfMemoryError if the host is out of memory, or it cannot be pinned.
    """

    def __init__(self, count: int, stride_bytes: int, device: torch.device) -> None:
        self._pinned: PinnedRows | None = None
        self._process = os.getpid()
        if device.type == "cuda":
            self._pinned = PinnedRows(count, stride_bytes, device)
            self.data = self._pinned.data
        else:
            self.data = allocate(count, stride_bytes, device)

    def read(self, index: Tensor, into: Tensor) -> None:
        """Copy rows index [n] int64 (CPU) to `into` [n, S] uint8; on a GPU, enqueue it on the current stream."""
        self._check_process()
        if into.device.type == "cpu":
            # index_select would take threads from the training step.
            np.take(self.data.numpy(), index.numpy(), axis=0, out=into.numpy(), mode="clip")
        else:
            transfer.rows_to_device(self.data, index, into, kernel=self.data.shape[1] < COPY_ENGINE_BYTES)

    def write(self, index: Tensor, rows: Tensor) -> None:
        """Store `rows` [n, S] uint8 of any device as rows index [n] int64 (CPU)."""
        self._check_process()
        self.data.index_copy_(0, index, rows.cpu())

    def _check_process(self) -> None:
        """Raise RuntimeError in a forked process, which does not have pinned memory."""
        if self._pinned is not None and self._process != os.getpid():
            raise RuntimeError(
                "ActivationCache: rows in pinned memory must be used by the process that made the cache, "
                f"{self._process}, got the forked process {os.getpid()}"
            )


class CopyStream:
    """A stream that fills two areas of T = staging rows each at the end of `data` [R, S] uint8 on a GPU, one while the
    training step reads the other. Rows of a file bounce: they pass through pinned memory [2, T, S]; raises
    torch.OutOfMemoryError without it.
    """

    def __init__(self, data: Tensor, staging: int, *, bounces: bool) -> None:
        self.stream = torch.cuda.Stream(data.device)
        self.filled = [torch.cuda.Event() for _ in range(2)]
        self.free = [torch.cuda.Event() for _ in range(2)]
        self.bounce = PinnedRows(2 * staging, data.shape[1], data.device) if bounces else None
        self.staging = staging
        self.fill_areas_of(data)

    def fill_areas_of(self, data: Tensor) -> None:
        """Fill areas of `data` [R, S] uint8 from now on, after the current stream's work on it."""
        for event in self.free:
            event.record(torch.cuda.current_stream(data.device))
        # If it is freed while a copy is in flight, the allocator must not reuse it before the copy has ended.
        data.record_stream(self.stream)

    @contextlib.contextmanager
    def filling(self, area: int) -> Iterator[None]:
        """Enqueue the copies of a `with` block on this stream, once the area is free."""
        with torch.cuda.stream(self.stream):
            self.stream.wait_event(self.free[area])
            try:
                yield
            finally:
                # Even if a read fails: copies before it are in flight, and the next use of the area waits for them.
                self.filled[area].record(self.stream)

    def bounce_rows(self, area: int, count: int) -> Tensor:
        """Wait for the last copy from an area's host memory, and return that memory, [count, S]."""
        assert self.bounce is not None
        self.filled[area].synchronize()
        return self.bounce.data[area * self.staging :][:count]


def allocate(rows: int, stride_bytes: int, device: torch.device) -> Tensor:
    """Return memory [rows, stride_bytes] uint8. Raises torch.OutOfMemoryError on a CPU too."""
    try:
        return torch.empty((rows, stride_bytes), dtype=torch.uint8, device=device)
    except RuntimeError as error:
        if "allocate memory" not in str(error):
            raise
        raise torch.OutOfMemoryError(str(error)) from error
