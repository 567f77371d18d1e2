"""Batch norms that are about to be frozen get the statistics of their inputs under the weights of that moment."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from torch import nn
from torch.utils.data import TensorDataset

from learndrop_ext import DropScheduler, Fixed, StoppedLearning, split_layers
from learndrop_ext.decide.policy import Decision, Situation
from learndrop_ext.forward.statistics import recalibrate
from small_training import data, epoch, parts


class Norms(nn.Module):
    """Norms of all kinds, a counter among the buffers, a list, and noise. The user keeps the third norm in eval mode."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU())
        self.body = nn.Sequential(nn.Conv2d(4, 4, 3), nn.BatchNorm2d(4, momentum=0.3), nn.Dropout(0.2), nn.ReLU())
        self.kept = nn.Sequential(nn.Conv2d(4, 4, 3), nn.BatchNorm2d(4), nn.ReLU())
        self.plain = nn.Sequential(nn.Conv2d(4, 4, 1), nn.BatchNorm2d(4, track_running_stats=False), nn.GroupNorm(2, 4))
        self.head = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.BatchNorm1d(4), nn.Linear(4, 5))
        self.register_buffer("calls", torch.zeros(()))
        self.seen: list[int] = []

    def train(self, mode: bool = True) -> Norms:
        super().train(mode)
        self.kept[1].training = False
        return self

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.calls += 1
        self.seen.append(len(x))
        return self.head(self.plain(self.kept(self.body(self.stem(x)))))


def of_inputs(
    model: nn.Module, path: str, batches: Sequence[torch.Tensor], *, frozen: str = ""
) -> tuple[torch.Tensor, torch.Tensor]:
    """The mean over batches of mean and unbiased variance of what a norm gets in train mode, in float64."""
    model = copy.deepcopy(model).train()
    if frozen:
        model.get_submodule(frozen).eval()
    found = []

    def note(_: nn.Module, args: tuple[torch.Tensor]) -> None:
        values = args[0].detach().double().transpose(0, 1).flatten(1)
        found.append(torch.stack([values.mean(1), values.var(1)]))

    model.get_submodule(path).register_forward_pre_hook(note)
    with torch.no_grad():
        for batch in batches:
            model(batch)
    mean, variance = torch.stack(found).mean(0)
    return mean, variance


def state_of(model: nn.Module) -> dict[str, torch.Tensor]:
    return {name: value.clone() for name, value in model.state_dict().items()}


def changes(before: dict[str, torch.Tensor], model: nn.Module) -> set[str]:
    return {name for name, value in model.state_dict().items() if not torch.equal(value, before[name])}


def statistics(*paths: str) -> set[str]:
    return {f"{path}.running_{what}" for path in paths for what in ("mean", "var")}


