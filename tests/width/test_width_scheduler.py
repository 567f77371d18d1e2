"""WidthScheduler over a run: what it records, how it resumes, what criteria see, what it refuses."""

from __future__ import annotations

import builtins
import copy
import io
import re
from collections.abc import Callable
from typing import Any

import pytest
import torch
from narrow_models import EXAMPLE, equal, everything, made, mlp, train
from torch import Tensor, nn

from learndrop_ext.width import (
    CRITERIA,
    Below,
    Coreset,
    Iterative,
    Linear,
    OneCycle,
    OneShot,
    Seen,
    Tolerance,
    WidthScheduler,
    Zeros,
    in_norms,
    out_norms,
)


def sgd(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)


def scheduler_of(model: nn.Module, optimizer: torch.optim.Optimizer, **options: Any) -> WidthScheduler:
    return WidthScheduler(model, optimizer, EXAMPLE, **{"epochs": 4} | options)


def run(
    model: nn.Module, optimizer: torch.optim.Optimizer, width: WidthScheduler, epochs: range, **given: Any
) -> list[float]:
    """Train some epochs with a step after each; return the losses."""
    losses = []
    for epoch in epochs:
        losses += train(model, optimizer, seed=epoch)
        width.step(**{name: values[epoch] for name, values in given.items()})
    return losses


@pytest.mark.parametrize("scope", ["layer", "global"])
def test_a_run_ends_with_the_share_that_was_asked_for(scope: str) -> None:
    model = made()
    optimizer = sgd(model)
    width = scheduler_of(model, optimizer, keep=0.5, scope=scope, schedule=Linear())
    run(model, optimizer, width, range(4))
    assert [record.step for record in width.history] == [1, 2, 3, 4]
    assert [record.left for record in width.history] == [0.875, 0.75, 0.625, 0.5]
    last = width.history[-1]
    assert sum(last.widths.values()) == 12
    assert last.widths == {"conv1": 3, "conv2": 4, "fc1": 5} or scope == "global"
    assert sum(record.removed for record in width.history) == 12
    assert last.parameters == sum(p.numel() for p in model.parameters())
    cut = rf"0\.500 of the channels to be left: {last.removed} cut from [123] of 3 groups of layers"
    assert re.fullmatch(cut, last.reason)
    assert last.accuracy is None
    with pytest.raises(RuntimeError, match=r"width\.step: the run must have steps left, got step 5 of 4"):
        width.step()


def test_a_step_without_anything_to_cut_says_so() -> None:
    model = made()
    width = scheduler_of(model, sgd(model), schedule=OneShot(2))
    record = width.step()
    assert (record.removed, record.reason) == (0, "1.000 of the channels to be left: nothing to cut")
    assert width.step().removed == 12


@pytest.mark.parametrize("criterion", sorted(CRITERIA))
def test_every_criterion_narrows_and_leaves_no_hook(criterion: str) -> None:
    torch.manual_seed(0)
    model = mlp() if criterion == "coreset" else made()
    optimizer = sgd(model)
    with scheduler_of(model, optimizer, criterion=criterion, schedule=OneCycle()) as width:
        run(model, optimizer, width, range(4))
        assert width.history[-1].left == pytest.approx(0.5)
        hooks = everything(model, optimizer)["hooks"]
        assert hooks == [0] * len(hooks)  # after the last step
    assert all(record.removed > 0 for record in width.history[1:3])


def test_hooks_go_at_the_end_of_the_block() -> None:
    model = made()
    optimizer = sgd(model)
    with scheduler_of(model, optimizer, criterion="activation"):
        assert sum(everything(model, optimizer)["hooks"]) == 4  # on each layer that has weights
        copied = copy.deepcopy(model)
    assert sum(everything(model, optimizer)["hooks"]) == 0
    copied(EXAMPLE)  # its hooks do nothing


