from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn.utils import prune
from torch.utils.data import DataLoader, Dataset

from learndrop_ext import CacheConfig, DropScheduler, Fixed
from small_training import Net, data, epoch, parts, prefix_rows


class Changing(Dataset[Any]):
    """Images and labels that can be changed between epochs."""

    def __init__(self) -> None:
        self.images, self.labels = (t.clone() for t in data().tensors)

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> tuple[torch.Tensor, torch.Tensor]:
        return self.images[index], self.labels[index]


def dropped(dataset: Dataset[Any], **options: Any) -> tuple[DropScheduler, torch.optim.Optimizer]:
    """A run with two dropped layers and all rows."""
    model, optimizer, loader = parts(dataset)
    drop = DropScheduler(model, optimizer, loader, **({"policy": Fixed({0: 2}), "cache": "fp32"} | options))
    for _ in range(drop.rows.views):
        epoch(drop, optimizer)
        drop.step()
    assert bool(drop.rows.cache.filled.all())
    return drop, optimizer


def brighter(dataset: Changing) -> None:
    dataset.images += 0.5


def flipped(dataset: Changing) -> None:
    dataset.images = dataset.images.flip(-1)


def corrected(dataset: Changing) -> None:
    dataset.labels = (dataset.labels + 1) % 5


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
    epoch(drop, optimizer)
    change(dataset)
    with pytest.warns(RuntimeWarning, match=f"drop.loader: the rows are computed again: {what} of some samples are no"):
        batches = list(drop.loader)
    labels = torch.cat([y for _, y in batches])
    assert sorted(labels.tolist()) == sorted(dataset.labels.tolist())
    with torch.no_grad():
        wanted = drop.chain.prefix(2).eval()(dataset.images)
    for x, y in batches:
        for row, label in zip(x, y, strict=True):
            distance = [float((row - wanted[i]).abs().max()) for i in range(24) if dataset.labels[i] == label]
            assert min(distance) < 0.05


@pytest.mark.parametrize("codec", ["fp32", "fp16", "bf16", "uint8"])
@pytest.mark.parametrize("views", [1, 2])
def test_data_that_stays_is_not_made_anew(codec: str, views: int) -> None:
    drop, optimizer = dropped(Changing(), cache=CacheConfig(codec=codec, mirror=views == 2))
    cache = drop.rows.cache
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for _ in range(4):
            epoch(drop, optimizer)
            drop.step()
    assert drop.rows.cache is cache


def test_activations_beyond_the_largest_fp16_are_said_once_and_not_taken_for_other_images() -> None:
    dataset = Changing()
    dataset.images *= 1e6
    model, optimizer, loader = parts(dataset)
    drop = DropScheduler(model, optimizer, loader, policy=Fixed({0: 2}), cache="fp16")
    cache = drop.rows.cache
    epoch(drop, optimizer)
    with pytest.warns(RuntimeWarning, match=r"activations after conv2 are larger than 65504 .* cache='bf16'"):
        drop.step()
    epoch(drop, optimizer)
    drop.step()
    assert drop.rows.cache is cache


@pytest.mark.parametrize("views", [1, 2])
def test_images_of_another_size_are_refused(views: int) -> None:
    dataset = Changing()
    drop, _ = dropped(dataset, views=views)
    dataset.images = nn.functional.interpolate(dataset.images, size=12)
    with pytest.raises(RuntimeError, match=r"images must keep their shape \[3, 8, 8\] .*, got \[3, 12, 12\]; .*undrop"):
        next(iter(drop.loader))


def test_labels_are_compared_where_the_images_are_random() -> None:
    class Noisy(Changing):
        def __getitem__(self, index: int) -> tuple[torch.Tensor, torch.Tensor]:
            return self.images[index] + torch.rand(()), self.labels[index]

    dataset = Noisy()
    drop, optimizer = dropped(dataset, views=2)
    cache = drop.rows.cache
    epoch(drop, optimizer)
    assert drop.rows.cache is cache
    corrected(dataset)
    with pytest.warns(RuntimeWarning, match=r"computed again: batch\[1\] of some samples"):
        labels = torch.cat([y for _, y in drop.loader])
    assert sorted(labels.tolist()) == sorted(dataset.labels.tolist())


