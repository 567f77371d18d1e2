"""After the run, a second run, and layers that train again."""

from __future__ import annotations

import copy
import gc
import warnings
import weakref
from pathlib import Path
from typing import Any

import pytest
import torch
from four_quarters import Run, accuracy, quarters
from torch import nn

from learndrop_ext import CacheConfig
from learndrop_ext.forward.images import Images


def attributes(model: nn.Module) -> list[set[str]]:
    return [
        set(m.__dict__) | set(m._forward_hooks) | set(m._forward_pre_hooks) | set(m._state_dict_hooks)
        for m in model.modules()
    ]


def test_close_gives_the_model_back_as_it_was_found(tmp_path: Path) -> None:
    for how in ("close", "with"):
        config = CacheConfig(budget_bytes=0, store_bytes=1 << 22, store=tmp_path)
        run = Run(cache=config)
        run.model[4].eval()  # the caller keeps one in eval mode
        before = attributes(run.model), [m.training for m in run.model.modules()]
        if how == "with":
            with run.drop as drop:
                for _ in range(4):
                    for x, y in drop.loader:
                        run.train_step(x, y)
                    drop.step()
                drop.state_dict()
                assert list(tmp_path.glob("rows-*")) != []
        else:
            for _ in range(4):
                for x, y in run.drop.loader:
                    run.train_step(x, y)
                run.drop.step()
            assert run.drop.prefix == 2
            run.drop.close()
            run.drop.close()  # a second time does nothing
        assert (attributes(run.model), [m.training for m in run.model.modules()]) == before
        assert all(p.requires_grad for p in run.model.parameters())
        assert list(tmp_path.glob("rows-*")) == []
        assert run.drop._rows.cache is None
        assert run.model(quarters().tensors[0][:2]).shape == (2, 4)
        with pytest.raises(RuntimeError, match="must be open, and it was closed"):
            next(iter(run.drop.loader))
        with pytest.raises(RuntimeError, match="must be open, and it was closed"):
            run.drop.step()


def test_a_run_that_an_error_ends_keeps_the_rows_of_its_checkpoint(tmp_path: Path) -> None:
    config = CacheConfig(store_bytes=1 << 22, store=tmp_path)
    run = Run(cache=config)
    state: dict[str, Any] = {}

    def interrupted() -> None:
        with run.drop:
            run.epochs(4)
            state.update(copy.deepcopy(run.drop.state_dict()))
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    assert len(list(tmp_path.glob("rows-*"))) == 1
    run.drop = run.scheduler({2: 2}, cache=config)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        run.drop.load_state_dict(state)
    assert bool(run.drop._rows.cache.filled.all())


def test_a_second_scheduler_is_refused_by_name_while_layers_are_dropped_and_works_after() -> None:
    run = Run().epochs(3)
    with pytest.raises(ValueError, match=r"another DropScheduler has dropped 2: close\(\) that one first"):
        run.scheduler({1: 1})
    run.drop.close()
    run.drop = run.scheduler({1: 1})
    assert accuracy(run.epochs(4).model) > 0.95
    assert run.drop.prefix == 1


def test_of_two_schedulers_made_before_a_drop_only_one_drops() -> None:
    run = Run()
    other = run.scheduler({1: 1})
    run.epochs(3)
    for x, y in other.loader:
        nn.functional.cross_entropy(other.model(x), y)
    with pytest.raises(ValueError, match=r"another DropScheduler has dropped 2: close\(\) that one first"):
        other.step()
    assert other.prefix == 0


def test_a_scheduler_that_is_gone_does_not_stand_in_the_way() -> None:
    run = Run().epochs(3)
    run.drop = None  # type: ignore[assignment]
    gc.collect()
    run.drop = run.scheduler({1: 1})
    run.epochs(3)
    assert run.drop.prefix == 1


def test_undrop_stays_undone_under_a_fixed_policy() -> None:
    run = Run(drops={1: 1, 2: 2}).epochs(3)
    assert run.drop.prefix == 2
    run.drop.undrop()
    before = run.model[0].weight.detach().clone()
    run.epochs(3)
    assert run.drop.prefix == 0
    assert not torch.equal(run.model[0].weight, before)
    assert accuracy(run.epochs(2).model) > 0.95


