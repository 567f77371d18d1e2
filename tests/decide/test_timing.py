from __future__ import annotations

import copy
import dataclasses
import random
import time
import warnings
from collections import OrderedDict
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from ticking import Clock, Ticking, TickingSGD
from torch import nn
from torch.utils.checkpoint import checkpoint
from torch.utils.data import DataLoader, TensorDataset

from learndrop_ext import Budget, DropScheduler, Fixed, StoppedLearning
from learndrop_ext.decide import timing
from learndrop_ext.decide.costs import forward_flops, live_seconds
from learndrop_ext.decide.forecast import RunCosts
from learndrop_ext.decide.policy import Situation
from learndrop_ext.decide.timing import StepCosts, time_step, untimed
from learndrop_ext.forward.chain import split_layers
from small_training import Net, data

CPU = torch.device("cpu")


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    return Clock(monkeypatch)


def steps_of(model: nn.Module, x: torch.Tensor, *, optimizer: torch.optim.Optimizer | None = None) -> StepCosts:
    """What time_step finds for a batch x."""
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1) if optimizer is None else optimizer
    return time_step(split_layers(model, x[:2]), lambda: model(x), optimizer, batch=len(x), device=x.device)


def seconds_of(found: StepCosts) -> list[tuple[float, float, float]]:
    """Forward, forward and backward, and these as the first live layer, of each layer."""
    return [(layer.seconds, layer.train_seconds, layer.first_live_seconds) for layer in found.layers]


def total_of(found: StepCosts) -> float:
    """Seconds of a sample in all parts of a step."""
    return sum(layer.train_seconds for layer in found.layers) + found.other_seconds + found.optimizer_seconds


def test_a_step_is_its_layers_the_optimizer_and_the_rest(clock: Clock, monkeypatch: pytest.MonkeyPatch) -> None:
    model = nn.Sequential(*(Ticking(clock, seconds) for seconds in ((1, 2, 9), (2, 1, 3), (5, 1, 1))))
    monkeypatch.setattr(timing, "wait_for", lambda device: clock.tick(0.5))
    found = steps_of(model, torch.rand(8, 4), optimizer=TickingSGD(clock, model))
    # The first layer has no gradient of its input. Half of a backward pass is taken to be for that.
    assert seconds_of(found) == [(1, 3, 3), (2, 6, 4), (5, 7, 6)]
    # A step ends when the device has done its work; so does that of the optimizer, of six parameters.
    assert found.other_seconds == pytest.approx(0.5 / 8)
    assert found.optimizer_seconds == pytest.approx(6.5 / 8)
    assert found.step_seconds == pytest.approx(16 * 8 + 0.5 + 6.5)
    assert total_of(found) * 8 == pytest.approx(found.step_seconds)
    assert live_seconds(found.layers[1:]) == pytest.approx(4 + 7)


@pytest.mark.parametrize("late", [(400.0, 20.0), (20.0, 400.0)])
def test_the_shorter_of_two_steps_counts(clock: Clock, late: tuple[float, ...]) -> None:
    model = nn.Sequential(*(Ticking(clock, (1, 1, 1)) for _ in range(3)))
    chain, x = split_layers(model, torch.rand(2, 4)), torch.rand(4, 4)
    still = iter(late)

    def run() -> torch.Tensor:
        clock.tick(next(still))
        return model(x)

    found = time_step(chain, run, torch.optim.SGD(model.parameters(), lr=0.1), batch=4, device=CPU)
    assert list(still) == []
    # What comes before the first layer is part of it.
    assert seconds_of(found)[0] == (1 + 20 / 4, 2 + 20 / 4, 2 + 20 / 4)
    assert found.step_seconds == 8 * 4 + 20


class Answer(OrderedDict[str, Any]):
    """As ModelOutput of transformers."""

    def __getattr__(self, name: str) -> Any:
        try:
            return self[name]
        except KeyError:
            raise AttributeError(name) from None


