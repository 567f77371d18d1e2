"""A file under its name is complete; while it changes it is a part: written under another name, synced and renamed.

A part is called `<name>.part`. One that a killed process has left is overwritten.
"""

from __future__ import annotations

import fcntl
import os
import shutil
from pathlib import Path

from learndrop_ext.rows.store.file import lock, naming

COPY_BYTES = 1 << 20


class PartFile:
    """An open file that is a part until `commit`, and is deleted if it is closed as one. A forked process does not own it.

    Args:
        path (Path): its path once it is complete.

    Attributes:
        aside (Path or None): if set, other runs read the file at `path` too: it is never changed, but copied to this path.

    Raises:
        OSError: if the part cannot be created, or another process is writing it.
    """

    def __init__(self, path: Path, *, _complete: int | None = None, aside: Path | None = None) -> None:
        self.path = path
        self.aside = aside
        self.process = os.getpid()
        self.part = _part_of(path) if _complete is None else None  # None if the file is complete
        self.descriptor = _new_part(path) if _complete is None else _complete

    @classmethod
    def open(cls, path: Path, *, aside: Path | None) -> PartFile:
        """Open a complete file; for reading only if it is to be copied `aside`. Raises OSError if it is being written."""
        descriptor = os.open(path, (os.O_RDWR if aside is None else os.O_RDONLY) | os.O_CLOEXEC)
        try:
            with naming(f"cache file {path}", "must not be written by another process"):
                lock(descriptor, fcntl.LOCK_SH)
        except BaseException:
            os.close(descriptor)
            raise
        return cls(path, _complete=descriptor, aside=aside)

    def check_owner(self) -> None:
        """Raise RuntimeError in a forked process, whose writes would change the rows of its parent."""
        if self.process != os.getpid():
            raise RuntimeError(
                f"cache file {self.path}: its rows must be written by the process that opened it, {self.process}, "
                f"got the forked process {os.getpid()}"
            )

    def change(self, size: int) -> None:
        """Make a complete file a part again, of whose bytes the first `size` are needed. Raises OSError, RuntimeError."""
        self.check_owner()
        if self.part is not None:
            return
        if self.aside is not None:
            return self._copy(self.aside, size)
        with naming(f"cache file {self.path}", "must not be read by another process while rows are written"):
            lock(self.descriptor, fcntl.LOCK_EX)
            os.rename(self.path, _part_of(self.path))
            self.part = _part_of(self.path)
            _sync_folder(self.path)

    def commit(self, head: bytes, tail: bytes, size: int) -> None:
        """Write the first page, and the tail after `size` bytes, and make the part the complete file at `path`.

        An old file there is replaced, and stays if this fails.
        """
        self.change(size)
        assert self.part is not None
        with naming(f"cache file {self.path}", "must have disk space for its tables"):
            os.ftruncate(self.descriptor, size)
            _write_all(self.descriptor, tail, size)
            _write_all(self.descriptor, head, 0)
            os.fsync(self.descriptor)
            os.rename(self.part, self.path)
            self.part = None
            _sync_folder(self.path)
        fcntl.flock(self.descriptor, fcntl.LOCK_SH)

    def close(self) -> None:
        """Close it, and delete a part."""
        if self.process != os.getpid():
            return
        if self.part is not None:
            self.part.unlink(missing_ok=True)
        # A forked process keeps the descriptor, and would keep the lock with it.
        fcntl.flock(self.descriptor, fcntl.LOCK_UN)
        os.close(self.descriptor)

    def _copy(self, path: Path, size: int) -> None:
        """Go on in a copy of the file. Other runs go on reading the original."""
        copy = PartFile(path)
        try:
            with naming(f"cache file {path}", f"must have {size:,} bytes of disk space for a copy of {self.path.name}"):
                os.posix_fallocate(copy.descriptor, 0, size)
                with open(self.path, "rb") as source, open(copy.descriptor, "wb", closefd=False) as target:
                    shutil.copyfileobj(source, target, COPY_BYTES)
        except BaseException:
            copy.close()
            raise
        self.close()
        self.path, self.aside, self.part, self.descriptor = path, None, copy.part, copy.descriptor


def _part_of(path: Path) -> Path:
    return path.with_name(path.name + ".part")


def _new_part(path: Path) -> int:
    """Create an empty part, locked."""
    with naming(f"cache file {path}", "must be written by one cache at a time, in a folder that is there"):
        descriptor = os.open(_part_of(path), os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
        try:
            lock(descriptor, fcntl.LOCK_EX)
            os.ftruncate(descriptor, 0)
        except BaseException:
            os.close(descriptor)
            raise
    return descriptor


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
