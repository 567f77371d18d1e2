from __future__ import annotations

import pytest
import torch

from learndrop_ext.rows.config import CacheConfig
from learndrop_ext.decide import costbook, costs
from learndrop_ext.decide.costbook import CostBook
from learndrop_ext.decide.costs import LayerCost

LAYERS = tuple(LayerCost(f"layer{i}", 100, 1.0, 3.0, (4, 8, 8)) for i in range(4))
ROW = 4 * 8 * 8 * 2  # bytes in fp16


def test_choices_are_made_once_until_a_budget_changes(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[int] = []
    choose = costs.choose_cut

    def count(layers: tuple[LayerCost, ...], prefix: int, **more: object) -> costs.CutChoice:
        asked.append(prefix)
        return choose(layers, prefix, **more)  # type: ignore[arg-type]

    monkeypatch.setattr(costs, "choose_cut", count)
    held = {"bytes": 10 * ROW}
    monkeypatch.setattr(costbook, "tier_speeds", lambda *_: (1e9, 1e9, 1e9))
    monkeypatch.setattr(costbook, "tier_costs", lambda *_: [costs.TierCost(held["bytes"], 1e9)])
    book = CostBook(LAYERS, CacheConfig(), torch.device("cpu"), samples=10)
    assert [choice.cut for choice in book.choices(0, 10)] == [0, 1, 2, 3]
    assert [choice.cut for choice in book.choices(0, 10)] == [0, 1, 2, 3]
    assert asked == [0, 1, 2, 3]
    held["bytes"] = 9 * ROW
    assert [choice.cut for choice in book.choices(0, 10)] == [0, 0, 0, 0]
    assert [choice.cut for choice in book.choices(0, 9)] == [0, 1, 2, 3]
    assert [choice.cut for choice in book.choices(2, 9)] == [0, 1, 2, 3]
