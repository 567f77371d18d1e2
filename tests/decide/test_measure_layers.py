from __future__ import annotations

import copy
import random
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from learndrop_ext.decide import costs as module
from learndrop_ext.decide.costs import (
    forward_flops,
    measure_layers,
)
from learndrop_ext.graph.chain import Chain, split_layers


def network() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(3, 8, 3, padding=1),
        nn.BatchNorm2d(8),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Conv2d(8, 16, 3, stride=2, padding=1, bias=False),
        nn.Dropout(0.5, inplace=True),
        nn.Flatten(),
        nn.Linear(256, 10),
    )


class TwoHeads(nn.Module):
    """Its last layer has no single output, one of its outputs no gradient, and a layer before it no parameters."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 4, 3, padding=1)
        self.pool = nn.Sequential(nn.ReLU(inplace=True), nn.MaxPool2d(2))
        self.head = nn.Conv2d(4, 2, 1)

    def forward(self, x: torch.Tensor) -> dict[str, torch.Tensor]:
        y = self.head(self.pool(self.stem(x)))
        return {"sum": y.sum((2, 3)), "largest": y.argmax(1)}


def chain_of(model: nn.Module, **more: Any) -> Chain:
    return split_layers(model, torch.rand(2, 3, 16, 16), **more)


def test_measure_layers_counts_flops_of_one_sample() -> None:
    costs = measure_layers(chain_of(network()), torch.rand(4, 3, 16, 16))
    # Two for each multiplication with its addition: outputs x weights of one output.
    assert [cost.flops for cost in costs] == [
        2 * (8 * 16 * 16) * (3 * 3 * 3),
        2 * (16 * 4 * 4) * (8 * 3 * 3),
        2 * 10 * 256,
    ]
    assert [cost.name for cost in costs] == ["0", "4", "7"]
    assert [cost.shape for cost in costs] == [(8, 8, 8), (256,), (10,)]
    assert [cost.parameters for cost in costs] == [8 * 3 * 9 + 8 + 16, 16 * 8 * 9, 2570]
    assert forward_flops(costs) == 110_592 + 36_864 + 5_120
    assert forward_flops(costs[1:]) == 41_984
    assert forward_flops([]) == 0


class Stopwatch:
    """Stands in for shortest_laps: each lap takes one second more than the one before, and each run is noted."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.calls: list[tuple[bool, int, tuple[Any, ...]]] = []
        self.seconds = 0.0
        monkeypatch.setattr(module, "shortest_laps", self)

    def __call__(self, run: Any, device: torch.device, *, repeats: int, prepare: Any) -> tuple[float, ...]:
        arguments = prepare()
        self.calls.append((torch.is_grad_enabled(), repeats, arguments))
        return tuple(self._second() for _ in run(*arguments))

    def _second(self) -> float:
        self.seconds += 1
        return self.seconds


def test_measure_layers_times_each_layer_frozen_and_live(monkeypatch: pytest.MonkeyPatch) -> None:
    watch = Stopwatch(monkeypatch)
    costs = measure_layers(chain_of(network()), torch.rand(4, 3, 16, 16), repeats=5)
    # Per sample of a batch of four: frozen, forward, backward to the parameters, backward to the input too. The first
    # layer needs no gradient of its input.
    assert [(c.seconds, c.train_seconds, c.first_seconds) for c in costs] == [
        (1 / 4, (2 + 3) / 4, (2 + 3) / 4),
        (5 / 4, (6 + 8) / 4, (6 + 7) / 4),
        (9 / 4, (10 + 12) / 4, (10 + 11) / 4),
    ]
    assert [(grad, repeats) for grad, repeats, _ in watch.calls] == [(False, 5), (True, 5)] * 3
    # What gradients are asked for: of the parameters, and of the input where a layer before learns too.
    assert [len(arguments[1]) for grad, _, arguments in watch.calls if grad] == [4, 2, 3]
    assert [tuple(arguments[0].shape) for grad, _, arguments in watch.calls if not grad] == [
        (4, 3, 16, 16),
        (4, 8, 8, 8),
        (4, 256),
    ]


def test_measure_layers_runs_frozen_layers_in_eval_mode_and_live_ones_in_train_mode() -> None:
    modes: list[tuple[bool, bool]] = []
    model = network()
    chain = chain_of(model)
    model[1].register_forward_hook(lambda m, _, y: modes.append((m.training, y.requires_grad)))
    measure_layers(chain, torch.rand(4, 3, 16, 16), repeats=2)
    # Once for the FLOPs and two that count; live two that count.
    assert modes == [(False, False)] * 3 + [(True, True)] * 2


