from __future__ import annotations

import copy
import random
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pytest
import torch
from torch import nn

from learndrop_ext.rows.config import CacheConfig
from learndrop_ext.rows.plan import Budgets
from learndrop_ext.decide import probes
from learndrop_ext.decide.probes import (
    StepSeconds,
    TierCost,
    copy_bytes_per_second,
    disk_bytes_per_second,
    median_seconds,
    probe_training_step,
    tier_costs,
    tier_speeds,
)

CPU = torch.device("cpu")


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """Lets the runs that are timed take the seconds given, one after the other."""

    def take(*seconds: float) -> None:
        def readings() -> Iterator[float]:
            now = 100.0
            for one in seconds:
                yield now
                now += one
                yield now

        reading = readings()
        monkeypatch.setattr(probes, "perf_counter", lambda: next(reading))

    return take


def test_median_seconds(clock: Callable[..., None]) -> None:
    ran: list[int] = []
    clock(50.0, 60.0, 4.0, 1.0, 3.0)
    assert median_seconds(lambda: ran.append(0), CPU, repeats=3, warmup=2) == 3.0
    assert len(ran) == 5
    clock(9.0, 2.0)
    assert median_seconds(lambda: None, CPU, repeats=1) == 2.0


def test_the_shortest_of_each_lap_counts(monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[int] = []
    ran: list[int] = []

    def prepare() -> tuple[int]:
        made.append(len(made))
        return (made[-1],)

    def run(number: int) -> Iterator[None]:
        ran.append(number)
        yield
        yield

    # Laps of 1 and 2.5, of 1.5 and 2, and of 3 and 4 seconds.
    times = iter([0.0, 1.0, 3.5, 10.0, 11.5, 13.5, 20.0, 23.0, 27.0])
    monkeypatch.setattr(probes, "perf_counter", lambda: next(times))
    assert probes.shortest_laps(run, CPU, repeats=3, prepare=prepare) == (1.0, 2.0)
    assert ran == made == [0, 1, 2]


def test_copy_bytes_per_second(clock: Callable[..., None]) -> None:
    # A byte read and a byte written for each of 1,000; the first copy warms up.
    clock(9.0, 4.0, 1.0, 2.0)
    assert copy_bytes_per_second(CPU, size=1000) == 1000.0


def test_disk_bytes_per_second(tmp_path: Path, clock: Callable[..., None]) -> None:
    clock(4.0)
    assert disk_bytes_per_second(tmp_path, size=3 << 20) == (3 << 20) / 4
    assert list(tmp_path.iterdir()) == []
    with pytest.raises(OSError, match="No such file"):
        disk_bytes_per_second(tmp_path / "none")


@pytest.mark.parametrize(
    ("budgets", "folder", "seconds", "speeds"),
    [
        (Budgets(100, 0, 0), False, [1.0] * 4, (2.0 * (1 << 26), float("inf"), float("inf"))),
        # A CPU model has no host tier of its own.
        (Budgets(100, 50, 0), False, [2.0] * 4, (1.0 * (1 << 26), float("inf"), float("inf"))),
        (Budgets(100, 0, 70), False, [2.0] * 4, (1.0 * (1 << 26), float("inf"), float("inf"))),
        (Budgets(100, 0, 70), True, [4.0] + [1.0] * 4, (2.0 * (1 << 26), float("inf"), (1 << 25) / 4)),
    ],
)
def test_tier_speeds(
    tmp_path: Path,
    clock: Callable[..., None],
    budgets: Budgets,
    folder: bool,
    seconds: list[float],
    speeds: tuple[float, ...],
) -> None:
    clock(*seconds)
    config = CacheConfig(disk_dir=str(tmp_path) if folder else None)
    assert tier_speeds(budgets, config, CPU) == speeds


def test_tier_costs() -> None:
    assert tier_costs(Budgets(3, 2, 1), (30.0, 20.0, 10.0)) == [TierCost(3, 30.0), TierCost(2, 20.0), TierCost(1, 10.0)]


def network() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Dropout(0.5), nn.Flatten(), nn.Linear(144, 5)
    )


OPTIMIZERS: list[Callable[[Any], torch.optim.Optimizer]] = [
    lambda parameters: torch.optim.SGD(parameters, lr=0.1, momentum=0.9, nesterov=True),
    lambda parameters: torch.optim.AdamW(parameters, lr=0.1, amsgrad=True),
]


def snapshot(model: nn.Module, optimizer: torch.optim.Optimizer) -> tuple[Any, ...]:
    grads = [p.grad for p in model.parameters()]
    return copy.deepcopy((model.state_dict(), optimizer.state_dict(), grads, [m.training for m in model.modules()]))


