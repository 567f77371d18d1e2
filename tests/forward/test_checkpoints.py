"""Activation checkpoints behind and around dropped layers."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint
from torch.utils.data import DataLoader, TensorDataset

from learndrop_ext import DropScheduler, Fixed


class Checkpointed(nn.Module):
    def __init__(self, *, reentrant: bool, always: bool = False) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.stem = nn.Conv2d(3, 4, 3)
        self.body = nn.Sequential(nn.Conv2d(4, 4, 3), nn.ReLU(inplace=True), nn.Conv2d(4, 4, 3), nn.ReLU())
        self.last = nn.Conv2d(4, 4, 3)
        self.head = nn.Linear(4, 2)
        self.reentrant, self.always = reentrant, always

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.stem(x)
        checkpoints = self.training or self.always  # behind dropped layers, training is False until the row has entered
        x = checkpoint(self.body, x, use_reentrant=self.reentrant) if checkpoints else self.body(x)
        return self.head(self.last(x).mean((2, 3)))


@pytest.mark.parametrize("reentrant", [True, False])
@pytest.mark.parametrize("prefix", [1, 2, 3, 4])
def test_live_layers_get_the_gradients_that_they_would_get(reentrant: bool, prefix: int) -> None:
    model = Checkpointed(reentrant=reentrant)
    names = ["stem", "body.0", "body.2", "last", "head"]
    whole = copy.deepcopy(model)
    data = TensorDataset(torch.rand(8, 3, 12, 12), torch.arange(8) % 2)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with DropScheduler(model, optimizer, DataLoader(data, 8), policy=Fixed({0: prefix}), cache="fp32") as drop:
        assert (list(drop.chain.names), drop.prefix) == (names, prefix)
        for _ in range(2):  # the epoch that keeps rows, and one that reads them
            for x, y in drop.loader:
                loss = nn.functional.cross_entropy(model(x), y)
                optimizer.zero_grad()
                loss.backward()
            whole.zero_grad()
            wanted = nn.functional.cross_entropy(whole(data.tensors[0]), data.tensors[1])
            wanted.backward()
            torch.testing.assert_close(loss, wanted)
            for name, module in model.named_modules():
                if name in names:
                    gradient = module.weight.grad
                    if names.index(name) < prefix:
                        assert gradient is None
                    else:
                        torch.testing.assert_close(gradient, whole.get_submodule(name).weight.grad)
            drop.step()


@pytest.mark.parametrize("reentrant", [True, False])
@pytest.mark.parametrize("prefix", [1, 2, 3, 4])
def test_a_part_that_runs_again_has_the_rows_of_its_own_batch(reentrant: bool, prefix: int) -> None:
    """Though the model was called on another batch since: the losses of two have one backward pass."""
    model = Checkpointed(reentrant=reentrant, always=not reentrant)
    whole = copy.deepcopy(model)
    images, labels = torch.rand(8, 3, 12, 12), torch.arange(8) % 2
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    loader = DataLoader(TensorDataset(images, labels), 4)
    with DropScheduler(model, optimizer, loader, policy=Fixed({0: prefix}), cache="fp32") as drop:
        for _ in range(3):
            optimizer.zero_grad()
            sum(nn.functional.cross_entropy(model(x), y) for x, y in drop.loader).backward()
            whole.zero_grad()
            sum(map(nn.functional.cross_entropy, map(whole, images.split(4)), labels.split(4))).backward()
            for name, parameter in model.named_parameters():
                if parameter.grad is not None:
                    torch.testing.assert_close(parameter.grad, whole.get_parameter(name).grad)
            drop.step()
        assert sum(p.grad is not None for p in model.parameters()) == 2 * (5 - prefix)