def test_activations_are_means_over_the_training_batches() -> None:
    found: list[Tensor] = []

    class Kept(type(CRITERIA["activation"])):  # type: ignore[misc]
        def __call__(self, seen: Seen, generator: torch.Generator) -> Tensor:
            found.append(super().__call__(seen, generator))
            return found[-1]

    model = made()
    width = scheduler_of(model, sgd(model), criterion=Kept(), schedule=OneShot(1))
    inputs: list[Tensor] = []
    hook = model.conv2.register_forward_pre_hook(lambda module, args: inputs.append(args[0].detach()))
    for n in (2, 5):
        model.train()(torch.randn(n, 3, 8, 8))
    hook.remove()
    seen_in_training = torch.cat(inputs)
    model.eval()(torch.full((2, 3, 8, 8), 100.0))
    width.step()
    assert torch.allclose(found[0], seen_in_training.double().abs().mean((0, 2, 3)))
    gone = found[0].argsort()[:3]
    assert model.conv1.out_channels == 3
    assert sorted(found[0].argsort()[3:].tolist()) == [i for i in range(6) if i not in gone]


def test_activations_need_a_batch() -> None:
    model = made()
    optimizer = sgd(model)
    width = scheduler_of(model, optimizer, criterion="activation")
    before = everything(model, optimizer)
    with pytest.raises(
        RuntimeError, match=r"width\.step: wanted training batches since the last step, got none behind conv1"
    ):
        width.step()
    assert equal(everything(model, optimizer), before)


def test_zeros_count_by_the_share_that_is_given() -> None:
    model = made()
    with torch.no_grad():
        model.conv1.weight.fill_(1.0)
        model.conv1.weight[3:] = 0.2  # as good as nothing if a quarter of the largest is
    scheduler_of(model, sgd(model), criterion=Zeros(0.25), schedule=OneShot(1)).step()
    assert torch.equal(model.conv1.weight, torch.full((3, 3, 3, 3), 0.2))


def test_a_coreset_leaves_convolutions_alone_and_scales_what_reads_the_rest() -> None:
    model = made()
    width = scheduler_of(model, sgd(model), criterion="coreset", schedule=OneShot(1), seed=3)
    assert width.refused["conv1"] == "the criterion is for fully connected layers"
    before = copy.deepcopy(model)
    record = width.step()
    assert record.widths == {"fc1": 5}
    kept = [i for i in range(10) if any(torch.equal(before.fc1.weight[i], row) for row in model.fc1.weight)]
    factors = model.fc2.weight / before.fc2.weight[:, kept]
    assert torch.allclose(factors, factors[:1].expand(4, 5), rtol=1e-5)
    assert bool((factors[0] > 1).any())
    assert bool((factors[0] > 1 - 1e-5).all())


def test_a_coreset_of_a_random_network_is_nearer_than_dropping_the_same_number_without_scaling() -> None:
    """In the sum over many draws, where the scaling has no bias."""
    torch.manual_seed(0)
    whole = nn.Sequential(nn.Flatten(), nn.Linear(192, 40), nn.ReLU(), nn.Linear(40, 4))
    nn.init.uniform_(whole[3].weight, 0.5, 1.0)
    wanted = whole(EXAMPLE).detach()
    outputs: dict[object, list[Tensor]] = {"coreset": [], "random": []}
    for criterion, found in outputs.items():
        for seed in range(20):
            model = copy.deepcopy(whole)
            scheduler_of(model, sgd(model), criterion=criterion, schedule=OneShot(1), seed=seed).step()
            found.append(model(EXAMPLE).detach())
    errors = {
        name: float((torch.stack(found).mean(0) - wanted).norm() / wanted.norm()) for name, found in outputs.items()
    }
    assert errors["coreset"] < 0.2 < 0.4 < errors["random"]