@dataclasses.dataclass
class Record:
    y: torch.Tensor
    names: tuple[str, ...] = ("a", "b")


OUTPUTS: dict[str, Callable[[torch.Tensor], Any]] = {
    "dict": lambda y: {"y": y, "place": y.argmax(1)},
    "ModelOutput": lambda y: Answer(loss=None, logits=y, hidden_states=[y, y]),
    "dataclass": Record,
    "tuple": lambda y: (y.argmax(1), [y.double(), y.half()]),
    "distribution": lambda y: torch.distributions.Normal(y, 1.0),
}


class Returns(nn.Module):
    def __init__(self, clock: Clock, output: Callable[[torch.Tensor], Any]) -> None:
        super().__init__()
        self.a, self.b, self.c = (Ticking(clock, (1, 1, 1)) for _ in range(3))
        self.output = output

    def forward(self, x: torch.Tensor) -> Any:
        return self.output(self.c(self.b(self.a(x))))


@pytest.mark.parametrize("output", OUTPUTS)
def test_all_outputs_have_a_backward_pass(clock: Clock, output: str) -> None:
    found = steps_of(Returns(clock, OUTPUTS[output]), torch.rand(4, 4))
    assert seconds_of(found) == [(1, 2, 2), (1, 3, 2), (1, 3, 2)]


def test_a_model_without_gradients_has_a_forward_pass_only(clock: Clock) -> None:
    found = steps_of(Returns(clock, lambda y: y.argmax(1)), torch.rand(4, 4))
    assert seconds_of(found) == [(1, 1, 1)] * 3


@pytest.mark.parametrize("frozen", [1, 2])
def test_layers_behind_frozen_ones_are_the_first_live_ones(clock: Clock, frozen: int) -> None:
    model = nn.Sequential(*(Ticking(clock, (1, 2, 4)) for _ in range(4)))
    model[:frozen].requires_grad_(False)
    found = steps_of(model, torch.rand(8, 4), optimizer=TickingSGD(clock, model))
    # The first layer that learns has no gradient of its input to compute, in the timed step or ever.
    assert seconds_of(found) == [(1, 1, 1)] * frozen + [(1, 3, 3)] + [(1, 7, 4)] * (3 - frozen)
    assert [layer.parameters for layer in found.layers] == [0] * frozen + [20] * (4 - frozen)
    # The optimizer steps those that have a gradient.
    assert found.optimizer_seconds == 2 * (4 - frozen) / 8
    assert total_of(found) * 8 == found.step_seconds


class Checkpointed(nn.Module):
    """Its middle layers run again in the backward pass."""

    def __init__(self, clock: Clock, *, reentrant: bool) -> None:
        super().__init__()
        self.first = Ticking(clock, (1, 1, 1))
        self.middle = nn.Sequential(*(Ticking(clock, (10, 20, 30)) for _ in range(3)))
        self.last = Ticking(clock, (1, 1, 1))
        self.reentrant = reentrant

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.first(x)
        x = checkpoint(self.middle, x, use_reentrant=self.reentrant) if self.training else self.middle(x)
        return self.last(x)


@pytest.mark.parametrize("reentrant", [True, False])
def test_a_checkpoint_runs_twice(clock: Clock, reentrant: bool) -> None:
    found = steps_of(Checkpointed(clock, reentrant=reentrant), torch.rand(4, 4))
    assert [layer.name for layer in found.layers] == ["first", "middle.0", "middle.1", "middle.2", "last"]
    assert [layer.seconds for layer in found.layers] == [1, 10, 10, 10, 1]
    # The part runs again, in 30 s, when the gradient of its output is there.
    backward = [layer.train_seconds - layer.seconds for layer in found.layers]
    assert backward == [1, 50, 50, 80, 2]
    assert total_of(found) * 4 == found.step_seconds


