"""What DropScheduler refuses, each before anything is changed."""

from __future__ import annotations

import copy
import inspect
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, IterableDataset, TensorDataset

from learndrop_ext import CacheConfig, Decision, DropScheduler, Fixed, Situation
from small_training import Jittered, Net, data, epoch, parts, prefix_rows


class Stream(IterableDataset[Any]):
    def __iter__(self) -> Iterator[Any]:
        yield from data()


def test_a_random_dataset_is_refused_and_the_ways_out_are_named() -> None:
    model, optimizer, loader = parts(Jittered())
    state = torch.get_rng_state()
    options: list[dict[str, Any]] = [
        {},
        {"cache": CacheConfig(views=1), "epochs": 8},
        {"cache": CacheConfig(mirror=True), "epochs": 8},
    ]
    for given in options:
        with pytest.raises(
            ValueError, match=r"same sample for the same id .* CacheConfig\(views=V\) .* without randomness"
        ):
            DropScheduler(model, optimizer, loader, **given)
    assert torch.equal(torch.get_rng_state(), state)
    assert all(parameter.requires_grad for parameter in model.parameters())


def test_load_state_dict_refuses_another_model_or_other_weights() -> None:
    model, optimizer, loader = parts()
    drop = DropScheduler(model, optimizer, loader, policy=Fixed({1: 2}))
    epoch(drop, optimizer)
    drop.step()
    state = drop.state_dict()
    with pytest.raises(RuntimeError, match=r"scheduler that has not trained with dropped layers"):
        drop.load_state_dict(state)
    drop.close()
    torch.manual_seed(9)
    other = Net()
    fresh = DropScheduler(other, torch.optim.SGD(other.parameters(), lr=0.1), loader)
    with pytest.raises(
        ValueError, match=r"weights and buffers that the state was saved with.*load the model's state_dict"
    ):
        fresh.load_state_dict(state)
    assert fresh.prefix == 0
    small = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(144, 5))
    another = DropScheduler(small, torch.optim.SGD(small.parameters(), lr=0.1), loader)
    with pytest.raises(ValueError, match=r"layers 0, 3; got conv1, conv2, conv3, fc"):
        another.load_state_dict(state)
    state["seen"] = torch.ones(25, dtype=torch.bool)
    with pytest.raises(ValueError, match=r"dataset with 24 samples or fewer, got 25"):
        fresh.load_state_dict(state)


def test_load_state_dict_changes_nothing_where_any_part_of_the_state_does_not_fit() -> None:
    model, optimizer, loader = parts()
    drop = DropScheduler(model, optimizer, loader, policy=Fixed({1: 2}))
    epoch(drop, optimizer)
    drop.step()
    whole = drop.state_dict()

    def spoilt(key: str, **changes: Any) -> dict[str, Any]:
        return whole | {key: whole[key] | changes}

    anchors = whole["deltas"]["anchors"]
    cases: list[tuple[dict[str, Any], str]] = [
        ({k: v for k, v in whole.items() if k not in ("cuts", "seen")}, r"got none of \['cuts', 'seen'\]"),
        (spoilt("deltas", layers=[1, 2]), r"must have layers=\[2, 2\], got \[1, 2\]"),
        (
            spoilt("deltas", anchors={k: v for k, v in anchors.items() if k != "0.1"}),
            r"have anchors\[0.1\]=.* got None",
        ),
    ]
    for state, message in cases:
        same, _, again = parts()
        same.load_state_dict(model.state_dict())
        fresh = DropScheduler(same, torch.optim.SGD(same.parameters(), lr=0.1), again, policy=Fixed({1: 2}))
        with pytest.raises(ValueError, match=message):
            fresh.load_state_dict(state)
        assert (fresh.prefix, fresh._rows.cuts, fresh.history, fresh.loader.epochs) == (0, [], (), 0)
        assert fresh._rows.cache is None
        assert all(p.requires_grad for p in same.parameters())
        fresh.load_state_dict(whole)
        assert fresh.prefix == 2


def test_step_without_training_is_refused() -> None:
    model, optimizer, loader = parts()
    drop = DropScheduler(model, optimizer, loader)
    with pytest.raises(RuntimeError, match=r"wanted batches of drop.loader since the last step, got none"):
        drop.step()
    epoch(drop, optimizer)
    drop.step()
    with pytest.raises(RuntimeError, match=r"since the last step, got none"):
        drop.step()
    assert len(drop.history) == 1
    model.eval()
    for x, _ in drop.loader:
        model(x)
    with pytest.raises(
        RuntimeError, match=r"wanted the model to be trained .* got the weights, gradients and buffers of"
    ):
        drop.step()


