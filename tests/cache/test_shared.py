"""Rows shared by runs: found by fingerprint, filled by one run at a time, removed when nobody reads them."""

from __future__ import annotations

import dataclasses
import errno
import fcntl
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import fault_programs
import pytest
import torch

from learndrop_ext.cache.cache import ActivationCache
from learndrop_ext.cache.file import CacheFileError
from learndrop_ext.cache.fingerprint import Fingerprint
from learndrop_ext.cache.plan import Budgets, TierPlan
from learndrop_ext.cache.shared import FillLock, find, find_or_lock, list_rows, remove_rows, shared_path

CPU = torch.device("cpu")
ON_DISK = Budgets(0, 0, 1 << 30)
PRINT = Fingerprint(weights="ab12", cut=2, codec="fp32", views=1, samples=20, dataset="Digits flip=True")
ROWS = torch.randn(20, 30, generator=torch.Generator().manual_seed(0))


def filled(path: Path, made_of: Fingerprint = PRINT, budgets: Budgets | None = None) -> ActivationCache:
    cache = ActivationCache(20, (30,), codec="fp32", device=CPU, path=path, budgets=budgets)
    cache.append(torch.arange(20), ROWS)
    cache.save(made_of)
    return cache


def other(number: int) -> Fingerprint:
    return dataclasses.replace(PRINT, weights=f"other {number}")


def test_shared_path_depends_on_every_field_of_the_fingerprint(tmp_path: Path) -> None:
    paths = {shared_path(tmp_path, PRINT)}
    for field in dataclasses.fields(Fingerprint):
        value = getattr(PRINT, field.name)
        changed = not value if isinstance(value, bool) else value + 1 if isinstance(value, int) else value + "x"
        paths.add(shared_path(tmp_path, dataclasses.replace(PRINT, **{field.name: changed})))
    assert len(paths) == 1 + len(dataclasses.fields(Fingerprint))
    assert shared_path(tmp_path, PRINT) == shared_path(tmp_path, dataclasses.replace(PRINT))
    assert {path.parent for path in paths} == {tmp_path}


@pytest.mark.parametrize("budgets", [None, ON_DISK], ids=["memory", "disk"])
def test_rows_of_one_run_are_found_by_another(tmp_path: Path, budgets: Budgets | None) -> None:
    assert find(tmp_path, PRINT) is None
    lock = find_or_lock(tmp_path, PRINT)
    assert isinstance(lock, FillLock)
    with lock:
        first = filled(lock.path, budgets=budgets)
        first.share(tmp_path / "first.bin")
    path = find_or_lock(tmp_path, PRINT)
    assert path == find(tmp_path, PRINT) == lock.path
    assert isinstance(path, Path)
    assert find(tmp_path, other(1)) is None
    second = ActivationCache.open(path, PRINT, device=CPU, budgets=budgets, aside=tmp_path / "second.bin")
    assert torch.equal(second.gather(torch.arange(20)), ROWS)
    # What either of them changes is its own.
    content = path.read_bytes()
    for cache, name in ((second, "second.bin"), (first, "first.bin")):
        assert cache.path == path
        cache.append(torch.tensor([3, 19]), -ROWS[[3, 19]])
        cache.grow(22)
        cache.append(torch.tensor([21]), ROWS[:1])
        assert (cache.path, cache.saved) == (tmp_path / name, False)
        assert torch.equal(
            cache.gather(torch.tensor([3, 19, 4, 21])), torch.stack([-ROWS[3], -ROWS[19], ROWS[4], ROWS[0]])
        )
        assert path.read_bytes() == content
        cache.save(PRINT)
        cache.close()
    third = ActivationCache.open(path, PRINT, device=CPU, aside=tmp_path / "third.bin")
    assert torch.equal(third.gather(torch.arange(20)), ROWS)
    changed = ActivationCache.open(tmp_path / "second.bin", PRINT, device=CPU)
    assert torch.equal(changed.gather(torch.tensor([3, 21])), torch.stack([-ROWS[3], ROWS[0]]))
    assert sorted(os.listdir(tmp_path)) == sorted(["first.bin", "second.bin", path.name])


