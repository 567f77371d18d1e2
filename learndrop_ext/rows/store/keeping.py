"""Keeping a store in order: what is there, removing what is not used, checking and compacting what is."""

from __future__ import annotations

import contextlib
import fcntl
import os
import time
import uuid
from dataclasses import dataclass
from pathlib import Path

import torch

from learndrop_ext.ops import transfer
from learndrop_ext.rows.store.store import CHECKED, THREADS, Entry, RowStore, StoredRows, locked


@dataclass(frozen=True)
class StoredSet:
    """The rows of one fingerprint in a store."""

    file: str  # its name
    cut: int  # number of layers before the rows
    layers: str  # the network, and names of these
    codec: str
    samples: int  # number of samples
    rows: int  # number of rows
    bytes: int  # size of the file
    unused_bytes: int  # of these, the bytes of rows that were deleted
    age_seconds: float  # time since a run last used them
    in_use: bool  # whether a run uses them now


def list_rows(store: RowStore) -> list[StoredSet]:
    """Return what is in a store, the most recently used first."""
    return [_described(store, entry) for entry in store.entries()]


def remove_rows(
    store: RowStore, *, older_than_seconds: float | None = None, keep_bytes: int | None = None
) -> tuple[list[StoredSet], list[StoredSet]]:
    """Delete rows that no run uses: those that were not used for longer than `older_than_seconds`, and the least recently
    used until the rest, with what is in use, takes no more than `keep_bytes`.

    Return what was deleted, and what was not because a run uses it. Raises ValueError if a condition is negative; nothing is
    deleted then.
    """
    for name, value in (("older_than_seconds", older_than_seconds), ("keep_bytes", keep_bytes)):
        if value is not None and not value >= 0:
            raise ValueError(f"remove_rows: {name} must be >= 0, got {value}")
    if older_than_seconds is None and keep_bytes is None:
        return [], []
    removed, in_use = [], []
    there = [(entry, _described(store, entry)) for entry in store.entries()]
    left = sum(one.bytes for _, one in there)
    for entry, one in reversed(there):
        unused = older_than_seconds is not None and one.age_seconds > older_than_seconds
        if not unused and (keep_bytes is None or left <= keep_bytes):
            continue
        if store.remove(entry):
            removed.append(one)
            left -= one.bytes
        else:
            in_use.append(one)
    return removed, in_use


def check_rows(store: RowStore) -> dict[str, int]:
    """Compare all rows with their checksums, delete those that differ from the index, and return their number by file."""
    damaged = {}
    for entry in store.entries():
        stored = StoredRows(store, entry.fingerprint, digest=entry.digest)
        try:
            if stored.form is None:  # its file was deleted
                continue
            names = dict(enumerate({sample for sample, *_ in _rows(store, entry)}))
            found = stored.find(names)
            bad = torch.nonzero(stored.damaged(found.place)).flatten()
            if len(bad):
                stored.forget([names[i] for i in found.sample[bad].tolist()], found.view[bad].tolist())
                damaged[entry.file] = len(bad)
        finally:
            stored.close()
    return damaged


def compact(store: RowStore) -> int:
    """Write files with deleted rows anew, without them, and delete files that are not in the index. Return the bytes saved.

    Files that a run uses stay as they are.
    """
    before = sum(os.path.getsize(path) for path in store.folder.glob("rows-*.bin"))
    for entry in store.entries():
        if _described(store, entry).unused_bytes:
            with contextlib.suppress(FileNotFoundError):
                _rewrite(store, entry)
    with store.transaction():  # a file is made and indexed in one
        known = {entry.file for entry in store.entries()}
        for path in store.folder.glob("rows-*.bin"):
            if path.name not in known and not _in_use(path):
                path.unlink(missing_ok=True)
    return before - sum(os.path.getsize(path) for path in store.folder.glob("rows-*.bin"))


def _rewrite(store: RowStore, entry: Entry) -> None:
    """Copy the rows of a file that are in the index to a new file, unless a run uses it or a row is damaged."""
    layout = entry.row_form.layout
    unused = name = f"rows-{uuid.uuid4().hex[:12]}.bin"
    with contextlib.ExitStack() as stack:
        stack.callback(os.close, old := os.open(store.folder / entry.file, os.O_RDWR | os.O_CLOEXEC))
        if not locked(old, fcntl.LOCK_EX) or store.entry(entry.digest, file=entry.file) is None:
            return
        stack.callback(lambda: (store.folder / unused).unlink(missing_ok=True))
        with store.transaction():  # nobody takes it for a file that is not in the index
            new = os.open(store.folder / name, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o666)
            stack.callback(os.close, new)
            locked(new, fcntl.LOCK_EX)
        lines = _rows(store, entry)
        places = torch.tensor([place for _, _, place, _ in lines], dtype=torch.int64)
        before = torch.zeros(int(places.max()) + 1 if lines else 0, dtype=torch.int32)
        before[places] = torch.tensor([checksum for *_, checksum in lines], dtype=torch.int32)
        after = torch.zeros(len(lines), dtype=torch.int32)
        for part in torch.arange(len(lines)).split(CHECKED) if lines else ():
            rows = torch.empty(len(part), layout.stride_bytes, dtype=torch.uint8)
            if transfer.read_rows(layout.file(old), places[part], rows, before, threads=THREADS) is not None:
                return
            transfer.write_rows(layout.file(new), part, rows, after, threads=THREADS)
        with store.transaction():
            store.db.executemany(
                "UPDATE rows SET place = ? WHERE fingerprint = ? AND sample = ? AND view = ?",
                [(place, entry.id, sample, view) for place, (sample, view, _, _) in enumerate(lines)],
            )
            store.db.execute("UPDATE fingerprints SET file = ?, places = ? WHERE id = ?", (name, len(lines), entry.id))
        unused = entry.file


def _described(store: RowStore, entry: Entry) -> StoredSet:
    made_of = entry.fingerprint
    with store.errors():
        samples, rows = store.db.execute(
            "SELECT COUNT(DISTINCT sample), COUNT(*) FROM rows WHERE fingerprint = ?", (entry.id,)
        ).fetchone()
    path, size = store.folder / entry.file, 0
    with contextlib.suppress(FileNotFoundError):
        size = os.path.getsize(path)
    return StoredSet(
        file=entry.file,
        cut=made_of.cut,
        layers=made_of.layers,
        codec=made_of.codec,
        samples=samples,
        rows=rows,
        bytes=size,
        unused_bytes=(entry.places - rows) * entry.row_form.layout.stride_bytes,
        age_seconds=max(0.0, time.time() - entry.used),
        in_use=_in_use(path),
    )


def _in_use(path: Path) -> bool:
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    except FileNotFoundError:
        return False
    try:
        return not locked(descriptor, fcntl.LOCK_EX)
    finally:
        os.close(descriptor)


def _rows(store: RowStore, entry: Entry) -> list[tuple[bytes, int, int, int]]:
    """Sample, view, place and checksum of each row in the index."""
    with store.errors():
        return store.db.execute(
            "SELECT sample, view, place, checksum FROM rows WHERE fingerprint = ? ORDER BY place", (entry.id,)
        ).fetchall()
