"""What forward reads beside its input changes, and what it leaves for the loop: hooks, stored features, copies."""

from __future__ import annotations

import copy
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from four_quarters import Run, quarters
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
    x, _ = next(iter(run.drop.loader))
    with torch.no_grad():
        torch.testing.assert_close(x, run.model[: run.drop.cut](quarters().tensors[0][:16]))
        torch.testing.assert_close(run.drop.model(x), run.model[run.drop.cut :](x), rtol=0, atol=0)


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
        assert run.drop.rows.cache is not None
        assert bool(run.drop.rows.cache.filled.all())
    run.epochs(2)
    assert_trained_as_the_model(run)


def test_a_global_variable_that_changed_before_the_drop() -> None:
    run = Blocks({2: 1})
    run.epochs(1)
    SCALE["of all blocks"] = 2.0
    run.epochs(1)
    assert run.drop.prefix == 1
    assert_trained_as_the_model(run)


def test_a_number_that_changes_at_each_step_is_refused_by_name_and_a_buffer_is_followed() -> None:
    run = Blocks()
    run.epochs(2)

    def epoch() -> None:
        for x, y in run.drop.loader:
            run.train_step(x, y)
            run.model[2].temperature *= 0.9

    with pytest.raises(RuntimeError, match=r"temperature of 2 was 1.0 .* is 0.9; set it between two epochs, or keep"):
        epoch()
    run.model[2].temperature = 1.0
    for x, y in run.drop.loader:
        run.model[2].shift.add_(0.1)
        with torch.no_grad():
            torch.testing.assert_close(run.drop.model(x), run.model[1:](x), rtol=0, atol=0)
        run.train_step(x, y)


def test_objects_that_forward_writes_to_are_kept_whole() -> None:
    class Counted(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv = nn.Conv2d(1, 6, 3, padding=1)
            self.meter = SimpleNamespace(total=0)

        def forward(self, x: Tensor) -> Tensor:
            self.meter.total += 1
            return self.conv(x)

    run = Run(drops={})
    run.model[0] = Counted()
    run.optimizer = torch.optim.SGD(run.model.parameters(), lr=0.05)
    run.drop = run.scheduler({})
    assert run.drop.chain.kept_whole == {"0": "its forward changes meter"}
    assert run.model[0].meter.total == 0
    run.epochs(1)
    assert run.model[0].meter.total == 6


@pytest.mark.parametrize("how", ["a hook", "a stored tensor"])
def test_what_dropped_layers_leave_for_the_loop_is_said(how: str) -> None:
    class Storing(Block):
        def forward(self, x: Tensor) -> Tensor:
            self.features = super().forward(x)
            self.calls = len(x)
            return self.features

    run = Blocks({})
    found = []
    run.model[2].conv.register_forward_hook(lambda _, x, y: found.append(len(y)))
    if how == "a hook":
        run.model[0].conv.register_forward_hook(lambda *_: None)
    else:
        run.model[0].__class__ = Storing
    run.drop = run.scheduler({1: 1})
    name = "the hooks of 0.conv" if how == "a hook" else "0.features"
    with pytest.warns(RuntimeWarning, match=f"a loss must not use {name}, which may be of another batch"):
        run.epochs(1)
    found.clear()
    run.epochs(2)
    assert found == [16] * 12  # the checks of the chain call no hook
    assert len(run.model[0].conv._forward_hooks) == (how == "a hook")


def test_hooks_on_the_model_itself_are_refused() -> None:
    run = Blocks({})
    handle = run.model.register_forward_hook(lambda *_: None)
    with pytest.raises(ValueError, match=r"model must have no hooks of its own, .* got some on Sequential"):
        run.scheduler({})
    handle.remove()
    run.drop = run.scheduler({1: 1})
    run.epochs(2)
    run.model.register_forward_pre_hook(lambda *_: None)
    with pytest.raises(ValueError, match="model must have no hooks of its own"):
        run.epochs(1)


def test_copies_and_averages_of_what_is_trained_are_refused() -> None:
    run = Run()
    for copied in (copy.deepcopy, AveragedModel):
        with pytest.raises(TypeError, match=r"drop.model: copies and averages must be of the whole model"):
            copied(run.drop.model)


def test_images_in_the_shape_of_rows_are_refused_in_eval_mode() -> None:
    model = nn.Sequential(nn.Conv2d(1, 1, 3, padding=1), nn.ReLU(), nn.Conv2d(1, 4, 3), nn.Flatten(), nn.Linear(144, 4))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    drop = DropScheduler(model, optimizer, Run.make_loader(shuffle=False), policy=Fixed({0: 1}), cache="fp32")
    images = quarters().tensors[0][:16]
    x, _ = next(iter(drop.loader))
    model.eval()
    with torch.no_grad():
        torch.testing.assert_close(drop.model(x), model(images))
        torch.testing.assert_close(drop.model(x[:4]), model(images[:4]))
        with pytest.raises(
            ValueError, match=r"in eval mode x must be the batch of cached rows .* call the whole model"
        ):
            drop.model(images)
