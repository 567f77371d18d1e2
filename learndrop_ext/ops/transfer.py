"""The compiled functions that move rows between a device, the host's memory and a file.

n rows in a call, R rows in a store, S bytes from one row to the next in memory. The callers have checked the slots.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from learndrop_ext import _C

PAGE_BYTES = 4096


class RowFile(NamedTuple):
    """Where the rows of an open file are: the members of RowFile in csrc/disk_rows.h, in its order."""

    descriptor: int
    first_byte: int
    rows_per_group: int
    group_bytes: int
    stride_bytes: int
    row_bytes: int


def crc32c(data: bytes | bytearray | memoryview, *, portable: bool = False) -> int:
    """CRC-32C (Castagnoli, as in RFC 3720) of contiguous bytes; portable: without the CPU's own instruction."""
    return _C.crc32c(data, portable)


def read_rows(
    file: RowFile,
    slots: Tensor,
    into: Tensor,
    checksums: Tensor,
    *,
    threads: int,
    block_bytes: int = 1,
) -> int | None:
    """Read the rows at slots [n] int64 into `into` [n, S] uint8 (CPU), without the GIL, and check them.

    checksums: [R] int32, by slot. block_bytes: what is not in the page cache is read from the disk in whole blocks of
    so many. Gives the first position whose row does not have its checksum, or None. Raises OSError.
    """
    slots = slots.contiguous()
    bad = _C.read_rows(
        file,
        slots.data_ptr(),
        len(slots),
        into.data_ptr(),
        into.stride(0),
        checksums.data_ptr(),
        block_bytes,
        threads,
    )
    return None if bad < 0 else bad


def write_rows(file: RowFile, slots: Tensor, rows: Tensor, checksums: Tensor, *, threads: int) -> None:
    """Write rows [n, S] uint8 (CPU) to slots [n] int64, none twice, and note their checksums [R] int32 by slot.

    Raises OSError; what these slots then hold is open.
    """
    slots = slots.contiguous()
    _C.write_rows(
        file,
        slots.data_ptr(),
        len(slots),
        rows.data_ptr(),
        rows.stride(0),
        checksums.data_ptr(),
        threads,
    )


def pin(rows: Tensor, device: torch.device) -> None:
    """Pin host memory where it lies, for the copy engines and kernels of a GPU. Raises RuntimeError where it cannot be."""
    if rows.nbytes:
        number = torch.cuda.current_device() if device.index is None else device.index
        _C.pin(rows.data_ptr(), rows.nbytes, number)


def unpin(rows: Tensor) -> None:
    """Give pinned memory back, once nothing reads it."""
    if rows.nbytes:
        _C.unpin(rows.data_ptr())


def copy_rows_to_device(source: Tensor, index: Tensor, into: Tensor, *, row_bytes: int | None = None) -> None:
    """Copy rows index [n] int64 (CPU) of pinned `source` [R, S] uint8 to `into` [n, S] uint8 on a GPU, by its copy
    engines, on the current stream; row_bytes: only the first of each. Raises RuntimeError."""
    _host_rows(source, index, into, row_bytes, kernel=False)


def gather_rows_to_device(source: Tensor, index: Tensor, into: Tensor, *, row_bytes: int | None = None) -> None:
    """The same by a kernel that reads the host's memory itself: faster for small rows. row_bytes: a multiple of 16."""
    _host_rows(source, index, into, row_bytes, kernel=True)


def _host_rows(source: Tensor, index: Tensor, into: Tensor, row_bytes: int | None, *, kernel: bool) -> None:
    stream = torch.cuda.current_stream(into.device)
    index = index.contiguous()
    on_device = index.pin_memory().to(into.device, non_blocking=True) if kernel else index
    _C.host_rows_to_device(
        source.data_ptr(),
        source.stride(0),
        on_device.data_ptr(),
        len(index),
        into.data_ptr(),
        into.stride(0),
        source.shape[1] if row_bytes is None else row_bytes,
        kernel,
        (into.get_device(), stream.cuda_stream),
    )
