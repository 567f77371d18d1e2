"""Rows shared by runs are found by their fingerprint."""

from __future__ import annotations

import dataclasses
import errno
import os
from pathlib import Path
from typing import Any

import pytest
import torch
from twenty_rows import CPU, ON_DISK, PRINT, ROWS, filled, other, refusing

from learndrop_ext.rows.cache import ActivationCache
from learndrop_ext.rows.plan import Budgets, TierPlan
from learndrop_ext.rows.store.file import CacheFileError
from learndrop_ext.rows.store.fingerprint import Fingerprint
from learndrop_ext.rows.store.shared import FillLock, find, find_or_lock, list_rows, remove_rows, shared_path


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
    assert os.listdir(tmp_path) == ["rows"]
    cache.append(torch.tensor([3]), ROWS[:1])
    assert torch.equal(cache.gather(torch.tensor([3, 4])), ROWS[[0, 4]])
    cache.close()


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
