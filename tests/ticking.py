"""A clock that only the layers of a network move: seconds that are the same on every machine."""

from __future__ import annotations

import time
from typing import Any

import pytest
import torch
from torch import nn


class Clock:
    """In place of `time.perf_counter`."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.now = 100.0
        monkeypatch.setattr(time, "perf_counter", lambda: self.now)

    def __deepcopy__(self, memo: Any) -> Clock:
        return self

    def tick(self, seconds: float) -> None:
        self.now += seconds


class _Ticks(torch.autograd.Function):
    """The same values; the clock moves `ahead` seconds in the forward and `back` seconds in the backward pass."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, clock: Clock, ahead: float, back: float) -> torch.Tensor:
        ctx.clock, ctx.back = clock, back
        clock.tick(ahead)
        return x.clone()

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor, None, None, None]:
        ctx.clock.tick(ctx.back)
        return gradient, None, None, None


class Ticking(nn.Linear):
    """A linear layer that takes, for each sample, seconds of forward, and of backward to its weight and to its input."""

    def __init__(self, clock: Clock, seconds: tuple[float, float, float], *, width: int = 4) -> None:
        super().__init__(width, width)
        self.seconds = seconds
        self.clock = (clock,)  # not an attribute that is restored when the model is

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        ahead, of_weight, of_input = (len(x) * one for one in self.seconds)
        weight = _Ticks.apply(self.weight, *self.clock, ahead, of_weight)
        return nn.functional.linear(_Ticks.apply(x, *self.clock, 0.0, of_input), weight, self.bias)


class TickingSGD(torch.optim.SGD):
    """A step takes as many seconds as there are parameters with a gradient."""

    def __init__(self, clock: Clock, model: nn.Module) -> None:
        super().__init__(model.parameters(), lr=0.01)
        self.defaults["clock"] = clock  # a copy of an optimizer keeps nothing else

    def step(self, closure: Any = None) -> Any:
        found = super().step(closure)
        self.defaults["clock"].tick(sum(p.grad is not None for g in self.param_groups for p in g["params"]))
        return found
