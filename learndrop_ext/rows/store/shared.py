"""Rows shared between runs: one file per fingerprint in a common folder, filled by one run at a time.

`find_or_lock` returns the path of existing rows, to be opened with `ActivationCache.open(path, ..., aside=OTHER)`; or a
lock, under which the run fills a cache with `path=lock.path`, saves it and releases the lock; or None if another run is
filling them, in which case this run keeps its rows to itself.
"""

from __future__ import annotations

import contextlib
import dataclasses
import errno
import fcntl
import hashlib
import json
import os
import time
import weakref
from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path

from learndrop_ext.rows.store.file import (
    VERSION,
    CacheFileError,
    check_fingerprint,
    naming,
    read_manifest,
    remove_abandoned,
    remove_unused,
)
from learndrop_ext.rows.store.fingerprint import Fingerprint
from learndrop_ext.warn import warn

PATTERN = "shared-*.rows"
POLL_SECONDS = 0.2


@dataclass(frozen=True)
class SharedFile:
    """A file of shared rows.

    Args:
        name (str): name of the file.
        bytes (int): its size.
        age_seconds (float): time since it was written or last used by a run.
        codec (str): how its rows are stored.
        cut (int): number of layers before the rows.
        samples (int): length of the dataset.
        dataset (str): description of the dataset and its transforms.
        damage (str, optional): why the file cannot be used, with the fields from `codec` on empty; "" if it can.
            Default: ""
    """

    name: str
    bytes: int
    age_seconds: float
    codec: str
    cut: int
    samples: int
    dataset: str
    damage: str = ""


@dataclass(frozen=True)
class Removal:
    """The result of `remove_rows`.

    Args:
        removed (tuple of SharedFile): deleted files.
        in_use (tuple of SharedFile): files that were not deleted because a run reads them.
    """

    removed: tuple[SharedFile, ...]
    in_use: tuple[SharedFile, ...]


class FillLock:
    """The right to fill the rows of one fingerprint, until `release`, the end of a `with` block, or the process's end.

    Attributes:
        path (Path): where to save the rows.
    """

    def __init__(self, path: Path, _descriptor: int) -> None:
        self.path = path
        self._finalizer = weakref.finalize(self, _release, _lock_path(path), _descriptor, os.getpid())

    def release(self) -> None:
        """Let other runs use the rows, or fill them if they were not saved. A second call does nothing."""
        self._finalizer()

    def __enter__(self) -> FillLock:
        return self

    def __exit__(self, *_: object) -> None:
        self.release()


def shared_path(folder: Path, fingerprint: Fingerprint) -> Path:
    """Return the path for the rows with a fingerprint, whether it exists or not."""
    values = {"version": VERSION} | dataclasses.asdict(fingerprint)
    digest = hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()
    return folder / PATTERN.replace("*", digest[:40])


def find(folder: Path, fingerprint: Fingerprint) -> Path | None:
    """Return the path of rows that a run has saved, and mark them as used now.

    Args:
        folder (Path): the common folder.
        fingerprint (Fingerprint): what the rows must depend on.

    Returns:
        The path; None if there are no such rows or, with a RuntimeWarning, if their file is damaged or of other rows.

    Raises:
        OSError: if the folder or the file cannot be read.
    """
    path = shared_path(folder, fingerprint)
    try:
        with naming(f"shared rows in {folder}", "must be a folder to read from"):
            check_fingerprint(path, fingerprint, read_manifest(path).fingerprint)
    except FileNotFoundError:
        return None
    except CacheFileError as error:
        warn(f"the shared rows are computed again ({error})")
        return None
    with contextlib.suppress(OSError):
        os.utime(path)
    return path


def find_or_lock(folder: Path, fingerprint: Fingerprint, *, timeout_seconds: float = 0.0) -> Path | FillLock | None:
    """Find shared rows, or lock them for this run to fill. Deletes unfinished files of killed runs.

    Args:
        folder (Path): the common folder.
        fingerprint (Fingerprint): what the rows must depend on.
        timeout_seconds (float, optional): how long to wait for another run that is filling them. Default: 0

    Returns:
        The path of existing rows; or a FillLock; or None, with a RuntimeWarning, if another run is still filling them after
        that time.

    Raises:
        OSError: if the folder is missing, cannot be read or written, or has no file locks.
    """
    deadline = time.monotonic() + timeout_seconds
    path = shared_path(folder, fingerprint)
    remove_abandoned(folder.glob(f"{PATTERN}.part"))
    while True:
        if (found := find(folder, fingerprint)) is not None:
            return found
        lock = _try_lock(folder, path)
        if lock is not None:
            # Another run may have saved them between the two calls.
            if (found := find(folder, fingerprint)) is not None:
                lock.release()
                return found
            return lock
        if time.monotonic() >= deadline:
            warn(
                f"another run has been filling the shared rows {path} for more than {timeout_seconds:g} s; "
                "this run computes its own"
            )
            return None
        time.sleep(POLL_SECONDS)


