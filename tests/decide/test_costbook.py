from __future__ import annotations

import dataclasses

import pytest
import torch

from learndrop_ext.decide import costbook
from learndrop_ext.decide.costbook import CostBook
from learndrop_ext.decide.costs import LayerCost
from learndrop_ext.decide.timing import StepCosts
from learndrop_ext.rows.config import CacheConfig
from learndrop_ext.rows.plan import Budgets, TierPlan

LAYERS = tuple(LayerCost(f"layer{i}", 100, 1.0, 3.0, (4, 8, 8)) for i in range(4))
ROW = 4 * 8 * 8 * 2  # bytes in fp16


def test_choices_follow_the_budgets() -> None:
    book = CostBook(LAYERS, CacheConfig(), torch.device("cpu"), samples=10)
    book.budgets = Budgets(10 * ROW)
    assert [choice.cut for choice in book.choices(0, 10)] == [0, 1, 2, 3]
    book.budgets = Budgets(9 * ROW)
    assert [choice.cut for choice in book.choices(0, 10)] == [0, 0, 0, 0]
    assert [choice.cut for choice in book.choices(0, 9)] == [0, 1, 2, 3]
    assert [choice.cut for choice in book.choices(2, 9)] == [0, 1, 2, 3]


def test_tiers_have_no_speed_before_a_step_was_timed(monkeypatch: pytest.MonkeyPatch) -> None:
    measured: list[int] = []
    monkeypatch.setattr(costbook, "tier_speeds", lambda *_: measured.append(1) or (1e9, 1e8, 1e7))
    book = CostBook(LAYERS, CacheConfig(), torch.device("cpu"), samples=10)
    book.budgets = Budgets(10 * ROW)
    assert book.run_costs(book.choices(0, 10), views=1).row_seconds == (0.0,) * 4
    assert measured == []
    book.note_step(StepCosts(LAYERS, 0.0, 0.0, 1.0), read_seconds=0.0, workers=0, batch=4)
    # Read 2, written 4 bytes of each of the 256 values.
    rows = book.run_costs(book.choices(0, 10), views=1)
    assert rows.row_seconds == rows.write_seconds == pytest.approx((0.0, *(6 * 256 / 1e9,) * 3))
    assert measured == [1]
    # Half of the rows, on the host, are read at a tenth of the speed.
    plan = TierPlan(5, 5)
    choices = [dataclasses.replace(choice, plan=plan) for choice in book.choices(0, 10)]
    assert book.run_costs(choices, views=1).row_seconds[1:] == pytest.approx((6 * 256 / 1e9 + 256 / 1e8,) * 3)


@pytest.mark.parametrize(
    ("read", "workers", "waits"),
    # A step of 4 samples takes 2 s. Workers read while it runs.
    [(0.3, 0, 0.3), (0.3, 1, 0.0), (0.8, 1, 0.3), (0.8, 2, 0.0), (3.0, 2, 1.0)],
)
def test_training_waits_for_what_reading_takes_longer(read: float, workers: int, waits: float) -> None:
    book = CostBook(LAYERS, None, torch.device("cpu"), samples=10)
    step = StepCosts(LAYERS[:2], 0.25, 0.125, 2.0)
    book.note_step(step, read_seconds=read, workers=workers, batch=4)
    assert book.image_seconds == pytest.approx(waits)
    costs = book.run_costs(book.choices(0, 10), views=1)
    assert (costs.layers, costs.other_seconds, costs.optimizer_seconds) == (LAYERS[:2], 0.25, 0.125)
    assert costs.image_seconds == book.image_seconds


@pytest.mark.parametrize(
    ("epochs", "scale"),
    [
        ([(10.0, 15.0)], 1.5),
        # Half of the newest and half of what was known.
        ([(10.0, 15.0), (10.0, 25.0)], 2.0),
        # One epoch changes the scale four times at most.
        ([(10.0, 900.0)], 4.0),
        ([(10.0, 0.1)], 0.25),
        ([(0.0, 15.0)], 1.0),
        ([(10.0, -1.0)], 1.0),
    ],
)
def test_epochs_correct_the_costs(epochs: list[tuple[float, float]], scale: float) -> None:
    book = CostBook(LAYERS, None, torch.device("cpu"), samples=10)
    for modelled, measured in epochs:
        book.observe(modelled, measured)
    assert book.scale == pytest.approx(scale)


def test_what_an_epoch_on_rows_begins_with_is_not_scaled() -> None:
    book = CostBook(LAYERS, None, torch.device("cpu"), samples=10)
    book.observe(10.0, 20.0)
    book.fixed_seconds = 7.0
    costs = book.run_costs(book.choices(0, 10), views=1)
    assert (costs.scale, costs.fixed_seconds) == (2.0, 7.0)
    # Ten samples of 12 s; of one frozen and three live layers: 1 + 9 s.
    assert [costs.epoch_seconds(k) for k in range(2)] == [240.0, 207.0]
