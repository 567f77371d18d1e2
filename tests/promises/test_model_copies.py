"""Averages and copies of the model are ordinary models."""

from __future__ import annotations

import copy
from pathlib import Path

import torch
from four_quarters import Run, accuracy
from torch import nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn, update_bn


def test_stochastic_weight_averaging_begun_after_a_drop() -> None:
    run = Run().epochs(4)
    averaged = AveragedModel(run.model)
    for _ in range(3):
        run.epochs(1)
        averaged.update_parameters(run.model)
    update_bn(run.user, averaged)
    assert accuracy(averaged) > 0.95
    assert run.drop.prefix == 2
    assert accuracy(run.epochs(1).model) > 0.95


def test_stochastic_weight_averaging_begun_before_a_drop() -> None:
    run = Run().epochs(1)
    averaged = AveragedModel(run.model)
    for _ in range(6):
        run.epochs(1)
        averaged.update_parameters(run.model)
    update_bn(run.user, averaged)
    assert accuracy(averaged) > 0.9


def test_an_exponential_average_updated_at_each_step() -> None:
    run = Run()
    ema = AveragedModel(run.model, multi_avg_fn=get_ema_multi_avg_fn(0.9), use_buffers=True)
    for _ in range(8):
        for x, y in run.drop.loader:
            run.train_step(x, y)
            ema.update_parameters(run.model)
        run.drop.step()
        accuracy(ema)
    assert run.drop.prefix == 2
    assert accuracy(ema) > 0.95


def test_a_copy_of_the_model_trains_as_any_model(tmp_path: Path) -> None:
    run = Run().epochs(3)
    torch.save(run.model, tmp_path / "model.pt")
    for other in (copy.deepcopy(run.model), torch.load(tmp_path / "model.pt", weights_only=False)):
        optimizer = torch.optim.SGD(other.parameters(), lr=0.05)
        other.train()
        before = {name: value.clone() for name, value in other.state_dict().items()}
        for x, y in run.user:
            optimizer.zero_grad()
            nn.functional.cross_entropy(other(x), y).backward()
            optimizer.step()
        after = other.state_dict()
        moved = {name for name, value in before.items() if not torch.equal(value, after[name])}
        # A bias before a norm has no gradient.
        assert set(before) - moved <= {"0.bias", "3.bias"}
    assert accuracy(run.epochs(2).model) > 0.95
