"""Whole runs against the clock: what Budget and forecasts say, and what then happened.

The layers of these networks take seconds by sleeping, so that a busy machine hardly changes them.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from learndrop_ext import Budget, DropScheduler, Fixed
from learndrop_ext.history import Record

pytestmark = pytest.mark.timing

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
    """A linear layer that takes as long as a large one: `seconds` for a batch forward, and twice as long backward."""

    def __init__(self, inputs: int, outputs: int, seconds: float) -> None:
        super().__init__(inputs, outputs)
        self.seconds = seconds

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        # The sleep lies on the weight, so that a backward pass without the input's gradient takes as long.
        return nn.functional.linear(x, _Sleep.apply(self.weight, self.seconds * x.shape[0] / BATCH), self.bias)


def training(*, seconds: float = 0.005, batches: int = 10) -> tuple[nn.Module, torch.optim.Optimizer, DataLoader[Any]]:
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Flatten(), *(nn.Sequential(Slow(8, 8, seconds), nn.ReLU()) for _ in range(6)), Slow(8, 3, seconds)
    )
    images, labels = torch.randn(batches * BATCH, 1, 2, 4), torch.arange(batches * BATCH) % 3
    loader = DataLoader(TensorDataset(images, labels), BATCH, shuffle=True)
    return model, torch.optim.SGD(model.parameters(), lr=0.01), loader


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
    model, optimizer, loader = training()
    begin = time.perf_counter()
    run(model, optimizer, lambda: iter(loader))
    return time.perf_counter() - begin


def dropped_seconds(policy: Any) -> float:
    model, optimizer, loader = training()
    begin = time.perf_counter()
    with DropScheduler(model, optimizer, loader, policy=policy, epochs=EPOCHS) as drop:
        run(drop.model, optimizer, lambda: iter(drop.loader), step=drop.step)
        assert drop.prefix > 0
    return time.perf_counter() - begin


def test_budget_ends_within_five_percent_of_the_time_asked_for() -> None:
    full = plain_seconds()
    taken = [dropped_seconds(Budget(1.5)) for _ in range(3)]
    assert statistics.median(taken) == pytest.approx(full / 1.5, rel=0.05)


@pytest.mark.parametrize(("start", "prefix"), [(0, 3), (2, 5)])
def test_a_run_takes_what_was_forecast(start: int, prefix: int) -> None:
    # Long steps and not too few: a forecast knows neither the few milliseconds that the loop itself takes for a batch
    # nor what is compared at the begin of an epoch with dropped layers, here about 60 ms.
    model, optimizer, loader = training(seconds=0.015, batches=12)
    with DropScheduler(model, optimizer, loader, policy=Fixed({start: prefix}), epochs=EPOCHS) as drop:
        forecast = drop.forecast()
        begin = time.perf_counter()
        records = run(drop.model, optimizer, lambda: iter(drop.loader), step=drop.step)
        seconds = time.perf_counter() - begin
    assert seconds == pytest.approx(forecast.runs[prefix - 1][start].seconds, rel=0.15)
    # The first epoch begins before anything was measured in the run itself.
    said, taken = ([getattr(r, name) for r in records[1:]] for name in ("forecast_seconds", "epoch_seconds"))
    assert sum(taken) == pytest.approx(sum(said), rel=0.15)