def test_step_without_training_is_refused_after_a_drop() -> None:
    model, optimizer, loader = parts()
    drop = DropScheduler(model, optimizer, loader, policy=Fixed({1: 2}))
    epoch(drop, optimizer)
    drop.step()
    for training in (None, False):
        for x, _ in drop.loader:
            if training is not None:
                model.train(training)(x)
        with pytest.raises(
            RuntimeError, match=r"wanted the model to be trained .* got no call of it on one in train mode"
        ):
            drop.step()
    assert len(drop.history) == 1
    assert not drop._rows.cache.filled.any()
    epoch(drop, optimizer)
    assert drop.step().samples == 3 * 24  # of all epochs since the last step


def test_a_learning_rate_of_zero_is_training() -> None:
    model, _, loader = parts()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    drop = DropScheduler(model, optimizer, loader, policy=Fixed({}))
    epoch(drop, optimizer)
    assert set(drop.step().relative) == {0.0}


def test_step_names_the_layer_with_weights_that_are_not_finite() -> None:
    model, optimizer, loader = parts()
    drop = DropScheduler(model, optimizer, loader, policy=Fixed({1: 1}))
    epoch(drop, optimizer)
    with torch.no_grad():
        model.conv3.weight[0, 0, 0, :2] = torch.tensor([float("nan"), float("inf")])
    with pytest.raises(ValueError, match=r"weights must be finite, got 2 NaN or inf in layer conv3"):
        drop.step()
    assert drop.prefix == 0
    assert drop.history == ()


def test_step_refuses_a_loop_that_trains_something_else() -> None:
    model, optimizer, loader = parts()
    drop = DropScheduler(model, optimizer, loader)
    for _ in drop.loader:
        pass
    with pytest.raises(RuntimeError, match=r"wanted the model to be trained"):
        drop.step()
    epoch(drop, optimizer)
    drop.step()
    for _ in drop.loader:
        pass
    with pytest.raises(RuntimeError, match=r"wanted the model to be trained"):
        drop.step()


def test_rows_are_of_what_the_loop_makes_of_the_images() -> None:
    model, optimizer, loader = parts()
    drop = DropScheduler(model, optimizer, loader, policy=Fixed({1: 2}), cache="fp32")
    for _ in range(3):
        model.train()
        for x, y in drop.loader:
            optimizer.zero_grad()
            nn.functional.cross_entropy(model(2 * x), y).backward()
            optimizer.step()
        drop.step()
    with torch.no_grad():
        wanted = drop.chain.prefix(2)(2 * data().tensors[0])
    rows = drop._rows
    torch.testing.assert_close(rows.cache.gather(rows.places(torch.arange(24))), wanted)
    with pytest.raises(RuntimeError, match=r"wanted mul\(2\), got nothing"):
        epoch(drop, optimizer)


def test_the_model_still_takes_images_after_a_drop() -> None:
    model, optimizer, loader = parts()
    drop = DropScheduler(model, optimizer, loader, policy=Fixed({1: 2}), cache="fp32")
    epoch(drop, optimizer)
    drop.step()
    images = data().tensors[0]
    running = model.bn1.running_mean.clone()
    out = model.train()(images)
    with torch.no_grad():
        model.conv3.train(), model.fc.train()
        x = model.bn2(model.conv2(model.bn1(model.conv1(images)).relu())).relu()
        assert not model.bn2.training
        assert torch.equal(out, model.fc(model.conv3(x).relu().mean((2, 3))))
    assert torch.equal(model.bn1.running_mean, running)
    assert not drop._rows.cache.filled.any()  # only batches of drop.loader leave rows


def test_a_policy_that_goes_back_or_too_far_is_refused() -> None:
    for wanted in (-1, 4):
        model, optimizer, loader = parts()

        def policy(situation: Situation, wanted: int = wanted) -> Decision:
            return Decision(wanted if situation.epoch else 0, "because")

        drop = DropScheduler(model, optimizer, loader, policy=policy)
        epoch(drop, optimizer)
        with pytest.raises(ValueError, match=rf"policy must decide on 0..3 layers, got {wanted}"):
            drop.step()
        assert drop.prefix == 0


@pytest.mark.parametrize(
    ("decided", "error", "message"),
    [
        (None, TypeError, "policy must return a Decision, got NoneType"),
        (Decision(2.0, ""), TypeError, "policy must decide on a whole number of layers, got 2.0"),  # type: ignore[arg-type]
        (Decision(Decision, ""), TypeError, "policy must decide on a whole number of layers, got <class"),  # type: ignore[arg-type]
    ],
)
def test_a_decision_that_is_none_is_refused(decided: Any, error: type[Exception], message: str) -> None:
    model, optimizer, loader = parts()
    drop = DropScheduler(
        model, optimizer, loader, policy=lambda situation: decided if situation.epoch else Decision(0, "")
    )
    epoch(drop, optimizer)
    with pytest.raises(error, match=message):
        drop.step()


