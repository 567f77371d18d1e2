"""The format of a file of rows, and its locks.

A file is a header page, the rows, and a tail: the manifest (JSON), a byte per slot that says whether it was written, a
CRC-32C per slot, and the sidecar's tensors. The header holds the lengths, the tail's checksum and its own.
"""

from __future__ import annotations

import contextlib
import dataclasses
import errno
import fcntl
import json
import os
import struct
import time
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from learndrop_ext import ops
from learndrop_ext.ops import transfer
from learndrop_ext.ops.transfer import PAGE_BYTES
from learndrop_ext.rows.store.fingerprint import Fingerprint

MAGIC = b"LDROWS\r\n"
VERSION = 4
#: The beginning of the header page. The page's last four bytes are its checksum.
HEADER = struct.Struct("<8sIQQQI")


class CacheFileError(ValueError):
    """A file whose rows must not be used: it is damaged, of another version, or of another cache."""


@dataclass(frozen=True)
class Manifest:
    """A description of the rows in a file.

    Args:
        codec (str): how rows are stored.
        shape (tuple of int): shape of a row.
        stored (tuple of int): strides of the stored values of a row.
        strides (tuple of int): strides of the rows returned.
        dtype (str): dtype of the rows stored and returned; "" before the first.
        slots (int): R.
        row_bytes (int): bytes of a row without padding.
        stride_bytes (int): bytes from one row to the next.
        fingerprint (Fingerprint): what the rows depend on.
    """

    codec: str
    shape: tuple[int, ...]
    stored: tuple[int, ...]
    strides: tuple[int, ...]
    dtype: str
    slots: int
    row_bytes: int
    stride_bytes: int
    fingerprint: Fingerprint


@dataclass(frozen=True)
class Sidecar:
    """Other data stored in a file of rows.

    Args:
        values (optional): any value that JSON can hold. Default: None
        tensors (tuple of Tensor, optional): tensors on the CPU. Default: ()
    """

    values: Any = None
    tensors: tuple[Tensor, ...] = ()


class Tables(NamedTuple):
    """The tail of a file. filled: [R] bool, which slots were written; checksums: [R] int32."""

    manifest: Manifest
    filled: Tensor
    checksums: Tensor
    sidecar: Sidecar


class _Header(NamedTuple):
    magic: bytes
    version: int
    tail_offset: int
    text_bytes: int
    tail_bytes: int
    tail_checksum: int


def pack_tables(tables: Tables, tail_offset: int) -> tuple[bytes, bytes]:
    """Return the header page and the tail of a file.

    Raises:
        TypeError: if the sidecar holds values that JSON cannot.
    """
    manifest, filled, checksums, sidecar = tables
    forms = [(str(t.dtype).removeprefix("torch."), list(t.shape)) for t in sidecar.tensors]
    values = dataclasses.asdict(manifest) | {"sidecar": sidecar.values, "tensors": forms}
    text = json.dumps(values, sort_keys=True).encode()
    tail = b"".join([text, *(_bytes_of(table) for table in (filled, checksums, *sidecar.tensors))])
    page = HEADER.pack(*_Header(MAGIC, VERSION, tail_offset, len(text), len(tail), transfer.crc32c(tail)))
    page += bytes(PAGE_BYTES - 4 - len(page))
    return page + struct.pack("<I", transfer.crc32c(page)), tail


def read_tables(path: Path, descriptor: int) -> Tables:
    """Return the tail of an open file.

    Raises:
        CacheFileError: if the header or the tail is damaged or truncated, or the version is another one.
    """
    header = _read_header(path, descriptor)
    tail = bytearray(os.pread(descriptor, header.tail_bytes, header.tail_offset))
    computed = transfer.crc32c(tail)
    if header.tail_checksum != computed:
        raise _refused(
            path, "the checksum of manifest and tables", f"{header.tail_checksum:#010x}", f"{computed:#010x}"
        )
    manifest, values, forms = _parse(tail[: header.text_bytes])
    row_bytes = ops.row_bytes(manifest.shape, manifest.codec)
    if manifest.row_bytes != row_bytes:
        what = f"row_bytes of {manifest.codec} rows {manifest.shape}"
        raise _refused(path, what, row_bytes, manifest.row_bytes)
    tables, offset = [], header.text_bytes
    for name, shape in [("bool", [manifest.slots]), ("int32", [manifest.slots]), *forms]:
        table = torch.empty(shape, dtype=getattr(torch, name))
        if table.nbytes:
            # Copied, because its address in `tail` need not be aligned.
            read = torch.frombuffer(tail, dtype=torch.uint8, count=table.nbytes, offset=offset)
            table.view(-1).view(torch.uint8).copy_(read)
        tables.append(table)
        offset += table.nbytes
    filled, checksums, *tensors = tables
    return Tables(manifest, filled, checksums, Sidecar(values, tuple(tensors)))


