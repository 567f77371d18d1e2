"""A folder of rows that outlive a run: an index in SQLite, and a flat file of rows for each fingerprint.

Files are only appended to, under the index's write lock. A row is there once the transaction that indexes it is. n rows in
a call, S bytes from one row to the next in memory.
"""

from __future__ import annotations

import contextlib
import dataclasses
import fcntl
import hashlib
import json
import os
import sqlite3
import time
import uuid
import weakref
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from learndrop_ext.ops import transfer
from learndrop_ext.rows.layout import RowForm
from learndrop_ext.rows.plan import lengthened
from learndrop_ext.rows.store.fingerprint import Fingerprint

INDEX = "index.sqlite"
#: In the index's header: "LDRS", and the version of the tables below.
APPLICATION, VERSION = 0x4C445253, 1
SCHEMA = f"""
PRAGMA application_id = {APPLICATION};
PRAGMA user_version = {VERSION};
CREATE TABLE fingerprints (
    id INTEGER PRIMARY KEY,
    digest TEXT NOT NULL UNIQUE,
    made_of TEXT NOT NULL,      -- JSON of the Fingerprint
    form TEXT NOT NULL,         -- JSON of the RowForm of the first row
    dtype TEXT NOT NULL,        -- of the rows returned
    file TEXT NOT NULL,
    places INTEGER NOT NULL,    -- the first free place of the file
    used REAL NOT NULL,         -- time of the last use
    private INTEGER NOT NULL    -- 1: deleted with the run that writes it
);
CREATE TABLE rows (
    fingerprint INTEGER NOT NULL,
    sample BLOB NOT NULL,
    view INTEGER NOT NULL,
    place INTEGER NOT NULL,
    checksum INTEGER NOT NULL,  -- CRC-32C
    image INTEGER,              -- digest of the image, if it is always the same
    PRIMARY KEY (fingerprint, sample, view)
) WITHOUT ROWID;
"""
#: How long to wait for another process to write or compact.
BUSY_SECONDS = 60.0
#: Eight reads at a time keep the queue of an NVMe disk filled; the threads sleep meanwhile.
THREADS = 8
#: Rows that are checked at once.
CHECKED = 256


class StoreError(ValueError):
    """A store, or rows in it, that must not be used: damaged, or of another version."""


class RowKeys(NamedTuple):
    """What rows are called in a store.

    samples: keys of their samples; views: [n] int64, which view of it; images: digests of their images, or None.
    """

    samples: Sequence[bytes]
    views: Sequence[int]
    images: Sequence[int | None]


class FoundRows(NamedTuple):
    """Rows in a store: which of the samples asked for, their view, place and image's digest (0 without one): [n] int64."""

    sample: Tensor
    view: Tensor
    place: Tensor
    image: Tensor
    has_image: Tensor  # [n] bool