def test_a_decision_in_numpy_integers_is_followed() -> None:
    model, optimizer, loader = parts()
    drop = DropScheduler(model, optimizer, loader, policy=lambda situation: Decision(np.int64(2), ""))
    assert drop.prefix == 2
    assert type(drop.prefix) is int


def test_bad_arguments_are_refused_before_anything_is_changed() -> None:
    model, optimizer, loader = parts()
    flags = [m.training for m in model.modules()]
    weights = copy.deepcopy(model.state_dict())
    stranger = torch.optim.SGD(nn.Linear(2, 2).parameters(), lr=0.1)
    cases: list[tuple[dict[str, Any], type[Exception], str]] = [
        ({"loader": DataLoader(Stream())}, TypeError, r"dataset with ids .*got an IterableDataset, Stream"),
        ({"loader": [1, 2]}, TypeError, r"loader must be a torch DataLoader, got list"),
        ({"loader": DataLoader(data(), batch_size=None)}, ValueError, r"batch_size or batch_sampler"),
        ({"optimizer": stranger}, ValueError, r"optimizer must hold the model's parameters, got none of its 12"),
        ({"optimizer": 3}, TypeError, r"optimizer must be a torch.optim.Optimizer, got int"),
        ({"model": 3}, TypeError, r"model must be a torch.nn.Module, got int"),
        ({"model": nn.ReLU()}, ValueError, r"parameters on one device, got no parameters"),
        ({"cache": 3}, TypeError, r"cache must be a CacheConfig, a codec or None, got int"),
        ({"cache": "fp8"}, ValueError, r"codec must be one of fp32, bf16, fp16, uint8, got 'fp8'"),
        (
            {"cache": CacheConfig(store=__file__)},
            ValueError,
            rf"a store that is a folder to write to, got .*'{__file__}'",
        ),
        ({"policy": Fixed}, TypeError, r"policy must be a function of a Situation, got <class"),
        ({"policy": 3}, TypeError, r"policy must be a function of a Situation, got 3"),
        ({"epochs": True}, ValueError, r"epochs must be a whole number >= 1 or None, got True"),
        ({"epochs": 0}, ValueError, r"epochs must be a whole number >= 1 or None, got 0"),
        ({"input": 7}, ValueError, r"input must be the position of the model's input in a batch, got 7"),
        ({"call": 3}, TypeError, r"call must be a function of the model and a batch, got 3"),
    ]
    for change, error, message in cases:
        arguments: dict[str, Any] = {"model": model, "optimizer": optimizer, "loader": loader} | change
        with pytest.raises(error, match=message):
            DropScheduler(arguments.pop("model"), arguments.pop("optimizer"), arguments.pop("loader"), **arguments)
    assert [m.training for m in model.modules()] == flags
    for name, value in model.state_dict().items():
        assert torch.equal(value, weights[name])


def test_an_epoch_that_a_broken_sample_ends_can_be_begun_again() -> None:
    class Breaks(TensorDataset):
        broken = False

        def __getitem__(self, index: int) -> Any:
            if self.broken and index == 20:
                raise OSError("disk gone")
            return super().__getitem__(index)

        __getitems__ = None

    dataset = Breaks(*data().tensors)
    model, optimizer, loader = parts(dataset)
    drop = DropScheduler(model, optimizer, loader, policy=Fixed({1: 2}), cache="fp32")
    epoch(drop, optimizer)
    dataset.broken = True
    drop.step()
    with pytest.raises(OSError, match="disk gone"):
        epoch(drop, optimizer)
    dataset.broken = False
    epoch(drop, optimizer)
    rows = drop._rows
    assert rows.cache is not None
    assert bool(rows.cache.filled.all())
    torch.testing.assert_close(rows.cache.gather(rows.places(torch.arange(24))), prefix_rows(drop, 2))


@pytest.mark.parametrize("fails", ["the policy", "the wrap"])
def test_a_step_that_fails_can_be_called_again(fails: str) -> None:
    broken = True

    def policy(situation: Situation) -> Decision:
        if broken and fails == "the policy" and situation.epoch:
            raise OSError("no policy")
        return Decision(2 if situation.epoch else 0, "now")

    def wrap(module: nn.Module) -> nn.Module:
        if broken and fails == "the wrap" and not isinstance(module, Net):
            raise OSError("no wrap")
        return module

    runs = []
    for broken_once in (False, True):
        broken = broken_once
        model, optimizer, loader = parts()
        drop = DropScheduler(model, optimizer, loader, policy=policy, wrap=wrap)
        epoch(drop, optimizer)
        if broken_once:
            with pytest.raises(OSError, match="no "):
                drop.step()
            assert (drop.prefix, drop._rows.cache, drop.history) == (0, None, ())
            broken = False
        record = drop.step()
        runs.append((record.relative, record.prefix, record.samples, epoch(drop, optimizer)))
    assert runs[0] == runs[1]