@pytest.mark.parametrize("make", OPTIMIZERS)
@pytest.mark.parametrize("steps", [0, 2])
@pytest.mark.parametrize("training", [True, False])
def test_probe_training_step_leaves_everything_as_it_was(
    make: Callable[[Any], torch.optim.Optimizer], steps: int, training: bool
) -> None:
    model = network().train(training)
    optimizer = make(model.parameters())
    schedule = torch.optim.lr_scheduler.StepLR(optimizer, 1)
    x = torch.rand(4, 3, 8, 8)
    for _ in range(steps):
        model(x).sum().backward()
        optimizer.step()
        schedule.step()
    parameters = list(model.parameters())
    before = snapshot(model, optimizer)
    draws = torch.get_rng_state(), np.random.get_state()[1].tolist(), random.getstate()
    found = probe_training_step(model, optimizer, x)
    assert found is not None
    assert 0 < found.optimizer < found.step
    torch.testing.assert_close(snapshot(model, optimizer), before, rtol=0, atol=0)
    assert torch.equal(torch.get_rng_state(), draws[0])
    assert (np.random.get_state()[1].tolist(), random.getstate()) == draws[1:]
    assert all(p is q for p, q in zip(parameters, optimizer.param_groups[0]["params"], strict=True))
    assert not x.requires_grad


def test_probe_training_step_takes_medians(clock: Callable[..., None]) -> None:
    model = network()
    clock(90.0, 5.0, 3.0, 4.0, 0.5, 2.0, 1.0, 70.0, 0.25, 0.5, 0.125)
    found = probe_training_step(model, torch.optim.SGD(model.parameters(), lr=0.1), torch.rand(2, 3, 8, 8))
    assert found == StepSeconds(4.0, 1.0, 0.25)


class Recording(torch.optim.SGD):
    """Notes each step: how many gradients there were, and whether its parameters moved."""

    notes: ClassVar[list[tuple[int, bool]]] = []

    def step(self, closure: Any = None) -> Any:
        parameters = self.param_groups[0]["params"]
        before = [p.detach().clone() for p in parameters]
        super().step(closure)
        moved = all(not torch.equal(p, old) for p, old in zip(parameters, before, strict=True))
        self.notes.append((sum(p.grad is not None for p in parameters), moved))


class Watched(nn.Module):
    """Notes the mode, dtype and weight of each pass in a list that its copies share."""

    notes: ClassVar[list[tuple[bool, torch.dtype, float]]] = []

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(3, 2)

    def forward(self, x: torch.Tensor) -> dict[str, torch.Tensor]:
        y = self.linear(x)
        self.notes.append((self.training, y.dtype, self.linear.weight.detach().sum().item()))
        return {"y": y, "place": y.argmax(1)}


@pytest.mark.parametrize("autocast", [None, torch.bfloat16])
def test_probe_training_step_trains_the_copied_parameters(autocast: torch.dtype | None) -> None:
    model = Watched().eval()
    Watched.notes.clear()
    Recording.notes.clear()
    optimizer = Recording(model.parameters(), lr=0.1)
    assert probe_training_step(model, optimizer, torch.rand(4, 3), repeats=2, autocast=autocast) is not None
    # A pass to see whether there is a gradient, a step to warm up and two timed; then two of the optimizer alone.
    assert len(Watched.notes) == 4
    assert {note[:2] for note in Watched.notes} == {(True, autocast or torch.float32)}
    assert Recording.notes == [(2, True)] * 5
    # Each step sees what the one before made of the weights.
    assert len({weight for *_, weight in Watched.notes}) == 3
    assert not model.training


def test_probe_training_step_without_gradient_mode() -> None:
    model = network()
    with torch.no_grad():
        assert probe_training_step(model, OPTIMIZERS[0](model.parameters()), torch.rand(4, 3, 8, 8)) is not None


class Uncopyable(nn.Linear):
    def __deepcopy__(self, memo: Any) -> Any:
        raise TypeError("holds an open file")


class Integers(nn.Linear):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return super().forward(x).argmax(1)


@pytest.mark.parametrize(
    ("model", "optimizer"),
    [
        (Uncopyable(3, 2), torch.optim.SGD),
        (Integers(3, 2), torch.optim.SGD),
        (nn.Linear(3, 2), torch.optim.LBFGS),
        (nn.Linear(3, 2).requires_grad_(False), torch.optim.SGD),
    ],
)
def test_probe_training_step_of_what_cannot_be_timed(model: nn.Module, optimizer: Any) -> None:
    x = torch.rand(4, 3)
    before = torch.get_rng_state()
    assert probe_training_step(model, optimizer(model.parameters(), lr=0.1), x) is None
    assert torch.equal(torch.get_rng_state(), before)
