"""Whole runs against the clock: what Budget and forecasts say, and what then happened."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from ticking import Clock, Ticking, TickingSGD
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from learndrop_ext import Budget, DropScheduler, Fixed
from learndrop_ext.history import Record

EPOCHS, BATCH = 8, 32


class _Sleep(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, seconds: float) -> torch.Tensor:
        ctx.seconds = seconds
        time.sleep(seconds)
        return x.clone()

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor, None]:
        time.sleep(2 * ctx.seconds)
        return gradient, None


class Slow(nn.Linear):
    """A linear layer that takes as long as a large one: `seconds` for a batch forward, and twice as long backward.

    It sleeps, so that a busy machine hardly changes it.
    """

    def __init__(self, inputs: int, outputs: int, seconds: float) -> None:
        super().__init__(inputs, outputs)
        self.seconds = seconds

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        # The sleep lies on the weight, so that a backward pass without the input's gradient takes as long.
        return nn.functional.linear(x, _Sleep.apply(self.weight, self.seconds * x.shape[0] / BATCH), self.bias)


def loader(batches: int) -> DataLoader[Any]:
    images, labels = torch.randn(batches * BATCH, 1, 2, 4), torch.arange(batches * BATCH) % 3
    return DataLoader(TensorDataset(images, labels), BATCH, shuffle=True)


def training(*, seconds: float = 0.005, batches: int = 10) -> tuple[nn.Module, torch.optim.Optimizer, DataLoader[Any]]:
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Flatten(), *(nn.Sequential(Slow(8, 8, seconds), nn.ReLU()) for _ in range(6)), Slow(8, 3, seconds)
    )
    return model, torch.optim.SGD(model.parameters(), lr=0.01), loader(batches)


def run(
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    batches: Callable[[], Iterator[Any]],
    *,
    step: Callable[[], Record] | None = None,
) -> list[Record]:
    records = []
    for _ in range(EPOCHS):
        for x, y in batches():
            optimizer.zero_grad()
            nn.functional.cross_entropy(model(x), y).backward()
            optimizer.step()
        if step is not None:
            records.append(step())
    return records


def plain_seconds() -> float:
    model, optimizer, batches = training()
    begin = time.perf_counter()
    run(model, optimizer, lambda: iter(batches))
    return time.perf_counter() - begin


def dropped_seconds(policy: Any) -> float:
    model, optimizer, batches = training()
    begin = time.perf_counter()
    with DropScheduler(model, optimizer, batches, policy=policy, epochs=EPOCHS) as drop:
        run(model, optimizer, lambda: iter(drop.loader), step=drop.step)
        assert drop.prefix > 0
    return time.perf_counter() - begin


@pytest.mark.timing
def test_budget_ends_within_five_percent_of_the_time_asked_for() -> None:
    full = plain_seconds()
    taken = [dropped_seconds(Budget(1.5)) for _ in range(3)]
    assert statistics.median(taken) == pytest.approx(full / 1.5, rel=0.05)


@pytest.mark.timing
@pytest.mark.parametrize(("start", "prefix"), [(0, 3), (2, 5)])
def test_a_run_takes_what_was_forecast(start: int, prefix: int) -> None:
    # Long steps and not too few: a forecast knows neither the few milliseconds that the loop itself takes for a batch
    # nor what is compared at the begin of an epoch with dropped layers, here about 60 ms.
    model, optimizer, batches = training(seconds=0.015, batches=12)
    with DropScheduler(model, optimizer, batches, policy=Fixed({start: prefix}), epochs=EPOCHS) as drop:
        forecast = drop.forecast()
        begin = time.perf_counter()
        records = run(model, optimizer, lambda: iter(drop.loader), step=drop.step)
        seconds = time.perf_counter() - begin
    assert seconds == pytest.approx(forecast.runs[prefix - 1][start].seconds, rel=0.15)
    # The first epoch begins before anything was measured in the run itself.
    said, taken = ([getattr(r, name) for r in records[1:]] for name in ("forecast_seconds", "epoch_seconds"))
    assert sum(taken) == pytest.approx(sum(said), rel=0.15)


#: Seconds of a sample forward, and backward to weight and input, of each layer on a clock that only layers move.
COSTS = ((1, 1, 1), (4, 4, 4), (2, 2, 2), (1, 2, 2), (1, 1, 1), (1, 1, 1))


def ticking(clock: Clock) -> tuple[nn.Module, torch.optim.Optimizer, DataLoader[Any]]:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Flatten(), *(Ticking(clock, seconds, width=8) for seconds in COSTS))
    return model, TickingSGD(clock, model), loader(20)


def test_budget_ends_in_the_time_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = Clock(monkeypatch)
    model, optimizer, batches = ticking(clock)
    begin = clock.now
    run(model, optimizer, lambda: iter(batches))
    full = clock.now - begin
    for speedup in (1.5, 2.0, 3.0):
        model, optimizer, batches = ticking(clock)
        begin = clock.now
        with DropScheduler(model, optimizer, batches, policy=Budget(speedup), epochs=EPOCHS) as drop:
            run(model, optimizer, lambda drop=drop: iter(drop.loader), step=drop.step)
        assert 0.95 < (clock.now - begin) / (full / speedup) <= 1.0


@pytest.mark.parametrize(("start", "prefix"), [(0, 3), (2, 5)])
def test_a_run_takes_what_was_forecast_to_the_second(monkeypatch: pytest.MonkeyPatch, start: int, prefix: int) -> None:
    clock = Clock(monkeypatch)
    model, optimizer, batches = ticking(clock)
    with DropScheduler(model, optimizer, batches, policy=Fixed({start: prefix}), epochs=EPOCHS) as drop:
        forecast = drop.forecast()
        # 640 samples: forward, and backward to all weights and to the input of all layers but the first. 20 steps of 12 s.
        full = 640 * (sum(map(sum, COSTS)) - COSTS[0][2]) + 20 * 12
        assert forecast.full_seconds == pytest.approx(EPOCHS * full)
        begin = clock.now
        records = run(model, optimizer, lambda: iter(drop.loader), step=drop.step)
        seconds = clock.now - begin
    # What is not forecast are the few samples that are looked at before an epoch on rows and before a drop.
    assert seconds == pytest.approx(forecast.runs[prefix - 1][start].seconds, rel=0.005)
    assert [r.epoch_seconds for r in records] == pytest.approx(
        [records[0].epoch_seconds, *(r.forecast_seconds for r in records[1:])], rel=0.01
    )
    # From the second epoch on rows on, that is known too.
    assert [r.epoch_seconds for r in records[-3:]] == pytest.approx(
        [r.forecast_seconds for r in records[-3:]], rel=1e-3
    )
