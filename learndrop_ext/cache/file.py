"""Rows of a cache in one file that is written aside, synced and renamed: complete and right, or refused.

A file is a header page, the rows, and a tail: the manifest (JSON), one byte a slot that says whether it was written, and
one CRC-32C a slot, then what is kept beside the rows. The header holds the lengths, the tail's checksum and its own.
While a file is filled it is called `<name>.part`, has no header, and its tables are in memory; what a killed process
left of it is written over.
"""

from __future__ import annotations

import contextlib
import dataclasses
import errno
import fcntl
import json
import math
import os
import struct
import time
import weakref
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from learndrop_ext import ops
from learndrop_ext.cache.fingerprint import Fingerprint
from learndrop_ext.cache.layout import RowLayout
from learndrop_ext.ops import free_bytes, transfer
from learndrop_ext.ops.transfer import PAGE_BYTES

CPU = torch.device("cpu")
MAGIC = b"LDROWS\r\n"
VERSION = 2
# magic, version, and the tail's offset, manifest bytes, bytes and checksum. The page's last four bytes are its checksum.
HEADER = struct.Struct("<8sIQQQI")
# So many reads keep the queue of an NVMe disk filled; the threads sleep while it works.
THREADS = 8
# Rows of less than half of this are read with their neighbours, which the same epoch wants too. Measured on a disk that
# gives 1.0 to 1.7 GB/s from begin to end: random reads of 4 KB gave 0.23 GB/s (58,000 a second, whatever the number of
# threads), of 32 KB 0.74, of 128 KB 0.9. Larger blocks were no faster: all of the file is then there before any row of it
# is copied and checked.
BLOCK_BYTES = 128 << 10


class CacheFileError(ValueError):
    """A file that holds no rows that may be used: damaged, of another version, or of another cache."""


@dataclass(frozen=True)
class Manifest:
    """What the rows of a file are: `slots` places for rows of `shape`, kept with `codec` as `stored_shape`."""

    codec: str
    shape: tuple[int, ...]
    stored_shape: tuple[int, ...]
    dtype: str
    augmented: bool
    slots: int
    row_bytes: int
    stride_bytes: int
    fingerprint: Fingerprint


@dataclass(frozen=True)
class Sidecar:
    """What a file keeps beside its rows: plain values, as JSON has them, and tensors on the CPU."""

    values: Any = None
    tensors: tuple[Tensor, ...] = ()


@dataclass(frozen=True)
class SavedRows:
    """What `open_rows` finds in a file; filled: which rows were written [R] bool."""

    disk: DiskTier
    manifest: Manifest
    filled: Tensor
    sidecar: Sidecar


@dataclass
class _Handle:
    """An open file; a part goes with it. A forked child does not own it."""

    descriptor: int
    part: Path | None
    process: int = dataclasses.field(default_factory=os.getpid)


def _release(handle: _Handle) -> None:
    if handle.process != os.getpid():
        return
    if handle.part is not None:
        handle.part.unlink(missing_ok=True)
    # A forked child keeps the descriptor, and with it the lock, which another cache may want.
    fcntl.flock(handle.descriptor, fcntl.LOCK_UN)
    os.close(handle.descriptor)


