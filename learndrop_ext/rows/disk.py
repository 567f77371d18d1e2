"""Rows in one file, which is written under another name, synced and renamed: it is complete and correct, or refused.

A file being filled is called `<name>.part`; it has no header, and its tables are in memory. A part left by a killed process
is overwritten. R rows, S bytes from one row to the next in memory, n rows in a call.
"""

from __future__ import annotations

import dataclasses
import fcntl
import math
import os
import shutil
import time
import weakref
from dataclasses import dataclass
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
    lock,
    naming,
    pack_tables,
    read_tables,
)
from learndrop_ext.rows.store.fingerprint import Fingerprint

#: Eight reads at a time keep the queue of an NVMe disk filled; the threads sleep meanwhile.
THREADS = 8
#: Rows smaller than half of this are read together with their neighbours, which the same epoch needs too. A disk that reads
#: 1.0 to 1.7 GB/s sequentially reached 0.23 GB/s in random reads of 4 KB (58,000 a second with any number of threads), 0.74
#: of 32 KB and 0.9 of 128 KB; larger blocks were no faster.
BLOCK_BYTES = 128 << 10


@dataclass
class _OpenFile:
    """An open file. part: its path while it is unfinished, else None. A forked process does not own it."""

    descriptor: int
    part: Path | None
    process: int = dataclasses.field(default_factory=os.getpid)

    def close(self) -> None:
        """Close it, and delete it if it is unfinished."""
        if self.process != os.getpid():
            return
        if self.part is not None:
            self.part.unlink(missing_ok=True)
        # A forked process keeps the descriptor, and would keep the lock with it.
        fcntl.flock(self.descriptor, fcntl.LOCK_UN)
        os.close(self.descriptor)


class DiskTier:
    """R rows by slot in one file, read and written by several threads without the GIL.

    A new file is `<path>.part` until `commit`, and is deleted if it is closed before that. A file from `open_rows` stays at
    `path` until a row is written, which makes it a part again: rows at `path` never change in place. All methods that
    change the file raise OSError if the disk is full, and RuntimeError in a forked process.

    Args:
        path (Path): path of the committed file.
        layout (RowLayout): positions of the rows in it.

    Attributes:
        aside (Path or None): if set, other runs read the file at `path` too. It is not changed: the first change of a row
            is made in a copy at this path.

    Raises:
        OSError: if the part cannot be created, or another cache is writing it.
    """

    def __init__(self, path: Path, layout: RowLayout, *, _descriptor: int | None = None) -> None:
        self.path = path
        self.layout = layout
        self.slots = 0
        self.checksums = torch.zeros(0, dtype=torch.int32)  # by slot; may be longer than R
        self.aside: Path | None = None
        self._allocated = range(0)  # bytes of the file that have disk space
        self._free_bytes = -math.inf, 0  # time of the last query and its result
        self._hold(_new_part(path) if _descriptor is None else _OpenFile(_descriptor, None))

    def grow(self, slots: int, *, first: int) -> None:
        """Make room for R = slots rows, of which those before `first` are in another tier.

        Their disk space is allocated now, so that a full disk is found before the work is done.
        """
        if self._file.part is None and slots <= self.slots:
            return
        self._reopen_part()
        begin, end = self.layout.begin(first), self.layout.end(slots)
        start, rows = begin, slots - first
        if self._allocated.start <= begin <= self._allocated.stop:
            start, begin, rows = self._allocated.start, self._allocated.stop, slots - self.slots
        if first < slots and begin < end:
            with naming(f"cache file {self.path}", f"must have {end - begin:,} bytes of disk space for {rows} rows"):
                os.posix_fallocate(self._file.descriptor, begin, end - begin)
            self._allocated = range(start, end)
        self.checksums = lengthened(self.checksums, slots)
        self.slots = max(slots, self.slots)

    def read(self, slots: Tensor, into: Tensor) -> None:
        """Read rows at slots [n] int64 (CPU) to `into` [n, S] uint8 (CPU).

        If the whole file fits into half of the free memory, small rows are read in blocks, which stay in the page cache. An
        epoch then reads the disk once, whatever the order of the rows.

        Raises:
            CacheFileError: if a row does not match its checksum.
            OSError: if the file cannot be read.
        """
        with naming(f"cache file {self.path}", f"must give {len(slots)} rows"):
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
                f"cache file {self.path}: row {int(slots[bad])} must have the checksum it was written with, got another: "
                "the file was altered or truncated; delete it, and its rows are computed again"
            )

    def write(self, slots: Tensor, rows: Tensor) -> None:
        """Write rows [n, S] uint8 (CPU) at distinct slots [n] int64 (CPU), which hold no rows if that fails."""
        self._reopen_part()
        with naming(
            f"cache file {self.path}", f"must have disk space for {len(slots)} rows of {self.layout.row_bytes:,} bytes"
        ):
            transfer.write_rows(self.layout.file(self._file.descriptor), slots, rows, self.checksums, threads=THREADS)

    def commit(self, manifest: Manifest, filled: Tensor, sidecar: Sidecar) -> None:
        """Turn the part into the file at `path`, replacing an old one, which stays if that fails.

        filled: [R] bool, which rows were written. Raises TypeError if the sidecar holds values that JSON cannot.
        """
        tail_offset = self.layout.end(manifest.slots)
        page, tail = pack_tables(Tables(manifest, filled, self.checksums[: manifest.slots], sidecar), tail_offset)
        self._reopen_part()
        file = self._file
        assert file.part is not None
        with naming(f"cache file {self.path}", "must have disk space for its tables"):
            os.ftruncate(file.descriptor, tail_offset)
            self._allocated = range(self._allocated.start, min(self._allocated.stop, tail_offset))
            _write_all(file.descriptor, tail, tail_offset)
            _write_all(file.descriptor, page, 0)
            os.fsync(file.descriptor)
            os.rename(file.part, self.path)
            file.part = None
            _sync_folder(self.path)
        fcntl.flock(file.descriptor, fcntl.LOCK_SH)

    def check_owner(self) -> None:
        """Raise RuntimeError in a forked process, whose writes would change the rows of its parent."""
        if self._file.process != os.getpid():
            raise RuntimeError(
                f"cache file {self.path}: its rows must be written by the process that opened it, {self._file.process}, "
                f"got the forked process {os.getpid()}"
            )

    def close(self) -> None:
        """Close the file, and delete it if it was not committed."""
        self._finalizer()

    def _hold(self, file: _OpenFile) -> None:
        self._file = file
        self._finalizer = weakref.finalize(self, file.close)

    def _reads_blocks(self) -> bool:
        """Whether rows are small and the file fits into half of the free memory, which is queried once per second."""
        if 2 * self.layout.row_bytes >= BLOCK_BYTES:
            return False
        now = time.monotonic()
        if now > self._free_bytes[0] + 1:
            self._free_bytes = now, free_bytes(torch.device("cpu"))
        return 2 * self.layout.end(self.slots) <= self._free_bytes[1]

    def _reopen_part(self) -> None:
        """Turn a committed file into a part again, before it changes."""
        self.check_owner()
        if self._file.part is not None:
            return
        if self.aside is not None:
            return self._copy_aside(self.aside)
        with naming(f"cache file {self.path}", "must not be read by another process while rows are written"):
            lock(self._file.descriptor, fcntl.LOCK_EX)
            os.rename(self.path, _part_of(self.path))
            self._file.part = _part_of(self.path)
            _sync_folder(self.path)

    def _copy_aside(self, path: Path) -> None:
        """Continue in a copy of the file. Other runs go on reading the original."""
        copy = _new_part(path)
        size = self.layout.end(self.slots)
        try:
            with naming(f"cache file {path}", f"must have {size:,} bytes of disk space for a copy of {self.path.name}"):
                os.posix_fallocate(copy.descriptor, 0, size)
                with open(self.path, "rb") as source, open(copy.descriptor, "wb", closefd=False) as target:
                    shutil.copyfileobj(source, target, BLOCK_BYTES)
        except BaseException:
            copy.close()
            raise
        self.close()
        self.path, self.aside, self._allocated = path, None, range(size)
        self._hold(copy)