class Repeats(nn.Module):
    """Its time depends on an attribute."""

    def __init__(self, times: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(4, 4, 3, padding=1)
        self.times = times

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.calls = [self.times]
        for _ in range(self.times):
            x = self.conv(x)
        return x


def test_measure_layers_times_layers_that_are_built_alike_once(monkeypatch: pytest.MonkeyPatch) -> None:
    def block(**options: Any) -> nn.Sequential:
        return nn.Sequential(nn.Conv2d(4, 4, 3, **{"padding": 1, **options}), nn.BatchNorm2d(4), nn.ReLU())

    frozen = block()
    frozen[0].weight.requires_grad_(False)
    blocks = [block(), block(), block(), block(dilation=2, padding=2), block(bias=False), frozen, block()]
    model = nn.Sequential(*blocks, Repeats(2), Repeats(3), nn.Flatten(), nn.Linear(256, 2))
    chain = split_layers(model, torch.rand(2, 4, 8, 8))
    watch = Stopwatch(monkeypatch)
    costs = measure_layers(chain, torch.rand(2, 4, 8, 8))
    assert len(costs) == 10
    assert [cost.name for cost in costs] == list(chain.names)
    # The first layer has no gradient of its input; 1, 2 and 6 are alike.
    alike = [(cost.seconds, cost.train_seconds, cost.flops) for cost in costs]
    assert alike[1] == alike[2] == alike[6]
    assert len(set(alike)) == 8
    assert len(watch.calls) == 2 * 8
    assert costs[8].flops * 2 == costs[7].flops * 3
    assert [cost.parameters for cost in costs[4:7]] == [4 * 4 * 9 + 8, 4 + 8, 4 * 4 * 9 + 4 + 8]


def test_measure_layers_takes_two_of_a_single_sample() -> None:
    batches: list[int] = []
    model = network()
    chain = chain_of(model)
    model[0].register_forward_hook(lambda _, x, y: batches.append(len(x[0])))
    costs = measure_layers(chain, torch.rand(1, 3, 16, 16), repeats=1)
    assert set(batches) == {2}
    assert costs[0].flops == 110_592


def test_measure_layers_under_autocast() -> None:
    dtypes: list[torch.dtype] = []
    model = network()
    chain = chain_of(model)
    model[4].register_forward_hook(lambda _, x, y: dtypes.append(y.dtype))
    measure_layers(chain, torch.rand(2, 3, 16, 16), repeats=1, autocast=torch.bfloat16)
    assert set(dtypes) == {torch.bfloat16}
    assert not torch.is_autocast_enabled("cpu")


def test_measure_layers_of_outputs_and_layers_without_gradients() -> None:
    model = TwoHeads()
    model.stem.requires_grad_(False)
    costs = measure_layers(chain_of(model, layers=["stem", "pool", "head"]), torch.rand(2, 3, 16, 16), repeats=1)
    # The pool has no weights: it belongs to the layer before it.
    assert [cost.parameters for cost in costs] == [0, 10]
    assert [cost.shape for cost in costs] == [(4, 8, 8), None]
    assert all(cost.train_seconds > 0 and cost.seconds > 0 for cost in costs)


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("fails", [True, False])
def test_measure_layers_leaves_everything_as_it_was(training: bool, fails: bool) -> None:
    model = network().train(training)
    chain = chain_of(model)
    chain(torch.rand(2, 3, 16, 16)).sum().backward()
    model[4].weight.grad = None
    flags = [m.training for m in chain.modules()]
    state = copy.deepcopy((model.state_dict(), [p.grad for p in model.parameters()]))
    grads = [p.grad for p in model.parameters()]
    good, bad = torch.rand(2, 3, 16, 16), torch.rand(2, 4, 16, 16)
    draws = torch.get_rng_state(), np.random.get_state()[1].tolist(), random.getstate()
    if fails:
        with pytest.raises(RuntimeError):
            measure_layers(chain, bad)
    else:
        measure_layers(chain, good, repeats=2)
    assert [m.training for m in chain.modules()] == flags
    assert all(m.training is training for m in model.modules())
    torch.testing.assert_close((model.state_dict(), grads), state, rtol=0, atol=0)
    assert all(p.grad is g for p, g in zip(model.parameters(), grads, strict=True))
    assert torch.equal(torch.get_rng_state(), draws[0])
    assert (np.random.get_state()[1].tolist(), random.getstate()) == draws[1:]


def test_measure_layers_leaves_its_example() -> None:
    x = torch.randn(2, 4, 8, 8)
    before = x.clone()
    model = nn.Sequential(nn.Sequential(nn.ReLU(inplace=True), nn.Conv2d(4, 4, 3)), nn.Flatten(), nn.Linear(144, 2))
    measure_layers(split_layers(model, x.clone(), layers=["0", "2"]), x, repeats=1)
    assert torch.equal(x, before)
