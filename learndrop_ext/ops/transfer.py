"""The compiled functions that move rows between a device, host memory and a file.

n rows in a call, R rows in a store, S bytes from one row to the next in memory. Callers must check the slots.
"""

from __future__ import annotations

import torch
from torch import Tensor

from learndrop_ext import _C
from learndrop_ext._C import RowFile as RowFile
from learndrop_ext.ops.rows import travels_with_launch

PAGE_BYTES = 4096


def read_rows(
    file: RowFile,
    slots: Tensor,  # [n] int64 (CPU)
    into: Tensor,  # [n, S] uint8 (CPU), written
    checksums: Tensor,  # [R] int32, by slot
    *,
    threads: int,
    block_bytes: int = 1,
) -> int | None:
    """Read rows of a file and verify them, without the GIL. Raise OSError if the file cannot be read.

    Rows that are not in the page cache are read in blocks of `block_bytes`. Returns the first position whose row does not
    match its checksum, or None.
    """
    slots = slots.contiguous()
    bad = _C.read_rows(
        file=file,
        slots=slots.data_ptr(),
        count=len(slots),
        into=into.data_ptr(),
        into_stride_bytes=into.stride(0),
        checksums=checksums.data_ptr(),
        block_bytes=block_bytes,
        threads=threads,
    )
    return None if bad < 0 else bad


def write_rows(
    file: RowFile,
    slots: Tensor,  # [n] int64 (CPU), none twice
    rows: Tensor,  # [n, S] uint8 (CPU)
    checksums: Tensor,  # [R] int32, by slot, written
    *,
    threads: int,
) -> None:
    """Write rows to a file and their checksums to a table. After an OSError these slots hold undefined bytes."""
    slots = slots.contiguous()
    _C.write_rows(
        file=file,
        slots=slots.data_ptr(),
        count=len(slots),
        rows=rows.data_ptr(),
        rows_stride_bytes=rows.stride(0),
        checksums=checksums.data_ptr(),
        threads=threads,
    )


def pin(rows: Tensor, device: torch.device) -> None:
    """Pin contiguous uint8 host memory in place for a GPU. Raise RuntimeError if it cannot be pinned."""
    if rows.nbytes:
        number = torch.cuda.current_device() if device.index is None else device.index
        _C.pin(rows.data_ptr(), rows.nbytes, number)


def unpin(rows: Tensor) -> None:
    """Undo `pin`. No copy may be reading the memory."""
    if rows.nbytes:
        _C.unpin(rows.data_ptr())


def rows_to_device(
    source: Tensor,  # [R, S] uint8, pinned; S a multiple of 16
    index: Tensor,  # [n] int64 (CPU)
    into: Tensor,  # [n, S] uint8 on the GPU
    *,
    kernel: bool,
) -> None:
    """Copy rows to a GPU on the current stream, with its copy engines or a kernel that reads host memory, faster for
    small rows. Raise RuntimeError if it refuses a copy."""
    stream = torch.cuda.current_stream(into.device)
    index = index.contiguous()
    held = not kernel or travels_with_launch(index, len(source))
    given = index if held else index.pin_memory().to(into.device, non_blocking=True)
    _C.host_rows_to_device(
        source=source.data_ptr(),
        source_stride_bytes=source.stride(0),
        index=given.data_ptr(),
        count=len(index),
        into=into.data_ptr(),
        into_stride_bytes=into.stride(0),
        row_bytes=source.shape[1],
        kernel=kernel,
        index_on_host=held,
        device=into.get_device(),
        stream=stream.cuda_stream,
    )
