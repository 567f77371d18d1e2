from __future__ import annotations

import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from tiered_cache import CPU, disk_in, ids, rows, tiered
from torch import Tensor

from learndrop_ext.rows import tiers
from learndrop_ext.rows.cache import ActivationCache
from learndrop_ext.rows.disk import DamagedRowError
from learndrop_ext.rows.plan import Budgets, TierPlan


@pytest.mark.parametrize("staging", [1, 2, 5, 256])
@pytest.mark.parametrize("ahead", [False, True])
def test_gather_serves_a_batch_from_all_tiers_in_order(tmp_path: Path, staging: int, ahead: bool) -> None:
    cache = tiered(9, (5,), tmp_path, device=3, host=2, staging=staging)
    assert cache.plan == (TierPlan(3, 2, 4, staging) if staging < 3 else TierPlan(0, 2, 7, min(staging, 9)))
    stored = rows(9, 5)
    order = ids(8, 0, 4, 2, 5, 3, 1, 7, 6)
    cache.append(order[:5], stored[order[:5]])
    cache.append(order[5:], stored[order[5:]])
    for asked in (ids(8, 8, 0, 3, 7, 3, 8, 6, 1, 5, 4, 2), ids(0, 1), ids(6), ids()):
        if ahead:
            cache.prefetch(asked)
        assert torch.equal(cache.gather(asked), stored[asked])
    cache.close()


@pytest.mark.parametrize("codec", ["fp32", "fp16", "uint8"])
@pytest.mark.parametrize("staging", [2, 256])
def test_gather_from_tiers_equals_gather_from_one(tmp_path: Path, codec: str, staging: int) -> None:
    one = ActivationCache(9, (3, 4, 6), codec=codec, device=CPU)
    all_tiers = tiered(9, (3, 4, 6), tmp_path, device=3, host=2, staging=staging, codec=codec)
    stored = rows(9, 3, 4, 6).contiguous(memory_format=torch.channels_last)
    asked = ids(8, 0, 3, 3, 5, 1, 7)
    got = []
    for cache in (one, all_tiers):
        cache.append(torch.arange(9), stored)
        got.append(cache.gather(asked))
        assert got[-1].is_contiguous(memory_format=torch.channels_last)
    assert torch.equal(got[0], got[1])
    all_tiers.close()


def test_prefetch_is_forgotten_when_rows_change(tmp_path: Path) -> None:
    cache = tiered(4, (5,), tmp_path, device=0, host=2)
    cache.append(torch.arange(4), rows(4, 5))
    changed = rows(4, 5, seed=1)
    cache.prefetch(ids(1, 3))
    assert cache._rows is not None
    assert cache._rows._prefetch is not None
    cache._rows._prefetch[2].result()
    cache.append(torch.arange(4), changed)
    assert torch.equal(cache.gather(ids(1, 3)), changed[[1, 3]])
    cache.prefetch(ids(0, 1))
    assert torch.equal(cache.gather(ids(2, 3)), changed[[2, 3]])
    cache.prefetch(ids(0, 1))
    cache.prefetch(ids(2, 3))
    assert torch.equal(cache.gather(ids(0, 1)), changed[[0, 1]])
    cache.prefetch(ids(0, 1))
    cache.close()


def test_prefetch_reads_only_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cache = tiered(5, (5,), tmp_path, device=0, host=2, staging=3)
    cache.append(torch.arange(5), rows(5, 5))
    asked: list[list[int]] = []
    read = tiers.TierStorage.read

    def noting(self: tiers.TierStorage, slots: Tensor, into: Tensor) -> None:
        asked.append(slots.tolist())
        read(self, slots, into)

    monkeypatch.setattr(tiers.TierStorage, "read", noting)
    read_ahead = []
    for batch in (ids(3, 1), ids(2, 4, 2), ids(0)):
        cache.prefetch(batch)
        assert cache._rows is not None
        assert cache._rows._prefetch is not None
        cache._rows._prefetch[2].result()
        read_ahead.append(asked[-1])
        cache.gather(batch)
    assert read_ahead == asked == [[1, 3], [2, 4], [0]]
    cache.close()


