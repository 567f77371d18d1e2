"""Averages and copies of the model are ordinary models."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from four_quarters import Run, accuracy, quarters
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


COPIES: dict[str, Callable[[nn.Module, Path], nn.Module]] = {
    "deepcopy": lambda model, _: copy.deepcopy(model),
    "pickle": lambda model, _: pickle.loads(pickle.dumps(model)),
    "torch.save": lambda model, folder: saved(model, folder / "model.pt"),
    "AveragedModel": lambda model, _: AveragedModel(model).module,
    "a copy of a copy": lambda model, _: pickle.loads(pickle.dumps(copy.deepcopy(model))),
}


def saved(model: nn.Module, path: Path) -> nn.Module:
    torch.save(model, path)
    loaded: nn.Module = torch.load(path, weights_only=False)
    return loaded


def trained_by_hand(model: nn.Module) -> list[float]:
    """Losses of an epoch on plain images: no layer is frozen."""
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    model.train()
    losses = []
    for x, y in Run.make_loader():
        loss = nn.functional.cross_entropy(model(x), y)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


@pytest.mark.parametrize("when", ["before", "after a batch", "between epochs", "on rows"])
@pytest.mark.parametrize("how", COPIES.values(), ids=COPIES)
def test_a_copy_made_in_mid_run_is_an_ordinary_model(
    how: Callable[[nn.Module, Path], nn.Module], when: str, tmp_path: Path
) -> None:
    run = Run().epochs(1 if when == "before" else 2 if when == "after a batch" else 3)
    if when in ("after a batch", "on rows"):
        run.train_step(*next(iter(run.drop.loader)))
    other = how(run.model, tmp_path)
    plain = Run().model  # of the same class, never dropped
    plain.load_state_dict(run.model.state_dict())
    plain.train()
    images = quarters().tensors[0]
    with torch.no_grad():
        wanted = run.model.eval()(images)
        for mode in (True, False):
            other.train(mode)
        assert torch.equal(other(images), wanted)
    run.model.train()
    kept = [p.detach().clone() for p in run.model.parameters()]
    assert trained_by_hand(other) == trained_by_hand(plain)
    for mine, wanted in zip(other.state_dict().values(), plain.state_dict().values(), strict=True):
        assert torch.equal(mine, wanted)
    for module in other.modules():
        assert module.training
        assert "forward" not in vars(module) or vars(module)["forward"].__func__ is type(module).forward
    # The run knows nothing of it.
    assert all(map(torch.equal, kept, run.model.parameters()))
    assert accuracy(run.epochs(4).model) > 0.95
    run.drop.close()
    assert trained_by_hand(how(run.model, tmp_path)) == trained_by_hand(run.model)


LOOKS: dict[str, Callable[[nn.Module, torch.Tensor], Callable[[torch.Tensor], Any]]] = {
    "jit.trace": lambda model, x: torch.jit.trace(model, x),
    "fx": lambda model, x: torch.fx.symbolic_trace(model),
    "export": lambda model, x: torch.export.export(model, (x,)).module(),
}


@pytest.mark.filterwarnings("ignore:.*torch.jit:DeprecationWarning")
@pytest.mark.parametrize("look", LOOKS.values(), ids=LOOKS)
def test_a_model_with_dropped_layers_is_taken_whole_by_what_looks_into_it(
    look: Callable[[nn.Module, torch.Tensor], Callable[[torch.Tensor], Any]],
) -> None:
    run = Run().epochs(3)
    assert run.drop.prefix
    images = quarters().tensors[0]
    with torch.no_grad():
        wanted = run.model.eval()(images)
        assert torch.equal(look(run.model, images)(images), wanted)
    with pytest.raises(AttributeError, match=r"must get a model without dropped layers"):
        torch.jit.script(run.model)
    assert accuracy(run.epochs(4).model) > 0.95
    run.drop.close()
    assert torch.equal(torch.jit.script(run.model.eval())(images), run.model(images))


def test_a_copy_on_the_loaders_batches_is_refused_and_a_scheduler_of_its_own_works() -> None:
    run = Run().epochs(3)
    teacher = copy.deepcopy(run.model)
    x, _ = next(iter(run.drop.loader))
    with pytest.raises(RuntimeError, match="convolution would have to see 64 values of each sample"):
        teacher(x)
    torch.testing.assert_close(teacher.eval()(x.read()), run.model.eval()(x), rtol=1e-2, atol=1e-2)
    other = Run.__new__(Run)
    other.model, other.user, other.losses = teacher.train(), Run.make_loader(), []
    other.optimizer = torch.optim.SGD(teacher.parameters(), lr=0.05)
    other.drop = other.scheduler({1: 1})
    assert accuracy(other.epochs(3).model) > 0.95
    assert (other.drop.prefix, run.drop.prefix) == (1, 2)
    assert accuracy(run.epochs(2).model) > 0.95
