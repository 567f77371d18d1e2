"""Freezes a prefix, and checks that its weights and attributes do not change."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import nn

from learndrop_ext.graph.chain import Chain
from learndrop_ext.graph.watch import Attributes
from learndrop_ext.ops.transfer import crc32c


class FrozenPrefix:
    """The first k layers of a model while they are dropped.

    Nothing is attached to the model, so a copy of it is an ordinary model: the optimizer skips parameters without a
    gradient, and the modules are put into eval mode at each step (`hold_eval`).

    Rows are valid only for the weights and buffers they were computed with: `first_change` and `first_changed_value` name a
    layer that has changed.

    Args:
        model: the whole model.
        chain: its layers.
        k: number of frozen layers.
        optimizer: the user's optimizer.
        before: the shorter prefix that was frozen until now.
    """

    def __init__(
        self,
        model: nn.Module,
        chain: Chain,
        k: int,
        optimizer: torch.optim.Optimizer,
        *,
        before: FrozenPrefix | None = None,
    ) -> None:
        self.k = k
        self._model = model
        self.optimizer = optimizer
        modules = prefix_modules(model, chain, k)
        self._modes: dict[nn.Module, bool] = {module: module.training for module in modules}
        self._modules = tuple(modules)
        self._root_mode: bool = model.training
        if before is not None:
            self._modes |= before._modes
            self._root_mode = before._root_mode
        self._chain = chain
        self._slots = tuple(_slots(model, chain, k))  # (layer, dictionary that holds it, name) of each tensor
        held = _held(optimizer)
        self._asleep = tuple(  # parameters that did not train when they were dropped, with their requires_grad
            (layer, owner, name, owner[name].requires_grad)
            for layer, owner, name in self._slots
            if isinstance(owner[name], nn.Parameter) and not (owner[name].requires_grad and id(owner[name]) in held)
        )
        self._seen: list[tuple[torch.Tensor | None, int, int]] = []
        self._checksums: list[int] = []
        inside = set(chain.prefix(k).modules())
        self._called = tuple((name, module) for name, module in model.named_modules() if module in inside)
        self._attributes: Attributes
        for parameter in chain.prefix(k).parameters():
            parameter.grad = None
        self.accept()
        self.hold_eval()

    def hold_eval(self) -> None:
        """Put the frozen modules into eval mode again, in case of `model.train()`."""
        for module in self._modules:
            if module.training:  # nn.Module.__setattr__ costs 50 times as much as reading
                module.training = False

    def accept(self) -> None:
        """Accept the weights, buffers and attributes as they are now."""
        self._slots = tuple(_slots(self._model, self._chain, self.k))
        self._seen = [_identity(owner.get(name)) for _, owner, name in self._slots]
        self._checksums = [_checksum(owner.get(name)) for _, owner, name in self._slots]
        self._attributes = Attributes(self._called, self._chain.moving, since="its rows were computed")

    def first_changed_attribute(self) -> str | None:
        """Say which attribute of a frozen module (a temperature, a flag, a tensor that is not a buffer) has changed, or
        return None. Attributes that forward itself changes are not compared."""
        return self._attributes.moved()

    def attributes_as_accepted(self) -> contextlib.AbstractContextManager[bool]:
        """Restore the accepted attributes inside; gives False if one that was changed in place cannot be restored."""
        return self._attributes.put_back()

    def first_change(self) -> str | None:
        """Return the name of the first layer with a tensor that was written to or replaced, or None. Compares version
        counters and addresses, which is cheap, but misses writes through `.data`."""
        # As `_identity`, without a call and a tuple for each of some hundred tensors at each step.
        for (layer, owner, name), (tensor, address, writes) in zip(self._slots, self._seen, strict=True):
            if owner.get(name) is not tensor or (
                tensor is not None and (tensor._version != writes or tensor.data_ptr() != address)
            ):
                return layer
        return None

    def first_changed_value(self) -> str | None:
        """Return the name of the first layer with other values than those accepted, or None.

        If there is none, tensors that were written to with their old values count as unchanged.
        """
        for (layer, owner, name), checksum in zip(self._slots, self._checksums, strict=True):
            if _checksum(owner.get(name)) != checksum:
                return layer
        self._seen = [_identity(owner.get(name)) for _, owner, name in self._slots]
        return None

    def first_woken(self) -> str | None:
        """Return the name of the first layer with a parameter that did not train when it was dropped and has been set to
        train since, by `requires_grad_(True)` or by adding it to the optimizer; or None."""
        held = _held(self.optimizer)
        for layer, owner, name, asked in self._asleep:
            parameter = owner.get(name)
            if isinstance(parameter, nn.Parameter) and parameter.requires_grad and (not asked or id(parameter) in held):
                return layer
        return None

    def release(self) -> None:
        """Give the modules the model's mode again, or the modes they had if the model's has not changed."""
        training = self._model.training
        for module, before in self._modes.items():
            module.training = before if training == self._root_mode else training


def prefix_modules(model: nn.Module, chain: Chain, k: int) -> list[nn.Module]:
    """Return the modules of the first k layers: the chain's, and those of the model that are entirely in the prefix."""
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
    """Return the device of all parameters of a model.

    Raises:
        TypeError: the model is not a module.
        ValueError: it has no parameters, or has them on several devices.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"DropScheduler: model must be a torch.nn.Module, got {type(model).__name__}")
    devices = {p.device for p in model.parameters()}
    if len(devices) != 1:
        found = ", ".join(sorted(map(str, devices))) or "no parameters"
        raise ValueError(f"DropScheduler: model must have its parameters on one device, got {found}")
    return devices.pop()


def check_optimizer(optimizer: torch.optim.Optimizer, model: nn.Module) -> None:
    """Raise TypeError or ValueError for an optimizer with none of the model's parameters."""
    if not isinstance(optimizer, torch.optim.Optimizer):
        raise TypeError(f"DropScheduler: optimizer must be a torch.optim.Optimizer, got {type(optimizer).__name__}")
    held = _held(optimizer)
    own = list(model.parameters())
    if not any(id(p) in held for p in own):
        raise ValueError(f"DropScheduler: optimizer must hold the model's parameters, got none of its {len(own)}")


