"""A task, a network and a loop for the tests of what a loop may do to a run with dropped layers.

The task can be learned: the class of an image is the quarter of it that is bright, so that a result that is wrong
without a word shows as accuracy.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from torch.utils.data import DataLoader, Dataset, TensorDataset

from learndrop_ext import DropScheduler, Fixed

COUNT = 96

#: what a loop does to a batch of images before it calls the model
Change = Callable[[torch.Tensor], torch.Tensor]


def quarters(count: int = COUNT) -> TensorDataset:
    """Noise of which one quarter is brighter: four classes."""
    generator = torch.Generator().manual_seed(0)
    labels = torch.arange(count) % 4
    images = 0.3 * torch.randn(count, 1, 8, 8, generator=generator)
    for image, label in zip(images, labels.tolist(), strict=True):
        top, left = 4 * (label // 2), 4 * (label % 2)
        image[:, top : top + 4, left : left + 4] += 1
    return TensorDataset(images, labels)


def network(seed: int = 0) -> nn.Sequential:
    """Three layers: 0, 3 and 6."""
    torch.manual_seed(seed)
    return nn.Sequential(
        nn.Conv2d(1, 6, 3, padding=1),
        nn.BatchNorm2d(6),
        nn.ReLU(),
        nn.Conv2d(6, 8, 3, padding=1, stride=2),
        nn.BatchNorm2d(8),
        nn.ReLU(),
        nn.Sequential(nn.AdaptiveAvgPool2d(4), nn.Flatten(), nn.Linear(128, 4)),  # for images of any size
    )


def accuracy(model: nn.Module, change: Change = lambda x: x) -> float:
    """Of the whole model, on other images; it is left in train mode."""
    images, labels = (t[:COUNT] for t in quarters(2 * COUNT).tensors)
    model.eval()
    with torch.no_grad():
        right = float((model(change(images)).argmax(1) == labels).float().mean())
    model.train()
    return right


def rows_of(images: torch.Tensor) -> torch.Tensor:
    """The cached rows that stand for a batch of `drop.loader`."""
    rows: torch.Tensor = images.standing.rows  # type: ignore[attr-defined]
    return rows


class Run:
    """A model, its optimizer and a scheduler that drops two of three layers before the third epoch."""

    def __init__(
        self, dataset: Dataset[Any] | None = None, drops: dict[int, int] | None = None, **options: Any
    ) -> None:
        self.model = network()
        self.optimizer: torch.optim.Optimizer = torch.optim.SGD(self.model.parameters(), lr=0.05, momentum=0.9)
        self.user = self.make_loader(dataset)
        self.losses: list[float] = []
        self.drop = self.scheduler({2: 2} if drops is None else drops, **options)

    @staticmethod
    def make_loader(dataset: Dataset[Any] | None = None, **options: Any) -> DataLoader[Any]:
        settings: dict[str, Any] = {"batch_size": 16, "shuffle": True, "generator": torch.Generator().manual_seed(1)}
        return DataLoader(quarters() if dataset is None else dataset, **(settings | options))

    def scheduler(self, drops: dict[int, int], **options: Any) -> DropScheduler:
        return DropScheduler(self.model, self.optimizer, self.user, **({"policy": Fixed(drops)} | options))

    def train_step(self, x: torch.Tensor, y: torch.Tensor) -> float:
        loss = nn.functional.cross_entropy(self.model(x), y)
        self.optimizer.zero_grad()
        loss.backward()
        self.optimizer.step()
        self.losses.append(loss.item())
        return loss.item()

    def epochs(self, count: int = 1, change: Change = lambda x: x) -> Run:
        for _ in range(count):
            self.model.train()
            for x, y in self.drop.loader:
                self.train_step(change(x), y)
            self.drop.step()
        return self


def losses_without_rows(epochs: int, change: Change = lambda x: x) -> list[float]:
    """The losses of a `Run` by hand: from the third epoch on, the first two layers run frozen at each step."""
    model, losses = network(), []
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
    loader = Run.make_loader()
    for epoch in range(epochs):
        model.train()
        if epoch > 1:
            model[:6].eval().requires_grad_(False)
        for x, y in loader:
            loss = nn.functional.cross_entropy(model(change(x)), y)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            losses.append(loss.item())
    return losses


MADE_ANEW = r"drop.loader: the rows are computed again: the weights or buffers of the dropped layer"
