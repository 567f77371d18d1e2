"""One forward of the user's model, recorded: which operations ran, in which module calls, on which storages.

A value is *of the images* if it was computed from them; the others come from parameters, buffers and constants alone.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterator
from dataclasses import dataclass, fields, is_dataclass
from itertools import accumulate
from typing import Any

import torch
from torch import nn
from torch.nn.modules.module import register_module_forward_hook, register_module_forward_pre_hook
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry


@dataclass
class ModuleCall:
    """One call of a module, from operation `begin` (not included) to operation `end` (included).

    Args:
        path: name of the module in the model.
        module: the module.
        begin, end: number of operations done before the call and after it.
        depth: number of calls around it.
        order: number of calls that ended before it.
        output: what it returned.
    """

    path: str
    module: nn.Module
    begin: int
    depth: int
    end: int = -1
    order: int = -1
    output: Any = None

    def around(self, other: ModuleCall) -> bool:
        """Return whether `other` is a call within this one."""
        return self.depth < other.depth and self.begin <= other.begin and other.order < self.order


class Recording(TorchDispatchMode):
    """The operations and module calls of one forward.

    Attributes:
        calls: all module calls, in the order in which they began.
        now: number of operations.
        escape: the first operation that gave a value of the images to Python; `now` if there is none.
        made, last: operation that made a storage of the images, and the last one that used it.
        written: last operation that wrote into a storage of the images.
        uses: operations that used a parameter together with a value of the images, by the parameter's name.
        flops: FLOPs of each operation that has some.
        storing: modules with an attribute that holds a tensor of the images.
    """

    def __init__(self, model: nn.Module, image: torch.Tensor) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.calls: list[ModuleCall] = []
        self.now = 0
        self.escape = -1
        self.made: dict[int, int] = {_storage(image): 0}
        self.last: dict[int, int] = {}
        self.written: dict[int, int] = {}
        self.uses: dict[str, list[int]] = defaultdict(list)
        self.flops: dict[int, int] = {}
        self.storing: frozenset[nn.Module] = frozenset()
        self._model = model
        self._names = {module: name for name, module in model.named_modules()}
        self._stack: list[ModuleCall] = []
        self._ended = 0
        # storage -> names of the parameters that a value which is not of the images was computed from
        self._from: dict[int, frozenset[str]] = defaultdict(frozenset)
        for name, parameter in model.named_parameters():
            self._from[_storage(parameter)] |= {name}
        self._kept: list[Any] = [image]  # so that no storage is used again

    def run(self, call: Callable[[], Any]) -> None:
        """Record `call()`, which calls the model."""
        hooks = [register_module_forward_pre_hook(self._begin), register_module_forward_hook(self._end)]
        try:
            with self:
                out = call()
        finally:
            for hook in hooks:
                hook.remove()
        self._kept.append(out)
        for tensor in tensors_of(out):
            self._used(_storage(tensor), self.now + 1)
        if self.escape < 0:
            self.escape = self.now
        self.storing = frozenset(module for module in self._names if self._stores(module))

    def alive(self) -> list[int]:
        """Return how many storages of the images are needed later, after each number of operations: [now + 1]."""
        steps = [0] * (self.now + 3)
        for storage, made in self.made.items():
            steps[made] += 1
            steps[max(made, self.last.get(storage, made))] -= 1
        return list(accumulate(steps))[: self.now + 1]

    def shared(self, names: set[str]) -> list[int]:
        """Return how many of the parameters `names` are used before and after each number of operations: [now + 1]."""
        steps = [0] * (self.now + 3)
        for name in names & self.uses.keys():
            steps[self.uses[name][0]] += 1
            steps[self.uses[name][-1]] -= 1
        return list(accumulate(steps))[: self.now + 1]

    def of_images(self, tensor: torch.Tensor) -> bool:
        """Return whether a tensor was computed from the images."""
        return _storage(tensor) in self.made

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        out = func(*args, **kwargs)
        self.now += 1
        ins = [a for a in pytree.tree_leaves((args, kwargs)) if isinstance(a, torch.Tensor)]
        outs = [a for a in pytree.tree_leaves(out) if isinstance(a, torch.Tensor)]
        self._kept += outs
        storages = {_storage(a) for a in ins}
        names = frozenset[str]().union(*(self._from[s] for s in storages if s not in self.made))
        if any(s in self.made for s in storages):
            for storage in storages & self.made.keys():
                self._used(storage, self.now)
            for name in names:
                self.uses[name].append(self.now)
            for tensor in outs:
                self.made.setdefault(_storage(tensor), self.now)
            for argument, value in zip(func._schema.arguments, args, strict=False):
                if argument.alias_info is not None and argument.alias_info.is_write and isinstance(value, torch.Tensor):
                    self.written[_storage(value)] = self.now
            if not outs and self.escape < 0:
                self.escape = self.now - 1
        else:
            for tensor in outs:
                self._from[_storage(tensor)] |= names
        count = flop_registry.get(func._overloadpacket)
        if count is not None:
            self.flops[self.now] = int(count(*args, **kwargs, out_val=out))
        return out

    def _stores(self, module: nn.Module) -> bool:
        values = (value for name, value in vars(module).items() if name not in ("_parameters", "_buffers", "_modules"))
        return any(_storage(t) in self.made for value in values for t in _near(value, 2) if t.layout == torch.strided)

    def _used(self, storage: int, when: int) -> None:
        if storage in self.made:
            self.last[storage] = when

    def _begin(self, module: nn.Module, _: Any) -> None:
        if module in self._names:
            self.calls.append(ModuleCall(self._names[module], module, self.now, len(self._stack)))
            self._stack.append(self.calls[-1])

    def _end(self, module: nn.Module, _: Any, output: Any) -> None:
        if module in self._names:
            call = self._stack.pop()
            call.end, call.order, call.output = self.now, self._ended, output
            self._ended += 1


def tensors_of(value: Any, _within: tuple[int, ...] = ()) -> Iterator[torch.Tensor]:
    """Yield the tensors in a value of nested containers, mappings, dataclasses and other objects with attributes, such as
    those of torch.distributions."""
    if isinstance(value, torch.Tensor):
        yield value
    elif isinstance(value, dict):
        for item in value.values():
            yield from tensors_of(item, _within)
    elif isinstance(value, list | tuple | set):
        for item in value:
            yield from tensors_of(item, _within)
    elif is_dataclass(value) and not isinstance(value, type):
        for item in fields(value):
            yield from tensors_of(getattr(value, item.name, None), _within)
    elif hasattr(value, "__dict__") and not isinstance(value, type | nn.Module) and id(value) not in _within:
        for item in vars(value).values():
            yield from tensors_of(item, (*_within, id(value)))


def _near(value: Any, depth: int) -> Iterator[torch.Tensor]:
    """Yield the tensors in a value, in its items and attributes, and in theirs."""
    if isinstance(value, torch.Tensor):
        yield value
    elif depth and not isinstance(value, type | nn.Module):
        items = value.values() if isinstance(value, dict) else value if isinstance(value, list | tuple | set) else None
        for item in getattr(value, "__dict__", {}).values() if items is None else items:
            yield from _near(item, depth - 1)


def _storage(tensor: torch.Tensor) -> int:
    return int(tensor.untyped_storage()._cdata)