class PassedBy(nn.Module):
    """A layer that only evaluation runs."""

    def __init__(self, clock: Clock) -> None:
        super().__init__()
        self.a, self.b, self.c, self.d = (Ticking(clock, (1, 1, 1)) for _ in range(4))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.a(x)
        return self.d(self.c(x if self.training else self.b(x)))


def test_a_layer_that_training_passes_by_takes_no_time(clock: Clock) -> None:
    found = steps_of(PassedBy(clock), torch.rand(4, 4))
    assert [layer.name for layer in found.layers] == ["a", "b", "c", "d"]
    assert seconds_of(found) == [(1, 2, 2), (0, 0, 0), (1, 3, 2), (1, 3, 2)]
    assert total_of(found) * 4 == found.step_seconds


def network() -> nn.Sequential:
    torch.manual_seed(0)
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


def test_the_flops_of_one_sample_are_counted() -> None:
    model = network()
    for layers in (
        untimed(split_layers(model, torch.rand(2, 3, 16, 16))),
        steps_of(model, torch.rand(4, 3, 16, 16)).layers,
    ):
        # Two for each multiplication with its addition: outputs x weights of one output.
        assert [cost.flops for cost in layers] == [
            2 * (8 * 16 * 16) * (3 * 3 * 3),
            2 * (16 * 4 * 4) * (8 * 3 * 3),
            2 * 10 * 256,
        ]
        assert [cost.name for cost in layers] == ["0", "4", "7"]
        assert [cost.shape for cost in layers] == [(8, 8, 8), (16, 4, 4), None]
        assert [cost.parameters for cost in layers] == [8 * 3 * 9 + 8 + 16, 16 * 8 * 9, 2570]
        assert forward_flops(layers) == 110_592 + 36_864 + 5_120
        assert forward_flops(layers[1:]) == 41_984
    assert forward_flops([]) == 0


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(8, 8, 3, padding=1)
        self.conv2 = nn.Conv2d(8, 8, 3, padding=1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.conv2(self.conv1(x).relu())


def test_the_first_live_layer_is_spared_the_input_of_its_first_operation() -> None:
    model = nn.Sequential(nn.Conv2d(3, 8, 3), Block(), nn.Conv2d(8, 8, 3), nn.Flatten(), nn.Linear(32, 2))
    found = steps_of(model, torch.rand(4, 3, 6, 6))
    assert [layer.name for layer in found.layers] == ["0", "1", "2", "4"]
    # A backward pass has the gradients of the weights and of the input of each convolution: of two in the block.
    shares = [
        (layer.train_seconds - layer.first_live_seconds) / (layer.train_seconds - layer.seconds)
        for layer in found.layers
    ]
    assert shares == pytest.approx([0.0, 1 / 4, 1 / 2, 1 / 2])


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.cuda)])
def test_what_a_layer_does_on_the_host_is_its_own(device: str) -> None:
    model = Net().to(device)
    model.conv2.register_forward_pre_hook(lambda *_: time.sleep(0.05))
    model.conv2.register_full_backward_pre_hook(lambda *_: time.sleep(0.1))
    x = data(8).tensors[0].to(device)
    found = steps_of(model, x)
    assert [layer.name for layer in found.layers] == ["conv1", "conv2", "conv3", "fc"]
    assert 8 * found.layers[1].seconds >= 0.05
    assert 8 * found.layers[1].train_seconds >= 0.15
    assert max(found.layers, key=lambda layer: layer.train_seconds).name == "conv2"
    assert total_of(found) * 8 == pytest.approx(found.step_seconds, rel=1e-6)


