from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn.utils import prune
from torch.utils.data import DataLoader, Dataset

from learndrop_ext import CacheConfig, DropScheduler, Fixed
from learndrop_ext.guards import EACH_STEP, PROBES, READINGS
from small_training import Net, called, data, epoch, parts, prefix_rows


class Changing(Dataset[Any]):
    """Images and labels that can be changed between epochs, and are known by reading alone; which were read is noted."""

    def __init__(self) -> None:
        self.images, self.answers = (t.clone() for t in data().tensors)
        self.reads: list[int] = []

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> Any:
        self.reads.append(index)
        return self.images[index], self.answers[index]


class Noisy(Changing):
    def __getitem__(self, index: int) -> Any:
        image, label = super().__getitem__(index)
        return image + torch.rand(()), label


def dropped(dataset: Dataset[Any], *, batch_size: int = 8, **options: Any) -> tuple[DropScheduler, Any]:
    """A run with two dropped layers and all rows."""
    model, optimizer, loader = parts(dataset, batch_size=batch_size)
    drop = DropScheduler(model, optimizer, loader, **({"policy": Fixed({0: 2}), "cache": "fp32"} | options))
    for _ in range(drop._rows.views):
        epoch(drop, optimizer)
        drop.step()
    assert bool(drop._rows.cache.filled.all())
    return drop, optimizer


def rows_of(drop: DropScheduler) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """An epoch: what the live layers got of each batch, and its labels."""
    found = []
    drop._base.train()
    for x, y in drop.loader:
        output, rows = called(drop, x)
        nn.functional.cross_entropy(output, y).backward()
        found.append((rows, y))
    return found


def assert_rows_of_now(drop: DropScheduler) -> None:
    """An epoch on the rows that the dropped layers make of the small data now."""
    wanted = prefix_rows(drop, 2)
    for rows, _ in rows_of(drop):
        for row in rows:
            assert min(float((row - one).abs().max()) for one in wanted) < 1e-5


def assert_nothing_is_said(drop: DropScheduler, optimizer: Any, epochs: int = 2) -> None:
    cache = drop._rows.cache
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for _ in range(epochs):
            epoch(drop, optimizer)
            drop.step()
    assert drop._rows.cache is cache
    assert bool(cache.filled.all())


# Images and labels


def brighter(dataset: Changing) -> None:
    dataset.images += 0.5


def flipped(dataset: Changing) -> None:
    dataset.images = dataset.images.flip(-1)


def corrected(dataset: Changing) -> None:
    dataset.answers = (dataset.answers + 1) % 5


@pytest.mark.parametrize(
    ("change", "what"),
    [(brighter, "the images"), (flipped, "the images"), (corrected, r"batch\[1\]")],
)
@pytest.mark.parametrize("codec", ["fp32", "fp16", "uint8"])
def test_rows_are_made_anew_where_the_data_has_changed(
    change: Callable[[Changing], None], what: str, codec: str
) -> None:
    dataset = Changing()
    drop, optimizer = dropped(dataset, cache=codec)
    assert_nothing_is_said(drop, optimizer, 1)
    change(dataset)
    with pytest.warns(RuntimeWarning, match=f"drop.loader: the rows are computed again: {what} of some samples are no"):
        batches = rows_of(drop)
    labels = torch.cat([y for _, y in batches])
    assert sorted(labels.tolist()) == sorted(dataset.answers.tolist())
    with torch.no_grad():
        wanted = drop.chain.prefix(2).eval()(dataset.images)
    for rows, y in batches:
        for row, label in zip(rows, y, strict=True):
            distance = [float((row - wanted[i]).abs().max()) for i in range(24) if dataset.answers[i] == label]
            assert min(distance) < 0.05
    assert_nothing_is_said(drop, optimizer)