def test_a_prefix_that_is_no_function_of_the_sample_is_refused() -> None:
    class BatchStatistics(Net):
        def __init__(self) -> None:
            super().__init__()
            self.bn1 = nn.BatchNorm2d(4, track_running_stats=False)

    torch.manual_seed(0)
    model = BatchStatistics()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    drop = DropScheduler(model, optimizer, DataLoader(data(), batch_size=8), policy=Fixed({1: 2}))
    epoch(drop, optimizer)
    with pytest.raises(ValueError, match=r"those of bn1 \(BatchNorm2d\) change with the other samples"):
        drop.step()
    assert drop.prefix == 0


def test_a_model_in_float64_keeps_no_rows_and_is_told_so_at_once() -> None:
    model, _, _ = parts()
    model.double()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    images, labels = data().tensors
    loader = DataLoader(TensorDataset(images.double(), labels), batch_size=8)
    message = r"model must compute in float32, bfloat16 or float16 .* got torch.float64 after conv1; give cache=None"
    for cache in ("fp16", "fp32", CacheConfig()):
        with pytest.raises(ValueError, match=message):
            DropScheduler(model, optimizer, loader, policy=Fixed({2: 1}), cache=cache)
    drop = DropScheduler(model, optimizer, loader, policy=Fixed({2: 1}), cache=None)
    weights = []
    for _ in range(4):
        epoch(drop, optimizer)
        drop.step()
        weights.append(model.conv1.weight.detach().clone())
    assert drop.prefix == 1
    assert torch.equal(weights[1], weights[3])
    assert not torch.equal(weights[0], weights[1])


def test_a_default_device_is_refused() -> None:
    given = parts()
    with torch.device("meta"), pytest.raises(ValueError, match=r"default device must be the CPU, .* got meta: take"):
        DropScheduler(*given)


class Quantized(nn.Module):
    """A linear layer with weights that do not train, in `dtype`, and a small update that does."""

    def __init__(self, dtype: torch.dtype) -> None:
        super().__init__()
        self.weight = nn.Parameter((40 * torch.randn(4, 4)).to(dtype), requires_grad=False)
        self.update = nn.Parameter(torch.zeros(4, 4))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        weight = self.weight.real if self.weight.is_complex() else self.weight
        return nn.functional.linear(x, weight.to(x.dtype) / 40 + self.update)


@pytest.mark.parametrize("dtype", [torch.int8, torch.float8_e4m3fn, torch.complex64])
@pytest.mark.parametrize("k", [1, 2])
def test_weights_in_other_types_are_left_out_of_the_measurement_and_refused_if_they_train(
    dtype: torch.dtype, k: int
) -> None:
    torch.manual_seed(0)
    inner, head = Quantized(dtype), nn.Linear(4, 5)
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.AdaptiveAvgPool2d(1), nn.Flatten(), inner, head)
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
    loader = DataLoader(data(), 8)
    with DropScheduler(model, optimizer, loader, policy=Fixed({1: k}), cache="fp32") as drop:
        for _ in range(4):
            epoch(drop, optimizer)
            record = drop.step()
        assert record.changes[-1].l2 > 0
        assert record.tier == "device"
    if dtype != torch.int8:
        inner.weight.requires_grad_(True)
        with pytest.raises(TypeError, match=rf"fp32, bf16, fp16 or fp64 where they train, got {dtype} in 3.weight"):
            DropScheduler(model, optimizer, loader)


def test_nothing_of_the_scheduler_is_set_from_outside_but_the_optimizer() -> None:
    drop = DropScheduler(*parts(), policy=Fixed({}))
    names = [name for name in vars(DropScheduler) if isinstance(vars(DropScheduler)[name], property)]
    assert {"model", "loader", "history", "chain", "prefix", "epoch", "policy", "config", "optimizer"} == set(names)
    for name in names:
        value = getattr(drop, name)
        if name == "optimizer":
            setattr(drop, name, value)
            continue
        with pytest.raises(AttributeError):
            setattr(drop, name, value)
        assert getattr(drop, name) is value or name == "history"
    assert isinstance(drop.history, tuple)
    assert all(name.startswith("_") for name in vars(drop))


def test_the_constructor_has_ten_arguments_at_most() -> None:
    assert len(inspect.signature(DropScheduler).parameters) <= 10
