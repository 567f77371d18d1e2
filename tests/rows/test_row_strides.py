"""Rows keep the strides that the layers behind them were written for: a forward may call view()."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn.functional import cross_entropy, max_pool2d, relu
from torch.utils.data import DataLoader, TensorDataset

from learndrop_ext import DropScheduler, Fixed


class Permuted(nn.Module):
    """Patches as [B, H, W, C], whose memory is that of [B, C, H, W]."""

    def __init__(self) -> None:
        super().__init__()
        self.proj = nn.Conv2d(1, 8, 7, 7)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.proj(x).permute(0, 2, 3, 1)


class Tokens(nn.Module):
    """A vision transformer of any image size: a class token beside the patches, which are viewed as tokens."""

    def __init__(self) -> None:
        super().__init__()
        self.token, self.fc = nn.Parameter(torch.randn(1, 1, 8)), nn.Linear(8, 10)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        token = self.token.expand(len(x), -1, -1)
        return self.fc(torch.cat([token, x.view(len(x), -1, 8)], 1).mean(1))


class Back(nn.Module):
    """Permutes the patches back, where only the strides that they had can be viewed."""

    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(128, 10)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.fc(x.permute(0, 3, 1, 2).view(len(x), 128))


class Patches(nn.Sequential):
    """Patches, and what is made of them."""

    def __init__(self, head: type[nn.Module]) -> None:
        super().__init__(Permuted(), head())


class Digits(nn.Module):
    """Convolution, dropout, pool, view, linear."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1, self.conv2, self.drop = nn.Conv2d(1, 10, 5), nn.Conv2d(10, 20, 5), nn.Dropout2d()
        self.fc = nn.Linear(320, 10)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = relu(max_pool2d(self.conv1(x), 2))
        x = relu(max_pool2d(self.drop(self.conv2(x)), 2))
        return self.fc(x.view(-1, 320))


# model, number of dropped layers, beginnings of their parameters' names, strides of a row
MODELS: list[tuple[Callable[[], nn.Module], int, tuple[str, ...], tuple[int, ...]]] = [
    (lambda: Patches(Tokens), 1, ("0.", "1.token"), (1,)),  # the cut is behind the mean of the tokens
    (lambda: Patches(Back), 1, ("0.",), (4, 1, 16)),
    (Digits, 2, ("conv1.", "conv2."), (64, 8, 1)),
]


def parts(model: nn.Module) -> tuple[torch.optim.Optimizer, DataLoader[Any]]:
    images = torch.randn(64, 1, 28, 28, generator=torch.Generator().manual_seed(1))
    return torch.optim.SGD(model.parameters(), 0.1), DataLoader(TensorDataset(images, torch.arange(64) % 10), 16)


def trained(model: nn.Module, optimizer: torch.optim.Optimizer, loader: Any, *, halves: bool = False) -> list[float]:
    losses = []
    torch.manual_seed(2)
    for x, y in loader:
        x = torch.cat([x[:8], x[8:]]) if halves else x
        loss = cross_entropy(model(x), y)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


@pytest.mark.parametrize("codec", ["fp32", "bf16", "fp16", "uint8"])
@pytest.mark.parametrize(("make", "k", "dropped", "strides"), MODELS)
def test_a_forward_may_view_its_rows(
    make: Callable[[], nn.Module], k: int, dropped: tuple[str, ...], strides: tuple[int, ...], codec: str
) -> None:
    torch.manual_seed(0)
    model = make()
    by_hand = copy.deepcopy(model)
    for name, parameter in by_hand.named_parameters():
        parameter.requires_grad_(not name.startswith(dropped))
    optimizer, loader = parts(by_hand)
    wanted = [trained(by_hand, optimizer, loader) for _ in range(3)]
    optimizer, loader = parts(model)
    with DropScheduler(model, optimizer, loader, policy=Fixed({0: k}), cache=codec) as drop:
        got = []
        for turn in range(3):
            got.append(trained(model, optimizer, drop.loader, halves=turn == 2))
            drop.step()
        assert [record.fill_flops > 0 for record in drop.history] == [False, True, False, False]
        assert drop._rows.cache is not None
        assert drop._rows.cache.gather(torch.arange(2)).stride()[1:] == strides
    if codec == "fp32":
        assert got == wanted
    torch.testing.assert_close(torch.tensor(got), torch.tensor(wanted), rtol=0.02, atol=0.02)
