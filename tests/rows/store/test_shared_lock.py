"""Shared rows are filled by one run at a time."""

from __future__ import annotations

import errno
import fcntl
import gc
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import fault_programs
import pytest
from twenty_rows import ON_DISK, PRINT, filled, other, refusing

from learndrop_ext.rows.store.shared import FillLock, find_or_lock, shared_path


def held_by_another(lock: FillLock) -> bool:
    descriptor = os.open(lock.path.with_name(lock.path.name + ".lock"), os.O_RDWR)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    finally:
        os.close(descriptor)
    return False


def test_only_one_run_fills(tmp_path: Path) -> None:
    lock = find_or_lock(tmp_path, PRINT)
    assert isinstance(lock, FillLock)
    assert held_by_another(lock)
    begin = time.monotonic()
    with pytest.warns(RuntimeWarning, match=r"another run has been filling the shared rows .* for more than 0\.3 s"):
        assert find_or_lock(tmp_path, PRINT, timeout_seconds=0.3) is None
    assert 0.3 <= time.monotonic() - begin < 5
    # Other rows are another matter.
    elsewhere = find_or_lock(tmp_path, other(1))
    assert isinstance(elsewhere, FillLock)
    elsewhere.release()
    # One that gives up lets the next one fill.
    lock.release()
    lock.release()
    again = find_or_lock(tmp_path, PRINT)
    assert isinstance(again, FillLock)
    # As one that is forgotten does, once it is collected.
    del again
    gc.collect()
    assert os.listdir(tmp_path) == []


def test_a_run_that_waits_gets_the_rows_of_the_other(tmp_path: Path) -> None:
    lock = find_or_lock(tmp_path, PRINT)
    assert isinstance(lock, FillLock)
    got: list[Any] = []
    waiting = threading.Thread(target=lambda: got.append(find_or_lock(tmp_path, PRINT, timeout_seconds=60)))
    waiting.start()
    time.sleep(0.3)
    assert got == []
    filled(lock.path).close()
    lock.release()
    waiting.join(30)
    assert got == [lock.path]


def test_rows_saved_between_looking_and_locking_are_taken(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real = fcntl.flock

    def late(descriptor: int, kind: int) -> None:
        monkeypatch.setattr(fcntl, "flock", real)
        filled(shared_path(tmp_path, PRINT)).close()
        real(descriptor, kind)

    monkeypatch.setattr(fcntl, "flock", late)
    assert find_or_lock(tmp_path, PRINT) == shared_path(tmp_path, PRINT)
    assert os.listdir(tmp_path) == [shared_path(tmp_path, PRINT).name]


def test_a_lock_on_a_file_that_its_owner_deleted_is_no_lock(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real = fcntl.flock
    lock_path = Path(f"{shared_path(tmp_path, PRINT)}.lock")

    def late(descriptor: int, kind: int) -> None:
        # The owner releases after this run opened the file, and a third run makes a new one.
        monkeypatch.setattr(fcntl, "flock", real)
        lock_path.unlink()
        third = find_or_lock(tmp_path, PRINT)
        assert isinstance(third, FillLock)
        holders.append(third)
        real(descriptor, kind)

    holders: list[FillLock] = []
    monkeypatch.setattr(fcntl, "flock", late)
    with pytest.warns(RuntimeWarning, match="another run has been filling"):
        assert find_or_lock(tmp_path, PRINT) is None
    assert held_by_another(holders[0])


def test_a_killed_run_leaves_nothing_in_the_way(tmp_path: Path) -> None:
    command = [sys.executable, fault_programs.__file__, "fill_shared_rows", str(tmp_path)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "filling\n"
        with pytest.warns(RuntimeWarning, match="another run has been filling"):
            assert find_or_lock(tmp_path, fault_programs.PRINT) is None
        process.send_signal(signal.SIGKILL)
    path = shared_path(tmp_path, fault_programs.PRINT)
    assert sorted(os.listdir(tmp_path)) == [f"{path.name}.lock", f"{path.name}.part"]
    lock = find_or_lock(tmp_path, fault_programs.PRINT)
    assert isinstance(lock, FillLock)
    with lock:
        filled(lock.path, fault_programs.PRINT, budgets=ON_DISK).close()
    assert os.listdir(tmp_path) == [path.name]


def test_a_forked_process_does_not_release_the_lock(tmp_path: Path) -> None:
    lock = find_or_lock(tmp_path, PRINT)
    assert isinstance(lock, FillLock)
    process = os.fork()
    if process == 0:
        lock.release()
        os._exit(0)
    os.waitpid(process, 0)
    assert held_by_another(lock)
    lock.release()


@pytest.mark.parametrize("number", [errno.ENOLCK, errno.EOPNOTSUPP, errno.ENOSYS])
def test_a_file_system_without_locks_is_an_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int) -> None:
    monkeypatch.setattr(fcntl, "flock", refusing(number))
    before = set(os.listdir("/proc/self/fd"))
    with pytest.raises(OSError, match=r"the file system must have file locks \(flock\), got") as raised:
        find_or_lock(tmp_path, PRINT)
    assert raised.value.errno == number
    assert set(os.listdir("/proc/self/fd")) == before


def test_a_full_disk_is_an_error_and_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    lock = find_or_lock(tmp_path, PRINT)
    assert isinstance(lock, FillLock)
    monkeypatch.setattr(os, "posix_fallocate", refusing(errno.ENOSPC))
    with lock, pytest.raises(OSError, match="must have 4,096 bytes of disk space for 20 rows, got No space left"):
        filled(lock.path)
    assert os.listdir(tmp_path) == []
