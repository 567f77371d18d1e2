"""The state of a module (values, flags, attributes), to be restored and compared."""

from __future__ import annotations

import operator
import random
from collections import deque
from collections.abc import Callable, Iterator, Mapping
from types import FunctionType, MethodType, ModuleType
from typing import Any

import numpy as np
import torch
from torch import nn

#: The attributes of torch.nn.Module itself: parameters, submodules, hooks, the mode.
MODULE_NAMES = frozenset(vars(nn.Module()))

_PLAIN = (int, float, complex, str, bytes, tuple, list, dict, set, frozenset, deque)
_NO_FIELDS = (*_PLAIN, type, nn.Module, torch.Tensor, FunctionType, MethodType, ModuleType)


def version(tensor: torch.Tensor) -> int:
    """Return the number of in-place writes to a tensor; 0 for tensors made in inference mode, which do not count them."""
    return 0 if tensor.is_inference() else tensor._version


def _generator(value: Any) -> tuple[Callable[[], Any], Callable[[Any], Any]] | None:
    """Functions that read and set the state of a random generator; None for anything else."""
    if isinstance(value, torch.Generator):
        return value.get_state, value.set_state
    if isinstance(value, random.Random):
        return value.getstate, value.setstate
    if isinstance(value, np.random.RandomState):
        return value.get_state, value.set_state
    if isinstance(value, np.random.Generator):
        bits = value.bit_generator
        return lambda: bits.state, lambda state: setattr(bits, "state", state)
    return None


def is_mutable(value: Any) -> bool:
    """Return whether a value can change without an attribute being set."""
    return isinstance(value, list | dict | set | deque) or _generator(value) is not None or _fields(value) is not None


def _fields(value: Any) -> dict[str, Any] | None:
    """The attributes of an object that holds values, such as a configuration; None for code, modules and tensors."""
    if isinstance(value, _NO_FIELDS):
        return None
    if type(value).__module__.partition(".")[0] in ("torch", "numpy", "builtins", "random"):
        return None
    found = getattr(value, "__dict__", None)
    return found if isinstance(found, dict) else None


class ModelState:
    """A snapshot of a model, which `restore` restores as often as needed.

    It copies all parameters, buffers and tensor attributes, and the attributes of every module: training flags, hooks,
    submodules, plain values, the contents of lists, dicts and sets, and random generators.
    """

    def __init__(self, model: nn.Module) -> None:
        self._attributes = [(m, dict(m.__dict__)) for m in model.modules()]
        self._moved: set[int | tuple[int, str]] = set()  # ids of values, and (id of a module, attribute)
        self._stored: set[tuple[int, str]] = set()
        self._contents: list[tuple[Any, Any]] = []
        self._tensors: dict[int, tuple[str, torch.Tensor, torch.Tensor, bool]] = {}
        self._versions: dict[int, int] = {}
        self._generators: list[tuple[Any, Any]] = []
        seen: set[int] = set()
        for path, module in model.named_modules():
            for name, value in module.__dict__.items():
                self._take(f"{path}.{name}".lstrip("."), value, seen)

    def _take(self, name: str, value: Any, seen: set[int]) -> None:
        if value is None or isinstance(value, bool | int | float | str) or id(value) in seen:
            return
        if isinstance(value, torch.Tensor):
            self._tensors[id(value)] = (name, value, value.detach().clone(), value.requires_grad)
            self._versions[id(value)] = version(value)
        elif (fields := _fields(value)) is not None:
            seen.add(id(value))
            self._contents.append((value, dict(fields)))
        elif isinstance(value, list | dict | set | deque):
            seen.add(id(value))
            self._contents.append((value, value.copy()))
            parent = name.rpartition(".")[0] if name.endswith(("._parameters", "._buffers")) else name
            for key, item in list(value.items()) if isinstance(value, dict) else enumerate(value):
                self._take(f"{parent}.{key}", item, seen)
        elif (access := _generator(value)) is not None:
            get, put = access
            self._generators.append((put, get()))

    def changes(self, *, parameters: bool) -> dict[str, torch.Tensor]:
        """Return name -> copy of each buffer, tensor attribute and (`parameters`) parameter that has been written to."""
        return {
            name: tensor.detach().clone()
            for key, (name, tensor, _, _) in self._tensors.items()
            if (parameters or not isinstance(tensor, nn.Parameter)) and self._written(key)
        }

    def _written(self, key: int) -> bool:
        # Batch norm updates its running statistics without a new version. Parameters are compared by version alone.
        _, tensor, value, _ = self._tensors[key]
        if version(tensor) != self._versions[key]:
            return True
        return not isinstance(tensor, nn.Parameter) and not torch.equal(tensor.detach(), value)

    def floating(self) -> Iterator[torch.Tensor]:
        """Yield the floating-point parameters, buffers and tensor attributes that can be written to."""
        for _, tensor, _, _ in self._tensors.values():
            if tensor.is_floating_point() and not tensor.is_inference() and 0 not in tensor.stride():
                yield tensor

    def moving(self) -> frozenset[tuple[int, str]]:
        """Return (id of a module, name) of each attribute that had changed when the state was restored."""
        values = {(id(m), name) for m, before in self._attributes for name, v in before.items() if id(v) in self._moved}
        values |= {key for key in self._moved if isinstance(key, tuple)}
        return frozenset((module, name) for module, name in values if name not in MODULE_NAMES)

    def stored(self) -> frozenset[tuple[int, str]]:
        """Return (id of a module, name) of each attribute that held a new tensor, of one dimension or more, when the state
        was restored: those that forward stores for its caller."""
        return frozenset(self._stored)

    def restore(self, *, noting: bool = True) -> None:
        """Restore everything. Tensors that were not written to are not touched.

        noting: count tensors that were written to as `moving`.
        """
        for module, before in self._attributes:
            now = module.__dict__
            if _same_items(now, before):
                continue
            for name, value in now.items():
                if isinstance(value, torch.Tensor) and value.dim() and before.get(name) is not value:
                    self._stored.add((id(module), name))
            for name in [name for name in now if name not in before]:
                del now[name]
                self._moved.add((id(module), name))
            for name, value in before.items():
                if name not in now or now[name] is not value:
                    now[name] = value
                    self._moved.add((id(module), name))
        for content, copy in self._contents:
            if refill(content, copy):
                self._moved.add(id(content))
        for put, state in self._generators:
            put(state)
        with torch.no_grad():
            for key, (_, tensor, value, requires_grad) in self._tensors.items():
                if self._written(key):
                    if noting:
                        self._moved.add(key)
                    tensor.copy_(value)
                    self._versions[key] = version(tensor)
                if tensor.requires_grad is not requires_grad:
                    tensor.requires_grad_(requires_grad)


