"""Rows that are added one by one."""

from __future__ import annotations

import itertools
from pathlib import Path

import pytest
import torch
from five_values import ROW, cache_of, rows
from tiered_cache import disk_in, ids, reopened
from torch import Tensor

from learndrop_ext.rows import tiers
from learndrop_ext.rows.cache import ActivationCache
from learndrop_ext.rows.host import HostTier
from learndrop_ext.rows.plan import Budgets, TierPlan


@pytest.fixture
def allocated(monkeypatch: pytest.MonkeyPatch) -> dict[str, list[int]]:
    """Rows of each piece of memory that a tier takes, one after the other."""
    taken: dict[str, list[int]] = {"device": [], "host": []}
    real, real_init = tiers.allocate, HostTier.__init__

    def allocate(count: int, stride_bytes: int, device: torch.device) -> Tensor:
        taken["device"].append(count)
        return real(count, stride_bytes, device)

    def init(self: HostTier, count: int, stride_bytes: int, device: torch.device) -> None:
        taken["host"].append(count)
        real_init(self, count, stride_bytes, device)

    monkeypatch.setattr(tiers, "allocate", allocate)
    monkeypatch.setattr(HostTier, "__init__", init)
    return taken


def grow_one_by_one(cache: ActivationCache, wanted: Tensor) -> None:
    for slot in range(len(cache.filled), len(wanted)):
        cache.grow(slot + 1)
        assert len(cache.filled) == cache.plan.slots == slot + 1
        assert cache.nbytes == (slot + 1) * ROW
        assert not cache.filled[slot]
        cache.append(ids(slot), wanted[slot : slot + 1])
    assert torch.equal(cache.gather(torch.arange(len(wanted))), wanted)


def test_rows_added_one_by_one_are_copied_five_times_each_at_most(allocated: dict[str, list[int]]) -> None:
    cache = cache_of(1)
    cache.append(ids(0), rows(1000)[:1])
    grow_one_by_one(cache, rows(1000))
    counts = allocated["device"]
    # At least a quarter more each time: 1 + 4/5 + 16/25 + ... of the last.
    assert all(after >= before * 5 / 4 for before, after in itertools.pairwise(counts))
    assert counts[-1] <= 1250
    assert sum(counts[:-1]) <= 5 * 1000
    assert len(counts) < 40


def test_growing_rows_of_the_host_are_copied_as_seldom(allocated: dict[str, list[int]], tmp_path: Path) -> None:
    cache = cache_of(4, Budgets(2 * ROW, 600 * ROW, 1 << 20, 1), tmp_path)
    assert cache.plan == TierPlan(0, 4, 0, 1)
    cache.append(torch.arange(4), rows(700)[:4])
    grow_one_by_one(cache, rows(700))
    assert cache.plan == TierPlan(0, 600, 100, 1)
    counts = allocated["host"]
    # The budget ends the last step. From then on the file grows, and no memory is taken.
    assert all(after >= before * 5 / 4 for before, after in itertools.pairwise(counts[:-1]))
    assert counts[-1] == 600
    assert sum(counts[:-1]) <= 5 * 600
    assert allocated["device"] == [2]
    cache.close()


def test_growth_goes_through_all_tiers_within_their_budgets(allocated: dict[str, list[int]], tmp_path: Path) -> None:
    disk = disk_in(tmp_path, private=False)
    cache = cache_of(3, Budgets(10 * ROW, 20 * ROW, 1 << 20, 1), disk=disk)
    cache.append(torch.arange(3), rows(70)[:3])
    grow_one_by_one(cache, rows(70)[:60])
    assert cache.plan == TierPlan(8, 20, 32, 1)
    assert max(allocated["device"]) == 10
    assert max(allocated["host"]) == 20
    cache.save()
    cache.close()
    cache = reopened(tmp_path, 60, (5,), budgets=Budgets(0, 0, 1 << 20))
    assert torch.equal(cache.gather(torch.arange(60)), rows(70)[:60])
    grow_one_by_one(cache, rows(70))
    cache.close()


def test_growth_beyond_the_budgets_changes_nothing() -> None:
    cache = cache_of(4, Budgets(4 * ROW))
    cache.append(torch.arange(4), rows(4))
    with pytest.raises(ValueError, match="plan_tiers: budgets must hold 5 rows of 128 bytes, got 512 bytes on the dev"):
        cache.grow(5)
    assert (cache.plan, len(cache.filled)) == (TierPlan(4), 4)
    assert torch.equal(cache.gather(torch.arange(4)), rows(4))
    cache.grow(4)


def test_growth_without_memory_for_a_reserve_takes_what_is_needed(monkeypatch: pytest.MonkeyPatch) -> None:
    cache = cache_of(8)
    cache.append(torch.arange(8), rows(8))
    real = tiers.allocate

    def scarce(count: int, stride_bytes: int, device: torch.device) -> Tensor:
        if count > 9:
            raise torch.OutOfMemoryError(f"{count} rows do not fit")
        return real(count, stride_bytes, device)

    monkeypatch.setattr(tiers, "allocate", scarce)
    cache.grow(9)
    assert torch.equal(cache.gather(torch.arange(8)), rows(8))
    with pytest.raises(torch.OutOfMemoryError, match="10 rows do not fit"):
        cache.grow(10)
    assert len(cache.filled) == 9