def _held(optimizer: torch.optim.Optimizer) -> set[int]:
    return {id(p) for group in optimizer.param_groups for p in group["params"]}


def _slots(model: nn.Module, chain: Chain, k: int) -> Iterator[tuple[str, Mapping[str, Any], str]]:
    """(layer, dictionary of the owning module, name) of each tensor in the first k layers."""
    owners: dict[int, tuple[Mapping[str, Any], str]] = {}
    for module in model.modules():
        for held in (module._parameters, module._buffers, vars(module)):  # a graph may hold a plain tensor too
            for name, tensor in held.items():
                if isinstance(tensor, torch.Tensor):
                    owners.setdefault(id(tensor), (held, name))
    done: set[int] = set()
    for i in range(k):
        layer = chain.layer(i)
        for tensor in (*layer.parameters(), *layer.buffers()):
            if id(tensor) in owners and id(tensor) not in done:
                done.add(id(tensor))
                yield (layer.name, *owners[id(tensor)])


def _identity(tensor: torch.Tensor | None) -> tuple[torch.Tensor | None, int, int]:
    """A tensor, its address, and the number of writes to it."""
    return (None, 0, 0) if tensor is None else (tensor, tensor.data_ptr(), tensor._version)


def _checksum(tensor: torch.Tensor | None) -> int:
    """CRC-32C of the values. It misses a change once in 2^32 times."""
    if tensor is None or tensor.numel() == 0:
        return 0
    values = tensor.detach().cpu().contiguous().view(-1).view(torch.uint8)
    return crc32c(values.numpy().data)
