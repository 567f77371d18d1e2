"""Rows in the host's memory, and the stream on which they come to a GPU beside the training step."""

from __future__ import annotations

import functools
import statistics
import time
import weakref

import numpy as np
import torch
from torch import Tensor

from learndrop_ext.ops import transfer

#: Sizes of rows at which the two ways to a GPU are compared, 4 KiB to 256 KiB.
SWITCH_SIZES = tuple(4096 << k for k in range(7))


class HostTier:
    """Rows [R, S] uint8 in the host's memory, pinned where the model is on a GPU.

    Raises torch.OutOfMemoryError where they do not fit or cannot be pinned.
    """

    def __init__(self, count: int, stride_bytes: int, device: torch.device) -> None:
        try:
            self.data = torch.empty((count, stride_bytes), dtype=torch.uint8)
            if device.type == "cuda":
                transfer.pin(self.data, device)
                weakref.finalize(self, transfer.unpin, self.data)
        except RuntimeError as error:
            raise torch.OutOfMemoryError(
                f"HostTier: the host must hold {count * stride_bytes:,} bytes of rows, got {error}"
            ) from error

    def read(self, index: Tensor, into: Tensor) -> None:
        """Copy rows index [n] int64 (CPU) to `into` [n, S] uint8; on a GPU on the current stream."""
        if into.device.type == "cpu":
            # Not index_select: called beside the training step it would take that one's threads.
            np.take(self.data.numpy(), index.numpy(), axis=0, out=into.numpy(), mode="clip")
        elif self.data.shape[1] >= copy_engine_from(into.device):
            transfer.copy_rows_to_device(self.data, index, into)
        else:
            transfer.gather_rows_to_device(self.data, index, into)

    def write(self, index: Tensor, rows: Tensor) -> None:
        """Keep rows [n, S] uint8 at index [n] int64 (CPU)."""
        self.data.index_copy_(0, index, rows.cpu())


class CopyStream:
    """A stream beside the training step that fills two areas of a GPU's memory, each while the other is read.

    bounce: pinned memory [2, T, S] through which rows of a file go.
    """

    def __init__(self, device: torch.device, staging: int, stride_bytes: int, *, bounces: bool) -> None:
        self.stream = torch.cuda.Stream(device)
        self.filled = [torch.cuda.Event() for _ in range(2)]
        self.free = [torch.cuda.Event() for _ in range(2)]
        self.bounce: HostTier | None = HostTier(2 * staging, stride_bytes, device) if bounces else None
        self.staging = staging
        for event in self.free:
            # What the allocator gave may still be read by earlier work.
            event.record(torch.cuda.current_stream(device))

    def bounce_rows(self, area: int, count: int) -> Tensor:
        """Host memory [count, S] for an area, once the copy that last read it has ended."""
        assert self.bounce is not None
        self.filled[area].synchronize()
        return self.bounce.data[area * self.staging :][:count]


@functools.lru_cache(maxsize=16)
def copy_engine_from(device: torch.device, *, rows: int = 128, repeats: int = 7) -> int:
    """Row bytes from which a GPU's copy engines bring scattered host rows faster than a kernel that reads them.

    Measured once for each GPU: `rows` rows in random order, median of `repeats`, the sizes SWITCH_SIZES; the first from
    which the engines win for good.
    """
    largest = SWITCH_SIZES[-1]
    source = HostTier(4 * rows, largest, device)
    into = torch.empty((rows, largest), dtype=torch.uint8, device=device)
    index = torch.randperm(4 * rows, generator=torch.Generator().manual_seed(0))[:rows]
    for size in reversed(SWITCH_SIZES):
        seconds = []
        for move in (transfer.copy_rows_to_device, transfer.gather_rows_to_device):
            times = []
            for _ in range(repeats):
                torch.cuda.synchronize(device)
                begin = time.perf_counter()
                move(source.data, index, into, row_bytes=size)
                torch.cuda.synchronize(device)
                times.append(time.perf_counter() - begin)
            seconds.append(statistics.median(times))
        if seconds[0] > seconds[1]:
            return 2 * size
    return SWITCH_SIZES[0]