def open_rows(path: Path, fingerprint: Fingerprint, *, aside: Path | None = None) -> tuple[DiskTier, Tables]:
    """Open a committed file. Its rows are verified when they are read.

    Args:
        path (Path): the file.
        fingerprint (Fingerprint): what its rows must depend on.
        aside (Path, optional): open a file that other runs read too, for reading only. The first change of a row makes a
            copy at this path. Default: None

    Raises:
        FileNotFoundError: if there is no file.
        OSError: if it cannot be read, or another process is writing it.
        CacheFileError: if the header or the tail is damaged or truncated, the version is another one, or the fingerprint
            differs; it names the first difference.
    """
    descriptor = os.open(path, (os.O_RDWR if aside is None else os.O_RDONLY) | os.O_CLOEXEC)
    try:
        with naming(f"cache file {path}", "must not be written by another process"):
            lock(descriptor, fcntl.LOCK_SH)
        tables = read_tables(path, descriptor)
        check_fingerprint(path, fingerprint, tables.manifest.fingerprint)
    except BaseException:
        os.close(descriptor)
        raise
    manifest = tables.manifest
    rows = DiskTier(path, RowLayout(manifest.row_bytes, manifest.stride_bytes), _descriptor=descriptor)
    rows.checksums, rows.slots, rows.aside = tables.checksums, manifest.slots, aside
    return rows, tables


def _part_of(path: Path) -> Path:
    return path.with_name(path.name + ".part")


def _new_part(path: Path) -> _OpenFile:
    """A new, empty part, locked."""
    part = _part_of(path)
    with naming(f"cache file {path}", "must be written by one cache at a time, in a folder that is there"):
        descriptor = os.open(part, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
        try:
            lock(descriptor, fcntl.LOCK_EX)
            os.ftruncate(descriptor, 0)
        except BaseException:
            os.close(descriptor)
            raise
    return _OpenFile(descriptor, part)


def _write_all(descriptor: int, data: bytes, offset: int) -> None:
    view = memoryview(data)
    while len(view):
        written = os.pwrite(descriptor, view, offset)
        view, offset = view[written:], offset + written


def _sync_folder(path: Path) -> None:
    descriptor = os.open(path.parent, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
