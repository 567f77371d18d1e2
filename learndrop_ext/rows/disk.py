"""Rows by slot in one file. R rows, S bytes from one row to the next in memory, n rows in a call."""

from __future__ import annotations

import contextlib
import math
import os
import time
import weakref
from pathlib import Path

import torch
from torch import Tensor

from learndrop_ext.ops import free_bytes, transfer
from learndrop_ext.rows.layout import RowLayout
from learndrop_ext.rows.plan import lengthened
from learndrop_ext.rows.store.file import (
    CacheFileError,
    Manifest,
    Sidecar,
    Tables,
    check_fingerprint,
    naming,
    pack_tables,
    read_tables,
)
from learndrop_ext.rows.store.fingerprint import Fingerprint
from learndrop_ext.rows.store.part import PartFile

#: Eight reads at a time keep the queue of an NVMe disk filled; the threads sleep meanwhile.
THREADS = 8
#: Rows smaller than half of this are read together with their neighbours, which the same epoch needs too. A disk that reads
#: 1.0 to 1.7 GB/s sequentially reached 0.23 GB/s in random reads of 4 KB (58,000 a second with any number of threads), 0.74
#: of 32 KB and 0.9 of 128 KB; larger blocks were no faster.
BLOCK_BYTES = 128 << 10


class DiskTier:
    """R rows in the file at `path`, read and written by several threads without the GIL.

    It is a part until `commit`, and again once a row is written: rows at `path` never change in place, see `PartFile`. The
    checksums of its rows are in memory. What changes the file raises OSError if the disk is full, and RuntimeError in a
    forked process.
    """

    def __init__(self, path: Path, layout: RowLayout, *, _file: PartFile | None = None) -> None:
        self.layout = layout
        self.slots = 0
        self.checksums = torch.zeros(0, dtype=torch.int32)  # by slot; may be longer than R
        self._allocated = range(0)  # bytes of the file that have disk space
        self._free_bytes = -math.inf, 0  # time of the last query and its result
        self._file = _file or PartFile(path)
        self._finalizer = weakref.finalize(self, self._file.close)

    def grow(self, slots: int, *, first: int) -> None:
        """Make room for R = slots rows, of which those before `first` are in another tier.

        Their disk space is allocated now, so that a full disk is found before the work is done.
        """
        if self._file.part is None and slots <= self.slots:
            return
        self._change()
        begin, end = self.layout.begin(first), self.layout.end(slots)
        start, rows = begin, slots - first
        if self._allocated.start <= begin <= self._allocated.stop:
            start, begin, rows = self._allocated.start, self._allocated.stop, slots - self.slots
        if first < slots and begin < end:
            with self._naming(f"must have {end - begin:,} bytes of disk space for {rows} rows"):
                os.posix_fallocate(self._file.descriptor, begin, end - begin)
            self._allocated = range(start, end)
        self.checksums = lengthened(self.checksums, slots)
        self.slots = max(slots, self.slots)

    def read(self, slots: Tensor, into: Tensor) -> None:
        """Read rows at slots [n] int64 (CPU) to `into` [n, S] uint8 (CPU). Raises OSError, and CacheFileError if a row does
        not match its checksum.

        If the whole file fits into half of the free memory, small rows are read in blocks, which stay in the page cache. An
        epoch then reads the disk once, whatever the order of the rows.
        """
        with self._naming(f"must give {len(slots)} rows"):
            bad = transfer.read_rows(
                self.layout.file(self._file.descriptor),
                slots,
                into,
                self.checksums,
                threads=THREADS,
                block_bytes=BLOCK_BYTES if self._reads_blocks() else 1,
            )
        if bad is not None:
            raise CacheFileError(
                f"cache file {self._file.path}: row {int(slots[bad])} must have the checksum it was written with, got "
                "another: the file was altered or truncated; delete it, and its rows are computed again"
            )

    def write(self, slots: Tensor, rows: Tensor) -> None:
        """Write rows [n, S] uint8 (CPU) at distinct slots [n] int64 (CPU), which hold no rows if that fails."""
        self._change()
        with self._naming(f"must have disk space for {len(slots)} rows of {self.layout.row_bytes:,} bytes"):
            transfer.write_rows(self.layout.file(self._file.descriptor), slots, rows, self.checksums, threads=THREADS)

    def commit(self, manifest: Manifest, filled: Tensor, sidecar: Sidecar) -> None:
        """Make the part the file at `path`; filled: [R] bool, which rows were written.

        Raises TypeError if the sidecar holds values that JSON cannot; nothing is changed then.
        """
        end = self.layout.end(manifest.slots)
        page, tail = pack_tables(Tables(manifest, filled, self.checksums[: manifest.slots], sidecar), end)
        self._change()
        self._allocated = range(self._allocated.start, min(self._allocated.stop, end))
        self._file.commit(page, tail, end)

    def check_owner(self) -> None:
        """Raise RuntimeError in a forked process."""
        self._file.check_owner()

    def share(self, aside: Path) -> None:
        """Do not change the file from now on: the first change of a row is made in a copy at another path."""
        self._file.aside = aside

    def close(self) -> None:
        """Close the file, and delete it if it was not committed."""
        self._finalizer()

    def _change(self) -> None:
        self._file.change(self.layout.end(self.slots))

    def _naming(self, wanted: str) -> contextlib.AbstractContextManager[None]:
        return naming(f"cache file {self._file.path}", wanted)

    def _reads_blocks(self) -> bool:
        """Whether rows are small and the file fits into half of the free memory, which is queried once per second."""
        if 2 * self.layout.row_bytes >= BLOCK_BYTES:
            return False
        now = time.monotonic()
        if now > self._free_bytes[0] + 1:
            self._free_bytes = now, free_bytes(torch.device("cpu"))
        return 2 * self.layout.end(self.slots) <= self._free_bytes[1]


def open_rows(path: Path, fingerprint: Fingerprint, *, aside: Path | None = None) -> tuple[DiskTier, Tables]:
    """Open a committed file, for reading only if it is to be copied `aside`. Its rows are verified when they are read.

    Raises:
        FileNotFoundError: if there is no file.
        OSError: if it cannot be read, or another process is writing it.
        CacheFileError: if the header or the tail is damaged or truncated, the version is another one, or the fingerprint
            differs; it names the first difference.
    """
    file = PartFile.open(path, aside=aside)
    try:
        tables = read_tables(path, file.descriptor)
        check_fingerprint(path, fingerprint, tables.manifest.fingerprint)
    except BaseException:
        file.close()
        raise
    manifest = tables.manifest
    rows = DiskTier(path, RowLayout(manifest.row_bytes, manifest.stride_bytes), _file=file)
    rows.checksums, rows.slots = tables.checksums, manifest.slots
    return rows, tables
