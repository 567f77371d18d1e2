"""Rows that are forgotten."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from five_values import ROW, cache_of, rows
from tiered_cache import disk_in, ids, reopened

from learndrop_ext.rows.plan import Budgets


@pytest.mark.parametrize("budgets", [None, Budgets(4 * ROW, 2 * ROW, 1 << 20, 1)], ids=["one tier", "all tiers"])
def test_forgotten_rows_count_as_never_written(tmp_path: Path, budgets: Budgets | None) -> None:
    cache = cache_of(9, budgets, disk=disk_in(tmp_path, private=False))
    cache.append(torch.arange(9), rows(9))
    cache.save()
    cache.forget(ids(1, 8, 1))
    assert torch.nonzero(~cache.filled).flatten().tolist() == [1, 8]
    assert torch.equal(cache.gather(ids(0, 2, 7)), rows(9)[[0, 2, 7]])
    # The rows that are left keep their dtype.
    with pytest.raises(ValueError, match=r"rows must be torch\.float32 as the first were"):
        cache.append(ids(1), rows(1).half())
    cache.forget()
    assert not bool(cache.filled.any())
    cache.append(ids(8, 2), -rows(2))
    assert torch.equal(cache.gather(ids(2, 8)), -rows(2).flip(0))
    assert torch.nonzero(cache.filled).flatten().tolist() == [2, 8]
    cache.save()
    cache.close()
    # Others find the rows that were not written again as they were.
    again = reopened(tmp_path, 9, (5,)).gather(torch.arange(9))
    assert torch.equal(again[[2, 8]], -rows(2).flip(0))
    assert torch.equal(again[:2], rows(9)[:2])


def test_once_all_rows_are_forgotten_the_next_may_be_of_another_dtype() -> None:
    cache = cache_of(9)
    cache.append(ids(0, 8), rows(2))
    cache.forget(ids(0, 8))
    cache.append(ids(8, 2), rows(2).half())
    assert torch.equal(cache.gather(ids(2, 8)), rows(2).half().flip(0))


def test_rows_read_ahead_and_then_forgotten_are_not_given_out(tmp_path: Path) -> None:
    cache = cache_of(6, Budgets(0, 0, 1 << 20, 4), tmp_path)
    cache.append(torch.arange(6), rows(6))
    cache.prefetch(ids(1, 2))
    cache.forget(ids(2))
    assert torch.nonzero(~cache.filled).flatten().tolist() == [2]
    cache.append(ids(2), -rows(1))
    assert torch.equal(cache.gather(ids(1, 2)), torch.stack([rows(6)[1], -rows(1)[0]]))
    cache.close()