def test_a_single_value_of_the_samples_that_are_looked_at_is_seen() -> None:
    dataset = Changing()
    drop, optimizer = dropped(dataset)
    assert_nothing_is_said(drop, optimizer)
    dataset.images[:, 2, 7, 7] += 1e-6
    with pytest.warns(RuntimeWarning, match="the images of some samples are no longer"):
        epoch(drop, optimizer)


@pytest.mark.parametrize("codec", ["fp32", "fp16", "bf16", "uint8"])
@pytest.mark.parametrize("mirror", [False, True])
def test_data_that_stays_is_not_made_anew(codec: str, mirror: bool) -> None:
    dataset = Changing()
    drop, optimizer = dropped(dataset, cache=CacheConfig(codec=codec, mirror=mirror))
    dataset.reads.clear()
    assert_nothing_is_said(drop, optimizer, 4)
    assert 4 <= len(dataset.reads) <= 4 * PROBES
    assert len(set(dataset.reads)) > PROBES  # others in each epoch


def test_activations_beyond_the_largest_fp16_are_said_once_and_not_taken_for_other_images() -> None:
    dataset = Changing()
    dataset.images *= 1e6
    model, optimizer, loader = parts(dataset)
    drop = DropScheduler(model, optimizer, loader, policy=Fixed({0: 2}), cache="fp16")
    cache = drop._rows.cache
    epoch(drop, optimizer)
    with pytest.warns(RuntimeWarning, match=r"activations after conv2 are larger than 65504 .* cache='bf16'"):
        drop.step()
    epoch(drop, optimizer)
    drop.step()
    assert drop._rows.cache is cache


RESIZED = r"keep no rows, .* images must have one shape, wanted \[3, 8, 8\] .*, got \[3, 12, 12\]; .*undrop"


def resized(dataset: Changing) -> None:
    dataset.images = nn.functional.interpolate(dataset.images, size=12)


@pytest.mark.parametrize("options", [{}, {"views": 2}, {"mirror": True}], ids=str)
def test_images_of_another_size_run_through_the_frozen_layers(options: dict[str, Any]) -> None:
    dataset = Changing()
    drop, optimizer = dropped(dataset, cache=CacheConfig(codec="fp32", **options), epochs=9, policy=Fixed({0: 2, 5: 3}))
    resized(dataset)
    frozen = drop._base.conv2.weight.clone()
    with pytest.warns(RuntimeWarning, match=RESIZED), pytest.warns(match="computed again: the images of some samples"):
        epoch(drop, optimizer)
    drop.step()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        while drop.epoch < 5:
            batches = rows_of(drop)
            assert sum(len(y) for _, y in batches) == 24
            drop.step()
    shown = torch.cat([dataset.images, dataset.images.flip(-1)]) if "mirror" in options else dataset.images
    wanted = prefix_rows(drop, 2, shown)
    assert all(any(torch.equal(row, one) for one in wanted) for rows, _ in batches for row in rows)
    assert torch.equal(drop._base.conv2.weight, frozen)
    assert drop.prefix == 3
    assert drop.history[-1].reason.endswith("; no rows: images must have one shape, and had [3, 8, 8] and [3, 12, 12]")
    dataset.images = data().tensors[0]
    for _ in range(1 + drop._rows.views):  # rows are kept behind two layers again, and once all are there read
        epoch(drop, optimizer)
        assert drop.step().samples == 24
    assert all(x.pixels is None for x, _ in drop.loader)


def test_images_that_change_their_size_within_an_epoch_train() -> None:
    dataset = Changing()
    drop, _ = dropped(dataset)
    drop.refresh(range(0, 24, 2))
    drop._base.register_forward_hook(lambda *_: resized(dataset))  # after the first batch
    with pytest.warns(RuntimeWarning, match=RESIZED):
        labels = torch.cat([y for _, y in rows_of(drop)])
    assert sorted(labels.tolist()) == sorted(dataset.answers.tolist())
    assert (drop.step().samples, drop.prefix) == (24, 2)


