"""What a module holds beside its code: values, flags and attributes, to put back and to compare."""

from __future__ import annotations

import random
from collections import deque
from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from torch import nn


def version(tensor: torch.Tensor) -> int:
    """The number of in-place writes to a tensor; tensors made in inference mode do not count theirs."""
    return 0 if tensor.is_inference() else tensor._version


class ModelState:
    """The state of a model at one moment, which `restore` puts back as often as needed.

    It holds copies of all parameters, buffers and tensor attributes, and the attributes of every module: training
    flags, hooks, submodules, plain values, the content of lists, dicts and sets, and random generators.
    """

    def __init__(self, model: nn.Module) -> None:
        self._attributes = [(m.__dict__, dict(m.__dict__)) for m in model.modules()]
        self._contents: list[tuple[Any, Any]] = []
        self._tensors: dict[int, tuple[str, torch.Tensor, torch.Tensor, bool]] = {}
        self._versions: dict[int, int] = {}
        self._generators: list[tuple[Any, Any]] = []
        seen: set[int] = set()
        for path, module in model.named_modules():
            for name, value in module.__dict__.items():
                self._take(f"{path}.{name}".lstrip("."), value, seen)

    def _take(self, name: str, value: Any, seen: set[int]) -> None:
        if id(value) in seen:
            return
        if isinstance(value, torch.Tensor):
            self._tensors[id(value)] = (name, value, value.detach().clone(), value.requires_grad)
            self._versions[id(value)] = version(value)
        elif isinstance(value, list | dict | set | deque):
            seen.add(id(value))
            self._contents.append((value, value.copy()))
            parent = name.rpartition(".")[0] if name.endswith(("._parameters", "._buffers")) else name
            for key, item in list(value.items()) if isinstance(value, dict) else enumerate(value):
                self._take(f"{parent}.{key}", item, seen)
        elif isinstance(value, torch.Generator):
            self._generators.append((value.set_state, value.get_state()))
        elif isinstance(value, random.Random):
            self._generators.append((value.setstate, value.getstate()))
        elif isinstance(value, np.random.Generator):
            bits = value.bit_generator
            self._generators.append((lambda state, bits=bits: setattr(bits, "state", state), bits.state))
        elif isinstance(value, np.random.RandomState):
            self._generators.append((value.set_state, value.get_state()))

    def changes(self) -> dict[str, torch.Tensor]:
        """Copies of the tensors that have been written to since, by name."""
        return {
            name: tensor.detach().clone() for key, (name, tensor, _, _) in self._tensors.items() if self._written(key)
        }

    def _written(self, key: int) -> bool:
        # Batch norm moves its running statistics without a new version; a parameter is compared by version alone.
        _, tensor, value, _ = self._tensors[key]
        if version(tensor) != self._versions[key]:
            return True
        return not isinstance(tensor, nn.Parameter) and not torch.equal(tensor.detach(), value)

    def floating(self) -> Iterator[torch.Tensor]:
        """The parameters, buffers and tensor attributes with floating-point values that can be written to."""
        for _, tensor, _, _ in self._tensors.values():
            if tensor.is_floating_point() and not tensor.is_inference() and 0 not in tensor.stride():
                yield tensor

    def restore(self) -> None:
        """Put everything back. Tensors that were not written to are not touched."""
        for now, before in self._attributes:
            for name in [name for name in now if name not in before]:
                del now[name]
            for name, value in before.items():
                if name not in now or now[name] is not value:
                    now[name] = value
        for content, copy in self._contents:
            _refill(content, copy)
        for put, state in self._generators:
            put(state)
        with torch.no_grad():
            for key, (_, tensor, value, requires_grad) in self._tensors.items():
                if self._written(key):
                    tensor.copy_(value)
                    self._versions[key] = version(tensor)
                if tensor.requires_grad is not requires_grad:
                    tensor.requires_grad_(requires_grad)


def _refill(content: Any, copy: Any) -> None:
    if isinstance(content, dict):
        same = content.keys() == copy.keys() and all(content[key] is copy[key] for key in copy)
    elif isinstance(content, set):
        same = content == copy
    else:
        same = len(content) == len(copy) and all(a is b for a, b in zip(content, copy, strict=True))
    if same:
        return
    content.clear()
    if isinstance(content, dict | set):
        content.update(copy)
    else:
        content.extend(copy)


def flatten(value: Any, path: str = "") -> Iterator[tuple[str, Any]]:
    """The leaves of a nested output with their paths: tuples, lists, dicts, dataclasses and objects of such."""
    if isinstance(value, dict):
        for key in value:
            yield from flatten(value[key], f"{path}[{key!r}]")
    elif isinstance(value, tuple | list):
        for i, item in enumerate(value):
            yield from flatten(item, f"{path}[{i}]")
    elif not isinstance(value, torch.Tensor | type) and hasattr(value, "__dict__") and vars(value):
        for name, item in vars(value).items():
            yield from flatten(item, f"{path}.{name}")
    else:
        yield path, value


class Mark:
    """The value of an attribute at one moment, to be compared with what it is later."""

    def __init__(self, value: Any) -> None:
        self.value = value
        self.version: int | None = None
        self.items: tuple[Mark, ...] = ()
        self.keys: tuple[Any, ...] = ()
        if isinstance(value, torch.Tensor):
            self.version = version(value)
        elif isinstance(value, dict):
            self.keys = tuple(value)
            self.items = tuple(Mark(item) for item in value.values())
        elif isinstance(value, list | tuple):
            self.items = tuple(Mark(item) for item in value)
        elif isinstance(value, np.ndarray | set):
            self.value = value.copy()
        self.text = _text(value)

    def holds(self, now: Any) -> bool:
        """Whether the value is still the one that was marked."""
        was = self.value
        if isinstance(was, torch.Tensor):
            return now is was and version(now) == self.version
        if isinstance(was, np.ndarray):
            return isinstance(now, np.ndarray) and np.array_equal(was, now)
        if type(now) is not type(was):
            return False
        if isinstance(was, dict):
            return tuple(now) == self.keys and all(m.holds(v) for m, v in zip(self.items, now.values(), strict=True))
        if isinstance(was, list | tuple):
            return len(now) == len(self.items) and all(m.holds(v) for m, v in zip(self.items, now, strict=True))
        return now is was or (isinstance(was, int | float | complex | str | bytes | set) and bool(now == was))

    def told(self, now: Any) -> str:
        """How it differs from what it is now, in words: 'was 1.0 when the model was split, and is 0.5'."""
        text = _text(now)
        if text == self.text:
            return "has changed since the model was split"
        return f"was {self.text} when the model was split, and is {text}"


def _text(value: Any) -> str:
    if isinstance(value, torch.Tensor):
        return f"a tensor {list(value.shape)}"
    if isinstance(value, int | float | complex | str | bytes | None):
        return repr(value)
    text = repr(value) if isinstance(value, list | tuple | dict | set) else f"a {type(value).__name__}"
    return text if len(text) <= 40 else f"a {type(value).__name__}"