@pytest.mark.parametrize("how", ["add_param_group", "a new optimizer"])
def test_the_head_first_and_then_the_backbone(how: str) -> None:
    """Layers that were frozen when they were dropped train again when they are set to, without a call of ours."""
    run = Run(drops={})
    for parameter in run.model[:6].parameters():
        parameter.requires_grad_(False)
    run.optimizer = torch.optim.SGD(run.model[6].parameters(), lr=0.05, momentum=0.9)
    run.drop = run.scheduler({0: 2})
    run.epochs(2)
    for parameter in run.model[:6].parameters():
        parameter.requires_grad_(True)
    if how == "add_param_group":
        run.optimizer.add_param_group({"params": list(run.model[:6].parameters()), "lr": 0.01})
    else:
        run.optimizer = torch.optim.SGD(run.model.parameters(), lr=0.05, momentum=0.9)
    plain = copy.deepcopy(run.model).train()
    with pytest.warns(RuntimeWarning, match="drop.loader: all layers train again, .* dropped layer 0 have been set to"):
        batches = list(run.drop.loader)
    assert run.drop.prefix == 0
    assert not any(isinstance(x, Images) for x, _ in batches)
    assert all(module.training for module in run.model.modules())
    x, y = batches[0]
    ours, theirs = (nn.functional.cross_entropy(one(x), y) for one in (run.model, plain))
    assert torch.equal(ours, theirs)
    before = run.model[0].weight.detach().clone()
    run.epochs(3)
    assert not torch.equal(run.model[0].weight, before)
    assert accuracy(run.model) > 0.9
    assert [record.prefix for record in run.drop.history] == [2, 2, 2, 0, 0, 0]


def test_an_optimizer_made_anew_is_followed_once_it_is_said() -> None:
    run = Run(drops={0: 2})
    run.optimizer = run.drop.optimizer = torch.optim.SGD(run.model[6].parameters(), lr=0.5)
    assert run.epochs(1).drop.history[-1].learning_rate == 0.5
    run.drop.undrop()
    run.drop.close()
    for parameter in run.model[:6].parameters():
        parameter.requires_grad_(True)
    run.drop = run.scheduler({0: 2})  # its optimizer holds the head alone
    run.optimizer = run.drop.optimizer = torch.optim.SGD(run.model.parameters(), lr=0.1)
    with pytest.warns(RuntimeWarning, match="dropped layer 0 have been set to train"):
        run.epochs(1)
    assert run.drop.prefix == 0


@pytest.mark.parametrize("kept", [False, True])
def test_the_callers_modes_stay(kept: bool) -> None:
    run = Run(drops={})
    run.model[4].eval()  # a norm that the caller keeps on its statistics, set once
    run.drop = run.scheduler({1: 1}, cache="fp32" if kept else None)
    statistics = run.model[4].running_mean.clone()
    for _ in range(3):
        for x, y in run.drop.loader:
            run.train_step(x, y)
            assert not run.model[4].training
        run.drop.step()
    assert run.drop.prefix == 1
    assert torch.equal(run.model[4].running_mean, statistics)
    run.drop.undrop()
    assert [m.training for m in run.model] == [True] * 4 + [False] + [True] * 2


@pytest.mark.parametrize("dropped_in", [True, False])
@pytest.mark.parametrize("ended_in", [True, False])
@pytest.mark.parametrize("how", ["close", "undrop"])
def test_the_dropped_layers_come_back_in_the_models_mode(how: str, ended_in: bool, dropped_in: bool) -> None:
    run = Run(drops={1: 1, 2: 2}).epochs(1)
    for _ in range(2):
        run.model.train()
        for x, y in run.drop.loader:
            run.train_step(x, y)
        run.model.train(dropped_in)  # a loop that evaluates before or after the step
        run.drop.step()
    assert run.drop.prefix == 2
    run.model.train(ended_in)
    getattr(run.drop, how)()
    assert {m.training for m in run.model.modules()} == {ended_in}


class Interrupting(nn.ReLU):
    """Ctrl-C in one of its calls."""

    left = 0

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.left -= 1
        if self.left == 0:
            raise KeyboardInterrupt
        return super().forward(x)