def test_layers_dropped_after_images_were_resized_run_frozen() -> None:
    dataset = Changing()
    model, optimizer, loader = parts(dataset)
    with DropScheduler(model, optimizer, loader, policy=Fixed({2: 1, 3: 2})) as drop:
        for prefix in (0, 1, 2, 2):
            epoch(drop, optimizer)
            assert drop.step().prefix == prefix
            dataset.images = nn.functional.interpolate(data().tensors[0], size=12)
        assert drop._rows.cut == 0
        for record in drop.history[1:3]:
            assert record.reason.endswith("; no rows: images must have one shape, and had [3, 8, 8] and [3, 12, 12]")
        dataset.images = data().tensors[0]
        epoch(drop, optimizer)
        drop.step()


def test_labels_are_compared_where_some_samples_have_to_be_read_again() -> None:
    dataset = Changing()
    drop, optimizer = dropped(dataset, batch_size=20)
    bf16 = torch.autocast("cpu", torch.bfloat16)
    drop.refresh(range(24))
    with bf16:  # found at the first batch, which was read before: it has rows, and its labels will be read again
        epoch(drop, optimizer)
    drop.step()
    assert (len(drop._rows.drawn()), int(drop._extras.filled.sum())) == (24, 4)
    corrected(dataset)
    with bf16, pytest.warns(RuntimeWarning, match=r"computed again: batch\[1\] of some samples"):
        labels = torch.cat([y for _, y in rows_of(drop)])
    assert sorted(labels.tolist()) == sorted(dataset.answers.tolist())


def test_labels_are_compared_where_the_images_are_random() -> None:
    dataset = Noisy()
    drop, optimizer = dropped(dataset, cache=CacheConfig(codec="fp32", views=2))
    assert_nothing_is_said(drop, optimizer)
    brighter(dataset)  # the noise hides it
    assert_nothing_is_said(drop, optimizer)
    corrected(dataset)
    with pytest.warns(RuntimeWarning, match=r"computed again: batch\[1\] of some samples"):
        labels = torch.cat([y for _, y in rows_of(drop)])
    assert sorted(labels.tolist()) == sorted(dataset.answers.tolist())


@pytest.mark.parametrize("wordings", [2, 5])
def test_what_is_random_beside_random_images_is_not_compared(wordings: int) -> None:
    class Described(Noisy):
        """One of several wordings of a label at each reading, and the label."""

        def __getitem__(self, index: int) -> Any:
            image, label = super().__getitem__(index)
            return image, label, f"{int(torch.randint(wordings, ()))}: {int(label)}"

    def trained(drop: DropScheduler, optimizer: Any) -> list[tuple[str, int]]:
        found = []
        for x, y, said in drop.loader:
            nn.functional.cross_entropy(drop.model(x), y).backward()
            optimizer.step()
            found += zip(said, y.tolist(), strict=True)
        return found

    dataset = Described()
    model, optimizer, loader = parts(dataset)
    drop = DropScheduler(model, optimizer, loader, policy=Fixed({0: 2}), cache=CacheConfig(codec="fp32", views=2))
    for _ in range(8):
        cache = drop._rows.cache
        found = trained(drop, optimizer)
        assert len({said[0] for said, _ in found}) > 1
        assert all(said[3:] == str(label) for said, label in found)
        drop.step()
        assert drop._rows.cache is cache
    dataset.reads.clear()
    corrected(dataset)
    with pytest.warns(RuntimeWarning, match=r"computed again: batch\[1\] of some samples"):
        found = trained(drop, optimizer)
    assert all(said[3:] == str(label) for said, label in found)
    assert len(dataset.reads) <= READINGS * PROBES + 24


def test_a_look_at_the_data_leaves_the_random_state_alone() -> None:
    def state(drops: dict[int, int]) -> float:
        model, optimizer, _ = parts()
        loader = DataLoader(Changing(), batch_size=8, shuffle=True)
        drop = DropScheduler(model, optimizer, loader, policy=Fixed(drops))
        torch.manual_seed(5)
        for _ in range(3):
            epoch(drop, optimizer)
            drop.step()
        return float(torch.rand(()))

    assert state({1: 2}) == state({})


