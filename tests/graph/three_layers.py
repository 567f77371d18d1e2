"""A network of three layers, and its frozen prefix."""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor, nn

from learndrop_ext.graph.chain import Chain, split_layers
from learndrop_ext.graph.freeze import FrozenPrefix


def network() -> nn.Sequential:
    """Three layers, starting at 0, 3 and 7."""
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(3, 4, 3, padding=1),
        nn.BatchNorm2d(4),
        nn.ReLU(inplace=True),
        nn.Conv2d(4, 4, 3, padding=1),
        nn.BatchNorm2d(4),
        nn.ReLU(inplace=True),
        nn.Flatten(),
        nn.Linear(256, 5),
    )


def images(count: int = 4) -> Tensor:
    return torch.randn(count, 3, 8, 8, generator=torch.Generator().manual_seed(1))


def split(model: nn.Module) -> Chain:
    return split_layers(model, images(2))


def copied(state: dict[str, Any]) -> dict[str, Any]:
    return copy.deepcopy(state)


def frozen(model: nn.Module, k: int, optimizer: torch.optim.Optimizer | None = None, **options: Any) -> FrozenPrefix:
    return FrozenPrefix(model, split(model), k, optimizer or torch.optim.SGD(model.parameters(), lr=0.1), **options)


def add(model: nn.Module) -> None:
    with torch.no_grad():
        model[3].weight.add_(1)