class DiskTier:
    """R rows by slot in one file at `path`, read and written by several threads without the GIL.

    A new one is `<path>.part` until `commit`, and goes when it is closed before; one made by `open` is at `path` until
    a row is written, which makes it a part again: rows at `path` never change in place.
    """

    def __init__(self, path: Path, layout: RowLayout, *, _descriptor: int | None = None) -> None:
        self.path = path
        self.layout = layout
        self.checksums = torch.zeros(0, dtype=torch.int32)
        self._free_bytes = -math.inf, 0  # when it was asked for, and how many there were
        if _descriptor is None:
            with _explain(path, "must be written by one cache at a time, in a folder that is there"):
                descriptor = os.open(self.part, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
                _lock(descriptor, fcntl.LOCK_EX)
                os.ftruncate(descriptor, 0)
            self._handle = _Handle(descriptor, self.part)
        else:
            self._handle = _Handle(_descriptor, None)
        self._finalizer = weakref.finalize(self, _release, self._handle)

    @property
    def part(self) -> Path:
        """The name while it is filled."""
        return self.path.with_name(self.path.name + ".part")

    @property
    def committed(self) -> bool:
        """Whether the file at `path` holds exactly these rows."""
        return self._handle.part is None

    def grow(self, slots: int, *, first: int) -> None:
        """Make room for `slots` rows in all, and take the disk space of those from `first` on now, so that a full disk
        is met before the work is done. Raises OSError."""
        if self.committed and slots <= len(self.checksums):
            return
        self._unseal()
        if first < slots:
            begin = self.layout.begin(first)
            size = self.layout.end(slots) - begin
            with _explain(self.path, f"must have {size:,} bytes of disk space for {slots - first} rows"):
                os.posix_fallocate(self._handle.descriptor, begin, size)
        more = max(0, slots - len(self.checksums))
        self.checksums = torch.cat([self.checksums, self.checksums.new_zeros(more)])

    def read(self, slots: Tensor, into: Tensor) -> None:
        """Read the rows at slots [n] int64 into `into` [n, S] uint8 (CPU).

        Where the whole file fits into half of the free memory, small rows come in blocks and stay there: an epoch then
        reads the disk once, whatever the order of the rows. Raises CacheFileError for a row that does not have its
        checksum, OSError when the file cannot be read.
        """
        with _explain(self.path, f"must give {len(slots)} rows"):
            bad = transfer.read_rows(
                self.layout.file(self._handle.descriptor),
                slots,
                into,
                self.checksums,
                threads=THREADS,
                block_bytes=BLOCK_BYTES if self._reads_blocks() else 1,
            )
        if bad is not None:
            raise CacheFileError(
                f"cache file {self.path}: row {int(slots[bad])} must have the checksum it was written with, got another: "
                "the file was altered or cut; delete it, and its rows are computed again"
            )

    def _reads_blocks(self) -> bool:
        """Whether rows are small, and the file fits into half of the memory that was free within the last second."""
        if 2 * self.layout.row_bytes >= BLOCK_BYTES:
            return False
        now = time.monotonic()
        if now > self._free_bytes[0] + 1:
            self._free_bytes = now, free_bytes(CPU)
        return 2 * self.layout.end(len(self.checksums)) <= self._free_bytes[1]

    def write(self, slots: Tensor, rows: Tensor) -> None:
        """Write rows [n, S] uint8 (CPU) to slots [n] int64. Raises OSError; these slots then hold no rows."""
        self._unseal()
        with _explain(self.path, f"must have disk space for {len(slots)} rows of {self.layout.row_bytes:,} bytes"):
            transfer.write_rows(self.layout.file(self._handle.descriptor), slots, rows, self.checksums, threads=THREADS)

    def commit(self, manifest: Manifest, filled: Tensor, sidecar: Sidecar) -> None:
        """Make the rows a file at `path` in place of what was there; filled: [R] bool. Raises TypeError for values that
        JSON does not have, OSError: `path` is then as it was, and the rows can still be read and committed again."""
        forms = [(str(t.dtype).removeprefix("torch."), list(t.shape)) for t in sidecar.tensors]
        values = dataclasses.asdict(manifest) | {"sidecar": sidecar.values, "tensors": forms}
        text = json.dumps(values, sort_keys=True).encode()
        self._unseal()
        tables = (filled, self.checksums[: manifest.slots], *sidecar.tensors)
        tail = b"".join([text, *(_bytes_of(table) for table in tables)])
        tail_offset = self.layout.end(manifest.slots)
        page = HEADER.pack(MAGIC, VERSION, tail_offset, len(text), len(tail), transfer.crc32c(tail))
        page += bytes(PAGE_BYTES - 4 - len(page))
        page += struct.pack("<I", transfer.crc32c(page))
        descriptor = self._handle.descriptor
        with _explain(self.path, "must have disk space for its tables"):
            os.ftruncate(descriptor, tail_offset)
            _write_all(descriptor, tail, tail_offset)
            _write_all(descriptor, page, 0)
            os.fsync(descriptor)
            os.rename(self.part, self.path)
            self._handle.part = None
            _sync_folder(self.path)
        fcntl.flock(descriptor, fcntl.LOCK_SH)

    def _unseal(self) -> None:
        """Make a committed file a part again, before it changes."""
        if not self.committed:
            return
        with _explain(self.path, "must not be read by another process while rows are written"):
            _lock(self._handle.descriptor, fcntl.LOCK_EX)
            os.rename(self.path, self.part)
            self._handle.part = self.part
            _sync_folder(self.path)

    def close(self) -> None:
        """Close the file; one that was not committed is deleted."""
        self._finalizer()


def open_rows(path: Path, fingerprint: Fingerprint) -> SavedRows:
    """The rows of a committed file, and all that the file says of them.

    Raises FileNotFoundError, or CacheFileError naming what is wrong first: a damaged or cut header or tail, another
    version, or the first difference of the fingerprint. Rows are checked when they are read.
    """
    descriptor = os.open(path, os.O_RDWR | os.O_CLOEXEC)
    try:
        with _explain(path, "must not be written by another process"):
            _lock(descriptor, fcntl.LOCK_SH)
        manifest, filled, checksums, sidecar = _read_tables(path, descriptor)
        for field in dataclasses.fields(Fingerprint):
            wanted, got = getattr(fingerprint, field.name), getattr(manifest.fingerprint, field.name)
            if wanted != got:
                raise CacheFileError(
                    f"cache file {path}: its rows must be of {field.name} {wanted!r}, got rows of {field.name} {got!r}"
                )
    except BaseException:
        os.close(descriptor)
        raise
    layout = RowLayout(manifest.row_bytes, manifest.stride_bytes)
    rows = DiskTier(path, layout, _descriptor=descriptor)
    rows.checksums = checksums
    return SavedRows(rows, manifest, filled, sidecar)


def remove_abandoned(parts: Iterable[Path]) -> None:
    """Delete unfinished files that no living process has open. One made in the last minute may not be locked yet."""
    for part in parts:
        with contextlib.suppress(OSError):
            if time.time() - part.stat().st_mtime < 60:
                continue
            descriptor = os.open(part, os.O_RDWR | os.O_CLOEXEC)
            try:
                _lock(descriptor, fcntl.LOCK_EX)
                part.unlink()
            finally:
                os.close(descriptor)


def _read_tables(path: Path, descriptor: int) -> tuple[Manifest, Tensor, Tensor, Sidecar]:
    def refuse(what: str, wanted: object, got: object) -> CacheFileError:
        return CacheFileError(f"cache file {path}: {what} must be {wanted}, got {got}")

    size = os.fstat(descriptor).st_size
    page = os.pread(descriptor, PAGE_BYTES, 0)
    if len(page) < PAGE_BYTES:
        raise refuse("the header", f"{PAGE_BYTES} bytes", f"a file of {size}")
    magic, version, tail_offset, text_bytes, tail_bytes, tail_checksum = HEADER.unpack(page[: HEADER.size])
    if magic != MAGIC:
        raise refuse("the first bytes", MAGIC, magic)
    stored, computed = struct.unpack("<I", page[-4:])[0], transfer.crc32c(page[:-4])
    if stored != computed:
        raise refuse("the header's checksum", f"{computed:#010x}", f"{stored:#010x}")
    if version != VERSION:
        raise refuse("the version", VERSION, version)
    if size != tail_offset + tail_bytes:
        raise refuse("the file", f"{tail_offset + tail_bytes:,} bytes long", f"{size:,}")
    tail = bytearray(os.pread(descriptor, tail_bytes, tail_offset))
    computed = transfer.crc32c(tail)
    if tail_checksum != computed:
        raise refuse("the checksum of manifest and tables", f"{tail_checksum:#010x}", f"{computed:#010x}")
    values = json.loads(tail[:text_bytes])
    kept_values, forms = values.pop("sidecar"), values.pop("tensors")
    manifest = _manifest(values)
    row_bytes = ops.row_bytes(manifest.stored_shape, manifest.codec)
    if manifest.row_bytes != row_bytes:
        raise refuse(f"row_bytes of {manifest.codec} rows {manifest.stored_shape}", row_bytes, manifest.row_bytes)
    slots = [manifest.slots]
    tables, offset = [], text_bytes
    for name, shape in [("bool", slots), ("int32", slots), *forms]:
        table = torch.empty(shape, dtype=getattr(torch, name))
        if table.nbytes:
            # Copied to memory of its own: what stands before it in the file has any length.
            kept = torch.frombuffer(tail, dtype=torch.uint8, count=table.nbytes, offset=offset)
            table.view(-1).view(torch.uint8).copy_(kept)
        tables.append(table)
        offset += table.nbytes
    filled, checksums, *tensors = tables
    return manifest, filled, checksums, Sidecar(kept_values, tuple(tensors))


def _bytes_of(table: Tensor) -> bytes:
    return table.contiguous().view(-1).view(torch.uint8).numpy().tobytes()


def _manifest(values: dict[str, Any]) -> Manifest:
    values["fingerprint"] = Fingerprint(**values["fingerprint"])
    values["shape"], values["stored_shape"] = tuple(values["shape"]), tuple(values["stored_shape"])
    return Manifest(**values)


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


def _lock(descriptor: int, kind: int) -> None:
    try:
        fcntl.flock(descriptor, kind | fcntl.LOCK_NB)
    except BlockingIOError:
        raise OSError(errno.EBUSY, "another one has it open") from None


@contextlib.contextmanager
def _explain(path: Path, wanted: str) -> Iterator[None]:
    """Say of an OSError what was wanted of which file; its type and number stay."""
    try:
        yield
    except OSError as error:
        raise type(error)(error.errno, f"cache file {path}: {wanted}, got {error.strerror}") from error
