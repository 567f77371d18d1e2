"""Layers that are dropped before the first step, and were never trained."""

from __future__ import annotations

import warnings

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from learndrop_ext import Budget, DropScheduler, Fixed
from learndrop_ext.decide.policy import Policy

SAID = r"must be pretrained, and {}, in the first {} of 3 layers, never was"


def network(norm: nn.Module) -> nn.Sequential:
    torch.manual_seed(0)
    first = nn.Sequential(nn.Conv2d(3, 8, 3), norm, nn.ReLU())
    second = nn.Sequential(nn.Conv2d(8, 8, 3), nn.ReLU())
    return nn.Sequential(first, second, nn.Sequential(nn.Flatten(), nn.Linear(128, 4)))


def loader() -> DataLoader[tuple[torch.Tensor, ...]]:
    generator = torch.Generator().manual_seed(0)
    images, labels = torch.randn(32, 3, 8, 8, generator=generator), torch.randint(4, (32,), generator=generator)
    return DataLoader(TensorDataset(images, labels), 16)


def scheduler(model: nn.Module, policy: Policy) -> DropScheduler:
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    return DropScheduler(model, optimizer, loader(), policy=policy, epochs=4)


def train_one_step(model: nn.Module) -> None:
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    x, y = next(iter(loader()))
    nn.functional.cross_entropy(model(x), y).backward()
    optimizer.step()


NORMS = {
    "BatchNorm2d": lambda: nn.BatchNorm2d(8),
    "BatchNorm2d without affine": lambda: nn.BatchNorm2d(8, affine=False),
    "GroupNorm": lambda: nn.GroupNorm(2, 8),
    "LayerNorm": lambda: nn.LayerNorm([8, 6, 6]),
    "LayerNorm without bias": lambda: nn.LayerNorm([8, 6, 6], bias=False),
    "RMSNorm": lambda: nn.RMSNorm([8, 6, 6]),
}


@pytest.mark.parametrize("norm", NORMS)
def test_a_norm_as_it_was_made_is_named_and_a_trained_one_is_not(norm: str) -> None:
    model = network(NORMS[norm]())
    said = SAID.format(rf"0\.1 \({norm.split()[0]}\)", 1)
    with pytest.warns(RuntimeWarning, match=said) as caught:
        scheduler(model, Fixed({0: 1})).close()
    assert [w.filename for w in caught] == [__file__]
    train_one_step(model)
    with warnings.catch_warnings(action="error"):
        scheduler(model, Fixed({0: 1})).close()


def test_a_budget_on_a_model_without_its_weights() -> None:
    with pytest.warns(RuntimeWarning, match=SAID.format(".*", "[12]")):
        scheduler(network(nn.BatchNorm2d(8)), Budget(1.05)).close()


def test_an_error_made_of_the_warning_changes_nothing() -> None:
    model = network(nn.BatchNorm2d(8))
    with warnings.catch_warnings(action="error"), pytest.raises(RuntimeWarning, match="must be pretrained"):
        scheduler(model, Fixed({0: 1}))
    assert all(p.requires_grad for p in model.parameters())
    scheduler(model, Fixed({})).close()


def test_without_norms_it_cannot_be_known() -> None:
    with warnings.catch_warnings(action="error"):
        scheduler(network(nn.Identity()), Fixed({0: 1})).close()


def test_only_the_layers_that_are_dropped_count() -> None:
    model = network(nn.BatchNorm2d(8))
    model[1].insert(1, nn.BatchNorm2d(8))
    train_one_step(model)
    model[1][1].reset_parameters()  # a new head on pretrained layers
    model[1][1].reset_running_stats()
    with warnings.catch_warnings(action="error"):
        scheduler(model, Fixed({0: 1})).close()
    with pytest.warns(RuntimeWarning, match=SAID.format(r"1\.1 \(BatchNorm2d\)", 2)):
        scheduler(model, Fixed({0: 2})).close()


def test_layers_dropped_after_an_epoch_were_trained() -> None:
    model = network(nn.BatchNorm2d(8))
    with warnings.catch_warnings(action="error"):
        drop = scheduler(model, Fixed({1: 1}))
        model.train()
        for x, y in drop.loader:
            nn.functional.cross_entropy(model(x), y).backward()
        drop.step()
        drop.close()
