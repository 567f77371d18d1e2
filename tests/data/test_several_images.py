"""Samples with several images, `input=[0, 1]`: each has a row of its own, alone or joined along the batch."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, Dataset, WeightedRandomSampler

from learndrop_ext import Budget, CacheConfig, DropScheduler, Fixed
from learndrop_ext.forward.images import Images
from small_training import Net, data

Batch = Any
Loss = Callable[[nn.Module, Batch], torch.Tensor]


class Pairs(Dataset[Any]):
    """Two images and a number of each sample."""

    def __init__(self, count: int = 24) -> None:
        self.first, self.second = data(count).tensors[0], data(count).tensors[0].flip(0) * 0.5
        self.read = 0

    def __len__(self) -> int:
        return len(self.first)

    def __getitem__(self, index: int) -> Any:
        self.read += 1
        return self.first[index], index, self.second[index]


class Named(Pairs):
    def __getitem__(self, index: int) -> Any:
        one, number, other = super().__getitem__(index)
        return {"b": other, "number": number, "a": one}


def apart(model: nn.Module, batch: Batch) -> torch.Tensor:
    return (model(batch[0]) - model(batch[2])).square().sum() / 8


def joined(model: nn.Module, batch: Batch) -> torch.Tensor:
    one, other = model(torch.cat([batch[0], batch[2]])).chunk(2)
    return (one - other).square().sum() / 8


def in_parts(model: nn.Module, batch: Batch) -> torch.Tensor:
    found = [model(torch.cat([a, b])).chunk(2) for a, b in zip(batch[0].split(4), batch[2].split(4), strict=True)]
    return sum((one - other).square().sum() for one, other in found) / 8  # type: ignore[return-value]


def normalised(model: nn.Module, batch: Batch) -> torch.Tensor:
    return (model((batch[0] - 0.5) / 2) - model((batch[2] - 0.5) / 2)).square().sum() / 8


def by_name(model: nn.Module, batch: Batch) -> torch.Tensor:
    return (model(batch["a"]) - model(batch["b"])).square().sum() / 8


def losses_of(
    loss: Loss, *, dataset: type[Pairs] = Pairs, drops: bool, input: Any = (0, 2), **options: Any
) -> tuple[list[float], Pairs]:
    """The losses of four epochs of which three train behind two layers: dropped, or frozen in eval mode."""
    torch.manual_seed(0)
    model = Net()
    model.to(memory_format=options.pop("memory_format", torch.contiguous_format))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.02)
    pairs = dataset()
    settings = {"batch_size": 8, "shuffle": True, "generator": torch.Generator().manual_seed(1)} | options
    loader = DataLoader(pairs, **settings)
    losses = []
    config = CacheConfig(codec="fp32")
    drop = DropScheduler(model, optimizer, loader, policy=Fixed({1: 2}), input=input, cache=config) if drops else None
    prefix = nn.ModuleList([model.conv1, model.bn1, model.conv2, model.bn2])
    for epoch in range(4):
        if epoch == 2:
            pairs.read = 0
        model.train()
        if drop is None and epoch:
            prefix.eval().requires_grad_(False)
        for batch in loader if drop is None else drop.loader:
            one = loss(model, batch)
            optimizer.zero_grad()
            one.backward()
            if drop is None and epoch:
                for p in prefix.parameters():
                    p.grad = None
            optimizer.step()
            losses.append(one.item())
        if drop is not None:
            drop.step()
    return losses, pairs


@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("loss", [apart, joined, in_parts, normalised])
def test_losses_are_those_behind_a_frozen_prefix(loss: Loss, memory_format: torch.memory_format) -> None:
    live, _ = losses_of(loss, drops=False, memory_format=memory_format)
    rows, pairs = losses_of(loss, drops=True, memory_format=memory_format)
    torch.testing.assert_close(rows, live, rtol=1e-5 if memory_format == torch.channels_last else 0, atol=0)
    # Two epochs on rows: only the samples that are compared when an epoch begins.
    assert pairs.read <= 2 * 4


def test_images_are_named_by_key_in_a_dict() -> None:
    live, _ = losses_of(by_name, dataset=Named, drops=False)
    rows, pairs = losses_of(by_name, dataset=Named, drops=True, input=["a", "b"])
    assert rows == live
    assert pairs.read <= 8


class InAList(Pairs):
    def __getitem__(self, index: int) -> Any:
        one, number, other = super().__getitem__(index)
        return [one, other], number


class InADict(Pairs):
    def __getitem__(self, index: int) -> Any:
        one, number, other = super().__getitem__(index)
        return {"views": {"a": one, "b": (other, number)}}


def in_a_list(model: nn.Module, batch: Batch) -> torch.Tensor:
    one, other = model(torch.cat(batch[0])).chunk(2)
    return (one - other).square().sum() / 8


def in_a_dict(model: nn.Module, batch: Batch) -> torch.Tensor:
    views = batch["views"]
    return (model(views["a"]) - model(views["b"][0])).square().sum() / 8


@pytest.mark.parametrize("size", [2, 3, 8])
@pytest.mark.parametrize(
    ("dataset", "loss", "input"),
    [
        (InAList, in_a_list, [(0, 0), (0, 1)]),
        (InADict, in_a_dict, [("views", "a"), ("views", "b", 0)]),
        (InADict, lambda model, batch: model(batch["views"]["a"]).square().sum(), [("views", "a")]),
    ],
)
def test_images_are_named_by_paths_where_they_lie_within_an_entry(
    dataset: type[Pairs], loss: Loss, input: Any, size: int
) -> None:
    live, _ = losses_of(loss, dataset=dataset, drops=False, batch_size=size)
    rows, pairs = losses_of(loss, dataset=dataset, drops=True, input=input, batch_size=size)
    assert rows == live
    assert pairs.read <= 8


def test_a_list_of_images_is_told_how_to_be_named() -> None:
    model, optimizer, _ = pair_parts()
    hint = r"got 0, a list; for several images of each sample, give input=\[\(0, 0\), \(0, 1\), ...\]"
    with pytest.raises(ValueError, match=hint):
        DropScheduler(model, optimizer, DataLoader(InAList(), batch_size=8))


def pair_parts(**options: Any) -> tuple[Net, torch.optim.Optimizer, DataLoader[Any]]:
    torch.manual_seed(0)
    model = Net()
    return model, torch.optim.SGD(model.parameters(), lr=0.02), DataLoader(Pairs(), batch_size=8, **options)


def trained(drop: DropScheduler, optimizer: torch.optim.Optimizer, loss: Loss = apart) -> list[Batch]:
    batches = []
    for batch in drop.loader:
        one = loss(drop.model, batch)
        optimizer.zero_grad()
        one.backward()
        optimizer.step()
        batches.append(batch)
    return batches


def test_a_sample_that_is_drawn_twice_and_one_that_was_not_read() -> None:
    generator = torch.Generator().manual_seed(3)
    sampler = WeightedRandomSampler(torch.ones(24).tolist(), 40, replacement=True, generator=generator)
    model, optimizer, loader = pair_parts(sampler=sampler)
    drop = DropScheduler(model, optimizer, loader, policy=Fixed({0: 2}), input=[0, 2], cache="fp32")
    pairs = Pairs()
    with torch.no_grad():
        whole = {i: drop.chain.prefix(2).eval()(x) for i, x in enumerate((pairs.first, pairs.second))}
    for _ in range(4):
        for one, number, other in trained(drop, optimizer):
            for image, x in enumerate((one, other)):
                assert isinstance(x, Images)
                if x.standing.rows is not None and x.standing.some is None:
                    torch.testing.assert_close(x.standing.rows, whole[image][number])
                torch.testing.assert_close(x.read(), (pairs.first, pairs.second)[image][number])
    assert int(drop._rows.cache.filled.sum()) == 24


def test_budgets_and_costs_count_all_images_of_a_sample() -> None:
    model, optimizer, loader = pair_parts()
    row, number = 2 * 6 * 4 * 4 * 4, 8
    config = CacheConfig(codec="fp32", budget_bytes=24 * (row + number))
    drop = DropScheduler(model, optimizer, loader, policy=Budget(1.05), epochs=30, input=[0, 2], cache=config)
    forecast = drop.forecast()
    assert forecast.rows[1].bytes == (24 * row, 0, 0)
    trained(drop, optimizer)
    assert drop.step().samples == 24


def test_a_resumed_run_is_the_uninterrupted_one() -> None:
    def losses(stop: int) -> list[float]:
        torch.manual_seed(0)
        model, found, saved = Net(), [], None
        optimizer = torch.optim.SGD(model.parameters(), lr=0.02)
        for epoch in range(4):
            if epoch in (0, stop):
                loader = DataLoader(Pairs(), batch_size=8)
                drop = DropScheduler(model, optimizer, loader, policy=Fixed({1: 2}), input=[0, 2], cache="fp32")
                if saved is not None:
                    drop.load_state_dict(saved)
            for batch in drop.loader:
                loss = joined(model, batch)
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
                found.append(loss.item())
            drop.step()
            saved = drop.state_dict()
            if epoch + 1 == stop:
                drop.close()
        return found

    assert losses(3) == losses(9)


def test_a_step_that_leaves_an_image_out_says_that_no_rows_are_kept() -> None:
    model, optimizer, loader = pair_parts()
    drop = DropScheduler(model, optimizer, loader, policy=Fixed({0: 2}), input=[0, 2])
    with pytest.warns(RuntimeWarning, match=r"all images that input= names must go through the model in each step"):
        trained(drop, optimizer, lambda model, batch: model(batch[0]).square().sum())


def test_random_views_of_pairs() -> None:
    class Jittered(Pairs):
        def __getitem__(self, index: int) -> Any:
            one, number, other = super().__getitem__(index)
            return one + torch.rand(()), number, other + torch.rand(())

    torch.manual_seed(0)
    model = Net()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.02)
    pairs = Jittered()
    loader = DataLoader(pairs, batch_size=8, shuffle=True)
    drop = DropScheduler(model, optimizer, loader, policy=Fixed({0: 2}), input=[0, 2], cache=CacheConfig(views=2))
    for epoch in range(4):
        if epoch == 2:
            pairs.read = 0
        trained(drop, optimizer, joined)
        drop.step()
    # In each epoch four samples are read four times: their images may differ, the rest may not.
    assert pairs.read <= 2 * 4 * 4


@pytest.mark.parametrize("input", [[0, 0], [], [0, None], [[0, 1]], [()], [(0, 1), (0, 1)]])
def test_keys_that_are_not_several(input: Any) -> None:
    with pytest.raises(ValueError, match=r"DropScheduler: input must be a key, or a list of different ones, got \["):
        DropScheduler(*pair_parts(), input=input)


def test_images_of_two_shapes_are_refused() -> None:
    class Cropped(Pairs):
        def __getitem__(self, index: int) -> Any:
            one, number, other = super().__getitem__(index)
            return one, number, other[:, :4, :4]

    model, optimizer, _ = pair_parts()
    with pytest.raises(
        ValueError, match=r"input must name entries of a batch of one shape and dtype, got \[8, 3, 8, 8\], "
    ):
        DropScheduler(model, optimizer, DataLoader(Cropped(), batch_size=8), input=[0, 2])
    with pytest.raises(ValueError, match=r"one shape and dtype, got one tensor"):
        DropScheduler(model, optimizer, DataLoader(data().tensors[0], batch_size=8), input=[0, 1])  # type: ignore[arg-type]


def test_a_store_wants_names_of_pairs(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"CacheConfig: key must name the samples in a store where they have several"):
        DropScheduler(*pair_parts(), input=[0, 2], cache=CacheConfig(store=tmp_path))
    fills = []
    for _ in range(2):
        model, optimizer, loader = pair_parts()
        config = CacheConfig(codec="fp32", store=tmp_path, key=lambda i: f"pair {i}")
        with DropScheduler(model, optimizer, loader, policy=Fixed({0: 2}), input=[0, 2], cache=config) as drop:
            trained(drop, optimizer)
            fills.append(drop.step().fill_flops)
    assert fills[1] * 3 == fills[0]  # the batch by which the second run looks


class Siamese(Net):
    def forward(self, one: torch.Tensor, other: torch.Tensor | None = None) -> torch.Tensor:
        found = super().forward(one)
        return found if other is None else found - super().forward(other)


def test_a_model_that_takes_two_images_at_once_is_refused() -> None:
    _, _, loader = pair_parts()
    model = Siamese()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.02)
    drop = DropScheduler(model, optimizer, loader, policy=Fixed({0: 2}), input=[0, 2])
    with pytest.raises(RuntimeError, match=r"one batch of images in a call, got 2: call it on each, or on torch.cat"):
        trained(drop, optimizer, lambda model, batch: model(batch[0], batch[2]).square().sum())
