"""Batch norms that are about to be frozen get the statistics of their inputs under the weights of that moment."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import pytest
import torch
from torch import nn
from torch.func import vmap
from torch.utils.data import DataLoader, TensorDataset

from learndrop_ext import DropScheduler, Fixed, StoppedLearning, split_layers
from learndrop_ext.decide.policy import Decision, Situation
from learndrop_ext.forward.statistics import CALLS, TrainingCalls, recalibrate
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


def calls_on(model: nn.Module, batches: Sequence[torch.Tensor]) -> list[Callable[[], Any]]:
    return [partial(model, batch) for batch in batches]


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
    assert recalibrate(chain, first, 3, calls_on(model, batches), norms=norms)
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
    calls = calls_on(model, batches)
    assert recalibrate(chain, 0, 3, calls, norms=[model.stem[1], model.body[1]]) == is_alone
    assert changes(before, model) == (statistics("stem.1", "body.1") if is_alone else set())


def test_nothing_else_of_the_model_changes() -> None:
    torch.manual_seed(0)
    model = Norms().eval()
    model.stem[0].weight.grad = gradient = torch.ones_like(model.stem[0].weight)
    chain = split_layers(model, batch := torch.randn(8, 3, 12, 12))
    numbers = torch.get_rng_state()
    recalibrate(chain, 0, 3, calls_on(model, [batch]), norms=[model.stem[1], model.body[1]])
    assert not any(module.training for module in model.modules())
    assert (model.stem[1].momentum, model.body[1].momentum, model.seen) == (0.1, 0.3, [])
    assert model.stem[0].weight.grad is gradient
    assert torch.equal(torch.get_rng_state(), numbers)


def after(*prefixes: int) -> Callable[[Situation], Decision]:
    """A policy of the user's own: the prefix before training, after the first epoch, and so on."""
    return lambda situation: Decision(prefixes[min(situation.epoch, len(prefixes) - 1)], "by epoch")


class Noted:
    """What the loop calls the model with: the images of each step, after what it does to them."""

    def __init__(self, change: Callable[[torch.Tensor], torch.Tensor] = lambda x: x) -> None:
        self.change = change
        self.ids: list[torch.Tensor] = []

    def images(self) -> list[torch.Tensor]:
        return [self.change(data().tensors[0][ids]) for ids in self.ids]

    def train(self, drop: DropScheduler, model: nn.Module, optimizer: torch.optim.Optimizer, **options: Any) -> None:
        self.ids.clear()
        model.train()
        for x, y, ids in drop.loader:
            self.ids.append(ids)
            optimizer.zero_grad()
            with torch.autocast("cpu", torch.bfloat16, enabled=bool(options)):
                loss = nn.functional.cross_entropy(model(self.change(x)).float(), y)
            loss.backward()
            optimizer.step()


def numbered(**options: Any) -> tuple[nn.Module, torch.optim.Optimizer, DataLoader[Any]]:
    """The small training whose batches have the samples' numbers."""
    model, optimizer, _ = parts()
    return model, optimizer, DataLoader(TensorDataset(*data().tensors, torch.arange(24)), **options)


@pytest.mark.parametrize("options", [{"cache": "fp32"}, {"cache": None}, {"ids": 2}], ids=str)
@pytest.mark.parametrize("change", [lambda x: x, lambda x: (x - 3) * 0.2], ids=["as they are", "normalised"])
def test_layers_dropped_in_training_get_the_statistics_of_the_loops_first_calls(
    options: dict[str, Any], change: Callable[[torch.Tensor], torch.Tensor]
) -> None:
    loop = Noted(change)
    model, optimizer, loader = numbered(batch_size=4, sampler=range(2, 24))
    with DropScheduler(model, optimizer, loader, policy=after(0, 1, 2), **options) as drop:
        for one, frozen in (("bn1", ""), ("bn2", "bn1")):
            loop.train(drop, model, optimizer)
            before, numbers = state_of(model), torch.get_rng_state()
            record = drop.step()
            assert record.reason.endswith("; batch norms recalibrated")
            assert changes(before, model) == statistics(one)
            assert torch.equal(torch.get_rng_state(), numbers)
            mean, _ = of_inputs(
                model, one, loop.images()[:4], frozen=frozen
            )  # the fifth is held out, the sixth not noted
            torch.testing.assert_close(model.get_submodule(one).running_mean.double(), mean, rtol=1e-4, atol=1e-5)


def test_calls_are_repeated_under_their_autocast() -> None:
    loop = Noted(lambda x: x.bfloat16())
    model, optimizer, loader = numbered(batch_size=8)
    with DropScheduler(model, optimizer, loader, policy=after(0, 1)) as drop:
        loop.train(drop, model, optimizer, autocast=True)
        assert drop.step().reason.endswith("; batch norms recalibrated")