def test_penalties_drive_neurons_to_nothing_and_below_removes_them() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Flatten(), nn.Linear(192, 16), nn.ReLU(), nn.Linear(16, 4))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    x = torch.randn(64, 3, 8, 8)
    y = (x[:, 0, 0, 0] > 0).long()
    for _ in range(200):
        loss = nn.functional.cross_entropy(model(x), y) + 0.04 * (in_norms(model) + out_norms(model))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    width = scheduler_of(model, optimizer, criterion="connections", scope=Below(0.02), least=0.0)
    wide = copy.deepcopy(model)
    record = width.step()
    assert 1 <= record.widths["1"] <= 10
    # A neuron without incoming weights still gave its bias, the same for all images.
    assert bool((model(x) - wide(x)).norm() < 0.05 * wide(x).norm())
    assert torch.allclose(model(x) - wide(x), (model(x) - wide(x)).mean(0), atol=0.02)


def saved(*states: Any) -> list[Any]:
    """States as another process would read them."""
    file = io.BytesIO()
    torch.save(states, file)
    file.seek(0)
    return list(torch.load(file, weights_only=True))


@pytest.mark.parametrize(
    ("options", "given"),
    [
        ({"criterion": "random", "scope": "global", "schedule": Iterative(0.2)}, {}),
        ({"criterion": "activation", "schedule": Linear()}, {}),
        # A drop beyond the tolerance after the second epoch, and one after the third: the state that is held is saved.
        ({"controller": Tolerance(5.0, rate=0.2), "keep": 0.2}, {"accuracy": [50.0, 52.0, 30.0, 51.0]}),
        ({"controller": Tolerance(5.0, rate=0.2), "keep": 0.2}, {"accuracy": [50.0, 30.0, 30.0, 51.0]}),
    ],
)
@pytest.mark.parametrize("make", [sgd, lambda model: torch.optim.Adam(model.parameters(), amsgrad=True)])
def test_a_run_resumes_bit_equal(
    options: dict[str, Any], given: dict[str, Any], make: Callable[[nn.Module], torch.optim.Optimizer]
) -> None:
    def parts() -> tuple[nn.Module, torch.optim.Optimizer, WidthScheduler]:
        model = made()
        optimizer = make(model)
        return model, optimizer, scheduler_of(model, optimizer, **options)

    model, optimizer, width = parts()
    run(model, optimizer, width, range(2), **given)
    half = train(model, optimizer, seed=77, steps=1)  # in the middle of an epoch
    states = saved(width.state_dict(), model.state_dict(), optimizer.state_dict())
    losses = run(model, optimizer, width, range(2, 4), **given)

    other, other_optimizer, other_width = parts()
    for of, state in zip((other_width, other, other_optimizer), states, strict=True):
        of.load_state_dict(state)
    assert len(half) == 1
    assert run(other, other_optimizer, other_width, range(2, 4), **given) == losses
    assert other_width.history == width.history
    one, two = everything(model, optimizer), everything(other, other_optimizer)
    assert all(equal(one[key], two[key]) for key in ("tensors", "optimizer", "shapes", "strides"))
    assert equal(other_width.state_dict(), width.state_dict())


def test_a_depthwise_convolution_of_one_channel_resumes() -> None:
    def parts() -> tuple[nn.Module, torch.optim.Optimizer, WidthScheduler]:
        model = made("Depthwise")
        optimizer = sgd(model)
        return model, optimizer, scheduler_of(model, optimizer, schedule=OneShot(1), keep=0.01, least=0.0)

    model, optimizer, width = parts()
    run(model, optimizer, width, range(1))
    assert width.widths == {"wide": 1, "narrow": 1}
    states = saved(width.state_dict(), model.state_dict(), optimizer.state_dict())
    losses = train(model, optimizer, seed=1)
    other, other_optimizer, other_width = parts()
    for of, state in zip((other_width, other, other_optimizer), states, strict=True):
        of.load_state_dict(state)
    assert repr(other) == repr(model)
    assert train(other, other_optimizer, seed=1) == losses


