"""Training on cached rows computes what training behind a frozen, live prefix computes."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from learndrop_ext import CacheConfig, DropScheduler, Fixed, split_layers
from learndrop_ext.app.models import build_model

Optimize = Callable[[Iterator[nn.Parameter]], torch.optim.Optimizer]


def sgd(parameters: Iterator[nn.Parameter]) -> torch.optim.Optimizer:
    return torch.optim.SGD(parameters, lr=0.05, momentum=0.9, nesterov=True, weight_decay=5e-4)


def adamw(parameters: Iterator[nn.Parameter]) -> torch.optim.Optimizer:
    return torch.optim.AdamW(parameters, lr=1e-3)


def images(count: int = 40) -> TensorDataset:
    generator = torch.Generator().manual_seed(5)
    return TensorDataset(
        torch.randn(count, 3, 16, 16, generator=generator), torch.randint(0, 10, (count,), generator=generator)
    )


def train_by_hand(
    name: str, optimize: Optimize, drops: dict[int, int], epochs: int, *, channels_last: bool = False
) -> tuple[list[float], nn.Module]:
    """The meaning of dropping, without a cache: the prefix is frozen, in eval mode, and run at each step."""
    model = build_model(name, num_classes=10, in_channels=3, width=8, seed=1)
    if channels_last:
        model = model.to(memory_format=torch.channels_last)
    chain = split_layers(model, torch.zeros(2, 3, 16, 16))
    optimizer = optimize(model.parameters())
    torch.manual_seed(2)
    loader = DataLoader(images(), 8, shuffle=True, generator=torch.Generator().manual_seed(3))
    losses = []
    prefix = 0
    for epoch in range(1, epochs + 1):
        model.train()
        if prefix:
            chain.prefix(prefix).eval()
        for x, y in loader:
            with torch.no_grad():
                rows = chain.prefix(prefix)(x) if prefix else x
            loss = nn.functional.cross_entropy((chain.suffix(prefix)(rows) if prefix else model(x)), y)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            losses.append(loss.item())
        prefix = drops.get(epoch, prefix)
        for parameter in chain.parameters(0, prefix):
            parameter.requires_grad_(False)
            parameter.grad = None
    return losses, model


def train_dropping(
    name: str,
    optimize: Optimize,
    drops: dict[int, int],
    epochs: int,
    *,
    cache: CacheConfig | str | None = "fp32",
    channels_last: bool = False,
) -> tuple[list[float], nn.Module, DropScheduler]:
    model = build_model(name, num_classes=10, in_channels=3, width=8, seed=1)
    if channels_last:
        model = model.to(memory_format=torch.channels_last)
    optimizer = optimize(model.parameters())
    torch.manual_seed(2)
    loader = DataLoader(images(), 8, shuffle=True, generator=torch.Generator().manual_seed(3))
    drop = DropScheduler(model, optimizer, loader, policy=Fixed(drops), cache=cache)
    losses = []
    for _ in range(epochs):
        model.train()
        for x, y in drop.loader:
            loss = nn.functional.cross_entropy(model(x), y)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            losses.append(loss.item())
        drop.step()
    return losses, model, drop


def assert_same_weights(first: nn.Module, second: nn.Module) -> None:
    other = second.state_dict()
    for name, value in first.state_dict().items():
        assert torch.equal(value, other[name]), name


@pytest.mark.parametrize("channels_last", [False, True])
@pytest.mark.parametrize("optimize", [sgd, adamw])
@pytest.mark.parametrize(("name", "drops"), [("resnet10", {1: 3}), ("resnet10", {1: 2, 2: 4}), ("vgg11", {1: 1, 3: 6})])
def test_cached_training_equals_a_frozen_live_prefix(
    name: str, drops: dict[int, int], optimize: Optimize, channels_last: bool
) -> None:
    wanted, by_hand = train_by_hand(name, optimize, drops, 4, channels_last=channels_last)
    got, model, drop = train_dropping(name, optimize, drops, 4, channels_last=channels_last)
    assert got == wanted
    assert_same_weights(by_hand, model)
    assert drop.prefix == max(drops.values())


def test_freezing_without_a_cache_equals_it_too() -> None:
    wanted, by_hand = train_by_hand("resnet10", sgd, {1: 2, 2: 4}, 4)
    got, model, drop = train_dropping("resnet10", sgd, {1: 2, 2: 4}, 4, cache=None)
    assert got == wanted
    assert_same_weights(by_hand, model)
    assert drop.history[-1].cache_bytes == 0


def test_without_a_drop_the_run_is_the_plain_run() -> None:
    wanted, by_hand = train_by_hand("resnet10", sgd, {}, 3)
    got, model, _ = train_dropping("resnet10", sgd, {}, 3)
    assert got == wanted
    assert_same_weights(by_hand, model)


def test_fp16_rows_stay_close_and_are_not_equal() -> None:
    wanted, _ = train_by_hand("resnet10", sgd, {1: 3}, 2)
    got, _, _ = train_dropping("resnet10", sgd, {1: 3}, 2, cache="fp16")
    assert got[:5] == wanted[:5]
    assert got[5:] != wanted[5:]
    torch.testing.assert_close(torch.tensor(got), torch.tensor(wanted), rtol=2e-2, atol=2e-2)


def test_the_optimizer_keeps_its_state_across_a_drop() -> None:
    _, model, drop = train_dropping("resnet10", sgd, {1: 3}, 2)
    state = drop.optimizer.state_dict()
    assert len(state["state"]) == len(list(model.parameters()))
    fresh = sgd(model.parameters())
    fresh.load_state_dict(state)
    for parameter in model.parameters():
        assert torch.equal(
            fresh.state[parameter]["momentum_buffer"], drop.optimizer.state[parameter]["momentum_buffer"]
        )
