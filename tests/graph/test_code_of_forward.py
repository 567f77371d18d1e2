"""Forwards that assign buffers, and functions whose meaning depends on the mode, through a split and a drop."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from typing import Any

import pytest
import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor, fx, nn
from torch.utils.data import DataLoader

from learndrop_ext import Budget, DropScheduler, Fixed
from learndrop_ext.graph.chain import split_layers
from small_training import data

X = torch.rand(4, 3, 8, 8, generator=torch.Generator().manual_seed(0))


class Averaging(nn.Module):
    """Assigns a buffer at each forward in train mode."""

    seen: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 3, 3, padding=1)
        self.register_buffer("seen", torch.ones(()))

    def forward(self, x: Tensor) -> Tensor:
        if self.training:
            self.seen = 0.9 * self.seen + 0.1 * x.detach().mean()
        return self.conv(x) / self.seen


def network() -> nn.Sequential:
    torch.manual_seed(0)
    head = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 5))
    return nn.Sequential(nn.Conv2d(3, 3, 3, padding=1), Averaging(), nn.Conv2d(3, 4, 3, padding=1), *head)


class OnTop(nn.Module):
    """The forward of the model itself assigns the buffer."""

    seen: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.body = network()
        self.register_buffer("seen", torch.ones(()))

    def forward(self, x: Tensor) -> Tensor:
        self.seen = 0.9 * self.seen + 0.1 * x.mean()
        return self.body(x) / self.seen


class Tied(Averaging):
    """Fails in the middle of its forward too, when it is traced."""

    def forward(self, x: Tensor) -> Tensor:
        self.seen = 0.9 * self.seen + 0.1 * x.mean()
        self.note = x
        if x.sum() > 1e9:
            raise ValueError("too large")
        return self.conv(x) / self.seen


def held(value: Any) -> Iterator[Any]:
    yield value
    if isinstance(value, dict):
        for item in value.values():
            yield from held(item)
    elif isinstance(value, list | tuple | set):
        for item in value:
            yield from held(item)


def assert_untouched(model: nn.Module, before: dict[str, Tensor], attributes: list[set[str]]) -> None:
    """No proxy of torch.fx, no other value, and no attribute more."""
    for module in model.modules():
        assert not [
            v for v in held({k: v for k, v in vars(module).items() if k != "_modules"}) if isinstance(v, fx.Proxy)
        ]
    assert [set(vars(module)) for module in model.modules()] == attributes
    torch.testing.assert_close(model.state_dict(), before, rtol=0, atol=0)


@pytest.mark.parametrize("block", [Averaging, Tied])
def test_a_buffer_that_forward_assigns_leaves_no_proxy_and_is_kept_whole(block: type[nn.Module]) -> None:
    model = network()
    model[1] = block()
    before, attributes = copy.deepcopy(model.state_dict()), [set(vars(m)) for m in model.modules()]
    chain = split_layers(model, X)
    assert_untouched(model, before, attributes)
    assert "its forward sets 1.seen" in chain.kept_whole["1"]
    twin = copy.deepcopy(model).train()
    chain.train()
    model.train()
    for _ in range(3):
        torch.testing.assert_close(chain(X), twin(X), rtol=0, atol=0)
    torch.testing.assert_close(model[1].seen, twin[1].seen, rtol=0, atol=0)


def test_a_refused_model_keeps_its_buffers_and_no_proxy() -> None:
    for fresh, arguments in ((OnTop(), {}), (nn.Sequential(Tied(), nn.Flatten()), {})):
        model: nn.Module = fresh
        before, attributes = copy.deepcopy(model.state_dict()), [set(vars(m)) for m in model.modules()]
        with pytest.raises(ValueError, match=r"the forward of OnTop itself is not: its forward sets seen|cut point"):
            split_layers(model, X, **arguments)
        assert_untouched(model, before, attributes)
        assert model(X).requires_grad


def test_a_scheduler_that_is_refused_late_leaves_no_proxy() -> None:
    model = network()
    before, attributes = copy.deepcopy(model.state_dict()), [set(vars(m)) for m in model.modules()]
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with pytest.raises(ValueError, match="Budget"):
        DropScheduler(model, optimizer, DataLoader(data(), batch_size=8), policy=Budget(speedup=1e6), epochs=2)
    assert_untouched(model, before, attributes)


@pytest.mark.parametrize("prefix", [1, 2])
def test_training_with_an_assigned_buffer_equals_training_behind_a_frozen_prefix(prefix: int) -> None:
    def train(model: nn.Sequential, drops: bool) -> tuple[list[float], Tensor]:
        optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
        loader = DataLoader(data(), batch_size=8)
        losses = []
        policy = Fixed({1: prefix} if drops else {})
        drop = DropScheduler(model, optimizer, loader, policy=policy, cache="fp32")
        for number in range(3):
            model.train()
            if not drops and number:
                for module in model[:prefix]:
                    module.eval().requires_grad_(False)
            for x, y in drop.loader:
                loss = F.cross_entropy(drop.model(x), y)
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
                losses.append(loss.item())
            drop.step()
        drop.close()
        return losses, model[1].seen.clone()

    # A drop frees the gradients of its layers: the plain run must not move them by a step more.
    dropped, seen = train(network(), True)
    plain, wanted = train(network(), False)
    assert dropped == pytest.approx(plain, rel=1e-5)
    torch.testing.assert_close(seen, wanted)


class Functional(nn.Module):
    """Functions of torch.nn.functional that ask for the mode, before, between and after the convolutions."""

    mean: Tensor
    var: Tensor

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.conv1 = nn.Conv2d(3, 8, 3, padding=1)
        self.conv2 = nn.Conv2d(8, 8, 3, padding=1)
        self.conv3 = nn.Conv2d(8, 8, 3, padding=1)
        self.fc = nn.Linear(8, 5)
        self.register_buffer("mean", torch.zeros(8))
        self.register_buffer("var", torch.ones(8))

    def forward(self, x: Tensor) -> Tensor:
        x = self.conv1(F.dropout(x, 0.1, self.training)).relu()
        x = F.batch_norm(self.conv2(F.dropout(x, 0.5, self.training)), self.mean, self.var, training=self.training)
        x = self.conv3(F.dropout2d(x.relu(), 0.5, self.training)).relu()
        return self.fc(F.dropout(x.mean((2, 3)), 0.5, training=self.training))


@pytest.mark.parametrize("prefix", [1, 2, 3])
def test_functions_of_the_mode_are_live_behind_the_drop_and_in_eval_mode_before_it(prefix: int) -> None:
    model = Functional()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    loader = DataLoader(data(), batch_size=8)
    drop = DropScheduler(model, optimizer, loader, policy=Fixed({1: prefix}), cache="fp32")
    assert drop.chain.names == ("conv1", "conv2", "conv3", "fc")
    for number in range(3):
        model.train()
        for x, y in drop.loader:
            loss = F.cross_entropy(drop.model(x), y)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        drop.step()
        if number == 0:
            mean = model.mean.clone()
    assert (drop.prefix, drop.cut) == (prefix, prefix)
    assert torch.equal(model.mean, mean) == (prefix >= 2)  # the running statistics of a frozen layer do not move

    def rows_by_hand(x: Tensor) -> Tensor:
        """The first layers in eval mode; a row is taken before the dropout that follows."""
        x = model.conv1(x).relu()
        if prefix > 1:
            x = F.batch_norm(model.conv2(x), model.mean, model.var, training=False).relu()
        if prefix > 2:
            x = model.conv3(x).relu().mean((2, 3))
        return x

    def rest_by_hand(x: Tensor) -> Tensor:
        if prefix < 2:
            x = F.batch_norm(model.conv2(F.dropout(x, 0.5, True)), model.mean, model.var, training=True).relu()
        if prefix < 3:
            x = model.conv3(F.dropout2d(x, 0.5, True)).relu().mean((2, 3))
        return model.fc(F.dropout(x, 0.5, True))

    model.train()
    rows, _ = next(iter(drop.loader))
    with torch.no_grad():
        torch.testing.assert_close(rows, rows_by_hand(data().tensors[0][:8]))
    torch.manual_seed(5)
    got = drop.model(rows)
    torch.manual_seed(5)
    torch.testing.assert_close(got, rest_by_hand(rows), rtol=0, atol=0)
    torch.manual_seed(6)
    assert not torch.equal(drop.model(rows), got)
    model.eval()
    with torch.no_grad():
        torch.testing.assert_close(drop.model(rows), model(data().tensors[0][:8]))
