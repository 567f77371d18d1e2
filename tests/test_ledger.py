from __future__ import annotations

import dataclasses
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from learndrop_ext import ledger
from learndrop_ext.decide.costs import LayerCost, choose_cut
from learndrop_ext.decide.timing import StepCosts
from learndrop_ext.ledger import Ledger
from learndrop_ext.rows.config import CacheConfig
from learndrop_ext.rows.plan import Budgets, TierPlan

LAYERS = tuple(LayerCost(f"layer{i}", 100, 1.0, 3.0, (4, 8, 8)) for i in range(4))
ROW = 4 * 8 * 8 * 2  # bytes in fp16


@pytest.fixture
def made(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Makes a ledger of four layers and ten samples, and says what it reads of the run."""

    def make(config: CacheConfig | None = None, **read: Any) -> Any:
        step = StepCosts(LAYERS, read.get("other", 0.0), read.get("optimizer", 0.0), 2.0)
        monkeypatch.setattr(ledger, "untimed", lambda _: LAYERS)
        monkeypatch.setattr(ledger, "time_step", lambda *_, **__: step)
        rows = SimpleNamespace(images=1, config=config, device=torch.device("cpu"), cut=read.get("cut", 0), views=1)
        rows.counts = (0, 0, 0.0)
        count = read.get("rows", 10)
        batches = SimpleNamespace(expected_rows=lambda: count)
        loader = SimpleNamespace(batches=batches, relabelled=0, shapes=None)
        source = SimpleNamespace(expected=lambda: 10, reading=lambda: read.get("reading", (0.0, 0)))
        extras = SimpleNamespace(row_bytes=0, nbytes=0)
        return Ledger(None, rows, loader, source, extras, keeps_rows=config is not None)  # type: ignore[arg-type]

    return make


def measure(book: Ledger) -> None:
    book.measure(lambda: None, None, batch=4)  # type: ignore[arg-type]


def observe(book: Ledger, prefix: int, samples: int, seconds: float) -> None:
    book._loader.counts = samples, seconds, 7.0  # type: ignore[misc]
    book.observe(prefix, wrap_seconds=0.0)


@pytest.mark.parametrize(
    ("budget", "cut", "rows", "cuts"),
    [(10, 0, 10, [0, 1, 2, 3]), (9, 0, 10, [0, 0, 0, 0]), (9, 0, 9, [0, 1, 2, 3]), (9, 2, 9, [0, 1, 2, 3])],
)
def test_choices_follow_the_budgets(made: Any, budget: int, cut: int, rows: int, cuts: list[int]) -> None:
    book = made(CacheConfig(budget_bytes=budget * ROW), cut=cut, rows=rows)
    book.read_budgets()
    assert [choice.cut for choice in book.run_costs()[1]] == cuts


def test_tiers_have_no_speed_before_a_step_was_timed(made: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    measured: list[int] = []
    monkeypatch.setattr(ledger, "tier_speeds", lambda *_: measured.append(1) or (1e9, 1e8, 1e7))
    book = made(CacheConfig(budget_bytes=10 * ROW))
    book.read_budgets()
    assert book.run_costs()[0].row_seconds == (0.0,) * 4
    assert measured == []
    measure(book)
    # Read 2, written 4 bytes of each of the 256 values.
    rows = book.run_costs()[0]
    assert rows.row_seconds == rows.write_seconds == pytest.approx((0.0, *(6 * 256 / 1e9,) * 3))
    assert measured == [1]

    # Half of the rows, on the host, are read at a tenth of the speed.
    def halved(layers: Any, prefix: int, **options: Any) -> Any:
        return dataclasses.replace(choose_cut(layers, prefix, **options), plan=TierPlan(5, 5) if prefix else None)

    monkeypatch.setattr(ledger.costs, "choose_cut", halved)
    assert book.run_costs()[0].row_seconds[1:] == pytest.approx((6 * 256 / 1e9 + 256 / 1e8,) * 3)
    assert measured == [1]


@pytest.mark.parametrize(
    ("read", "workers", "waits"),
    # A step of 4 samples takes 2 s. Workers read while it runs.
    [(0.3, 0, 0.3), (0.3, 1, 0.0), (0.8, 1, 0.3), (0.8, 2, 0.0), (3.0, 2, 1.0)],
)
def test_training_waits_for_what_reading_takes_longer(made: Any, read: float, workers: int, waits: float) -> None:
    book = made(reading=(read, workers), other=0.25, optimizer=0.125)
    measure(book)
    costs = book.run_costs()[0]
    assert (costs.layers, costs.other_seconds, costs.optimizer_seconds) == (LAYERS, 0.25, 0.125)
    assert costs.image_seconds == pytest.approx(waits)


@pytest.mark.parametrize(
    ("epochs", "scale"),
    # Samples and seconds. Ten samples of four live layers take 120 s by the model.
    [
        ([(10, 180.0)], 1.5),
        # Half of the newest and half of what was known.
        ([(10, 180.0), (10, 300.0)], 2.0),
        # One epoch changes the scale four times at most.
        ([(10, 10800.0)], 4.0),
        ([(10, 1.2)], 0.25),
        ([(0, 180.0)], 1.0),
        ([(10, -12.0)], 1.0),
    ],
)
def test_epochs_correct_the_costs(made: Any, epochs: list[tuple[int, float]], scale: float) -> None:
    book = made()
    observe(book, 0, 10, 999.0)  # nothing was timed
    assert book.scale == 1.0
    measure(book)
    for samples, seconds in epochs:
        observe(book, 0, samples, seconds)
    assert book.scale == pytest.approx(scale)


def test_what_an_epoch_on_rows_begins_with_is_not_scaled(made: Any) -> None:
    book = made()
    measure(book)
    # Ten samples of 12 s; of one frozen and three live layers: 1 + 9 s, and 7 s before the first batch.
    observe(book, 1, 10, 207.0)
    costs = book.run_costs()[0]
    assert (costs.scale, costs.fixed_seconds) == (2.0, 7.0)
    assert [costs.epoch_seconds(k) for k in range(2)] == [240.0, 207.0]


def test_budgets_are_read_once_for_each_decision(made: Any) -> None:
    book = made(CacheConfig(budget_bytes=10 * ROW))
    assert book.run_costs()[1][1].cut == 0
    book.read_budgets()
    assert book.run_costs()[1][1].budgets == Budgets(10 * ROW)