class RowStore:
    """An open store: a folder that is there, in which an index is made. Any number of processes may use one at once.

    Raises OSError if the folder cannot be read, written or locked, StoreError if the index is damaged, or not one of this
    version.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.process = os.getpid()
        with self.errors():
            self.db = sqlite3.connect(
                folder / INDEX, timeout=BUSY_SECONDS, isolation_level=None, check_same_thread=False
            )
            self._close = weakref.finalize(self, _close, self.db, self.process)
            self._write_ahead()
            # A row that a crash of the machine has taken from its file is found by its checksum.
            self.db.execute("PRAGMA synchronous = NORMAL")
        self._set_up()

    def _write_ahead(self) -> None:
        """Write ahead, as other processes do or are about to: SQLite does not wait for them here."""
        deadline = time.monotonic() + BUSY_SECONDS
        while True:
            try:
                self.db.execute("PRAGMA journal_mode = WAL")
                return
            except sqlite3.OperationalError as error:
                if "locked" not in str(error) or time.monotonic() > deadline:
                    raise
            time.sleep(0.01)

    def _set_up(self) -> None:
        with self.transaction():
            pragmas = ("application_id", "user_version")
            application, version = (self.db.execute(f"PRAGMA {name}").fetchone()[0] for name in pragmas)
            if application == version == 0 and not self.db.execute("SELECT 1 FROM sqlite_master").fetchone():
                for statement in SCHEMA.split(";"):
                    self.db.execute(statement)
            elif (application, version) != (APPLICATION, VERSION):
                raise StoreError(
                    f"store {self.folder}: {INDEX} must be of a store of version {VERSION}, got application "
                    f"{application:#x}, version {version}; give another folder, or delete this one"
                )
        for entry in self.entries():
            if entry.private:  # of a run that was killed, unless it has its file open
                self.remove(entry)

    def close(self) -> None:
        """Close the index."""
        self._close()

    def entries(self) -> list[Entry]:
        """Return what is there, the most recently used first."""
        with self.errors():
            found = self.db.execute(
                f"SELECT {', '.join(Entry._fields)} FROM fingerprints ORDER BY used DESC"
            ).fetchall()
        return [Entry(*values) for values in found]

    def entry(self, digest: str, *, file: str | None = None) -> Entry | None:
        """Return what is there under a digest, and in this file if one is given, or None."""
        return next((one for one in self.entries() if one.digest == digest and file in (None, one.file)), None)

    def remove(self, entry: Entry) -> bool:
        """Delete all rows of an entry; return False if a run uses them, or if they are in another file now."""
        path = self.folder / entry.file
        with self.transaction(), contextlib.ExitStack() as stack:
            if self.entry(entry.digest, file=entry.file) is None:
                return False
            with contextlib.suppress(FileNotFoundError):
                descriptor = os.open(path, os.O_RDWR | os.O_CLOEXEC)
                stack.callback(os.close, descriptor)
                if not locked(descriptor, fcntl.LOCK_EX):
                    return False
                path.unlink()  # first, as the index needs space too
            self.db.execute("DELETE FROM rows WHERE fingerprint = ?", (entry.id,))
            self.db.execute("DELETE FROM fingerprints WHERE id = ?", (entry.id,))
        return True

    @property
    def is_forked(self) -> bool:
        """Whether this is a fork of the process that opened the store: it may only read rows whose file is open, as
        SQLite's connections cannot be used there."""
        return self.process != os.getpid()

    @contextlib.contextmanager
    def transaction(self) -> Iterator[None]:
        """Hold the write lock inside; take back what was written if an error leaves it. Raises RuntimeError in a forked
        process."""
        if self.is_forked:
            raise RuntimeError(
                f"store {self.folder}: rows must be written by the process that opened it, {self.process}, got the forked "
                f"process {os.getpid()}"
            )
        with self.errors():
            self.db.execute("BEGIN IMMEDIATE")
            try:
                yield
                self.db.execute("COMMIT")
            except BaseException:
                with contextlib.suppress(sqlite3.Error):
                    self.db.execute("ROLLBACK")
                raise

    @contextlib.contextmanager
    def errors(self) -> Iterator[None]:
        """Turn errors of SQLite into OSError, or StoreError if the index is damaged."""
        try:
            yield
        except sqlite3.OperationalError as error:
            raise OSError(
                f"store {self.folder}: wanted a folder that can be read, written and locked, got: {error}"
            ) from error
        except sqlite3.DatabaseError as error:
            raise StoreError(
                f"store {self.folder}: {INDEX} must be a whole index, got: {error}; delete the folder, and its rows are "
                "computed again"
            ) from error


class Entry(NamedTuple):
    """A line of the table of fingerprints."""

    id: int
    digest: str
    made_of: str
    form: str
    dtype: str
    file: str
    places: int
    used: float
    private: int

    @property
    def fingerprint(self) -> Fingerprint:
        """What its rows depend on."""
        return Fingerprint(**json.loads(self.made_of))

    @property
    def row_form(self) -> RowForm:
        """How its rows lie."""
        values = json.loads(self.form)
        return RowForm(tuple(values["shape"]), values["codec"], tuple(values["stored"]), tuple(values["strides"]))


