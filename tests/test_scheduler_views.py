"""How many random views of a sample are kept, given or chosen."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from learndrop_ext import Budget, CacheConfig, DropScheduler, Fixed
from small_training import Jittered, called, epoch, parts


def sums_of_an_epoch(drop: DropScheduler) -> set[float]:
    """The sum of each row that the live layers of the model get in an epoch."""
    drop.model.train()
    return {float(row.sum()) for x, _ in drop.loader for row in called(drop, x)[1]}


def test_views_keep_several_readings_of_each_sample() -> None:
    model, optimizer, loader = parts(Jittered())
    drop = DropScheduler(model, optimizer, loader, policy=Fixed({1: 1}), cache=CacheConfig("fp32", views=4))
    epoch(drop, optimizer)
    record = drop.step()
    assert record.reason == "set by hand; rows after conv1, 4 views of each sample"
    assert record.cache_bytes == 24 * 4 * record.row_bytes
    seen = [sums_of_an_epoch(drop) for _ in range(8)]
    assert all(len(one) == 24 for one in seen)
    assert len(set.union(*seen[:4])) == 96  # fresh images in the first four epochs
    assert seen[4:] == seen[:4]  # and then their rows, view by view
    cache = drop._rows.cache
    assert cache is not None
    views = cache.gather(torch.arange(4))
    assert len({float(view.sum()) for view in views}) == 4


@pytest.mark.parametrize(
    ("epochs", "policy", "views"),
    [
        (12, Fixed({1: 1}), 3),  # 12 / (2 x 2)
        (12, Budget(1.5), 4),
        (12, Budget(1.0), 6),
        (40, Fixed({}), 10),
        (5, Fixed({1: 1}), 2),  # one view would freeze the augmentation
        (2, Fixed({}), 2),
    ],
)
def test_views_of_random_samples_are_chosen_by_the_time_asked_for(epochs: int, policy: Any, views: int) -> None:
    model, optimizer, loader = parts(Jittered())
    drop = DropScheduler(model, optimizer, loader, policy=policy, epochs=epochs, cache="fp32")
    assert drop.config.views == drop._rows.views == drop.forecast().views == views


def test_views_are_chosen_by_what_the_budgets_hold() -> None:
    model, optimizer, loader = parts(Jittered())
    many = CacheConfig("fp32", views=1000)
    with DropScheduler(model, optimizer, loader, policy=Fixed({0: 3}), cache=many) as drop:
        row = drop.history[0].row_bytes + 8  # and a label beside each
    for budget, views in ((24 * 5 * row, 5), (24 * 5 * row - 1, 4), (0, 2)):
        config = CacheConfig(codec="fp32", budget_bytes=budget)
        drop = DropScheduler(model, optimizer, loader, policy=Fixed({}), epochs=40, cache=config)
        assert drop.config.views == views


def test_samples_without_randomness_get_one_view() -> None:
    model, optimizer, loader = parts()
    for cache in ("fp16", None, CacheConfig(mirror=True)):
        drop = DropScheduler(model, optimizer, loader, policy=Fixed({}), epochs=40, cache=cache)
        assert drop._rows.views == (2 if isinstance(cache, CacheConfig) else 1)


def test_a_resumed_run_keeps_the_views_that_were_chosen_for_it(tmp_path: Path) -> None:
    """Longer than the run it goes on from, it would choose more."""
    cache = CacheConfig(codec="fp32", store=tmp_path, key=str)
    model, optimizer, loader = parts(Jittered())
    first = DropScheduler(model, optimizer, loader, policy=Fixed({0: 1}), epochs=12, cache=cache)
    epoch(first, optimizer)
    first.step()
    state = first.state_dict()
    assert first.config.views == 3
    assert state["stored"] is not None
    again, optimizer, loader = parts(Jittered())
    again.load_state_dict(model.state_dict())
    second = DropScheduler(again, optimizer, loader, policy=Fixed({}), epochs=40, cache=cache)
    assert second.config.views == 10
    second.load_state_dict(state)
    assert second.config.views == 3
    caches = first._rows.cache, second._rows.cache
    assert caches[0] is not None
    assert caches[1] is not None
    assert [int(cache.filled.sum()) for cache in caches if cache is not None] == [24, 24]
    at = [drop._rows.slots.places(torch.arange(24), 0) for drop in (first, second)]  # of the views of the first epoch
    rows = caches[1].gather(at[1])
    assert torch.equal(rows, caches[0].gather(at[0]))
    seen = [sums_of_an_epoch(second) for _ in range(3)]
    assert seen[2] == {float(row.sum()) for row in rows}  # the first epoch's, once all three have been drawn