def test_a_look_at_the_data_leaves_the_random_state_alone() -> None:
    def orders(drops: dict[int, int]) -> list[float]:
        model, optimizer, _ = parts()
        loader = DataLoader(data(), batch_size=8, shuffle=True)
        drop = DropScheduler(model, optimizer, loader, policy=Fixed(drops))
        torch.manual_seed(5)
        for _ in range(3):
            epoch(drop, optimizer)
            drop.step()
        return [float(torch.rand(()))]

    assert orders({1: 2}) == orders({})


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


@pytest.mark.parametrize(
    ("change", "layer"), [(add, "conv2"), (add_to_data, "conv2"), (statistics, "conv1"), (load, "conv1")]
)
@pytest.mark.parametrize("twice", [False, True])
def test_rows_are_made_anew_where_a_dropped_layer_has_changed(
    change: Callable[[Net], None], layer: str, twice: bool
) -> None:
    drop, optimizer = dropped(data())
    for _ in range(1 + twice):
        change(drop.base_model)
    with pytest.warns(
        RuntimeWarning, match=f"computed again: the weights or buffers of the dropped layer {layer} have"
    ):
        rows = torch.cat([x for x, _ in drop.loader])
    wanted = prefix_rows(drop, 2)
    for row in rows:
        assert min(float((row - one).abs().max()) for one in wanted) < 1e-5
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        epoch(drop, optimizer)
    # What comes after is watched as before.
    change(drop.base_model)
    if change is not load:  # the same weights again
        with pytest.warns(RuntimeWarning, match="computed again"):
            next(iter(drop.loader))


def test_weights_that_are_replaced_are_watched_from_then_on() -> None:
    drop, _ = dropped(data())
    assign(drop.base_model)
    with pytest.warns(RuntimeWarning, match="computed again"):
        rows = torch.cat([x for x, _ in drop.loader])
    wanted = prefix_rows(drop, 2)
    for row in rows:
        assert min(float((row - one).abs().max()) for one in wanted) < 1e-5
    add(drop.base_model)
    with pytest.warns(RuntimeWarning, match="computed again"):
        next(iter(drop.loader))


def test_a_pruned_layer_is_watched_from_then_on() -> None:
    drop, _ = dropped(data())
    prune.l1_unstructured(drop.base_model.conv2, "weight", amount=0.5)
    with pytest.warns(RuntimeWarning, match="dropped layer conv2 have changed"):
        list(drop.loader)
    with torch.no_grad():
        drop.base_model.conv2.weight_orig.add_(0.1)
    with pytest.warns(RuntimeWarning, match="dropped layer conv2 have changed"):
        list(drop.loader)


def test_weights_written_with_their_own_values_change_nothing() -> None:
    drop, _ = dropped(data())
    cache = drop.rows.cache
    drop.base_model.load_state_dict({k: v.clone() for k, v in drop.base_model.state_dict().items()})
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        list(drop.loader)
    assert drop.rows.cache is cache


def test_a_dropped_layer_that_is_asked_to_train_is_refused() -> None:
    model, _, loader = parts()
    model.conv1.requires_grad_(False)
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
    drop = DropScheduler(model, optimizer, loader, policy=Fixed({0: 2}))
    epoch(drop, optimizer)
    model.conv1.requires_grad_(True)
    optimizer.add_param_group({"params": list(model.conv1.parameters())})
    with pytest.raises(RuntimeError, match=r"parameters of conv1 have been set to train .*: call drop.undrop\(\) to"):
        drop.step()
    with pytest.raises(RuntimeError, match=r"parameters of conv1 have been set to train"):
        next(iter(drop.loader))
    drop.undrop()
    before = model.conv1.weight.detach().clone()
    epoch(drop, optimizer)
    assert not torch.equal(model.conv1.weight, before)