def read_manifest(path: Path) -> Manifest:
    """Return the manifest of a file, without reading or checking the other tables.

    Raises:
        OSError: if the file cannot be read.
        CacheFileError: if its header or manifest is damaged, or the version is another one.
    """
    descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        header = _read_header(path, descriptor)
        text = os.pread(descriptor, header.text_bytes, header.tail_offset)
    finally:
        os.close(descriptor)
    try:
        return _parse(text)[0]
    except (ValueError, KeyError, TypeError) as error:
        raise _refused(path, "the manifest", "JSON with the known keys", error) from None


def check_fingerprint(path: Path, wanted: Fingerprint, got: Fingerprint) -> None:
    """Raise CacheFileError if a file has another fingerprint, naming the first difference."""
    for field in dataclasses.fields(Fingerprint):
        ours, theirs = getattr(wanted, field.name), getattr(got, field.name)
        if ours != theirs:
            raise CacheFileError(
                f"cache file {path}: its rows must be of {field.name} {ours!r}, got rows of {field.name} {theirs!r}"
            )


def lock(descriptor: int, kind: int) -> None:
    """Lock an open file (fcntl.LOCK_SH or LOCK_EX) without waiting. Raises OSError if it is locked."""
    try:
        fcntl.flock(descriptor, kind | fcntl.LOCK_NB)
    except BlockingIOError:
        raise OSError(errno.EBUSY, "another one has it open") from None


@contextlib.contextmanager
def naming(subject: str, wanted: str) -> Iterator[None]:
    """Add to an OSError its subject and what was wanted of it, keeping its type and errno."""
    try:
        yield
    except OSError as error:
        raise type(error)(error.errno, f"{subject}: {wanted}, got {error.strerror}") from error


def remove_abandoned(parts: Iterable[Path]) -> None:
    """Delete unfinished files that no process has open. One created in the last minute may not be locked yet, and stays."""
    for part in parts:
        with contextlib.suppress(OSError):
            if time.time() - part.stat().st_mtime >= 60:
                remove_unused(part)


def remove_unused(path: Path) -> None:
    """Delete a file that no process has open. Raises OSError, with errno EBUSY if one has."""
    descriptor = os.open(path, os.O_RDWR | os.O_CLOEXEC)
    try:
        lock(descriptor, fcntl.LOCK_EX)
        path.unlink()
    finally:
        os.close(descriptor)


def _refused(path: Path, what: str, wanted: object, got: object) -> CacheFileError:
    return CacheFileError(f"cache file {path}: {what} must be {wanted}, got {got}")


def _read_header(path: Path, descriptor: int) -> _Header:
    size = os.fstat(descriptor).st_size
    page = os.pread(descriptor, PAGE_BYTES, 0)
    if len(page) < PAGE_BYTES:
        raise _refused(path, "the header", f"{PAGE_BYTES} bytes", f"a file of {size}")
    header = _Header(*HEADER.unpack(page[: HEADER.size]))
    if header.magic != MAGIC:
        raise _refused(path, "the first bytes", MAGIC, header.magic)
    stored, computed = struct.unpack("<I", page[-4:])[0], transfer.crc32c(page[:-4])
    if stored != computed:
        raise _refused(path, "the header's checksum", f"{computed:#010x}", f"{stored:#010x}")
    if header.version != VERSION:
        raise _refused(path, "the version", VERSION, header.version)
    end = header.tail_offset + header.tail_bytes
    if size != end:
        raise _refused(path, "the file", f"{end:,} bytes long", f"{size:,}")
    return header


def _parse(text: bytes | bytearray) -> tuple[Manifest, Any, list[tuple[str, list[int]]]]:
    """The manifest, the sidecar's values, and the dtype and shape of each of its tensors."""
    values = json.loads(text)
    sidecar, forms = values.pop("sidecar"), values.pop("tensors")
    values["fingerprint"] = Fingerprint(**values["fingerprint"])
    values |= {name: tuple(values[name]) for name in ("shape", "stored", "strides")}
    return Manifest(**values), sidecar, forms


def _bytes_of(table: Tensor) -> bytes:
    return table.contiguous().view(-1).view(torch.uint8).numpy().tobytes()