def contents_of(value: Any) -> Any:
    """Return a copy of a list, dict, set, deque or an object's attributes, for `refill`; None for anything else."""
    if (fields := _fields(value)) is not None:
        return dict(fields)
    return value.copy() if isinstance(value, list | dict | set | deque) else None


def refill(content: Any, copy: Any) -> bool:
    """Restore the contents of a list, dict, set, deque or object, and return whether they had changed."""
    if isinstance(content, dict) and not content and not copy:
        return False  # most of a model's dictionaries: hooks
    content = content if (fields := _fields(content)) is None else fields
    if isinstance(content, dict):
        same = _same_items(content, copy)
    elif isinstance(content, set):
        same = content == copy
    elif isinstance(content, list | deque):
        same = len(content) == len(copy) and all(a is b for a, b in zip(content, copy, strict=True))
    else:
        return False
    if same:
        return False
    content.clear()
    if isinstance(content, dict | set):
        content.update(copy)
    else:
        content.extend(copy)
    return True


def _same_items(one: Mapping[str, Any], other: Mapping[str, Any]) -> bool:
    """Whether two dictionaries hold the same objects under the same keys."""
    if one.keys() != other.keys():
        return False
    # In the same order, as nearly always, the comparison runs in C.
    return all(map(operator.is_, one.values(), other.values())) or all(one[key] is other[key] for key in other)


def flatten(value: Any, path: str = "") -> Iterator[tuple[str, Any]]:
    """Yield (path, leaf) of a nested output of tuples, lists, dicts, dataclasses and other objects."""
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
    """The value of an attribute at one moment, for comparison with its later value.

    Args:
        value: the attribute's value.
        since: description of the moment.
        writes: an in-place write to a floating-point tensor counts as a change.
        depth: depth to which objects inside objects are compared, as one may contain itself.
    """

    def __init__(self, value: Any, *, since: str = "the model was split", writes: bool = False, depth: int = 2) -> None:
        self.value = value
        self.since = since
        self.version: int | None = None
        self.items: tuple[Mark, ...] = ()
        self.constant: bool
        self.keys: tuple[Any, ...] = ()
        self.fields: Mark | None = None  # the attributes of an object
        if isinstance(value, torch.Tensor) and (writes or not value.is_floating_point()):
            self.version = version(value)
        elif isinstance(value, dict):
            self.keys = tuple(value)
            self.items = tuple(Mark(item, writes=writes, depth=depth) for item in value.values())
        elif isinstance(value, list | tuple | deque):
            self.items = tuple(Mark(item, writes=writes, depth=depth) for item in value)
        elif isinstance(value, np.ndarray | set):
            self.value = value.copy()
        elif depth and (fields := _fields(value)) is not None:
            self.fields = Mark(fields, writes=writes, depth=depth - 1)
        self.state = repr(access[0]()) if (access := _generator(value)) is not None else None
        #: Whether the same object always has the same value.
        self.constant = not is_mutable(value) and not isinstance(value, torch.Tensor | np.ndarray)
        self.constant = self.constant and all(item.constant for item in self.items)
        self.text = _text(value)

    def holds(self, now: Any) -> bool:
        """Return whether the value has not changed."""
        was = self.value
        if isinstance(was, torch.Tensor):
            # The graphs share floating-point tensors, whose values the proof changes. Others may have become constants.
            return now is was and (self.version is None or version(now) == self.version)
        if isinstance(was, np.ndarray):
            return isinstance(now, np.ndarray) and np.array_equal(was, now)
        if type(now) is not type(was):
            return False
        if (access := _generator(now)) is not None:
            return now is was and repr(access[0]()) == self.state
        if isinstance(was, dict):
            return tuple(now) == self.keys and all(m.holds(v) for m, v in zip(self.items, now.values(), strict=True))
        if isinstance(was, list | tuple | deque):
            return len(now) == len(self.items) and all(m.holds(v) for m, v in zip(self.items, now, strict=True))
        if self.fields is not None:
            return now is was and self.fields.holds(vars(now))
        return now is was or (isinstance(was, int | float | complex | str | bytes | set) and bool(now == was))

    def told(self, now: Any) -> str:
        """Return the change in words: 'was 1.0 when the model was split, and is 0.5'."""
        text = _text(now)
        if text == self.text:
            return f"has changed since {self.since}"
        return f"was {self.text} when {self.since}, and is {text}"


def _text(value: Any) -> str:
    plain = int | float | complex | str | bytes | None
    if isinstance(value, torch.Tensor):
        return f"a tensor {list(value.shape)}"
    if isinstance(value, plain):
        return repr(value)
    if isinstance(value, list | tuple | set) and len(value) <= 8 and all(isinstance(item, plain) for item in value):
        return repr(value)
    return f"a {type(value).__name__}"
