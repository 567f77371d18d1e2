"""Small models of every kind that can or cannot be narrowed, and a loop."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

EXAMPLE = torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(9))


class Plain(nn.Module):
    """Convolutions with norms, a pool, and a classifier that reads four places of each channel."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(3, 6, 3, padding=1, bias=False), nn.BatchNorm2d(6)
        self.conv2, self.bn2 = nn.Conv2d(6, 8, 3, padding=1), nn.BatchNorm2d(8)
        self.fc1, self.fc2 = nn.Linear(8 * 4, 10), nn.Linear(10, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = nn.functional.max_pool2d(self.bn1(self.conv1(x)).relu(), 2)
        x = nn.functional.max_pool2d(self.bn2(self.conv2(x)).relu(), 2)
        return self.fc2(self.fc1(x.flatten(1)).relu())


class Residual(nn.Module):
    """Two convolutions write the same channels."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 6, 3, padding=1)
        self.inner, self.outer = nn.Conv2d(6, 8, 3, padding=1), nn.Conv2d(8, 6, 3, padding=1)
        self.fc = nn.Linear(6, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x).relu()
        return self.fc((x + self.outer(self.inner(x).relu())).relu().mean((2, 3)))


class Depthwise(nn.Module):
    """A depthwise convolution between two pointwise ones."""

    def __init__(self) -> None:
        super().__init__()
        self.wide, self.deep = nn.Conv2d(3, 8, 1), nn.Conv2d(8, 8, 3, padding=1, groups=8)
        self.norm, self.narrow = nn.BatchNorm2d(8), nn.Conv2d(8, 6, 1)
        self.fc = nn.Linear(6, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = self.norm(self.deep(self.wide(x).relu())).relu()
        return self.fc(self.narrow(x).relu().mean((2, 3)))


class Concat(nn.Module):
    """Two branches side by side, read by one convolution."""

    def __init__(self) -> None:
        super().__init__()
        self.left, self.right = nn.Conv2d(3, 4, 1), nn.Conv2d(3, 6, 3, padding=1)
        self.norm, self.both = nn.BatchNorm2d(10), nn.Conv2d(10, 5, 1)
        self.fc = nn.Linear(5, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = self.norm(torch.cat([self.left(x), self.right(x)], 1)).relu()
        return self.fc(self.both(x).relu().mean((2, 3)))


class Volume(nn.Module):
    """Three dimensions, and one: the image's rows as a signal."""

    def __init__(self) -> None:
        super().__init__()
        self.conv3, self.conv1 = nn.Conv3d(3, 6, (1, 3, 3), padding=(0, 1, 1)), nn.Conv1d(6, 8, 3, padding=1)
        self.norm, self.fc = nn.BatchNorm1d(8), nn.Linear(8, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = self.conv3(x[:, :, None]).relu().mean((2, 4))
        return self.fc(self.norm(self.conv1(x)).relu().mean(2))


MODELS: dict[str, type[nn.Module]] = {cls.__name__: cls for cls in (Plain, Residual, Depthwise, Concat, Volume)}


class Shuffled(nn.Module):
    """Reads its channels in another order than it writes them, by an operation that Torch-Pruning takes for element-wise."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1, self.conv2, self.fc = nn.Conv2d(3, 6, 1), nn.Conv2d(6, 6, 1), nn.Linear(6, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(self.conv2(self.conv1(x).relu().flip(1)).relu().mean((2, 3)))


def mlp() -> nn.Sequential:
    return nn.Sequential(nn.Flatten(), nn.Linear(192, 16), nn.ReLU(), nn.Linear(16, 12), nn.ReLU(), nn.Linear(12, 4))


def made(name: str = "Plain", *, seed: int = 0) -> nn.Module:
    """A model with norms that are not those of a new one."""
    torch.manual_seed(seed)
    model = MODELS[name]()
    for module in model.modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            for tensor in (module.weight.data, module.bias.data, module.running_mean, module.running_var):
                tensor.add_(torch.rand(tensor.shape))
    return model


def train(model: nn.Module, optimizer: torch.optim.Optimizer, *, seed: int, steps: int = 2) -> list[float]:
    """Train on batches of random images; return the losses."""
    generator, losses = torch.Generator().manual_seed(seed), []
    model.train()
    for _ in range(steps):
        x, y = torch.randn(6, 3, 8, 8, generator=generator), torch.randint(0, 4, (6,), generator=generator)
        loss = nn.functional.cross_entropy(model(x.to(next(model.parameters()).dtype)), y)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


def everything(model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Any]:
    """All that a step may change, as copies."""
    return {
        "tensors": {name: tensor.clone() for name, tensor in model.state_dict().items()},
        "strides": {name: tensor.stride() for name, tensor in model.state_dict().items()},
        "gradients": {name: None if p.grad is None else p.grad.clone() for name, p in model.named_parameters()},
        "modes": [module.training for module in model.modules()],
        "shapes": repr(model),
        "hooks": [len(module._forward_hooks) + len(module._forward_pre_hooks) for module in model.modules()],
        "optimizer": {
            name: {key: v.clone() if isinstance(v, Tensor) else v for key, v in optimizer.state[p].items()}
            for name, p in model.named_parameters()
            if p in optimizer.state
        },
        "random": torch.get_rng_state(),
    }


def equal(one: Any, other: Any) -> bool:
    """Whether nested values are equal to the bit."""
    if isinstance(one, dict):
        return one.keys() == other.keys() and all(equal(one[key], other[key]) for key in one)
    if isinstance(one, list | tuple):
        return len(one) == len(other) and all(map(equal, one, other))
    if isinstance(one, Tensor):
        same = isinstance(other, Tensor) and one.dtype == other.dtype and one.shape == other.shape
        return same and bool(((one == other) | ((one != one) & (other != other))).all())
    return type(one) is type(other) and one == other
