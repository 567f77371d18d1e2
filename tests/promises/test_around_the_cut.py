"""What runs beside the dropped layers, and on both sides of the cut, does what it does behind frozen layers that run."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.data import DataLoader, TensorDataset

from learndrop_ext import DropScheduler, Fixed

IMAGES = torch.randn(16, 3, 8, 8, generator=torch.Generator().manual_seed(0))
OTHERS = torch.randn(16, 2, generator=torch.Generator().manual_seed(1))
LABELS = torch.arange(16) % 2


def step(optimizer: torch.optim.Optimizer, output: Tensor, labels: Tensor) -> float:
    loss = functional.cross_entropy(output.float(), labels)
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
    return loss.item()


def begun(model: nn.Module, drops: dict[int, int], **options: Any) -> tuple[DropScheduler, torch.optim.Optimizer]:
    data = TensorDataset(*options.pop("data", (IMAGES, LABELS)))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    settings = {"policy": Fixed(drops), "cache": "fp32"} | options
    return DropScheduler(model, optimizer, DataLoader(data, 8), **settings), optimizer


def epoch(drop: DropScheduler, optimizer: torch.optim.Optimizer, model: nn.Module) -> list[float]:
    return [step(optimizer, model(x), y) for x, y in drop.loader]


class Met(nn.Module):
    """Its head also gets what a small network makes of two numbers, before it looks at the image."""

    def __init__(self) -> None:
        super().__init__()
        self.meta = nn.Sequential(nn.Linear(2, 4), nn.BatchNorm1d(4), nn.ReLU(), nn.Dropout(0.5))
        self.conv1, self.conv2 = nn.Conv2d(3, 4, 3), nn.Conv2d(4, 4, 3)
        self.head = nn.Linear(8, 2)

    def forward(self, image: Tensor, meta: Tensor) -> Tensor:
        m = self.meta(meta)
        x = self.conv2(self.conv1(image).relu()).relu().mean((2, 3))
        return self.head(torch.cat([x, m], 1))


def test_a_network_on_other_inputs_trains_though_it_runs_before_the_cut() -> None:
    losses, states = [], []
    for cache in (None, "fp32"):
        torch.manual_seed(0)
        model = Met()
        drop, optimizer = begun(
            model, {1: 1}, data=(IMAGES, OTHERS, LABELS), cache=cache, call=lambda model, batch: model(*batch[:2])
        )
        found = []
        for _ in range(3):
            before = model.meta[0].weight.detach().clone()
            found += [step(optimizer, model(x, m), y) for x, m, y in drop.loader]
            assert model.meta[1].training
            assert not torch.equal(before, model.meta[0].weight)
            drop.step()
        assert drop.prefix == 1
        losses.append(found)
        states.append(copy.deepcopy(model.state_dict()))
    assert losses[0] == losses[1]
    assert all(torch.equal(one, states[1][name]) for name, one in states[0].items())


class Shared(nn.Module):
    """One dropout after each block."""

    def __init__(self) -> None:
        super().__init__()
        self.c1, self.c2, self.c3 = nn.Conv2d(3, 4, 3), nn.Conv2d(4, 4, 3), nn.Conv2d(4, 4, 3)
        self.drop, self.head = nn.Dropout(0.2), nn.Linear(4, 2)

    def forward(self, x: Tensor) -> Tensor:
        x = self.drop(self.c1(x).relu())
        x = self.drop(self.c2(x).relu())
        return self.head(self.drop(self.c3(x).relu().mean((2, 3))))


def test_a_dropout_on_both_sides_of_the_cut_is_random_behind_it_alone() -> None:
    torch.manual_seed(0)
    model, noisy = Shared(), []
    drop, optimizer = begun(model, {1: 2})
    model.head.register_forward_pre_hook(lambda _, args: noisy.append(bool((args[0] == 0).any())))
    for _ in range(3):
        epoch(drop, optimizer, model)
        drop.step()
    assert drop.prefix == 2
    assert all(noisy)
    assert model.drop.training
    drop.close()
    assert model.drop.training


def block(channels: int) -> nn.Module:
    return nn.Sequential(nn.Conv2d(channels, 4, 3), nn.BatchNorm2d(4), nn.ReLU())


def test_a_loop_that_keeps_the_first_block_in_eval_mode_goes_on() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(block(3), block(4), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 2))
    drop, optimizer = begun(model, {1: 2})
    for _ in range(4):
        model.train()
        model[0].eval()
        epoch(drop, optimizer, model)
        drop.step()
    assert drop.prefix == 2


class Noisy(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv1, self.conv2 = nn.Conv2d(3, 4, 3), nn.Conv2d(4, 4, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv2(functional.dropout(self.conv1(x).relu(), 0.5, self.training)).relu()


def test_a_container_between_two_cuts_is_in_eval_mode_as_its_rows_are_made() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(Noisy(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 2))
    drop, optimizer = begun(model, {0: 1, 1: 2})
    for i in range(2):
        model.train()
        epoch(drop, optimizer, model)
        if i == 0:
            drop.step()
    x, _ = next(iter(drop.loader))
    model.eval()
    assert x.standing.at == 2
    with torch.no_grad():
        assert torch.equal(x.standing.rows, model[:3](x.read()))
    model.train()
    epoch(drop, optimizer, model)
    drop.step()  # a warning is an error
    drop.close()
    assert all(module.training for module in model.modules())


def small() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 2))


def test_images_that_another_network_makes_are_refused_in_training_and_have_gradients_in_eval_mode() -> None:
    model, before = small(), nn.Conv2d(3, 3, 3, padding=1)
    drop, optimizer = begun(model, {0: 1})
    epoch(drop, optimizer, model)
    with pytest.raises(RuntimeError, match="images must not require gradients while layers are dropped"):
        model(before(IMAGES[:8]))
    image = IMAGES[:2].clone().requires_grad_()
    model.eval()(image).sum().backward()
    plain = IMAGES[:2].clone().requires_grad_()
    copy.deepcopy(model)(plain).sum().backward()
    assert image.grad is not None
    assert torch.equal(image.grad, plain.grad)
    optimizer.zero_grad()
    model.train()
    epoch(drop, optimizer, model)


@pytest.mark.parametrize("wrap", [None, lambda module: module])
def test_the_loader_may_be_evaluated_outside_of_the_autocast_of_training(wrap: Callable[..., Any] | None) -> None:
    def call(model: nn.Module, batch: Any) -> Tensor:
        with torch.autocast("cpu", torch.bfloat16):
            return model(batch[0])

    drop, optimizer = begun(small(), {0: 1}, cache="bf16", call=call, wrap=wrap)
    for i in range(3):
        drop.model.train()
        for batch in drop.loader:
            step(optimizer, call(drop.model, batch), batch[1])
        assert drop._rows.counts[0] == (0 if i else 16)
        drop.step()
        drop.model.eval()
        with torch.no_grad():
            for x, _ in drop.loader:
                assert drop.model(x).dtype == torch.float32


def test_a_constant_that_the_loop_makes_in_the_size_of_the_images_is_a_part_of_what_it_does() -> None:
    model = small()
    drop, optimizer = begun(model, {0: 1})
    for x, y in drop.loader:
        step(optimizer, model(x + x.new_full(x.shape, 1.0)), y)
    for x, y in drop.loader:
        step(optimizer, model(x + x.new_full(x.shape, 1.0)), y)
    x, _ = next(iter(drop.loader))
    with pytest.raises(RuntimeError, match="the loop must do the same to the images of every batch"):
        model(x + x.new_full(x.shape, 2.0))


def test_closing_does_not_wrap_the_model_anew() -> None:
    model, wrapped = small(), []

    def wrap(module: nn.Module) -> nn.Module:
        if len(wrapped) == 2:
            raise ValueError("the other processes have gone")
        wrapped.append(module)
        return module

    drop, optimizer = begun(model, {0: 1}, wrap=wrap)

    def fails() -> None:
        with drop:
            epoch(drop, optimizer, drop.model)
            raise KeyError("the user's own")

    with pytest.raises(KeyError, match="the user's own"):
        fails()
    assert not any("forward" in vars(module) for module in model.modules())
