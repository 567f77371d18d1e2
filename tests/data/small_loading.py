"""Numbered images, a scheduler over them, and what its loader gives."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from learndrop_ext import DropScheduler, Fixed
from small_training import called


def data(count: int = 22) -> TensorDataset:
    return TensorDataset(torch.arange(count * 12, dtype=torch.float32).view(count, 3, 2, 2) / 100, torch.arange(count))


def network() -> nn.Sequential:
    """Three layers."""
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(3, 4, 1), nn.ReLU(), nn.Conv2d(4, 4, 1), nn.Flatten(), nn.Linear(16, 30))


def scheduler(loader: DataLoader[Any], **options: Any) -> DropScheduler:
    model = network()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    return DropScheduler(model, optimizer, loader, **({"policy": Fixed({1: 1}), "cache": "fp32"} | options))


def given(drop: DropScheduler, x: torch.Tensor) -> torch.Tensor:
    """Train on a batch, without an optimizer; return what the live layers got."""
    output, got = called(drop, x)
    output.float().mean().backward()
    return got


def labels(loader: Any, drop: DropScheduler | None = None) -> list[list[int]]:
    found = []
    for x, y in loader:
        if drop is not None:
            given(drop, x)
        found.append(y.tolist())
    return found


def drawn(loader: Any, drop: DropScheduler, stop: int | None = None) -> list[tuple[int, torch.Tensor]]:
    """The samples of an epoch that is broken off after `stop` batches, with what the live layers got of each."""
    found = []
    for i, (x, y) in enumerate(loader):
        if i == stop:
            break
        found += list(zip(y.tolist(), given(drop, x), strict=True))
    return found


def assert_rows(found: list[tuple[int, torch.Tensor]], drop: DropScheduler, k: int) -> None:
    """The live layers got the rows behind k layers, or with k = 0 the images."""
    wanted = data().tensors[0]
    if k:
        with torch.no_grad():
            wanted = drop.chain.prefix(k).eval()(wanted)
    for label, row in found:
        torch.testing.assert_close(row, wanted[label])