def assert_whole(model: nn.Module) -> None:
    for module in model.modules():
        assert "forward" not in vars(module)
        assert not module._forward_hooks
        assert not module._forward_pre_hooks
        assert module.training


#: position of the module that is interrupted: in a dropped layer, at the cut, and behind it
PLACES = {"dropped": 2, "at the cut": 5, "live": 7}


def interrupted(where: str, epochs: int) -> Run:
    """A run that was interrupted in its fourth step after some epochs."""
    run = Run(drops={})
    run.model.append(nn.Identity())
    run.model[PLACES[where]] = Interrupting()
    run.model = nn.Sequential(run.model)  # a container around the cut
    run.optimizer = torch.optim.SGD(run.model.parameters(), lr=0.05, momentum=0.9)
    run.drop = run.scheduler({2: 2}, cache=None if epochs > 2 else "fp32")
    run.epochs(epochs)
    assert run.drop.prefix == 2
    run.model[0][PLACES[where]].left = 4
    with pytest.raises(KeyboardInterrupt):
        run.epochs(1)
    return run


@pytest.mark.parametrize("epochs", [2, 3])
@pytest.mark.parametrize("where", PLACES)
def test_an_interrupted_forward_and_close_give_the_model_back_whole(where: str, epochs: int) -> None:
    run = interrupted(where, epochs)
    run.drop.close()
    assert_whole(run.model)
    before = run.model[0][0].weight.detach().clone()
    for x, y in run.user:
        run.train_step(x, y)
    assert not torch.equal(run.model[0][0].weight, before)


@pytest.mark.parametrize("epochs", [2, 3])
@pytest.mark.parametrize("where", PLACES)
def test_a_run_goes_on_after_an_interrupted_forward(where: str, epochs: int) -> None:
    run = interrupted(where, epochs)
    assert run.model.training
    run.model.eval()
    with torch.no_grad():
        run.model(quarters().tensors[0])
    assert not any(m.training for m in run.model.modules())
    run.model.train()
    for x, y in run.drop.loader:
        run.train_step(x, y)
    assert accuracy(run.epochs(4).model) > 0.95
    run.drop.close()
    assert_whole(run.model)


def test_the_loop_is_still_compared_after_an_interrupted_forward() -> None:
    run = Run(drops={})
    run.model[6].append(Interrupting())
    run.drop = run.scheduler({1: 2})
    run.epochs(3)
    run.model[6][-1].left = 2
    with pytest.raises(KeyboardInterrupt):
        run.epochs(1)
    x, _ = next(iter(run.drop.loader))
    with pytest.raises(RuntimeError, match="flip would have to see 64 values of each sample"):
        x.flip(0)
    with pytest.raises(RuntimeError, match="the loop must do the same to the images of every batch"):
        run.model(x - 0.5)


def test_a_module_that_the_forward_calls_twice_comes_back_whole() -> None:
    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.one, self.two = nn.Conv2d(1, 6, 3, padding=1), nn.Conv2d(6, 6, 3, padding=1)
            self.act, self.pool, self.head = nn.ReLU(), nn.MaxPool2d(2), nn.Linear(96, 4)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            x = self.pool(self.act(self.two(self.act(self.one(x)))))
            return self.head(x.flatten(1))

    run = Run(drops={})
    torch.manual_seed(0)
    run.model = Twice()  # type: ignore[assignment]
    run.optimizer = torch.optim.SGD(run.model.parameters(), lr=0.05, momentum=0.9)
    run.drop = run.scheduler({2: 2})
    assert accuracy(run.epochs(6).model) > 0.95
    assert run.drop.prefix == 2
    run.drop.close()
    assert_whole(run.model)


def test_a_scheduler_that_is_gone_takes_its_rows_along() -> None:
    run = Run().epochs(3)
    rows = weakref.ref(run.drop._rows)
    loader = run.drop.loader
    run.drop = None  # type: ignore[assignment]
    gc.collect()
    for x, y in loader:  # the loop may go on as long as it has the loader
        assert type(x) is Images
        run.train_step(x, y)
    del loader, x
    gc.collect()
    assert rows() is None
    assert_whole(run.model)