def test_a_run_that_resumes_knows_the_images_of_its_rows(tmp_path: Path) -> None:
    config = CacheConfig(codec="fp32", store=tmp_path, key=str)

    def resumed(dataset: Changing) -> tuple[DropScheduler, Any]:
        model, optimizer, loader = parts(dataset)
        model.load_state_dict(first._base.state_dict())
        drop = DropScheduler(model, optimizer, loader, policy=Fixed({0: 2}), cache=config)
        drop.load_state_dict(first.state_dict())
        return drop, optimizer

    first, _ = dropped(Changing(), cache=config)
    same = resumed(Changing())
    assert bool(same[0]._rows.cache.filled.all())
    assert_nothing_is_said(*same)
    dataset = Changing()
    dataset.images += 1
    drop, optimizer = resumed(dataset)
    assert bool(drop._rows.cache.filled.all())
    with pytest.warns(RuntimeWarning, match="computed again: the images of some samples"):
        [epoch(drop, optimizer) for _ in range(3)]


# Weights and buffers


def add(net: Net) -> None:
    with torch.no_grad():
        net.conv2.weight.add_(0.1)


def add_to_data(net: Net) -> None:
    net.conv2.weight.data.add_(0.1)


def statistics(net: Net) -> None:
    net.bn1.running_mean.add_(1)


def load(net: Net) -> None:
    torch.manual_seed(7)
    net.load_state_dict(Net().state_dict())


def assign(net: Net) -> None:
    torch.manual_seed(7)
    net.load_state_dict(Net().state_dict(), assign=True)


def other_memory(net: Net) -> None:
    net.conv2.weight.data = net.conv2.weight.data + 0.1


def other_parameter(net: Net) -> None:
    net.conv2.weight = nn.Parameter(net.conv2.weight.detach() + 0.1)


CHANGES = {
    "in place": (add, "conv2"),
    "through .data": (add_to_data, "conv2"),
    "another .data": (other_memory, "conv2"),
    "another parameter": (other_parameter, "conv2"),
    "a buffer": (statistics, "conv1"),
    "load_state_dict": (load, "conv1"),
    "load_state_dict, assigned": (assign, "conv1"),
}


@pytest.mark.parametrize(("change", "layer"), CHANGES.values(), ids=CHANGES)
@pytest.mark.parametrize("twice", [False, True])
def test_rows_are_made_anew_where_a_dropped_layer_has_changed(
    change: Callable[[Net], None], layer: str, twice: bool
) -> None:
    drop, optimizer = dropped(data())
    for _ in range(1 + twice):
        change(drop._base)
    with pytest.warns(
        RuntimeWarning,
        match=f"drop.loader: the rows are computed again: the weights or buffers of the dropped layer {layer} have",
    ):
        assert_rows_of_now(drop)
    assert_nothing_is_said(drop, optimizer)
    # What comes after is watched as before.
    change(drop._base)
    if change not in (load, assign):  # the same weights again
        with pytest.warns(RuntimeWarning, match="computed again"):
            assert_rows_of_now(drop)
    else:
        assert_nothing_is_said(drop, optimizer)


@pytest.mark.parametrize(("change", "layer"), CHANGES.values(), ids=CHANGES)
def test_step_sees_what_an_epoch_has_changed(change: Callable[[Net], None], layer: str) -> None:
    drop, optimizer = dropped(data())
    epoch(drop, optimizer)
    change(drop._base)
    with pytest.warns(
        RuntimeWarning,
        match=f"drop.step: the rows are computed again: the weights or buffers of the dropped layer {layer} have",
    ):
        drop.step()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert_rows_of_now(drop)
    assert_nothing_is_said(drop, optimizer)


