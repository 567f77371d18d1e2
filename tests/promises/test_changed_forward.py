"""What forward reads beside its input changes, and what it leaves for the loop: hooks, stored features, copies."""

from __future__ import annotations

import copy
from collections.abc import Callable
from functools import partial
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from four_quarters import Run, accuracy, quarters, rows_of
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel

from learndrop_ext import DropScheduler, Fixed

SCALE = {"of all blocks": 1.0}


class Block(nn.Module):
    """Reads a number of its own, one of a configuration, one of a global variable, and a tensor that is no buffer."""

    def __init__(self, channels: tuple[int, int], config: SimpleNamespace) -> None:
        super().__init__()
        self.conv = nn.Conv2d(*channels, 3, padding=1)
        self.temperature = 1.0
        self.config = config
        self.shift = torch.zeros(())

    def forward(self, x: Tensor) -> Tensor:
        x = self.conv(x) / self.temperature * self.config.inner.scale + self.shift
        return x.relu() * SCALE["of all blocks"]


class Blocks(Run):
    """Three blocks and a classifier, of which one is dropped after the first epoch."""

    def __init__(self, drops: dict[int, int] | None = None, **options: Any) -> None:
        torch.manual_seed(0)
        self.losses = []
        self.config = SimpleNamespace(inner=SimpleNamespace(scale=1.0))
        blocks = [Block(channels, self.config) for channels in ((1, 6), (6, 8), (8, 8))]
        self.model = nn.Sequential(*blocks, nn.Sequential(nn.Flatten(), nn.Linear(512, 4)))
        self.optimizer = torch.optim.SGD(self.model.parameters(), lr=0.01)
        self.user = self.make_loader(shuffle=False)
        self.drop = self.scheduler({1: 1} if drops is None else drops, cache="fp32", **options)


@pytest.fixture(autouse=True)
def _scale() -> Any:
    yield
    SCALE["of all blocks"] = 1.0


def assert_trained_as_the_model(run: Run) -> None:
    """Rows are what the dropped layers make now, and the live layers compute what those of the model do."""
    x, y = next(iter(run.drop.loader))
    if x.standing.rows is None:  # they are kept on the way
        run.train_step(x, y)
        x, _ = next(iter(run.drop.loader))
    with torch.no_grad():
        torch.testing.assert_close(rows_of(x), run.model[: run.drop.prefix](quarters().tensors[0][:16]))
        torch.testing.assert_close(run.model(x), run.model[run.drop.prefix :](rows_of(x)), rtol=0, atol=0)


#: what is done between two epochs, and whether rows are of before
CHANGES: dict[str, tuple[Callable[[Blocks], Any], bool]] = {
    "a number of a live block": (lambda run: setattr(run.model[2], "temperature", 0.5), False),
    "a number of a dropped block": (lambda run: setattr(run.model[0], "temperature", 0.5), True),
    "a configuration": (lambda run: setattr(run.config.inner, "scale", 2.0), True),
    "a global variable": (lambda _: SCALE.update({"of all blocks": 2.0}), True),
    "a tensor that is no buffer": (lambda run: run.model[0].shift.add_(1), True),
    "a hook": (lambda run: run.model[0].conv.register_forward_hook(lambda _, x, y: 2 * y), True),
}


@pytest.mark.parametrize(("change", "rows"), CHANGES.values(), ids=CHANGES)
def test_what_forward_reads_is_followed_from_the_next_epoch_on(change: Callable[[Blocks], Any], rows: bool) -> None:
    run = Blocks()
    run.epochs(3)
    change(run)
    if rows:
        with pytest.warns(RuntimeWarning, match=r"drop.loader: the rows are computed again"):
            assert_trained_as_the_model(run)
    else:  # what live layers read does not cost the rows
        assert_trained_as_the_model(run)
        assert run.drop._rows.cache is not None
        assert bool(run.drop._rows.cache.filled.all())
    run.epochs(2)
    assert_trained_as_the_model(run)


def test_a_global_variable_that_changed_before_the_drop() -> None:
    run = Blocks({2: 1})
    run.epochs(1)
    SCALE["of all blocks"] = 2.0
    run.epochs(1)
    assert run.drop.prefix == 1
    assert_trained_as_the_model(run)


def train_without_rows(run: Blocks, epochs: int, change: Callable[[Blocks], Any] = lambda _: None) -> None:
    """Train by hand: the first block runs frozen at each step."""
    run.model[0].requires_grad_(False)
    run.optimizer.zero_grad()
    for _ in range(epochs):
        for x, y in run.user:
            run.train_step(x, y)
            change(run)


