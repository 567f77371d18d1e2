"""Attributes of modules that a dropped prefix calls as they are: a change is seen, and the rows are computed again."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor, nn
from torch.utils.data import DataLoader

from learndrop_ext import DropScheduler, Fixed
from learndrop_ext.graph.chain import split_layers
from small_training import data


class Inner(nn.Module):
    scale: float
    shift: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.scale = 1.0
        self.shift = torch.zeros(())  # no buffer
        self.names = ["a", "b"]
        self.unused = 0

    def forward(self, x: Tensor) -> Tensor:
        self.seen = len(x)  # kept whole: it sets an attribute
        return x * self.scale * len(self.names) + self.shift


class Block(nn.Module):
    """Kept whole, with counters that its own forward moves."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 3, 3, padding=1)
        self.inner = Inner()
        self.temperature = 1.0
        self.rate = 0.1
        self.calls = 0
        self.log: list[int] = []
        self.last = torch.zeros(())

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        self.log.append(self.calls)
        self.last.copy_(x.detach().sum())
        if self.training and self.rate > 1:
            x = x * self.rate
        return self.inner(self.conv(x) / self.temperature).relu()


def network() -> nn.Sequential:
    torch.manual_seed(0)
    head = nn.Sequential(nn.Conv2d(3, 4, 3, padding=1), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 5))
    return nn.Sequential(Block(), Block(), *head)


def train(drop: DropScheduler, optimizer: torch.optim.Optimizer) -> None:
    drop.base_model.train()
    for x, y in drop.loader:
        loss = F.cross_entropy(drop.model(x), y)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()


def dropped(prefix: int = 1) -> tuple[nn.Sequential, torch.optim.Optimizer, DropScheduler]:
    model = network()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    drop = DropScheduler(model, optimizer, DataLoader(data(), batch_size=8), policy=Fixed({1: prefix}), cache="fp32")
    assert set(drop.chain.kept_whole) == {"0", "1"}
    train(drop, optimizer)
    drop.step()
    train(drop, optimizer)
    assert drop.rows.cache is not None
    assert bool(drop.rows.cache.filled.all())
    return model, optimizer, drop


CHANGES: list[tuple[Callable[[Any], Any], str]] = [
    (lambda b: setattr(b, "temperature", 0.5), "temperature of 0 was 1.0 when its rows were computed, and is 0.5"),
    (lambda b: setattr(b.inner, "scale", 3.0), "scale of 0.inner was 1.0 when its rows were computed, and is 3.0"),
    (lambda b: b.inner.names.append("c"), r"names of 0.inner was \['a', 'b'\] when its rows were computed, and is"),
    (lambda b: b.inner.shift.add_(1), "shift of 0.inner has changed since its rows were computed"),
    (lambda b: setattr(b.inner, "shift", torch.ones(())), "shift of 0.inner has changed since its rows were computed"),
    (lambda b: setattr(b, "forward", lambda x: b.conv(x)), "forward of 0 was added after its rows were computed"),
]


@pytest.mark.parametrize(("change", "message"), CHANGES, ids=[message[:24] for _, message in CHANGES])
def test_rows_are_made_anew_where_an_attribute_of_the_dropped_prefix_has_changed(
    change: Callable[[Any], Any], message: str
) -> None:
    model, optimizer, drop = dropped()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        drop.step()
    train(drop, optimizer)
    change(model[0])
    with pytest.warns(RuntimeWarning, match=message):
        drop.step()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        train(drop, optimizer)
        drop.step()
    rows, _ = next(iter(drop.loader))
    with torch.no_grad():
        torch.testing.assert_close(rows, copy.deepcopy(model[0]).eval()(data().tensors[0][:8]))


def test_what_means_nothing_to_the_rows_does_not_cost_them() -> None:
    model, optimizer, drop = dropped()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model[0].rate = 0.2  # read in train mode alone
        model[0].inner.unused = 7
        model[0].note = "new"
        drop.step()
        assert drop.rows.cache is not None
        assert bool(drop.rows.cache.filled.all())
        assert (model[0].rate, model[0].inner.unused, model[0].note) == (0.2, 7, "new")
        train(drop, optimizer)
        model[1].temperature = 0.5  # of a live layer
        drop.step()
        model[0](data().tensors[0][:2])  # counters of its own
    train(drop, optimizer)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        drop.step()


def test_what_forward_itself_moves_is_known_when_the_model_is_split() -> None:
    model = network()
    chain = split_layers(model, data().tensors[0][:2])
    names = {name for key, name in chain.moving if key == id(model[0])}
    assert names == {"calls", "log", "last"}
    assert {name for key, name in chain.moving if key == id(model[0].inner)} == {"seen"}
    assert (model[0].calls, model[0].log, float(model[0].last)) == (0, [], 0.0)
    assert copy.deepcopy(chain).moving == frozenset()
