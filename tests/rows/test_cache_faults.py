"""Faults of memory, disk and process: a clear error or the right rows, never a wrong one."""

from __future__ import annotations

import os
import re
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from fault_programs import (
    MOSTLY_ON_DISK,
    ON_DISK,
    SHAPE,
    forked_owner,
    forked_reader,
    forked_writer,
    limited_fill,
    rows,
)
from processes import Apart
from tiered_cache import CPU, disk_in

from learndrop_ext.rows import host as host_rows
from learndrop_ext.rows import tiers
from learndrop_ext.rows.cache import ActivationCache
from learndrop_ext.rows.disk import DiskTier
from learndrop_ext.rows.plan import Budgets, TierPlan
from learndrop_ext.rows.store.store import RowStore


def test_a_file_that_may_not_grow_is_an_error_and_costs_no_other_row(tmp_path: Path) -> None:
    # It is the file of the rows, or the index's log.
    filled, _, said = Apart(limited_fill, tmp_path, 5 * 8192).printed().partition("]")
    assert filled == "[0, 1, 2, 3"
    assert re.search("File too large|disk I/O error", said)


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 300 KiB; skips where none may be mounted."""
    place = tmp_path / "disk"
    place.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=300k", "tmpfs", str(place)]
    if os.geteuid() != 0 or subprocess.run(mount, capture_output=True, check=False).returncode:
        pytest.skip("needs the right to mount a file system")
    yield place
    subprocess.run(["umount", "--lazy", str(place)], check=True)


def test_a_full_disk_costs_the_rows_that_are_written_and_no_other(small_disk: Path) -> None:
    disk = disk_in(small_disk)
    cache = ActivationCache(60, SHAPE, codec="fp32", device=CPU, budgets=ON_DISK, disk=disk)
    cache.append(torch.arange(3), rows(3))
    with pytest.raises(OSError, match=r"No space left on device|disk is full"):
        all(cache.append(part, rows(12)[part % 12]) is None for part in torch.arange(3, 60).split(6))
    there = torch.nonzero(cache.filled).flatten()
    assert 3 <= len(there) < 54
    assert torch.equal(cache.gather(there), rows(12)[there % 12])
    cache.close()
    assert disk_in(small_disk).stored.entry is None
    # Those of a run whose rows are in memory stay there.
    cache = ActivationCache(60, SHAPE, codec="fp32", device=CPU, disk=disk_in(small_disk))
    cache.append(torch.arange(60), rows(12)[torch.arange(60) % 12])
    with pytest.raises(OSError, match=r"No space left on device|disk is full"):
        cache.save()
    assert torch.equal(cache.gather(torch.arange(60)), rows(12)[torch.arange(60) % 12])
    cache.close()


def test_rows_whose_write_failed_are_not_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cache = ActivationCache(9, SHAPE, codec="fp32", device=CPU, budgets=MOSTLY_ON_DISK, disk=disk_in(tmp_path))
    cache.append(torch.arange(6), rows(6))
    real = DiskTier.write

    def failing(self: DiskTier, slots: torch.Tensor, stored: torch.Tensor) -> None:
        if 5 in slots.tolist():
            raise OSError(28, "No space left on device")
        real(self, slots, stored)

    monkeypatch.setattr(DiskTier, "write", failing)
    with pytest.raises(OSError, match="No space left"):
        cache.append(torch.arange(9), rows(9))
    # Two device rows and the disk's first two pieces' worth were written, 4 and 5 were being written over.
    assert torch.nonzero(cache.filled).flatten().tolist() == [0, 1, 2, 3]
    assert torch.equal(cache.gather(torch.arange(4)), rows(9)[:4])
    monkeypatch.undo()
    cache.append(torch.arange(4, 9), rows(9)[4:])
    assert torch.equal(cache.gather(torch.arange(9)), rows(9))
    cache.close()


def test_rows_that_cannot_be_moved_stay_where_they_are(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def failing(self: DiskTier, slots: torch.Tensor, stored: torch.Tensor) -> None:
        raise OSError(5, "Input/output error")

    # The fourth row on the device is one too many: two areas want their place, and rows go to the file.
    budgets = Budgets(3 * 6016, 0, 1 << 30, 1)
    cache = ActivationCache(3, SHAPE, codec="fp32", device=CPU, budgets=budgets, disk=disk_in(tmp_path))
    cache.append(torch.arange(3), rows(3))
    monkeypatch.setattr(DiskTier, "write", failing)
    for call in (lambda: cache.grow(4), cache.save):
        with pytest.raises(OSError, match="Input/output error"):
            call()
        assert cache.plan == TierPlan(3)
        assert cache.filled.tolist() == [True] * 3
        assert torch.equal(cache.gather(torch.arange(3)), rows(3))
    monkeypatch.undo()
    cache.grow(4)
    assert cache.plan == TierPlan(1, 0, 3, 1)
    assert torch.equal(cache.gather(torch.arange(3)), rows(3))
    cache.close()


def no_memory(monkeypatch: pytest.MonkeyPatch, *, above: int, host: bool = False) -> None:
    """Device memory of more than `above` rows cannot be had; none of the host's if `host`."""
    real = tiers.allocate

    def allocate(count: int, stride_bytes: int, device: torch.device) -> torch.Tensor:
        if count > above:
            raise torch.OutOfMemoryError(f"{count} rows do not fit")
        return real(count, stride_bytes, device)

    def init(self: host_rows.HostTier, count: int, stride_bytes: int, device: torch.device) -> None:
        raise torch.OutOfMemoryError("no host memory")

    monkeypatch.setattr(tiers, "allocate", allocate)
    if host:
        monkeypatch.setattr(host_rows.HostTier, "__init__", init)


