from __future__ import annotations

import torch

from learndrop_ext.rows.cache import ActivationCache
from learndrop_ext.rows.slots import SlotTable, filled_at

CPU = torch.device("cpu")


def table(size: int = 6, views: int = 1) -> SlotTable:
    return SlotTable(size, views, torch.Generator().manual_seed(0))


def test_slots_are_given_in_the_order_of_the_first_draw() -> None:
    slots = table()
    assert slots.places(torch.tensor([4, 1]), 0).tolist() == [-1, -1]
    assert slots.assign(torch.tensor([4, 1, 4]), 0).tolist() == [0, 1, 0]
    assert slots.assign(torch.tensor([1, 5, 0, 5]), 3).tolist() == [1, 2, 3, 2]
    assert slots.places(torch.tensor([0, 1, 2, 3, 4, 5]), 1).tolist() == [3, 1, -1, -1, 0, 2]
    assert slots.drawn().tolist() == [0, 1, 4, 5]
    assert slots.used == 4


def test_each_epoch_draws_another_view_until_all_have_been_drawn() -> None:
    slots = table(50, views=3)
    ids = torch.arange(50)
    views = torch.stack([slots.view(ids, epoch) for epoch in range(7)])
    assert views[:3].sort(0).values.tolist() == [[0] * 50, [1] * 50, [2] * 50]
    assert torch.equal(views[:4], views[3:])
    # Samples begin with different views.
    assert len(views[0].unique()) == 3


def test_the_views_of_a_sample_lie_side_by_side() -> None:
    slots = table(5, views=4)
    ids = torch.tensor([3, 0])
    places = torch.stack([slots.assign(ids, epoch) for epoch in range(4)])
    assert places.sort(0).values.T.tolist() == [[0, 1, 2, 3], [4, 5, 6, 7]]


def test_more_samples_leave_the_others_where_they_are() -> None:
    slots = table(3, views=2)
    before = slots.assign(torch.tensor([2, 0]), 5)
    slots.extend(2)
    assert len(slots) == 5
    assert torch.equal(slots.places(torch.tensor([2, 0]), 5), before)
    assert slots.places(torch.tensor([3, 4]), 5).tolist() == [-1, -1]
    assert (slots.assign(torch.tensor([4]), 5) // 2).tolist() == [2]


def test_cleared_slots_are_given_anew() -> None:
    slots = table()
    slots.assign(torch.tensor([4, 1]), 0)
    slots.clear()
    assert slots.used == 0
    assert slots.assign(torch.tensor([1, 4]), 0).tolist() == [0, 1]


def test_slots_that_are_assigned_in_their_order_are_those_of_the_earlier_run() -> None:
    first, second = table(), table()
    first.assign(torch.tensor([4, 1, 0]), 0)
    second.assign(first.order(), 0)
    first.clear()  # nothing is shared
    assert second.order().tolist() == [4, 1, 0]
    assert second.assign(torch.tensor([0, 2, 4]), 0).tolist() == [2, 3, 0]


def test_filled_at() -> None:
    at = torch.tensor([0, -1, 2, 7])
    assert filled_at(None, at).tolist() == [False] * 4
    assert filled_at(ActivationCache(0, (4,), codec="fp32", device=CPU), at).tolist() == [False] * 4
    cache = ActivationCache(3, (4,), codec="fp32", device=CPU)
    cache.append(torch.tensor([2]), torch.ones(1, 4))
    assert filled_at(cache, at).tolist() == [False, False, True, False]
    assert filled_at(cache, torch.empty(0, dtype=torch.int64)).tolist() == []