def test_a_plan_follows_the_seconds_of_the_host_and_not_the_flops(clock: Clock) -> None:
    # Nearly all FLOPs are in the last layer, nearly all seconds in the second, before one of its operations.
    model = nn.Sequential(
        nn.Linear(4, 4), nn.Sequential(nn.Linear(4, 4), nn.Tanh()), nn.Linear(4, 4), nn.Linear(4, 4096)
    )
    model[1].register_forward_pre_hook(lambda *_: clock.tick(3.0))
    model[0].register_forward_pre_hook(lambda *_: clock.tick(1.0))
    model[3].register_forward_pre_hook(lambda *_: clock.tick(1.0))
    found = steps_of(model, torch.rand(8, 4))
    assert [layer.seconds * 8 for layer in found.layers] == [1.0, 3.0, 0.0, 1.0]
    nothing = (0.0,) * 4
    costs = RunCosts(found.layers, (0, 1, 2, 3), nothing, nothing, 0.0, found.other_seconds, samples=8)
    # Ten epochs of 5 s; of 4 s, 1 s and 1 s from the rows of one, two and three layers, which take 5 s to make.
    assert Budget(3.5)(Situation(0, 10, 0, tuple("abcd"), (), costs=costs)).prefix == 2
    with pytest.raises(ValueError, match=r"speedup must be at most 3.57, .* got 3.6"):
        Budget(3.6).check(costs, 10)


OPTIMIZERS: list[Callable[[Any], torch.optim.Optimizer]] = [
    lambda parameters: torch.optim.SGD(parameters, lr=0.1, momentum=0.9, nesterov=True),
    lambda parameters: torch.optim.AdamW(parameters, lr=0.1, amsgrad=True),
]


def everything(model: nn.Module, optimizer: torch.optim.Optimizer) -> tuple[Any, ...]:
    """All values that timing must leave as they are."""
    hooks = [len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules()]
    random_states = torch.get_rng_state(), np.random.get_state()[1].tolist(), random.getstate()
    gradients = [p.grad for p in model.parameters()]
    modes = [m.training for m in model.modules()]
    return copy.deepcopy(
        (model.state_dict(), optimizer.state_dict(), gradients, modes, hooks, random_states, torch.is_grad_enabled())
    )


@pytest.mark.parametrize("make", OPTIMIZERS)
@pytest.mark.parametrize("steps", [0, 2])
@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("fails", [True, False])
def test_everything_is_left_as_it_was(
    make: Callable[[Any], torch.optim.Optimizer], steps: int, training: bool, fails: bool
) -> None:
    model = network().train(training)
    model[1].eval()
    optimizer = make(model.parameters())
    schedule = torch.optim.lr_scheduler.StepLR(optimizer, 1)
    x = torch.rand(4, 3, 16, 16)
    for _ in range(steps):
        model(x).square().sum().backward()
        optimizer.step()
        schedule.step()
    model[4].weight.grad = None
    chain = split_layers(model, x[:2])
    before, gradients = everything(model, optimizer), [p.grad for p in model.parameters()]
    if fails:
        with pytest.raises(RuntimeError, match="to have 3 channels, but got 4"):
            time_step(chain, lambda: model(torch.rand(4, 4, 16, 16)), optimizer, batch=4, device=CPU)
    else:
        found = time_step(chain, lambda: model(x), optimizer, batch=4, device=CPU)
        assert 0 < 4 * found.optimizer_seconds < found.step_seconds
    torch.testing.assert_close(everything(model, optimizer), before, rtol=0, atol=0)
    assert all(p.grad is g for p, g in zip(model.parameters(), gradients, strict=True))
    assert all(p is q for p, q in zip(model.parameters(), optimizer.param_groups[0]["params"], strict=True))
    assert not x.requires_grad


def test_hooks_of_gradients_are_not_called() -> None:
    # Each parameter is stepped as soon as its gradient is there.
    model = network()
    steps = {p: torch.optim.SGD([p], lr=0.1) for p in model.parameters()}
    called = []

    def step(parameter: torch.Tensor) -> None:
        called.append(parameter)
        steps[parameter].step()

    for parameter in model.parameters():
        parameter.register_post_accumulate_grad_hook(step)
        parameter.register_hook(called.append)
    before = copy.deepcopy(model.state_dict())
    x = torch.rand(4, 3, 16, 16)
    steps_of(model, x)
    assert called == []
    torch.testing.assert_close(model.state_dict(), before, rtol=0, atol=0)
    model(x).sum().backward()
    assert len(called) == 2 * 7