@pytest.mark.parametrize("host", [False, True])
def test_out_of_memory_falls_to_the_next_tier_with_a_warning(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, host: bool
) -> None:
    no_memory(monkeypatch, above=4, host=host)
    budgets = Budgets(None, 5 * 6016, 1 << 30, 2)
    with pytest.warns(RuntimeWarning) as seen:
        cache = ActivationCache(9, SHAPE, codec="fp32", device=CPU, budgets=budgets, disk=disk_in(tmp_path))
    said = [str(warning.message) for warning in seen]
    assert said[0].startswith(
        "ActivationCache: the rows that were to be kept on the device did not fit into its memory; "
        "now 5 rows on host, 4 rows on disk (9 rows do not fit)"
    )
    assert len(said) == 1 + host
    if host:
        assert said[1].startswith("ActivationCache: the rows that were to be kept on the host did not fit")
        assert "now 9 rows on disk" in said[1]
    assert cache.plan == (TierPlan(0, 0, 9, 2) if host else TierPlan(0, 5, 4, 2))
    cache.append(torch.arange(9), rows(9))
    assert torch.equal(cache.gather(torch.arange(9)), rows(9))
    cache.close()


def test_out_of_memory_while_it_grows_moves_the_rows_that_there_are(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    budgets = Budgets(None, 0, 1 << 30, 2)
    cache = ActivationCache(5, SHAPE, codec="fp32", device=CPU, budgets=budgets, disk=disk_in(tmp_path))
    cache.append(torch.arange(5), rows(5))
    no_memory(monkeypatch, above=5)
    with pytest.warns(RuntimeWarning, match="now 9 rows on disk"):
        cache.grow(9)
    cache.append(torch.arange(5, 9), rows(9)[5:])
    assert torch.equal(cache.gather(torch.arange(9)), rows(9))
    # It is not tried again.
    cache.grow(10)
    assert cache.plan == TierPlan(0, 0, 10, 2)
    cache.close()


def test_out_of_memory_without_a_next_tier_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    cache = ActivationCache(4, SHAPE, codec="fp32", device=CPU)
    cache.append(torch.arange(4), rows(4))
    no_memory(monkeypatch, above=4)
    with pytest.raises(torch.OutOfMemoryError, match="9 rows do not fit"):
        ActivationCache(9, SHAPE, codec="fp32", device=CPU)
    with pytest.raises(torch.OutOfMemoryError, match="9 rows do not fit"):
        cache.grow(9)
    assert torch.equal(cache.gather(torch.arange(4)), rows(4))


def test_memory_that_the_machine_does_not_have_is_out_of_memory() -> None:
    with pytest.raises(torch.OutOfMemoryError):
        ActivationCache(1 << 20, (1 << 25,), codec="fp32", device=CPU)


def test_a_forked_child_does_not_take_the_file_away(tmp_path: Path) -> None:
    Apart(forked_owner, tmp_path).printed()
    (entry,) = RowStore(tmp_path).entries()
    assert (entry.places, len(list(tmp_path.glob("rows-*.bin")))) == (10, 1)


@pytest.mark.parametrize("moment", ["ahead", "after"])
def test_a_forked_child_reads_rows_and_is_refused_what_it_may_not_write(tmp_path: Path, moment: str) -> None:
    Apart(forked_reader, tmp_path, moment).printed()
    assert list(tmp_path.glob("rows-*.bin")) == []


@pytest.mark.parametrize("first", ["append", "prefetch"])
def test_a_forked_child_does_not_wait_for_the_thread_of_its_parent(tmp_path: Path, first: str) -> None:
    Apart(forked_writer, tmp_path, first).printed()