def test_calls_whose_images_were_written_to_are_not_repeated() -> None:
    loop = Noted()
    model, optimizer, loader = numbered(batch_size=8)

    def in_place(_: nn.Module, args: tuple[torch.Tensor]) -> None:
        args[0].sub_(3)

    model.register_forward_pre_hook(in_place)
    with DropScheduler(model, optimizer, loader, policy=after(0, 1)) as drop:
        loop.train(drop, model, optimizer)
        before = state_of(model)
        assert drop.step().prefix == 1
        assert changes(before, model) == set()


def test_a_forward_that_cannot_be_repeated_is_frozen_as_it_is() -> None:
    loop = Noted()
    model, optimizer, loader = numbered(batch_size=8)
    allowed = True

    def guard(_: nn.Module, args: tuple[torch.Tensor]) -> None:
        if not allowed and len(args[0]) == 8:
            raise RuntimeError("wants targets")

    model.register_forward_pre_hook(guard)
    with DropScheduler(model, optimizer, loader, policy=Fixed({1: 1}, recalibrate=True)) as drop:
        loop.train(drop, model, optimizer)
        allowed, before = False, state_of(model)
        record = drop.step()
        assert record.prefix == 1
        assert record.reason.endswith("; batch norms not recalibrated: wants targets")
        assert changes(before, model) == set()


def test_calls_are_noted_while_the_loop_trains_and_no_longer() -> None:
    model, optimizer, loader = numbered(batch_size=2)
    calls = TrainingCalls(model, torch.device("cpu"))

    def noted() -> int:
        return len(calls.repeats(model))

    x = torch.randn(4, 3, 8, 8)
    model(x)
    assert (noted(), len(model._forward_pre_hooks)) == (0, 0)
    calls.listen(())
    model.eval()
    model(x)
    with torch.no_grad():
        model.train()(x)
    torch.compile(model, backend="eager")(x)
    assert noted() == 0
    for count in range(1, 8):
        model(x.clone().requires_grad_())
        assert noted() == min(count, CALLS)
    assert not model._forward_pre_hooks
    assert not any(call.args[0].requires_grad for call in calls._calls)
    calls.listen(())
    model(x.share_memory_())
    x.zero_()
    assert noted() == 1  # of a copy
    calls.forget()
    assert (noted(), len(model._forward_pre_hooks)) == (0, 0)
    with DropScheduler(model, optimizer, loader, policy=after(0)) as drop:
        for i, (images, _, _) in enumerate(drop.loader):
            assert bool(model._forward_pre_hooks) == (i % 6 < CALLS)
            model(images).sum().backward()
            if i == 5:
                drop.step()
        assert not model._forward_pre_hooks
        assert len(drop._calls.repeats(model)) == CALLS
        drop.step()
        assert not drop._calls.repeats(model)


def test_inputs_without_memory_and_models_without_batch_norms_are_not_noted() -> None:
    model = nn.Linear(6, 2)
    calls = TrainingCalls(model, torch.device("cpu"))
    calls.listen(())
    assert not model._forward_pre_hooks  # without batch norms nothing is held
    model.norm = nn.BatchNorm1d(2)
    calls.listen((model.norm,))
    assert not model._forward_pre_hooks
    calls.listen(())
    vmap(model)(torch.randn(4, 6))  # as for gradients of each sample
    model(torch.eye(6).to_sparse())
    assert calls.repeats(model) == []
    model(torch.randn(4, 6))
    assert len(calls.repeats(model)) == 1


def test_a_wrapped_model_is_heard() -> None:
    loop = Noted()
    model, optimizer, loader = numbered(batch_size=8)
    with DropScheduler(model, optimizer, loader, policy=after(0, 1, 2), wrap=lambda part: part) as drop:
        for one in ("bn1", "bn2"):
            loop.train(drop, drop.model, optimizer)
            before = state_of(model)
            assert drop.step().reason.endswith("; batch norms recalibrated")
            assert changes(before, model) == statistics(one)


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
    model, optimizer, loader = parts()
    with DropScheduler(model, optimizer, loader, policy=after(0, 2)) as drop:
        model.train()
        model.bn1.eval()  # by the loop, in each epoch
        images = []
        for x, y in drop.loader:
            images.append(x)
            nn.functional.cross_entropy(model(x), y).backward()
            optimizer.step()
        model.train()  # whatever the modes are now
        before = state_of(model)
        assert drop.step().reason.endswith("; batch norms recalibrated")
        assert changes(before, model) == statistics("bn2")
        mean, _ = of_inputs(model, "bn2", images[:-1], frozen="bn1")  # the last one is held out
        torch.testing.assert_close(model.bn2.running_mean.double(), mean, rtol=1e-4, atol=1e-5)


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