def test_tolerance_brings_the_last_state_within_it_back() -> None:
    model = made()
    optimizer = sgd(model)
    width = scheduler_of(model, optimizer, controller=Tolerance(1.0, rate=0.25), keep=0.1, epochs=None)
    train(model, optimizer, seed=0)
    within = everything(model, optimizer)
    assert width.step(80.0).removed > 0
    train(model, optimizer, seed=1)
    record = width.step(70.0)
    assert record.removed < 0
    assert record.reason == "accuracy 70 is not within the tolerance of 80: the last state that was is back"
    now = everything(model, optimizer)
    assert all(equal(now[key], within[key]) for key in ("tensors", "optimizer", "shapes", "strides"))
    train(model, optimizer, seed=2)
    # Half of the first cut: 0.875 of 6, 8 and 10 channels, rounded up.
    assert width.step(79.5).widths == {"conv1": 6, "conv2": 7, "fc1": 9}
    train(model, optimizer, seed=3)
    assert width.step(60.0).widths == {"conv1": 6, "conv2": 8, "fc1": 10}
    assert width.step(60.0).removed == 0  # nothing is left to bring back


@pytest.mark.parametrize("accuracy", [None, float("nan")])
def test_a_controller_needs_an_accuracy(accuracy: float | None) -> None:
    model = made()
    width = scheduler_of(model, sgd(model), controller=Tolerance(1.0))
    with pytest.raises(ValueError, match=r"width\.step: accuracy must be a finite number for a controller, got"):
        width.step(accuracy)
    assert width.history == ()


def bad(**options: Any) -> Callable[[], WidthScheduler]:
    def make() -> WidthScheduler:
        model = made()
        return scheduler_of(model, sgd(model), **options)

    return make


def other(model: Any = None, optimizer: Any = None, example: Any = EXAMPLE) -> Callable[[], WidthScheduler]:
    def make() -> WidthScheduler:
        own = made() if model is None else model
        return WidthScheduler(own, sgd(made()) if optimizer is None else optimizer, example, epochs=2)

    return make


def wrong_example(example: Any) -> Callable[[], WidthScheduler]:
    def make() -> WidthScheduler:
        model = made()
        return WidthScheduler(model, sgd(model), example, epochs=2)

    return make


