"""The package's door to the compiled functions that move rows between a device, the host's memory and a file.

n rows in a call, R rows in a store, S bytes from one row to the next in memory. The callers have checked the slots.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from . import _C

PAGE_BYTES = 4096


@dataclass(frozen=True)
class Places:
    """Where rows lie in a file: small ones share a page and none crosses one, large ones each begin one.

    row_bytes: of a row without padding. stride_bytes: from one row to the next in memory.
    """

    row_bytes: int
    stride_bytes: int
    first_byte: int = PAGE_BYTES

    @property
    def rows_per_group(self) -> int:
        """Rows that share a page, 1 for rows of more than half of one."""
        return max(1, PAGE_BYTES // self.stride_bytes)

    @property
    def group_bytes(self) -> int:
        """Bytes from one group of rows to the next, a multiple of a page."""
        return -(-self.rows_per_group * self.stride_bytes // PAGE_BYTES) * PAGE_BYTES

    def begin(self, slot: int) -> int:
        """The file offset of the group that holds a slot."""
        return self.first_byte + slot // self.rows_per_group * self.group_bytes

    def end(self, slots: int) -> int:
        """The file offset behind the last of `slots` rows."""
        return self.first_byte + -(-slots // self.rows_per_group) * self.group_bytes

    def file(self, descriptor: int) -> tuple[int, int, int, int, int, int]:
        """The members of RowFile in csrc/disk_rows.h."""
        return (
            descriptor,
            self.first_byte,
            self.rows_per_group,
            self.group_bytes,
            self.stride_bytes,
            self.row_bytes,
        )


def crc32c(data: bytes | bytearray | memoryview, *, portable: bool = False) -> int:
    """CRC-32C (Castagnoli, as in RFC 3720) of contiguous bytes; portable: without the CPU's own instruction."""
    return _C.crc32c(data, portable)


def read_rows(
    places: Places,
    descriptor: int,
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
        places.file(descriptor),
        slots.data_ptr(),
        len(slots),
        into.data_ptr(),
        into.stride(0),
        checksums.data_ptr(),
        block_bytes,
        threads,
    )
    return None if bad < 0 else bad


def write_rows(
    places: Places, descriptor: int, slots: Tensor, rows: Tensor, checksums: Tensor, *, threads: int
) -> None:
    """Write rows [n, S] uint8 (CPU) to slots [n] int64, none twice, and note their checksums [R] int32 by slot.

    Raises OSError; what these slots then hold is open.
    """
    slots = slots.contiguous()
    _C.write_rows(
        places.file(descriptor),
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