class StoredRows:
    """The rows of one fingerprint. They are looked up by their keys once, and from then on read by place.

    Private ones are of this run alone: they are deleted with it, unless `keep` was called. digest: that of private rows
    which a run has kept; if not given, a new one, or the fingerprint's if not private.
    """

    def __init__(
        self, store: RowStore, made_of: Fingerprint, *, private: bool = False, digest: str | None = None
    ) -> None:
        self._store, self._made_of = store, made_of
        self._kept = digest is not None
        self.digest = digest or self._digest_of(uuid.uuid4().hex if private else "")
        self.checksums = torch.zeros(0, dtype=torch.int32)  # by place
        self.entry: Entry | None = None
        self.form: RowForm | None = None  # how the rows lie; None if there are none
        self._file = _File(-1)
        self._finalizer = weakref.finalize(self, self._file.close)
        #: Whether the rows are of this run alone.
        self.is_private = private or (digest is not None and digest != self._digest_of(""))
        self._open()

    @property
    def dtype(self) -> torch.dtype | None:
        """The dtype of the rows returned; None if there are none."""
        return None if self.entry is None else getattr(torch, self.entry.dtype)

    @property
    def nbytes(self) -> int:
        """Bytes of the file."""
        return 0 if self._file.descriptor < 0 else os.fstat(self._file.descriptor).st_size

    def find(self, names: Mapping[int, bytes]) -> FoundRows:
        """Return the rows of samples, given by number with their keys. Several may have one key."""
        numbers: dict[bytes, list[int]] = {}
        for number, name in names.items():
            numbers.setdefault(name, []).append(number)
        found = []
        if self.entry is not None:
            with self._store.errors():
                lines = self._store.db.execute(
                    "SELECT sample, view, place, checksum, image FROM rows WHERE fingerprint = ?", (self.entry.id,)
                )
                found = [(number, *line[1:]) for line in lines for number in numbers.get(line[0], ())]
        sample, view, place, checksum, image = zip(*found, strict=True) if found else ((),) * 5
        places = torch.tensor(place, dtype=torch.int64)
        self.checksums = lengthened(self.checksums, max(place, default=-1) + 1)
        self.checksums[places] = torch.tensor(checksum, dtype=torch.int32)
        return FoundRows(
            torch.tensor(sample, dtype=torch.int64),
            torch.tensor(view, dtype=torch.int64),
            places,
            torch.tensor([one or 0 for one in image], dtype=torch.int64),
            torch.tensor([one is not None for one in image], dtype=torch.bool),
        )

    def append(self, keys: RowKeys, rows: Tensor, form: RowForm, dtype: torch.dtype) -> Tensor:
        """Add rows [n, S] uint8 (CPU), and return the places [n] of each: that of another run, if it has added the same,
        and not of another image.

        Raises:
            OSError: the disk is full, or the store cannot be written. Nothing is added then.
            StoreError: the index is damaged, or the rows in it lie in another form.
        """
        if self.entry is None:
            self._create(form, dtype)
        assert self.entry is not None
        assert self.form is not None
        if (self.form.stored, self.dtype) != (form.stored, dtype):
            raise StoreError(f"store {self._store.folder}: another run is adding the same rows in another form")
        with self._store.transaction():
            id = self.entry.id
            places = torch.empty(len(rows), dtype=torch.int64)
            new: dict[tuple[bytes, int], int] = {}  # of several with one name the first
            line = self._store.db.execute(
                "SELECT places FROM fingerprints WHERE id = ? AND file = ?", (id, self.entry.file)
            ).fetchone()
            if line is None:
                raise OSError(f"store {self._store.folder}: {self.entry.file} must be there, and was deleted")
            (end,) = line
            for i, (sample, view, image) in enumerate(zip(*keys, strict=True)):
                there = self._store.db.execute(
                    "SELECT place, checksum, image FROM rows WHERE fingerprint = ? AND sample = ? AND view = ?",
                    (id, sample, view),
                ).fetchone()
                if (sample, view) in new:
                    places[i] = places[new[sample, view]]
                elif there is None or (None not in (image, there[2]) and image != there[2]):
                    places[i] = end + len(new)
                    new[sample, view] = i
                else:
                    places[i] = there[0]
                    self.checksums = lengthened(self.checksums, there[0] + 1)
                    self.checksums[there[0]] = there[1]
            added = list(new.values())
            self.checksums = lengthened(self.checksums, end + len(new))
            rows = rows if len(added) == len(rows) else rows[added]
            file = self.form.layout.file(self._file.descriptor)
            transfer.write_rows(file, places[added], rows, self.checksums, threads=THREADS)
            self._store.db.executemany(
                "INSERT OR REPLACE INTO rows VALUES (?, ?, ?, ?, ?, ?)",
                [
                    (id, keys.samples[i], keys.views[i], int(places[i]), int(self.checksums[places[i]]), keys.images[i])
                    for i in added
                ],
            )
            self._store.db.execute("UPDATE fingerprints SET places = ? WHERE id = ?", (end + len(new), id))
        return places

    def read(self, places: Tensor, into: Tensor, *, block_bytes: int = 1) -> int | None:
        """Read the rows at places [n] to `into` [n, S] uint8 (CPU). Return the first position whose row does not match its
        checksum, or None. Raises OSError."""
        assert self.form is not None
        file = self.form.layout.file(self._file.descriptor)
        return transfer.read_rows(file, places, into, self.checksums, threads=THREADS, block_bytes=block_bytes)

    def damaged(self, places: Tensor) -> Tensor:
        """Return which of the rows at places [n] do not match their checksums: [n] bool. Raises OSError."""
        assert self.form is not None
        bad, begin = torch.zeros(len(places), dtype=torch.bool), 0
        into = torch.empty(CHECKED, self.form.layout.stride_bytes, dtype=torch.uint8)
        while begin < len(places):
            part = places[begin : begin + CHECKED]
            at = self.read(part, into[: len(part)])
            if at is not None:
                bad[begin + at] = True
            begin += len(part) if at is None else at + 1
        return bad

    def forget(self, samples: Sequence[bytes], views: Sequence[int]) -> None:
        """Delete rows from the index: they are damaged, or of other images. Their bytes stay until `compact`."""
        if self.entry is None:
            return
        named = [(self.entry.id, *key) for key in zip(samples, views, strict=True)]
        with self._store.transaction():
            self._store.db.executemany("DELETE FROM rows WHERE fingerprint = ? AND sample = ? AND view = ?", named)

    def note_use(self) -> None:
        """Note that a run uses the rows now."""
        if self.entry is not None:
            with self._store.transaction():
                self._store.db.execute("UPDATE fingerprints SET used = ? WHERE id = ?", (time.time(), self.entry.id))

    def keep(self) -> None:
        """Leave private rows to the run that resumes."""
        if self.is_private and self.entry is not None:
            self._kept = True
            with self._store.transaction():
                self._store.db.execute("UPDATE fingerprints SET private = 0 WHERE id = ?", (self.entry.id,))

    def close(self) -> None:
        """Close the file; private rows that were not kept are deleted."""
        entry, self.entry = self.entry, None
        self._finalizer()
        if entry is not None and self.is_private and not self._kept and not self._store.is_forked:
            with contextlib.suppress(OSError, StoreError):  # the next run deletes them
                self._store.remove(entry)

    def _digest_of(self, run: str) -> str:
        text = json.dumps(dataclasses.asdict(self._made_of) | {"run": run}, sort_keys=True)
        return hashlib.sha256(text.encode()).hexdigest()[:40]

    def _open(self) -> None:
        """Open the file, if there is one, and lock it against removal. It may be replaced while it is waited for."""
        deadline = time.monotonic() + BUSY_SECONDS
        while (entry := self._store.entry(self.digest)) is not None:
            try:
                self._file.descriptor = os.open(self._store.folder / entry.file, os.O_RDWR | os.O_CLOEXEC)
            except FileNotFoundError:
                self._store.remove(entry)  # does nothing if it is in another file now
                continue
            shared = locked(self._file.descriptor, fcntl.LOCK_SH)
            if shared and self._store.entry(self.digest, file=entry.file) is not None:
                self.entry, self.form = entry, entry.row_form
                return
            self._file.close()
            if time.monotonic() > deadline:
                raise OSError(
                    f"store {self._store.folder}: {entry.file} must be there and not in work by another process"
                )
            time.sleep(0.05)

    def _create(self, form: RowForm, dtype: torch.dtype) -> None:
        """Make the entry and its file, unless another run has made them since."""
        name = f"rows-{uuid.uuid4().hex[:12]}.bin"
        described, lies = (json.dumps(dataclasses.asdict(one), sort_keys=True) for one in (self._made_of, form))
        kind = str(dtype).removeprefix("torch.")
        values = (self.digest, described, lies, kind, name, 0, time.time(), self.is_private)
        with contextlib.ExitStack() as stack:
            with self._store.transaction():
                if self._store.entry(self.digest) is None:
                    flags = os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC
                    stack.callback(os.close, descriptor := os.open(self._store.folder / name, flags, 0o666))
                    locked(descriptor, fcntl.LOCK_SH)  # until `_open` has, so that nobody removes it
                    self._store.db.execute(
                        f"INSERT INTO fingerprints ({', '.join(Entry._fields[1:])}) VALUES (?, ?, ?, ?, ?, ?, ?, ?)",
                        values,
                    )
            self._open()


@dataclasses.dataclass
class _File:
    """An open file; -1: none."""

    descriptor: int
    process: int = dataclasses.field(default_factory=os.getpid)

    def close(self) -> None:
        """Close it. A forked process keeps its copy, and would keep the lock with it."""
        if self.descriptor >= 0 and self.process == os.getpid():
            fcntl.flock(self.descriptor, fcntl.LOCK_UN)
            os.close(self.descriptor)
        self.descriptor = -1


def locked(descriptor: int, kind: int) -> bool:
    """Lock an open file (fcntl.LOCK_SH or LOCK_EX) without waiting; return False if another process has locked it."""
    try:
        fcntl.flock(descriptor, kind | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def _close(db: sqlite3.Connection, process: int) -> None:
    if process == os.getpid():
        db.close()