def test_steps_are_trained_as_the_loop_calls_the_model() -> None:
    noted = []
    model = network().eval()
    chain, x = split_layers(model, torch.rand(2, 3, 16, 16)), torch.rand(4, 3, 16, 16)
    model[4].register_forward_hook(lambda m, _, y: noted.append((m.training, y.requires_grad, y.dtype, len(y))))

    def run() -> Any:
        with torch.autocast("cpu", torch.bfloat16):
            return model(x)

    with torch.no_grad():
        time_step(chain, run, torch.optim.SGD(model.parameters(), lr=0.1), batch=4, device=CPU)
    assert noted == [(True, True, torch.bfloat16, 4)] * 2
    assert not torch.is_autocast_enabled("cpu")


class TwoStep(torch.optim.SGD):
    """As common implementations of sharpness-aware minimisation, which ask for a closure."""

    def step(self, closure: Any = None) -> Any:
        if closure is None:
            raise AssertionError
        return super().step(closure)


class Uncopyable(torch.optim.SGD):
    def __deepcopy__(self, memo: Any) -> Any:
        raise TypeError("it holds an open file")


@pytest.mark.parametrize(
    ("optimizer", "error"),
    [
        (TwoStep, "AssertionError"),
        (torch.optim.LBFGS, "TypeError: .*missing 1 required positional argument: 'closure'"),
        (Uncopyable, "TypeError: it holds an open file"),
    ],
)
def test_what_is_assumed_of_an_optimizer_that_cannot_be_timed_is_said(
    monkeypatch: pytest.MonkeyPatch, optimizer: Any, error: str
) -> None:
    monkeypatch.setattr(timing, "copy_bytes_per_second", lambda device: 1e6)
    model, x = network(), torch.rand(4, 3, 16, 16)
    made = optimizer(model.parameters(), lr=0.1)
    before = everything(model, made)
    elements = 8 * 27 + 8 + 16 + 16 * 72 + 2570
    said = (
        rf"DropScheduler: {optimizer.__name__}.step\(\) cannot be timed on a copy \({error}\), as it may need a closure: "
        rf"forward and backward were timed once, and a step of it is assumed to take {28 * elements / 1e3:.1f} ms; the "
        "first epochs correct that"
    )
    with pytest.warns(RuntimeWarning, match=said):
        found = steps_of(model, x, optimizer=made)
    # Weight, gradient and two states are read, weight and states written: 28 bytes of each fp32 parameter.
    assert found.optimizer_seconds == pytest.approx(28 * elements / 1e6 / 4)
    torch.testing.assert_close(everything(model, made), before, rtol=0, atol=0)


def small_run(optimizer: Any, **more: Any) -> tuple[nn.Module, torch.optim.Optimizer, DropScheduler]:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 8, 3, 4), nn.ReLU(), nn.Conv2d(8, 8, 3), nn.Flatten(), nn.Linear(32, 4))
    loader = DataLoader(TensorDataset(torch.randn(64, 3, 16, 16), torch.arange(64) % 4), 16)
    made = optimizer(model.parameters(), 0.1)
    return model, made, DropScheduler(model, made, loader, epochs=4, **more)


def train(model: nn.Module, optimizer: torch.optim.Optimizer, drop: DropScheduler) -> None:
    """One epoch, with closures."""
    for x, y in drop.loader:

        def closure(x: Any = x, y: Any = y) -> torch.Tensor:
            optimizer.zero_grad()
            loss = nn.functional.cross_entropy(model(x), y)
            loss.backward()
            return loss

        optimizer.step(closure)