def test_numbers_of_live_blocks_that_change_at_each_step_work_to_the_bit() -> None:
    def change(run: Blocks) -> None:
        run.model[2].temperature *= 0.99
        run.model[1].shift.add_(0.01)

    run, by_hand = Blocks({1: 1}), Blocks({})
    by_hand.epochs(1)
    train_without_rows(by_hand, 3, change)
    run.epochs(1)
    for _ in range(3):
        for x, y in run.drop.loader:
            run.train_step(x, y)
            change(run)
        run.drop.step()
    assert run.drop.prefix == 1
    assert run.losses == by_hand.losses
    assert run.model[2].temperature == by_hand.model[2].temperature < 0.9


class Counted(nn.Module):
    """Its forward writes to objects."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(1, 6, 3, padding=1)
        self.meter = SimpleNamespace(total=0)
        self.shapes: list[Any] = []
        self.calls = 0

    def forward(self, x: Tensor) -> Tensor:
        self.meter.total += 1
        self.calls += 1
        self.shapes.append(x.shape)
        return self.conv(x)


def test_objects_that_forward_writes_to_count_the_loops_calls() -> None:
    run = Run(drops={})
    counted = run.model[0] = Counted()
    run.optimizer = torch.optim.SGD(run.model.parameters(), lr=0.05)
    run.drop = run.scheduler({1: 2})
    assert (counted.meter.total, counted.calls, counted.shapes) == (0, 0, [])
    run.epochs(1)
    assert run.drop.prefix == 2
    assert counted.meter.total == counted.calls == len(counted.shapes) == 6
    run.epochs(4)
    assert accuracy(run.model) > 0.9


class Storing(Block):
    """Leaves what it computes to the loss."""

    def forward(self, x: Tensor) -> Tensor:
        self.features = super().forward(x)
        return self.features


class Within(nn.Module):
    """A block in another one, with a head on its features."""

    def __init__(self, block: nn.Module) -> None:
        super().__init__()
        self.block = block

    def forward(self, x: Tensor) -> Tensor:
        return self.block(x).relu()


#: what leaves features to the loss, and the name of the layer in the error
LEFT: dict[str, tuple[Callable[[Blocks, dict[str, Any]], Any], str]] = {
    "a hook on a block": (lambda run, kept: keep_output(run.model[0], kept), "0"),
    "a hook within a block": (lambda run, kept: keep_output(run.model[0].conv, kept), "0.conv"),
    "a hook within two blocks": (lambda run, kept: nest(run, kept), "0.block.conv"),
    "a hook that is put on later": (lambda run, kept: later(run, kept), "0.conv"),
    "a hook before a module": (lambda run, kept: keep_input(run.model[1].conv, kept), "0"),
    "a stored tensor": (lambda run, kept: store(run.model[0], kept), "0.conv"),
    "a stored tensor within a block": (lambda run, kept: nest(run, kept, store), "0.block.conv"),
}


def keep_output(module: nn.Module, kept: dict[str, Any]) -> None:
    module.register_forward_hook(lambda _, x, y: kept.update(features=y))


def keep_input(module: nn.Module, kept: dict[str, Any]) -> None:
    module.register_forward_pre_hook(lambda _, args: kept.update(features=args[0]))


def store(module: nn.Module, kept: dict[str, Any]) -> None:
    module.__class__ = Storing
    kept["of"] = module


def nest(run: Blocks, kept: dict[str, Any], leave: Callable[[Any, dict[str, Any]], Any] | None = None) -> None:
    block = run.model[0]
    run.model[0] = Within(block)
    if leave is None:
        keep_output(block.conv, kept)
    else:
        leave(block, kept)


def later(run: Blocks, kept: dict[str, Any]) -> None:
    run.epochs(3)
    keep_output(run.model[0].conv, kept)


@pytest.mark.parametrize(("leave", "name"), LEFT.values(), ids=LEFT)
def test_a_loss_that_uses_what_dropped_layers_leave_is_refused_by_name(
    leave: Callable[[Blocks, dict[str, Any]], Any], name: str
) -> None:
    run, kept = Blocks({1: 2}), {}
    leave(run, kept)
    if not run.drop.prefix:
        run.drop = run.scheduler({1: 2})

    def epoch() -> None:
        for x, y in run.drop.loader:
            loss = nn.functional.cross_entropy(run.model(x), y)
            features = kept["of"].features if "of" in kept else kept["features"]
            assert len(features) == len(y)
            run.optimizer.zero_grad()
            (loss + 0.01 * features.square().mean()).backward()
            run.optimizer.step()
        run.drop.step()

    if not run.drop.prefix:
        epoch()
        epoch()  # rows are kept on the way, and the features are there
    with pytest.raises(RuntimeError, match=rf"have to see the output of a dropped layer \({name}\), which is not comp"):
        epoch()
    run.epochs(1)  # a loop that does not look at them
    run.drop.undrop()
    epoch()


def test_a_layer_whose_values_a_hook_takes_is_not_dropped_behind_its_row() -> None:
    run, taken = Blocks({1: 2}), []
    run.model[0].register_forward_hook(lambda _, x, y: taken.append(y.detach().numpy()))
    run.epochs(1)
    assert run.drop.prefix == 1
    assert "not 2 layers: drop.loader: Feature([4, 6, 8, 8], of the dropped layer 0, not" in run.drop.history[-1].reason
    before = len(taken)
    run.epochs(3)
    assert len(taken) == before + 3 * (len(run.user) + 2)  # two forwards of the trial of two layers run the hook


def test_a_hook_that_takes_the_values_of_a_dropped_layer_is_told_that_there_are_none() -> None:
    run, taken = Blocks({1: 2}).epochs(2), []
    run.model[0].register_forward_hook(lambda _, x, y: taken.append(y.detach().numpy()))
    with pytest.raises(
        TypeError, match=r"of the dropped layer 0, not computed\) cannot be a numpy array: .*cached rows"
    ):
        run.epochs(1)


@pytest.mark.parametrize("wrap", [lambda module: module, partial(torch.compile, backend="eager")])
@pytest.mark.parametrize("leave", ["a hook within a block", "a stored tensor"])
def test_a_loss_on_a_wrapped_model_that_uses_what_dropped_layers_leave_is_seen(leave: str, wrap: Any) -> None:
    run, kept = Blocks({}), {}
    LEFT[leave][0](run, kept)
    run.drop = run.scheduler({1: 1}, wrap=wrap)

    seen = False
    for _ in range(3):
        for x, y in run.drop.loader:
            loss = nn.functional.cross_entropy(run.drop.model(x), y)
            features = kept["of"].features if "of" in kept else kept["features"]
            try:
                loss = loss + 0.01 * features.square().mean()
            except RuntimeError as error:
                assert "output of a dropped layer (0.conv)" in str(error)  # noqa: PT017
                seen = True
            # A compiler has no tensors without values.
            seen = seen or bool(loss.isnan())
            run.optimizer.zero_grad()
            loss.backward()
            run.optimizer.step()
        assert seen == bool(run.drop._rows.cache and run.drop._rows.cache.filled.all() and run.drop.prefix)
        run.drop.step()
    assert seen


def test_hooks_on_live_layers_see_each_step_and_no_probe() -> None:
    run = Blocks({1: 1})
    run.epochs(1)
    found: list[Any] = []
    run.model[2].conv.register_forward_hook(lambda _, x, y: found.append((len(y), y.requires_grad)))
    run.epochs(3)
    assert found == [(16, True)] * 18


def double(_: Any, args: Any, out: Tensor) -> Tensor:
    return 2 * out


def halve_first(_: Any, args: Any) -> Any:
    return (args[0] - 0.5,)


@pytest.mark.parametrize("when", [0, 1, 3])
def test_hooks_on_the_model_itself_work(when: int) -> None:
    run, by_hand = Blocks({1: 1}), Blocks({})
    for epoch in range(5):
        if epoch == when:
            for model in (run.model, by_hand.model):
                model.register_forward_hook(double)
                model.register_forward_pre_hook(halve_first)
            if when == 0:
                run.drop = run.scheduler({1: 1})
        if epoch == when == 3:
            with pytest.warns(RuntimeWarning, match="computed again: the first 1 layers compute something else"):
                run.epochs(1)
        else:
            run.epochs(1)
        if epoch == 0:
            by_hand.epochs(1)
        else:
            train_without_rows(by_hand, 1)
    assert run.drop.prefix == 1
    assert bool(run.drop._rows.cache.filled.all())
    assert run.losses == pytest.approx(by_hand.losses, rel=1e-5)


def test_copies_and_averages_of_what_is_wrapped_are_refused() -> None:
    run = Run(wrap=lambda module: module)
    for copied in (copy.deepcopy, AveragedModel):
        with pytest.raises(TypeError, match=r"drop.model: copies and averages must be of the whole model"):
            copied(run.drop.model)


def test_images_in_the_shape_of_rows_are_images_in_eval_mode() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(1, 1, 3, padding=1), nn.ReLU(), nn.Conv2d(1, 4, 3), nn.Flatten(), nn.Linear(144, 4))
    whole = copy.deepcopy(model)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    drop = DropScheduler(model, optimizer, Run.make_loader(shuffle=False), policy=Fixed({0: 1}), cache="fp32")
    images = quarters().tensors[0][:16]
    for _ in range(2):  # the epoch in which rows are kept, and one on rows
        x, _ = next(iter(drop.loader))
        for mode in (False, True):
            model.train(mode)
            with torch.no_grad():
                assert torch.equal(model(images), whole(images))
                torch.testing.assert_close(model(x), whole(images))
                torch.testing.assert_close(model(x[:4]), whole(images[:4]))
        for x, _ in drop.loader:
            assert model(x).requires_grad