def list_rows(folder: Path) -> list[SharedFile]:
    """Return the files of shared rows in a folder, the most recently used first. Raises OSError if it cannot be read."""
    with naming(f"shared rows in {folder}", "must be a folder to read from"):
        names = [entry.name for entry in os.scandir(folder)]
    found = []
    for path in (folder / name for name in sorted(names) if Path(name).match(PATTERN)):
        with contextlib.suppress(FileNotFoundError):
            found.append(_described(path))
    return sorted(found, key=lambda file: file.age_seconds)


def remove_rows(
    folder: Path,
    *,
    older_than_seconds: float | None = None,
    keep_bytes: int | None = None,
    names: Collection[str] | None = None,
) -> Removal:
    """Delete files of shared rows that meet any of the conditions, and files left behind by killed runs.

    A file that a process is reading is never deleted.

    Args:
        folder (Path): the common folder.
        older_than_seconds (float, optional): delete files not used for longer than this. Default: None
        keep_bytes (int, optional): delete the least recently used files until the rest, including those in use, takes no
            more than this. Default: None
        names (collection of str, optional): delete the files with these names. Default: None

    Returns:
        Removal: the files deleted, and those that were not because they are in use.

    Raises:
        ValueError: if no condition is given, one is negative, or a name does not exist; nothing is deleted then.
        OSError: if the folder cannot be read, or a file cannot be deleted.
    """
    for name, value in (("older_than_seconds", older_than_seconds), ("keep_bytes", keep_bytes)):
        if value is not None and not value >= 0:
            raise ValueError(f"remove_rows: {name} must be >= 0, got {value}")
    if older_than_seconds is None and keep_bytes is None and names is None:
        raise ValueError("remove_rows: older_than_seconds, keep_bytes or names must be given, got none of them")
    files = list_rows(folder)
    if unknown := sorted(set(names or ()) - {file.name for file in files}):
        raise ValueError(f"remove_rows: names must be of files in {folder}, got {', '.join(unknown)}")
    removed, in_use, kept = [], [], sum(file.bytes for file in files)
    for file in reversed(files):
        unused = older_than_seconds is not None and file.age_seconds > older_than_seconds
        if not (unused or file.name in (names or ()) or (keep_bytes is not None and kept > keep_bytes)):
            continue
        if _removed(folder, file.name):
            removed.append(file)
            kept -= file.bytes
        else:
            in_use.append(file)
    remove_abandoned(folder.glob(f"{PATTERN}.part"))
    for lock in folder.glob(f"{PATTERN}.lock"):
        with contextlib.suppress(OSError):
            remove_unused(lock)
    return Removal(tuple(removed), tuple(in_use))


def _described(path: Path) -> SharedFile:
    state = path.stat()
    age = max(0.0, time.time() - state.st_mtime)
    try:
        manifest = read_manifest(path)
    except CacheFileError as error:
        return SharedFile(path.name, state.st_size, age, "", 0, 0, "", damage=str(error))
    made_of = manifest.fingerprint
    return SharedFile(path.name, state.st_size, age, manifest.codec, made_of.cut, made_of.samples, made_of.dataset)


def _removed(folder: Path, name: str) -> bool:
    """Delete a file. Returns False if a process is reading it."""
    try:
        with naming(f"shared rows in {folder}", f"{name} must be a file to delete"):
            remove_unused(folder / name)
    except FileNotFoundError:
        return True
    except OSError as error:
        if error.errno != errno.EBUSY:
            raise
        return False
    return True


def _lock_path(path: Path) -> Path:
    return path.with_name(path.name + ".lock")


def _try_lock(folder: Path, path: Path) -> FillLock | None:
    """The lock, or None if another run holds it. It is on an empty file, which is deleted when the lock is released."""
    lock_path = _lock_path(path)
    with naming(f"shared rows in {folder}", "must be a folder to write to"):
        descriptor = os.open(lock_path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
    try:
        with naming(f"shared rows in {folder}", "the file system must have file locks (flock)"):
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        if os.fstat(descriptor).st_ino == lock_path.stat().st_ino:
            return FillLock(path, descriptor)
    except (BlockingIOError, FileNotFoundError):
        pass  # held by another run, or deleted by it after it was opened here
    except BaseException:
        os.close(descriptor)
        raise
    os.close(descriptor)
    return None


def _release(lock_path: Path, descriptor: int, process: int) -> None:
    # A forked process does not own the lock.
    if process == os.getpid():
        lock_path.unlink(missing_ok=True)
        os.close(descriptor)