def test_shared_rows_that_move_to_other_tiers_leave_their_file_alone(tmp_path: Path) -> None:
    filled(tmp_path / "rows").close()
    before = (tmp_path / "rows").read_bytes()
    row = 128
    budgets = Budgets(21 * row, 0, 1 << 20, 1)
    cache = ActivationCache.open(tmp_path / "rows", PRINT, device=CPU, budgets=budgets, aside=tmp_path / "own")
    assert cache.plan == TierPlan(20)
    cache.grow(22)
    assert cache.plan == TierPlan(19, 0, 3, 1)
    assert sorted(os.listdir(tmp_path)) == ["own.part", "rows"]
    assert torch.equal(cache.gather(torch.arange(20)), ROWS)
    cache.close()
    assert os.listdir(tmp_path) == ["rows"]
    assert (tmp_path / "rows").read_bytes() == before


def test_share_wants_saved_rows(tmp_path: Path) -> None:
    cache = filled(tmp_path / "rows")
    cache.forget(torch.tensor([1]))
    with pytest.raises(ValueError, match=r"ActivationCache.share: the rows must be saved, and they were changed since"):
        cache.share(tmp_path / "own")


def test_a_copy_of_shared_rows_that_finds_no_room_leaves_all_as_it_was(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    filled(tmp_path / "rows", budgets=ON_DISK).close()
    own = tmp_path / "own"
    cache = ActivationCache.open(tmp_path / "rows", PRINT, device=CPU, budgets=ON_DISK, aside=own)

    def full(*_: Any) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patched:
        patched.setattr(os, "posix_fallocate", full)
        with pytest.raises(OSError, match=r"own: must have 8,192 bytes of disk space for a copy of rows, got No space"):
            cache.append(torch.tensor([3]), ROWS[:1])
    with monkeypatch.context() as patched:
        patched.setattr(os, "sendfile", lambda *_: 0)
        with pytest.raises(OSError, match=r"for a copy of rows, got only 0 bytes of it"):
            cache.append(torch.tensor([3]), ROWS[:1])
    assert os.listdir(tmp_path) == ["rows"]
    cache.append(torch.tensor([3]), ROWS[:1])
    assert torch.equal(cache.gather(torch.tensor([3, 4])), ROWS[[0, 4]])
    cache.close()


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
    # As one that is forgotten does.
    del again
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


def test_a_damaged_file_and_one_of_other_weights_are_not_used(tmp_path: Path) -> None:
    path = shared_path(tmp_path, PRINT)
    filled(path, other(1)).close()
    with pytest.warns(
        RuntimeWarning, match=r"the shared rows are computed again .* of weights 'ab12', got .*'other 1'"
    ):
        assert find(tmp_path, PRINT) is None
    with pytest.raises(CacheFileError, match="its rows must be of weights 'ab12', got rows of weights 'other 1'"):
        ActivationCache.open(path, PRINT, device=CPU, aside=tmp_path / "own")
    path.write_bytes(b"not rows")
    with pytest.warns(RuntimeWarning, match=r"the shared rows are computed again .* the header must be 4096 bytes"):
        lock = find_or_lock(tmp_path, PRINT)
    assert isinstance(lock, FillLock)
    with lock:
        filled(lock.path).close()
    assert find(tmp_path, PRINT) == path


def refusing(number: int, *, only: str = "") -> Callable[..., Any]:
    def call(*arguments: Any, **_: Any) -> Any:
        raise OSError(number, os.strerror(number))

    return call


def test_a_folder_that_cannot_be_used_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(FileNotFoundError, match=r"shared rows in .*none: must be a folder to write to, got No such"):
        find_or_lock(tmp_path / "none", PRINT)
    (tmp_path / "file").touch()
    with pytest.raises(
        NotADirectoryError, match=r"shared rows in .*file: must be a folder to read from, got Not a dir"
    ):
        find_or_lock(tmp_path / "file", PRINT)
    with pytest.raises(FileNotFoundError, match=r"shared rows in .*none: must be a folder to read from"):
        list_rows(tmp_path / "none")
    (tmp_path / "file").unlink()
    for number, error in ((errno.EACCES, PermissionError), (errno.EROFS, OSError)):
        with monkeypatch.context() as patched:
            patched.setattr(os, "open", refusing(number))
            with pytest.raises(error, match=r"shared rows in .*: must be a folder to read from, got"):
                find(tmp_path, PRINT)
    # Rows can be read where they cannot be written.
    path = shared_path(tmp_path, PRINT)
    filled(path).close()
    real = os.open

    def read_only(name: Any, flags: int, *arguments: Any) -> int:
        if flags & (os.O_WRONLY | os.O_RDWR | os.O_CREAT):
            raise PermissionError(errno.EACCES, "Permission denied")
        return real(name, flags, *arguments)

    monkeypatch.setattr(os, "open", read_only)
    monkeypatch.setattr(os, "utime", refusing(errno.EACCES))
    assert find_or_lock(tmp_path, PRINT) == path
    cache = ActivationCache.open(path, PRINT, device=CPU, budgets=ON_DISK, aside=tmp_path / "own")
    assert torch.equal(cache.gather(torch.arange(20)), ROWS)
    cache.close()
    with pytest.raises(
        PermissionError, match=r"shared rows in .*: must be a folder to write to, got Permission denied"
    ):
        find_or_lock(tmp_path, other(1))
    with pytest.raises(PermissionError, match=rf"{path.name} must be a file to delete, got Permission denied"):
        remove_rows(tmp_path, names=[path.name])


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


def aged(path: Path, seconds: float) -> None:
    os.utime(path, (time.time() - seconds, time.time() - seconds))


def test_list_rows_says_what_is_there(tmp_path: Path) -> None:
    path = shared_path(tmp_path, PRINT)
    filled(path).close()
    aged(path, 1000)
    damaged = tmp_path / "shared-0.rows"
    damaged.write_bytes(bytes(5000))
    aged(damaged, 500)
    for name in ("rows-1-2.bin", "shared-1.rows.part", "shared-1.rows.lock"):
        (tmp_path / name).touch()
    new, old = list_rows(tmp_path)
    assert (new.name, new.bytes, new.codec) == ("shared-0.rows", 5000, "")
    assert "the first bytes must be" in new.damage
    assert 1000 <= old.age_seconds < 1100
    assert dataclasses.replace(old, age_seconds=0.0) == dataclasses.replace(
        new, name=path.name, bytes=path.stat().st_size, age_seconds=0.0, codec="fp32", cut=2, samples=20,
        dataset="Digits flip=True", damage="",
    )  # fmt: skip
    # A run that finds rows makes them young again.
    assert find(tmp_path, PRINT) == path
    first = list_rows(tmp_path)[0]
    assert first.name == path.name
    assert first.age_seconds < 100


def test_a_manifest_that_cannot_be_understood_is_damage(tmp_path: Path) -> None:
    path = shared_path(tmp_path, PRINT)
    filled(path).close()
    content = path.read_bytes()
    path.write_bytes(content.replace(b'"sidecar"', b'"sidebar"'))
    assert "the manifest must be JSON with the known keys, got 'sidecar'" in list_rows(tmp_path)[0].damage
    path.write_bytes(content.replace(b'{"augmented"', b'["augmented"'))
    assert "the manifest must be JSON with the known keys" in list_rows(tmp_path)[0].damage


# conditions, which of the files of ages 400, 300, 200 and 100 s go
REMOVED: list[tuple[dict[str, Any], list[int]]] = [
    ({"older_than_seconds": 250}, [0, 1]),
    ({"older_than_seconds": 1e9}, []),
    ({"older_than_seconds": 0}, [0, 1, 2, 3]),
    ({"keep_bytes": 0}, [0, 1, 2, 3]),
    ({"keep_bytes": 2}, [0, 1]),
    ({"keep_bytes": 2.5}, [0, 1]),
    ({"keep_bytes": 4}, []),
    ({"names": [2]}, [2]),
    ({"names": []}, []),
    ({"names": [3], "older_than_seconds": 350, "keep_bytes": 3}, [0, 3]),
]


@pytest.mark.parametrize(("conditions", "gone"), REMOVED)
def test_remove_rows(tmp_path: Path, conditions: dict[str, Any], gone: list[int]) -> None:
    paths = [shared_path(tmp_path, other(i)) for i in range(4)]
    for i, path in enumerate(paths):
        filled(path, other(i)).close()
        aged(path, 400 - 100 * i)
    conditions = dict(conditions)
    if "keep_bytes" in conditions:
        conditions["keep_bytes"] = int(conditions["keep_bytes"] * paths[0].stat().st_size)
    if "names" in conditions:
        conditions["names"] = [paths[i].name for i in conditions["names"]]
    done = remove_rows(tmp_path, **conditions)
    assert [file.name for file in done.removed] == [paths[i].name for i in gone]
    assert done.in_use == ()
    assert sorted(os.listdir(tmp_path)) == sorted(path.name for i, path in enumerate(paths) if i not in gone)


def test_remove_rows_leaves_what_a_run_reads_or_fills(tmp_path: Path) -> None:
    path = shared_path(tmp_path, PRINT)
    filled(path).close()
    reader = ActivationCache.open(path, PRINT, device=CPU, budgets=ON_DISK, aside=tmp_path / "own")
    filling = find_or_lock(tmp_path, other(1))
    assert isinstance(filling, FillLock)
    part = ActivationCache(20, (30,), codec="fp32", device=CPU, path=filling.path, budgets=ON_DISK)
    aged(filling.path.with_name(filling.path.name + ".part"), 1000)
    (tmp_path / "shared-a.rows.part").touch()
    (tmp_path / "shared-b.rows.part").touch()
    (tmp_path / "shared-a.rows.lock").touch()
    aged(tmp_path / "shared-a.rows.part", 1000)
    done = remove_rows(tmp_path, older_than_seconds=0, keep_bytes=0, names=[path.name])
    assert done.removed == ()
    assert [file.name for file in done.in_use] == [path.name]
    # What a killed run left is gone, and what may just have been begun is not.
    left = [path.name, f"{filling.path.name}.part", f"{filling.path.name}.lock", "shared-b.rows.part"]
    assert sorted(os.listdir(tmp_path)) == sorted(left)
    assert torch.equal(reader.gather(torch.arange(20)), ROWS)
    reader.close()
    part.close()
    done = remove_rows(tmp_path, names=[path.name])
    assert [file.name for file in done.removed] == [path.name]


@pytest.mark.parametrize(
    ("conditions", "message"),
    [
        ({}, "older_than_seconds, keep_bytes or names must be given, got none of them"),
        ({"older_than_seconds": -1.0}, r"older_than_seconds must be >= 0, got -1\.0"),
        ({"older_than_seconds": float("nan")}, "older_than_seconds must be >= 0, got nan"),
        ({"keep_bytes": -5}, "keep_bytes must be >= 0, got -5"),
        ({"names": ["shared-1.rows", "../x"]}, r"names must be of files in .*, got \.\./x, shared-1\.rows"),
    ],
)
def test_remove_rows_refuses(tmp_path: Path, conditions: dict[str, Any], message: str) -> None:
    path = shared_path(tmp_path, PRINT)
    filled(path).close()
    with pytest.raises(ValueError, match=f"remove_rows: {message}"):
        remove_rows(tmp_path, **conditions)
    assert path.exists()