def test_grow_goes_on_in_the_slowest_tier(tmp_path: Path) -> None:
    disk, budgets = disk_in(tmp_path), Budgets(512, 256, 1 << 20, 1)
    cache = ActivationCache(3, (5,), codec="fp32", device=CPU, disk=disk, budgets=budgets)
    stored = rows(9, 5)
    cache.append(torch.arange(3), stored[:3])
    for slots, plan in [
        (4, TierPlan(4)),
        (5, TierPlan(2, 2, 1, 1)),
        (9, TierPlan(2, 2, 5, 1)),
    ]:
        before = len(cache.filled)
        cache.grow(slots)
        assert cache.plan == plan
        assert cache.nbytes == slots * 128
        cache.append(torch.arange(before, slots), stored[before:slots])
        assert torch.equal(cache.gather(torch.arange(slots)), stored[:slots])
    cache.close()


REFUSED: list[tuple[Callable[[ActivationCache], Any], type[Exception], str]] = [
    (lambda c: c.append(ids(0, 0), rows(2, 5)), ValueError, "append_rows: index must name no row twice, got 0 twice"),
    (lambda c: c.append(ids(0, 1), rows(1, 5)), ValueError, r"append_rows: index must be \[1\], .* got \[2\]"),
    (lambda c: c.append(ids(8), rows(1, 5).half()), ValueError, "rows must be torch.float32 as the first were"),
    (
        lambda c: c.append(ids(7), rows(1, 5).to("meta")),
        ValueError,
        "append_rows: rows must be on the cache's device cpu, got meta",
    ),
    (lambda c: c.grow(10**6), ValueError, "plan_tiers: budgets must hold 1000000 rows"),
]


@pytest.mark.parametrize(("call", "error", "message"), REFUSED)
def test_tiered_cache_refuses_before_it_writes(
    tmp_path: Path, call: Callable[[ActivationCache], Any], error: type[Exception], message: str
) -> None:
    cache = tiered(9, (5,), tmp_path, device=3, host=2, staging=2)
    written = ids(0, 4, 6, 8)
    stored = rows(4, 5)
    cache.append(written, stored)
    with pytest.raises(error, match=message):
        call(cache)
    assert torch.nonzero(cache.filled).flatten().tolist() == written.tolist()
    assert torch.equal(cache.gather(written), stored)
    cache.close()


def test_a_prefetch_that_failed_is_reported(tmp_path: Path) -> None:
    cache = tiered(6, (5,), tmp_path, device=0, host=0, staging=3)
    stored = rows(6, 5)
    cache.append(torch.arange(6), stored)
    (path,) = tmp_path.glob("rows-*.bin")
    with path.open("r+b") as opened:
        opened.seek(4096 + 4 * 128)
        opened.write(b"\xaa")
    # By the gather that asks for its rows, and once.
    cache.prefetch(ids(4, 1))
    with pytest.raises(DamagedRowError, match=r"a row in the store must have the checksum .* at slot 4: "):
        cache.gather(ids(4, 1))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert torch.equal(cache.gather(ids(0, 1)), stored[:2])
    # By a warning where nothing asks for them any more.
    said = r"rows that were read ahead could not be read \(a row in the store .* at slot 4: .*\); nothing has used them"
    for use in (
        lambda: cache.gather(ids(0, 1)),
        lambda: cache.prefetch(ids(0)),
        lambda: cache.append(ids(5), stored[5:]),
        lambda: cache.grow(len(cache.filled) + 1),
    ):
        cache.prefetch(ids(4, 1))
        with pytest.warns(RuntimeWarning, match=said):
            use()
    assert torch.equal(cache.gather(ids(0, 5)), stored[[0, 5]])
    cache.prefetch(ids(4, 1))
    with pytest.warns(RuntimeWarning, match=said):
        cache.close()
