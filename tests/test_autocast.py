"""The autocast dtype of the loop: given before the first step, or found in it."""

from __future__ import annotations

import warnings
from typing import Any

import pytest
import torch
from torch import nn

from learndrop_ext import Budget, Decision, DropScheduler, Fixed, Situation
from learndrop_ext.decide.forecast import RunCosts
from small_training import data, parts


class Planning:
    """Has training steps timed, as Budget does, and drops two layers before the first."""

    def check(self, costs: RunCosts, epochs: int | None) -> None:
        pass

    def __call__(self, situation: Situation) -> Decision:
        return Decision(2, "planned")


def train(drop: DropScheduler, optimizer: torch.optim.Optimizer, dtype: torch.dtype | None) -> None:
    for x, y in drop.loader:
        with torch.autocast("cpu", dtype=dtype, enabled=dtype is not None):
            loss = nn.functional.cross_entropy(drop.model(x), y)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()


def test_steps_are_timed_and_rows_computed_under_the_dtype_given(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: set[bool] = set()
    convolution = nn.Conv2d._conv_forward

    def recorded(module: nn.Conv2d, *args: Any) -> torch.Tensor:
        seen.add(torch.is_autocast_enabled("cpu"))
        return convolution(module, *args)

    model, optimizer, loader = parts()
    with DropScheduler(model, optimizer, loader, policy=Planning(), autocast=torch.bfloat16, epochs=3) as drop:
        assert drop.rows.autocast == torch.bfloat16
        with monkeypatch.context() as patch:
            patch.setattr(nn.Conv2d, "_conv_forward", recorded)
            drop.ledger.costs.probed = False
            drop.ledger.probe(model)
        assert seen == {True}
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            train(drop, optimizer, torch.bfloat16)
            drop.step()
        _, rows_made, _ = drop.rows.ledger
        assert rows_made == 0
        once = sum(layer.flops for layer in drop.ledger.costs.layers[: drop.cut])
        assert drop.history[-1].fill_flops == len(data()) * once


def test_another_dtype_than_planned_for_is_said_once() -> None:
    model, optimizer, loader = parts()
    with DropScheduler(model, optimizer, loader, policy=Planning(), epochs=3) as drop:
        train(drop, optimizer, torch.bfloat16)
        with pytest.warns(
            RuntimeWarning, match=r"timed without autocast.*under autocast of torch.bfloat16.*autocast=torch"
        ):
            drop.step()
        train(drop, optimizer, torch.bfloat16)
        drop.step()
        assert drop.rows.autocast == torch.bfloat16


def test_without_dropped_layers_the_loop_may_do_otherwise_than_told() -> None:
    model, optimizer, loader = parts()
    with DropScheduler(model, optimizer, loader, policy=Fixed({1: 2}), autocast=torch.bfloat16, epochs=3) as drop:
        for _ in range(2):
            train(drop, optimizer, None)
            drop.step()
        assert drop.prefix == 2
        assert drop.rows.autocast is None


@pytest.mark.parametrize("policy", [Planning(), Fixed({0: 2})])
def test_a_loop_without_the_autocast_that_was_told_is_refused(policy: Any) -> None:
    model, optimizer, loader = parts()
    drop = DropScheduler(model, optimizer, loader, policy=policy, autocast=torch.bfloat16, epochs=3)
    with drop, pytest.raises(RuntimeError, match=r"must run under torch.autocast of torch.bfloat16.*got no autocast"):
        train(drop, optimizer, None)


def test_nothing_is_said_where_nothing_was_planned() -> None:
    model, optimizer, loader = parts()
    with DropScheduler(model, optimizer, loader, policy=Fixed({0: 2}), epochs=3) as drop:
        train(drop, optimizer, torch.bfloat16)
        drop.step()


@pytest.mark.parametrize("wrong", ["bf16", torch.float32, True])
def test_what_autocast_does_not_take_is_refused(wrong: Any) -> None:
    model, optimizer, loader = parts()
    with pytest.raises(TypeError, match=r"autocast must be torch\.bfloat16, torch\.float16 or None, got"):
        DropScheduler(model, optimizer, loader, policy=Budget(1.2), epochs=3, autocast=wrong)