@pytest.mark.parametrize(("change", "layer"), [(add, "conv2"), (statistics, "conv1"), (load, "conv1")])
def test_a_change_amid_an_epoch_is_refused_by_name(change: Callable[[Net], None], layer: str) -> None:
    drop, optimizer = dropped(data(), batch_size=2)
    loader = iter(drop.loader)
    drop.model(next(loader)[0])
    change(drop._base)
    with pytest.raises(RuntimeError, match=f"must stay as they are, and those of {layer} have changed since its rows"):
        drop.model(next(loader)[0])
    drop.undrop()
    epoch(drop, optimizer)


def test_a_change_of_one_of_many_layers_is_refused_some_steps_later() -> None:
    layers = [nn.Linear(3 * 8 * 8, 4), *(nn.Linear(4, 4) for _ in range(100))]
    model = nn.Sequential(nn.Flatten(), *layers)
    _, _, loader = parts(batch_size=2)
    drop = DropScheduler(model, torch.optim.SGD(model.parameters(), 0.1), loader, policy=Fixed({0: 100}), cache="fp32")
    batches = iter(drop.loader)
    model(next(batches)[0])
    with torch.no_grad():
        layers[70].bias.add_(1)
    with pytest.raises(RuntimeError, match="those of 71 have changed"):
        [model(next(batches)[0]) for _ in range(200 // EACH_STEP)]


def test_weights_written_with_their_own_values_amid_an_epoch_change_nothing() -> None:
    drop, _ = dropped(data(), batch_size=2)
    cache = drop._rows.cache
    for x, _ in drop.loader:
        drop._base.load_state_dict({name: value.clone() for name, value in drop._base.state_dict().items()})
        drop.model(x)
    assert drop._rows.cache is cache


def test_a_pruned_layer_is_watched_from_then_on() -> None:
    drop, _ = dropped(data())
    prune.l1_unstructured(drop._base.conv2, "weight", amount=0.5)
    with pytest.warns(RuntimeWarning, match="dropped layer conv2 have changed"):
        assert_rows_of_now(drop)
    with torch.no_grad():
        drop._base.conv2.weight_orig.add_(0.1)
    with pytest.warns(RuntimeWarning, match="dropped layer conv2 have changed"):
        assert_rows_of_now(drop)


def test_weights_written_with_their_own_values_change_nothing() -> None:
    drop, optimizer = dropped(data())
    drop._base.load_state_dict({k: v.clone() for k, v in drop._base.state_dict().items()})
    assert_nothing_is_said(drop, optimizer)


def test_live_layers_may_change() -> None:
    drop, optimizer = dropped(data())
    for write in (drop._base.conv3.weight.data.zero_, drop._base.conv3.weight.requires_grad_):
        write()
        assert_nothing_is_said(drop, optimizer)


def test_a_dropped_layer_that_is_asked_to_train_trains() -> None:
    model, _, loader = parts()
    model.conv1.requires_grad_(False)
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
    drop = DropScheduler(model, optimizer, loader, policy=Fixed({0: 2}))
    epoch(drop, optimizer)
    model.conv1.requires_grad_(True)
    optimizer.add_param_group({"params": list(model.conv1.parameters())})
    with pytest.warns(RuntimeWarning, match="drop.step: all layers train again, .* layer conv1 have been set to"):
        drop.step()
    before = model.conv1.weight.detach().clone()
    epoch(drop, optimizer)
    assert not torch.equal(model.conv1.weight, before)


# What forward reads beside its input

SCALE = {"of all": 1.0}


@pytest.fixture(autouse=True)
def _scale() -> Iterator[None]:
    yield
    SCALE["of all"] = 1.0


class Reading(Net):
    """Reads a number of its own in its dropped and in its live layers, one of a configuration, and a global one."""

    def __init__(self) -> None:
        super().__init__()
        self.conv2 = Scaled(self.conv2)
        self.conv3 = Scaled(self.conv3)


class Scaled(nn.Module):
    def __init__(self, conv: nn.Module) -> None:
        super().__init__()
        self.conv = conv
        self.scale = 1.0
        self.config = SimpleNamespace(inner=SimpleNamespace(shift=torch.zeros(())))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.conv(x) * self.scale * SCALE["of all"] + self.config.inner.shift


def twice_as_much(module: nn.Module, args: Any, output: torch.Tensor) -> torch.Tensor:
    return 2 * output


READ: dict[str, Callable[[Any], Any]] = {
    "an attribute": lambda net: setattr(net.conv2, "scale", 2.0),
    "a tensor of a configuration": lambda net: net.conv2.config.inner.shift.add_(1),
    "a global variable": lambda net: SCALE.update({"of all": 2.0}),
    "a hook": lambda net: net.conv2.conv.register_forward_hook(twice_as_much),
    "a setting of a layer": lambda net: setattr(net.bn1, "eps", 1.0),
    "an attribute, to what is not a number": lambda net: setattr(net.conv2, "scale", float("nan")),
    "another forward": lambda net: setattr(net.conv2.conv, "forward", lambda x: x.new_ones(len(x), 6, 4, 4)),
}


def reading(**options: Any) -> tuple[DropScheduler, Any]:
    torch.manual_seed(0)
    model = Reading()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    _, _, loader = parts()
    drop = DropScheduler(model, optimizer, loader, policy=Fixed({0: 2}), cache="fp32", **options)
    epoch(drop, optimizer)
    drop.step()
    return drop, optimizer


@pytest.mark.parametrize("change", READ.values(), ids=READ)
def test_what_dropped_layers_read_is_followed(change: Callable[[Any], Any], request: pytest.FixtureRequest) -> None:
    drop, optimizer = reading()
    assert_nothing_is_said(drop, optimizer)
    change(drop._base)
    with pytest.warns(
        RuntimeWarning, match="drop.loader: the rows are computed again: the first 2 layers compute something else than"
    ):
        found = rows_of(drop)
    wanted = prefix_rows(drop, 2)
    for rows, _ in found:
        for row in rows:
            assert any(torch.allclose(row, one, atol=1e-5, equal_nan=True) for one in wanted)
    if "not a number" in str(request.node.callspec.id):  # nothing can train on that
        return
    assert_nothing_is_said(drop, optimizer)


def test_what_live_layers_read_does_not_cost_the_rows() -> None:
    drop, optimizer = reading()
    drop._base.conv3.scale = 2.0
    drop._base.conv3.conv.register_forward_hook(twice_as_much)
    assert_nothing_is_said(drop, optimizer)


def test_an_epoch_begins_without_computing_an_image(monkeypatch: pytest.MonkeyPatch) -> None:
    drop, optimizer = reading()

    def refuse(*_: Any) -> Any:
        raise AssertionError("the dropped layers ran")

    monkeypatch.setattr(drop._guards._probe, "_computed", refuse)
    assert_nothing_is_said(drop, optimizer)


def test_a_setting_that_changes_no_row_does_not_cost_the_rows() -> None:
    drop, optimizer = reading()
    drop._base.bn1.momentum = 0.5  # read by forward in eval mode too
    assert_nothing_is_said(drop, optimizer)


#: An operation that cannot run without values.
LIBRARY = torch.library.Library("learndrop_guards", "DEF")
LIBRARY.define("same(Tensor x) -> Tensor")
LIBRARY.impl("same", torch.clone, "CPU")


class Same(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        same: torch.Tensor = torch.ops.learndrop_guards.same(x)
        return same


class WithValues(Reading):
    def __init__(self) -> None:
        super().__init__()
        self.conv1 = nn.Sequential(self.conv1, Same())  # type: ignore[assignment]


@pytest.mark.parametrize("change", READ.values(), ids=READ)
def test_layers_that_need_values_are_compared_by_their_rows(
    change: Callable[[Any], Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(globals(), "Reading", WithValues)
    drop, optimizer = reading()
    assert drop._guards._probe._traced() is None
    assert_nothing_is_said(drop, optimizer)
    change(drop._base)
    with pytest.warns(RuntimeWarning, match="the rows are computed again: the first 2 layers compute something else"):
        rows_of(drop)


def test_the_look_at_what_layers_compute_leaves_the_random_state_and_the_modes() -> None:
    drop, optimizer = reading()
    epoch(drop, optimizer)
    modes = [module.training for module in drop._base.modules()]
    state = torch.get_rng_state()
    calls: list[int] = []
    hook = drop._base.fc.register_forward_hook(lambda *_: calls.append(1))
    drop._guards.look("loader")
    hook.remove()
    assert torch.equal(torch.get_rng_state(), state)
    assert [module.training for module in drop._base.modules()] == modes
    assert calls == []  # the forward ends at the cut


def test_rows_that_are_not_numbers_are_not_taken_for_a_change() -> None:
    dataset = Changing()
    dataset.images[:, 0, 0, 0] = float("nan")
    dataset.images[:, 1, 7, 7] = float("inf")
    model, optimizer, loader = parts(dataset)
    drop = DropScheduler(model, optimizer, loader, policy=Fixed({0: 2}), cache="fp32")
    cache = drop._rows.cache
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for _ in range(3):
            for x, _ in drop.loader:
                drop.model(x)
    assert drop._rows.cache is cache
    assert bool(cache.filled.all())


# The loop


def test_rows_are_made_anew_under_another_autocast() -> None:
    drop, optimizer = dropped(data())
    drop._base.train()

    def trained() -> list[torch.Tensor]:
        found = []
        with torch.autocast("cpu", torch.bfloat16):
            for x, y in drop.loader:
                output, rows = called(drop, x)
                found.append(rows.float())
                nn.functional.cross_entropy(output.float(), y).backward()
                optimizer.step()
        drop.step()
        return found

    with pytest.warns(RuntimeWarning, match="computed again: they were computed under no autocast, and the loop now"):
        first, *rest = trained()
    cache = drop._rows.cache
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        rest += trained() + trained()
    assert not torch.equal(first.bfloat16().float(), first)  # was given before the change was known
    assert all(torch.equal(rows.bfloat16().float(), rows) for rows in rest)
    assert drop._rows.cache is cache
    assert bool(cache.filled.all())


@pytest.mark.parametrize("inside", [False, True])
def test_a_loop_within_autocast_keeps_its_rows(inside: bool) -> None:
    model, optimizer, loader = parts()
    drop = DropScheduler(model, optimizer, loader, policy=Fixed({1: 2}), cache="fp32")
    for i in range(5):
        cache = drop._rows.cache
        with torch.autocast("cpu", torch.bfloat16), warnings.catch_warnings():
            warnings.simplefilter("error")
            for x, y in drop.loader:
                nn.functional.cross_entropy(model(x).float(), y).backward()
                optimizer.step()
            if inside:
                drop.step()
        if not inside:
            drop.step()
        assert i == 0 or drop._rows.cache is cache


def test_the_loop_of_the_rows_is_said_where_another_is_refused() -> None:
    drop, optimizer = dropped(data())
    for change in (lambda x: x * 2, lambda x: x.half().float()):
        x, _ = next(iter(drop.loader))
        with pytest.raises(RuntimeError, match=r"wanted nothing, got (mul|_to_copy)\("):
            drop.model(change(x))
    assert_nothing_is_said(drop, optimizer)


def test_refresh_accepts_other_images_and_labels_without_a_word() -> None:
    dataset = Changing()
    drop, optimizer = dropped(dataset)
    brighter(dataset)
    corrected(dataset)
    drop.refresh()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        batches = rows_of(drop)
    assert sorted(torch.cat([y for _, y in batches]).tolist()) == sorted(dataset.answers.tolist())
    with torch.no_grad():
        wanted = drop.chain.prefix(2).eval()(dataset.images)
    assert torch.allclose(torch.cat([rows for rows, _ in batches]).sum(), wanted.sum(), rtol=1e-4)
    assert_nothing_is_said(drop, optimizer)
