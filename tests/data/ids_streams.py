"""Loaders whose batches carry ids, and the loop over them, that the tests of ids share."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import nn
from torch.utils.data import IterableDataset

from learndrop_ext import DropScheduler, Fixed
from learndrop_ext.data.extras import with_input
from small_training import called, data, parts, prefix_rows

Make = Callable[[torch.Tensor, torch.Tensor, torch.Tensor], Any]


def triple(x: torch.Tensor, y: torch.Tensor, ids: torch.Tensor) -> Any:
    return x, y, ids


class Stream:
    """Batches of the small data with their samples' ids, shuffled anew at each iteration. What it was asked for is noted."""

    def __init__(
        self,
        make: Make = triple,
        *,
        count: int = 24,
        size: int = 8,
        drop_last: bool = False,
        noise: float = 0.0,
        shuffle: bool = True,
    ) -> None:
        self.images, self.labels = data(count).tensors
        self.make = make
        self.size = size
        self.drop_last = drop_last
        self.noise = noise
        self.shuffle = shuffle
        self.iterations = 0
        self.batches = 0
        self.generator = torch.Generator().manual_seed(7)

    def order(self) -> torch.Tensor:
        count = len(self.images)
        return torch.randperm(count, generator=self.generator) if self.shuffle else torch.arange(count)

    def __iter__(self) -> Iterator[Any]:
        self.iterations += 1
        for ids in self.order().split(self.size):
            if len(ids) < self.size and self.drop_last:
                return
            self.batches += 1
            x = self.images[ids]
            yield self.make(x + self.noise * torch.rand(len(ids), 1, 1, 1), self.labels[ids], ids)


class Shards(IterableDataset[Any]):
    """The small data as a stream of samples with string ids."""

    def __iter__(self) -> Iterator[Any]:
        x, y = data().tensors
        for i in range(24):
            yield {"image": x[i], "label": y[i], "__key__": f"shard/{i}"}


def begun(loader: Any, drops: dict[int, int] | None = None, **options: Any) -> tuple[DropScheduler, Any]:
    model, optimizer, _ = parts()
    settings = {"policy": Fixed({1: 2} if drops is None else drops), "cache": "fp32", "ids": 2} | options
    return DropScheduler(model, optimizer, loader, **settings), optimizer


def trained(drop: DropScheduler, optimizer: Any, *, autocast: bool = False) -> list[Any]:
    """The batches of one epoch of training, with what the live layers got in place of the images."""
    batches = []
    drop._base.train()
    for batch in drop.loader:
        x, y = (batch["image"], batch["label"]) if isinstance(batch, dict) else batch[:2]
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            output, got = called(drop, x)
            loss = nn.functional.cross_entropy(output.float(), y % 5)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        batches.append(with_input(batch, "image" if isinstance(batch, dict) else 0, got.clone()))
    return batches


def epochs(drop: DropScheduler, optimizer: Any, count: int, **options: Any) -> list[list[Any]]:
    found = []
    for _ in range(count):
        found.append(trained(drop, optimizer, **options))
        drop.step()
    return found


def ids_in(batches: list[Any]) -> list[int]:
    return [int(i) for batch in batches for i in batch[2]]


def assert_rows(batches: list[Any], drop: DropScheduler, k: int = 2) -> None:
    """The live layers got the rows of each batch's ids, and the loop its labels."""
    rows, labels = prefix_rows(drop, k), data().tensors[1]
    for x, y, ids in batches:
        assert torch.equal(x, rows[ids])
        assert torch.equal(y, labels[ids])


# Training


class OneBuffer(Stream):
    """Every batch in the memory of the one before."""

    buffer = torch.zeros(8, 3, 8, 8)

    def __iter__(self) -> Iterator[Any]:
        for x, y, ids in super().__iter__():
            yield self.buffer.copy_(x), y, ids


def saved(drop: DropScheduler, optimizer: Any) -> dict[str, Any]:
    return {"model": drop._base.state_dict(), "optimizer": optimizer.state_dict(), "drop": drop.state_dict()}


def resumed(loader: Any, state: dict[str, Any], **options: Any) -> tuple[DropScheduler, Any]:
    drop, optimizer = begun(loader, **options)
    drop._base.load_state_dict(state["model"])
    optimizer.load_state_dict(state["optimizer"])
    drop.load_state_dict(state["drop"])
    return drop, optimizer


def no_ids(x: torch.Tensor, y: torch.Tensor, i: torch.Tensor) -> Any:
    return {"image": x, "label": y}
