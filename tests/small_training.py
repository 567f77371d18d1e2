"""A small network, data and loop that the scheduler's tests share."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from torch.utils.data import DataLoader, Dataset, TensorDataset

from learndrop_ext import DropScheduler
from learndrop_ext.forward.images import Images


class Net(nn.Module):
    """Three convolutions and a classifier: four layers."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, 4, 3, padding=1)
        self.bn1 = nn.BatchNorm2d(4)
        self.conv2 = nn.Conv2d(4, 6, 3, padding=1, stride=2)
        self.bn2 = nn.BatchNorm2d(6)
        self.conv3 = nn.Conv2d(6, 8, 3, padding=1)
        self.fc = nn.Linear(8, 5)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.bn1(self.conv1(x)).relu()
        x = self.bn2(self.conv2(x)).relu()
        x = self.conv3(x).relu()
        return self.fc(x.mean((2, 3)))


def data(count: int = 24) -> TensorDataset:
    generator = torch.Generator().manual_seed(0)
    return TensorDataset(
        torch.randn(count, 3, 8, 8, generator=generator), torch.randint(0, 5, (count,), generator=generator)
    )


def parts(dataset: Dataset[Any] | None = None, **options: Any) -> tuple[Net, torch.optim.Optimizer, DataLoader[Any]]:
    torch.manual_seed(0)
    model = Net()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
    settings: dict[str, Any] = {
        "batch_size": 8,
        "shuffle": True,
        "generator": torch.Generator().manual_seed(1),
    } | options
    return model, optimizer, DataLoader(dataset if dataset is not None else data(), **settings)


def epoch(drop: DropScheduler, optimizer: torch.optim.Optimizer) -> list[float]:
    losses = []
    drop._base.train()
    for x, y in drop.loader:
        loss = nn.functional.cross_entropy(drop.model(x), y)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


def called(drop: DropScheduler, x: torch.Tensor) -> tuple[Any, torch.Tensor]:
    """What the model makes of a batch of `drop.loader`, and what its live layers got: images, or after a drop rows."""
    if not drop.prefix:
        return drop.model(x), x
    output = drop.model(x)
    if not isinstance(x, Images):  # no rows are kept
        with torch.no_grad():
            return output, drop.chain.prefix(drop.prefix)(x)
    if x.pixels is None and x.standing.at == drop.prefix:
        return output, x.standing.rows.clone()
    level, at = drop._rows.locate(x.standing.ids)
    if level == drop.prefix:
        return output, drop._rows.gather(at, level).clone()
    with torch.no_grad():  # no rows are kept
        return output, drop.chain.prefix(drop.prefix)(x.read())


class Jittered(Dataset[Any]):
    """Another image at each reading."""

    def __init__(self) -> None:
        self.data = data()

    def __len__(self) -> int:
        return len(self.data)

    def __getitem__(self, index: int) -> tuple[torch.Tensor, torch.Tensor]:
        x, y = self.data[index]
        return x + torch.rand(()), y


def prefix_rows(drop: DropScheduler, k: int, images: torch.Tensor | None = None) -> torch.Tensor:
    """What the first k layers make of images, or of the small data."""
    with torch.no_grad():
        return drop.chain.prefix(k).eval()(data().tensors[0] if images is None else images)
