"""The only file that changes the user's model: freezing a prefix, letting it go again, and swapping what is trained."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import nn

from learndrop_ext.graph.chain import Chain

Wrap = Callable[[nn.Module], nn.Module]


class _StaysInEval:
    """Stands in for `module.train` while the module is frozen: `model.train()` passes it by."""

    def __init__(self, module: nn.Module) -> None:
        self.module = module

    def __call__(self, mode: bool = True) -> nn.Module:
        return self.module


@dataclass(frozen=True)
class Frozen:
    """What a freeze changed, so that it can be undone."""

    parameters: tuple[nn.Parameter, ...]
    modules: tuple[nn.Module, ...]


def freeze(model: nn.Module, chain: Chain, k: int) -> Frozen:
    """Freeze the first k layers: no gradients, and eval mode whatever `model.train()` says.

    BatchNorm statistics stay. Frozen parameters keep their place and state in the optimizer; with no gradient, every
    step passes them by.
    """
    parameters = tuple(p for p in chain.prefix(k).parameters() if p.requires_grad)
    for parameter in parameters:
        parameter.requires_grad_(False)
        parameter.grad = None
    modules = tuple(m for m in prefix_modules(model, chain, k) if not isinstance(m.__dict__.get("train"), _StaysInEval))
    for module in modules:
        module.training = False
        module.__dict__["train"] = _StaysInEval(module)
    return Frozen(parameters, modules)


def unfreeze(frozen: Frozen, *, training: bool) -> None:
    """Undo a freeze: the parameters are trained again and the modules follow `model.train()`."""
    for parameter in frozen.parameters:
        parameter.requires_grad_(True)
    for module in frozen.modules:
        module.__dict__.pop("train", None)
        module.training = training


def prefix_modules(model: nn.Module, chain: Chain, k: int) -> list[nn.Module]:
    """The modules of the first k layers: the chain's own, and the model's that hold nothing outside the prefix."""
    inside = {m for i in range(k) for m in chain.layer(i).modules()}
    outside = {m for i in range(k, len(chain)) for m in chain.layer(i).modules()}
    leaves = {m for m in inside if next(m.children(), None) is None} - outside
    found = [m for m in inside if m not in outside]
    for module in model.modules():
        below = [m for m in module.modules() if next(m.children(), None) is None]
        if module not in inside and below and all(m in leaves for m in below):
            found.append(module)
    return found


def device_of(model: nn.Module) -> torch.device:
    """The device of all parameters of a model. Raises TypeError or ValueError where there is none."""
    if not isinstance(model, nn.Module):
        raise TypeError(f"DropScheduler: model must be a torch.nn.Module, got {type(model).__name__}")
    devices = {p.device for p in model.parameters()}
    if len(devices) != 1:
        found = ", ".join(sorted(map(str, devices))) or "no parameters"
        raise ValueError(f"DropScheduler: model must have its parameters on one device, got {found}")
    return devices.pop()


def check_optimizer(optimizer: torch.optim.Optimizer, model: nn.Module) -> None:
    """Raise TypeError or ValueError for an optimizer that holds none of the model's parameters."""
    if not isinstance(optimizer, torch.optim.Optimizer):
        raise TypeError(f"DropScheduler: optimizer must be a torch.optim.Optimizer, got {type(optimizer).__name__}")
    held = {id(p) for group in optimizer.param_groups for p in group["params"]}
    own = list(model.parameters())
    if not any(id(p) in held for p in own):
        raise ValueError(f"DropScheduler: optimizer must hold the model's parameters, got none of its {len(own)}")
