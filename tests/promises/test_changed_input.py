"""The input is changed on its way to the model."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from four_quarters import Run, accuracy
from torch import nn


def normalise(x: torch.Tensor) -> torch.Tensor:
    return x.sub_(0.5).div_(2)


def flip_one(x: torch.Tensor) -> torch.Tensor:
    x[3] = x[3].flip(-1)
    return x


def cutout(x: torch.Tensor) -> torch.Tensor:
    x[..., 2:5] = 0
    return x


@pytest.mark.parametrize("change", [normalise, flip_one, cutout])
@pytest.mark.parametrize("dropped", [False, True])
def test_a_batch_that_the_loop_changes_in_place_is_refused(
    change: Callable[[torch.Tensor], torch.Tensor], dropped: bool
) -> None:
    run = Run()
    if dropped:
        run.epochs(3)
    for x, y in run.drop.loader:
        run.train_step(change(x), y)
    with pytest.raises(RuntimeError, match=r"drop.model must get the batch's input .*changed in place"):
        run.drop.step()


@pytest.mark.parametrize("call", [lambda x: x.flip(-1), lambda x: x + 0.1 * torch.randn_like(x)])
def test_a_second_call_of_the_step_with_another_input_is_refused(call: Callable[[torch.Tensor], torch.Tensor]) -> None:
    run = Run().epochs(3)
    for x, _ in run.drop.loader:
        run.optimizer.zero_grad()
        nn.functional.mse_loss(run.drop.model(x), run.drop.model(call(x))).backward()
        run.optimizer.step()
    with pytest.raises(RuntimeError, match=r"drop.model must get the batch's input"):
        run.drop.step()


def test_noise_that_begins_with_the_second_batch_is_refused() -> None:
    run = Run()
    for i, (x, y) in enumerate(run.drop.loader):
        run.train_step(x if i == 0 else x + 0.1 * torch.randn_like(x), y)
    with pytest.raises(RuntimeError, match=r"drop.model must get the batch's input"):
        run.drop.step()


def test_adversarial_examples_are_refused() -> None:
    run = Run()
    for x, y in run.drop.loader:
        x.requires_grad_(True)
        nn.functional.cross_entropy(run.drop.model(x), y).backward()
        run.train_step((x + 0.1 * x.grad.sign()).detach(), y)
    with pytest.raises(RuntimeError, match=r"drop.model must get the batch's input"):
        run.drop.step()


def test_gradient_accumulation_over_slices_of_a_batch_works() -> None:
    run = Run()
    for _ in range(6):
        for x, y in run.drop.loader:
            run.optimizer.zero_grad()
            for part, labels in zip(x.split(8), y.split(8), strict=True):
                (nn.functional.cross_entropy(run.drop.model(part), labels) / 2).backward()
            run.optimizer.step()
        run.drop.step()
    assert accuracy(run.model) > 0.95