class Untraced(nn.Module):
    """Nothing of its output has a gradient."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.fc = nn.Conv2d(3, 4, 1), nn.Linear(4, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(self.conv(x).detach().mean((2, 3))).argmax(1)


def untraced() -> WidthScheduler:
    model = Untraced()
    return WidthScheduler(model, sgd(model), EXAMPLE, epochs=2)


@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (bad(keep=0), ValueError, "keep must be above 0 and at most 1, got 0"),
        (bad(keep=1.1), ValueError, r"keep must be above 0 and at most 1, got 1\.1"),
        (bad(keep="half"), ValueError, "keep must be above 0 and at most 1, got 'half'"),
        (bad(least=-0.1), ValueError, r"least must be within 0\.\.1, got -0\.1"),
        (bad(criterion="l3"), ValueError, "criterion must be one of l1, l2, activation, .* or a function, got 'l3'"),
        (bad(criterion=Coreset), ValueError, "criterion must be one of .* or a function, got <class"),
        (bad(scope="network"), ValueError, "scope must be one of layer, global or a function, got 'network'"),
        (bad(schedule=OneShot), TypeError, "schedule must be a function of a step, got <class"),
        (bad(controller=3), TypeError, "controller must be a Tolerance and stand alone, got 3"),
        (
            bad(controller=Tolerance(1.0), schedule=OneCycle()),
            TypeError,
            "controller must be a Tolerance and stand alone",
        ),
        (bad(epochs=None), ValueError, "epochs must be known for a schedule, got None"),
        (bad(epochs=0), ValueError, "epochs must be a whole number >= 1 or None, got 0"),
        (bad(untouched=["conv1", "conv9"]), ValueError, "untouched must name layers of the model, got conv9"),
        (other(model=3), TypeError, r"model must be a plain torch\.nn\.Module, got a int"),
        (other(model=nn.DataParallel(made())), TypeError, "model must be a plain .* got a DataParallel"),
        (other(optimizer=3), TypeError, r"optimizer must be a torch\.optim\.Optimizer, got int"),
        (other(), ValueError, "optimizer must hold the model's parameters, got none of them"),
        (wrong_example([1]), TypeError, "example must be a tensor or a tuple of tensors, got list"),
        (wrong_example((EXAMPLE, 1)), TypeError, "example must be a tensor or a tuple of tensors, got int"),
        (wrong_example(torch.zeros(2, 5, 8, 8)), ValueError, "example must be what the model takes, got RuntimeError"),
        (wrong_example((EXAMPLE, EXAMPLE)), ValueError, "example must be what the model takes, got TypeError"),
        (untraced, ValueError, "model must .*, got"),
    ],
)
def test_what_is_refused_before_anything_is_changed(
    make: Callable[[], Any], error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=f"WidthScheduler: {message}"):
        make()


def test_a_refused_model_is_as_it_was() -> None:
    model = made()
    optimizer = sgd(model)
    train(model, optimizer, seed=0)
    before = everything(model, optimizer)
    for example in (torch.zeros(2, 5, 8, 8), torch.zeros(3)):
        with pytest.raises(ValueError, match="WidthScheduler: example must be what the model takes"):
            WidthScheduler(model, optimizer, example, epochs=2)
    assert equal(everything(model, optimizer), before)


def test_without_torch_pruning_the_extra_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    found = builtins.__import__

    def without(name: str, *rest: Any, **more: Any) -> Any:
        if name == "torch_pruning":
            raise ImportError(name)
        return found(name, *rest, **more)

    monkeypatch.setattr(builtins, "__import__", without)
    with pytest.raises(
        ImportError, match=re.escape('WidthScheduler: it needs Torch-Pruning: pip install "learndrop_ext[width]"')
    ):
        bad()()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda state: state.pop("sizes"), r"state must be of state_dict\(\), got none of \['sizes'\]"),
        (lambda state: state["sizes"].pop("bn1"), r"state must be of this model, got other layers: \['bn1'\]"),
        (
            lambda state: state["sizes"]["conv1"].update(out_channels=7),
            "state must be no wider than the model, got 7 for 6 of conv1",
        ),
    ],
)
def test_a_state_that_does_not_fit_is_refused(change: Callable[[dict[str, Any]], Any], message: str) -> None:
    model = made()
    optimizer = sgd(model)
    width = scheduler_of(model, optimizer)
    before = everything(model, optimizer)
    state = width.state_dict()
    change(state)
    with pytest.raises(ValueError, match=rf"WidthScheduler\.load_state_dict: {message}"):
        width.load_state_dict(state)
    assert equal(everything(model, optimizer), before)


@pytest.mark.parametrize("controlled", [True, False])
def test_a_state_with_or_without_a_controller_is_not_the_others(controlled: bool) -> None:
    model = made()
    optimizer = sgd(model)
    of_each = [scheduler_of(model, optimizer, controller=Tolerance(1.0)), scheduler_of(model, optimizer)]
    saver, loader = of_each if controlled else of_each[::-1]
    saver.step(50.0)
    before, state = everything(model, optimizer), loader.state_dict()
    wanted = "without a controller, got one with$" if controlled else "with a controller, got one without$"
    with pytest.raises(ValueError, match=rf"WidthScheduler\.load_state_dict: state must be of a run {wanted}"):
        loader.load_state_dict(saver.state_dict())
    assert equal(everything(model, optimizer), before)
    assert equal(loader.state_dict(), state)


def test_a_model_of_several_inputs() -> None:
    class Two(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv, self.fc = nn.Conv2d(3, 6, 1), nn.Linear(6, 4)

        def forward(self, x: Tensor, scale: Tensor) -> Tensor:
            return self.fc((self.conv(x) * scale).relu().mean((2, 3)))

    model = Two()
    width = WidthScheduler(model, sgd(model), (EXAMPLE, torch.ones(2, 1, 1, 1)), epochs=1)
    assert width.step().widths == {"conv": 3}