def test_budget_plans_for_an_optimizer_that_needs_a_closure() -> None:
    with pytest.warns(RuntimeWarning, match=r"TwoStep.step\(\) cannot be timed") as said:
        model, optimizer, drop = small_run(TwoStep, policy=Budget(1.2))
    # It is said where the DropScheduler was made.
    assert {warning.filename for warning in said if "cannot be timed" in str(warning.message)} == {__file__}
    with drop, warnings.catch_warnings():
        warnings.filterwarnings("ignore", "budget")
        for _ in range(4):
            train(model, optimizer, drop)
            drop.step()
        assert drop.forecast().full_seconds > 0
        assert [record.epoch for record in drop.history if record.epoch] == [1, 2, 3, 4]


@pytest.mark.parametrize("ask", [lambda drop: drop.forecast(), lambda drop: drop.step()])
def test_what_is_assumed_is_said_where_costs_are_first_asked_for(ask: Callable[[DropScheduler], Any]) -> None:
    model, optimizer, drop = small_run(TwoStep)
    with drop:
        train(model, optimizer, drop)
        with pytest.warns(RuntimeWarning, match=r"TwoStep.step\(\) cannot be timed") as said:
            ask(drop)
    assert {warning.filename for warning in said} == {__file__}


def test_layers_are_timed_when_costs_are_first_asked_for() -> None:
    calls: list[int] = []

    def timed() -> int:
        count, calls[:] = calls.count(16), []
        return count

    def made(policy: Any) -> tuple[nn.Module, torch.optim.Optimizer, DropScheduler]:
        def call(model: nn.Module, batch: Any) -> Any:
            calls.append(len(batch[0]))
            return model(batch[0])

        return small_run(torch.optim.SGD, policy=policy, call=call)

    # Of a plan, before training: at most four steps.
    with made(Budget(1.01))[2] as drop:
        assert 0 < timed() <= 4
        drop.forecast()
        assert timed() == 0
    # By hand, only for a forecast.
    model, optimizer, drop = made(Fixed({}))
    with drop:
        train(model, optimizer, drop)
        assert drop.step().forecast_seconds is None
        assert timed() == 0
        drop.forecast()
        assert 0 < timed() <= 4
    # Of scores, at the first step, and again for another optimizer.
    model, optimizer, drop = made(StoppedLearning())
    with drop:
        for times in (True, False, True):
            train(model, optimizer, drop)
            assert timed() == 0
            drop.step()
            assert (0 < timed() <= 4) is times
            if not times:
                drop.optimizer = optimizer = torch.optim.Adam(model.parameters())


def test_all_layers_are_timed_while_some_are_dropped(clock: Clock) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(*(Ticking(clock, (1, 2, 2)) for _ in range(4)))
    optimizer = TickingSGD(clock, model)
    loader = DataLoader(TensorDataset(torch.rand(32, 4), torch.arange(32) % 4), 8)
    # 20 s less the gradient of the input of each of 32 samples; four steps of 8 parameters.
    full = 32 * 18 + 4 * 8
    with DropScheduler(model, optimizer, loader, policy=Fixed({0: 2}), epochs=4) as drop:
        assert drop.prefix == 2
        before = everything(model, optimizer)
        assert drop.forecast().full_seconds == pytest.approx(4 * full)
        torch.testing.assert_close(everything(model, optimizer), before, rtol=0, atol=0)
        for _ in range(2):
            train(model, optimizer, drop)
            drop.step()
        # In the middle of an epoch on rows, after two that were measured.
        for i, (x, y) in enumerate(drop.loader):
            nn.functional.cross_entropy(model(x), y).backward()
            if i == 1:
                assert drop.forecast().full_seconds == pytest.approx(4 * full, rel=0.02)
        assert model[0].weight.grad is None


def test_budget_follows_another_optimizer_while_layers_are_dropped() -> None:
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "budget")
        model, optimizer, drop = small_run(torch.optim.SGD, policy=Budget(1.3))
        with drop:
            assert drop.prefix > 0
            train(model, optimizer, drop)
            drop.optimizer = optimizer = torch.optim.Adam(model.parameters())
            train(model, optimizer, drop)
            assert drop.step().reason.startswith("budget 1.3x: ")