@pytest.mark.parametrize(("first", "paths"), [(0, ("stem.1", "body.1")), (0, ("body.1",)), (1, ("body.1",))])
@pytest.mark.parametrize("count", [1, 3])
def test_norms_get_the_mean_statistics_of_the_batches(first: int, paths: tuple[str, ...], count: int) -> None:
    torch.manual_seed(0)
    model = Norms()
    batches = list((torch.randn(count, 8, 3, 12, 12) * 3 + 1).unbind())
    chain = split_layers(model, batches[0])
    before = state_of(model)
    held_out = batches[:-1] or batches  # the last one, if there are several
    wanted = {path: of_inputs(model, path, held_out, frozen="" if "stem.1" in paths else "stem") for path in paths}
    norms = [model.get_submodule(path) for path in paths]
    assert recalibrate(chain, first, 3, model, batches, norms=norms)
    assert changes(before, model) == statistics(*paths)
    for path, (mean, variance) in wanted.items():
        norm = model.get_submodule(path)
        torch.testing.assert_close(norm.running_mean.double(), mean, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(norm.running_var.double(), variance, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("count", [1, 4])
def test_running_averages_that_are_better_stay(count: int) -> None:
    torch.manual_seed(0)
    model = Norms()
    chain = split_layers(model, torch.randn(8, 3, 12, 12))
    model.eval()
    for path in ("stem.1", "body.1"):  # of very many samples under these weights
        norm = model.get_submodule(path)
        norm.running_mean, norm.running_var = (
            one.float() for one in of_inputs(model, path, [torch.randn(4000, 3, 12, 12)])
        )
    before, batches = state_of(model), torch.randn(count, 4, 3, 12, 12).unbind()
    is_alone = count == 1  # and not held out
    assert recalibrate(chain, 0, 3, model, batches, norms=[model.stem[1], model.body[1]]) == is_alone
    assert changes(before, model) == (statistics("stem.1", "body.1") if is_alone else set())


def test_nothing_else_of_the_model_changes() -> None:
    torch.manual_seed(0)
    model = Norms().eval()
    model.stem[0].weight.grad = gradient = torch.ones_like(model.stem[0].weight)
    chain = split_layers(model, batch := torch.randn(8, 3, 12, 12))
    numbers = torch.get_rng_state()
    recalibrate(chain, 0, 3, model, [batch], norms=[model.stem[1], model.body[1]])
    assert not any(module.training for module in model.modules())
    assert (model.stem[1].momentum, model.body[1].momentum, model.seen) == (0.1, 0.3, [])
    assert model.stem[0].weight.grad is gradient
    assert torch.equal(torch.get_rng_state(), numbers)


def after(*prefixes: int) -> Callable[[Situation], Decision]:
    """A policy of the user's own: the prefix before training, after the first epoch, and so on."""
    return lambda situation: Decision(prefixes[min(situation.epoch, len(prefixes) - 1)], "by epoch")


class Samples(TensorDataset):
    """The small data; notes which samples are read."""

    def __init__(self) -> None:
        super().__init__(*data().tensors)
        self.read: list[int] = []

    def __getitem__(self, index: int) -> tuple[torch.Tensor, ...]:
        self.read.append(index)
        return super().__getitem__(index)


@pytest.mark.parametrize("cache", ["fp32", None])
def test_layers_dropped_in_training_are_recalibrated_on_samples_of_the_run(cache: str | None) -> None:
    samples = Samples()
    read = samples.read
    model, optimizer, loader = parts(samples, sampler=range(10, 24), shuffle=None, batch_size=4)
    with DropScheduler(model, optimizer, loader, policy=after(0, 1, 2), cache=cache) as drop:
        for norms in (("bn1",), ("bn2",)):
            epoch(drop, optimizer)
            before, numbers = state_of(model), torch.get_rng_state()
            read.clear()
            drop.step()
            assert changes(before, model) == statistics(*norms)
            assert torch.equal(torch.get_rng_state(), numbers)
            assert len(read) == 12  # three whole batches: four would take 16 samples
            assert set(read) <= set(range(10, 24))
            for one in norms:
                x = data().tensors[0][read].split(4)[:-1]  # the last one is held out
                frozen = "bn1" if one == "bn2" else ""
                mean, _ = of_inputs(model, one, x, frozen=frozen)
                torch.testing.assert_close(model.get_submodule(one).running_mean.double(), mean, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("policy", "norms"),
    [
        (Fixed({1: 2}), ()),  # by hand: as they are
        (Fixed({1: 2}, recalibrate=True), ("bn1", "bn2")),
        (StoppedLearning(threshold=1.0, patience=1, warmup=0, min_saving=0.0), ("bn1", "bn2")),
    ],
)
def test_what_policies_ask_for(policy: Any, norms: tuple[str, ...]) -> None:
    model, optimizer, loader = parts()
    with DropScheduler(model, optimizer, loader, policy=policy) as drop:
        epoch(drop, optimizer)
        before = state_of(model)
        assert drop.step().prefix >= 2
        assert changes(before, model) == statistics(*norms)


def test_norms_that_were_not_trained_stay_as_they_are() -> None:
    samples = Samples()
    model, optimizer, loader = parts(samples)
    with DropScheduler(model, optimizer, loader, policy=after(0, 2)) as drop:
        model.train()
        model.bn1.eval()  # by the loop, in each epoch
        for x, y in drop.loader:
            nn.functional.cross_entropy(model(x), y).backward()
            optimizer.step()
        model.train()  # whatever the modes are now
        before = state_of(model)
        samples.read.clear()
        assert drop.step().reason.endswith("; batch norms recalibrated")
        assert changes(before, model) == statistics("bn2")
        images = data().tensors[0][samples.read].split(8)[:-1]  # the last one is held out
        torch.testing.assert_close(
            model.bn2.running_mean.double(), of_inputs(model, "bn2", images, frozen="bn1")[0], rtol=1e-4, atol=1e-5
        )


def test_a_run_that_resumes_counts_from_there() -> None:
    model, optimizer, loader = parts()
    with DropScheduler(model, optimizer, loader, policy=after(0)) as drop:
        epoch(drop, optimizer)
        drop.step()
        saved = copy.deepcopy((model.state_dict(), drop.state_dict()))
    model, optimizer, loader = parts()
    with DropScheduler(model, optimizer, loader, policy=after(0, 0, 2)) as drop:
        model.load_state_dict(saved[0])
        drop.load_state_dict(saved[1])
        model.train()
        model.bn1.eval()
        for x, y in drop.loader:
            nn.functional.cross_entropy(model(x), y).backward()
            optimizer.step()
        before = state_of(model)
        drop.step()
        assert changes(before, model) == statistics("bn2")


def test_layers_dropped_before_training_stay_as_they_are() -> None:
    model, optimizer, loader = parts()
    before = state_of(model)
    with pytest.warns(RuntimeWarning, match="pretrained"):
        drop = DropScheduler(model, optimizer, loader, policy=after(2))
    assert changes(before, model) == set()
    drop.close()


def test_a_loader_with_ids_gives_its_first_batch() -> None:
    model, optimizer, _ = parts()
    x, y = data().tensors
    batches = [(x[at], y[at], at.tolist()) for at in torch.arange(24).split(8)]
    with DropScheduler(model, optimizer, batches, policy=after(0, 1), ids=2) as drop:
        model.train()
        for images, labels, _ in drop.loader:
            nn.functional.cross_entropy(model(images), labels).backward()
            optimizer.step()
        before = state_of(model)
        drop.step()
        assert changes(before, model) == statistics("bn1")
        torch.testing.assert_close(model.bn1.running_mean.double(), of_inputs(model, "bn1", [x[:8]])[0])
