"""Shared rows are listed, and removed when nobody reads them."""

from __future__ import annotations

import dataclasses
import os
from pathlib import Path
from typing import Any

import pytest
import torch
from twenty_rows import CPU, ON_DISK, PRINT, ROWS, aged, filled, other

from learndrop_ext.rows.cache import ActivationCache
from learndrop_ext.rows.store.shared import FillLock, find, find_or_lock, list_rows, remove_rows, shared_path


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
    path.write_bytes(content.replace(b'{"codec"', b'["codec"'))
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
