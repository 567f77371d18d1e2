"""A forward of the user's model, recorded: which operations ran, in which module calls, on which storages.

A value is *of the images* if it was computed from them; the others come from parameters, buffers and constants alone.
Operations, and the begins and ends of module calls, are numbered.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterator
from dataclasses import dataclass, fields, is_dataclass
from itertools import accumulate
from typing import Any

import torch
from torch import nn
from torch.multiprocessing.reductions import StorageWeakRef
from torch.nn.modules.module import register_module_forward_hook, register_module_forward_pre_hook
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry

from learndrop_ext.forward.images import Form, form_of
from learndrop_ext.preserve import TABLES

#: Stand for random numbers, and for what the model is given beside the images, among the names of parameters.
RANDOM, GIVEN = "random numbers", "the model's other inputs"


@dataclass(frozen=True)
class Passing:
    """A tensor of the images that enters or leaves a module call, after operation number `at`."""

    at: int
    storage: int
    form: Form


@dataclass(eq=False)
class ModuleCall:
    """One call of a module, from operation `begin` to operation `end`.

    entry, exit: its first argument and its output, if they are single tensors of the images. output: what it returned, with
    a `Form` in the place of each tensor. is_plain: whether all tensors in it can be seen, so that others can stand for them.
    sees_images: whether an operation within it used a value of the images.
    """

    path: str
    module: nn.Module
    begin: int
    end: int = -1
    entry: Passing | None = None
    exit: Passing | None = None
    output: Any = None
    is_plain: bool = False
    sees_images: bool = False

    def has_within(self, at: int) -> bool:
        """Return whether operation `at` was the last one at some moment within this call."""
        return self.begin < at < self.end


class Recording(TorchDispatchMode):
    """The operations and module calls of one forward.

    Each tensor that enters or leaves a module is copied on the way, so that its storage is needed later only if the
    forward goes on from what the module was given or has returned, and not from another reference to the same values.
    """

    def __init__(self, model: nn.Module, image: torch.Tensor) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.calls: list[ModuleCall] = []  # of all modules, in the order in which they began
        self.now = 0  # number of operations
        self.escape = -1  # the last one before a value of the images was given to Python; `now` if there is none
        self.made = {_storage(image): 0}  # storage of the images -> operation that made it
        self.last: dict[int, int] = {}  # and the last one that used it
        # By the name of a parameter: operations that used it together with a value of the images.
        self.uses: dict[str, list[int]] = defaultdict(list)
        self.flops: dict[int, int] = {}  # of each operation that has some
        self.storing: frozenset[nn.Module] = frozenset()  # with an attribute that holds a tensor of the images
        self.image = form_of(image)  # what the model itself is given of it
        self._written: dict[int, int] = {}  # last operation that wrote into a storage, or into a copy of it
        self._copy_of: dict[int, int] = {}
        self._model, self._names = model, {module: name for name, module in model.named_modules()}
        self._stack: list[ModuleCall] = []
        # storage -> names of the parameters that a value which is not of the images was computed from
        self._from: dict[int, frozenset[str]] = defaultdict(frozenset)
        for name, parameter in model.named_parameters():
            self._from[_storage(parameter)] |= {name}
        # A storage that is held weakly is freed, but its number is not used again.
        self._held: list[StorageWeakRef] = []

    def run(self, call: Callable[[], Any]) -> None:
        """Record `call()`, which calls the model."""
        hooks: list[Any] = [register_module_forward_pre_hook(self._begin), register_module_forward_hook(self._end)]
        hooks.append(self._model.register_forward_pre_hook(self._note_given, with_kwargs=True))
        try:
            with self:
                out = call()
        finally:
            for hook in hooks:
                hook.remove()
        self.last.update((_storage(tensor), self.now + 1) for tensor in tensors_of(out))
        self.escape = self.now if self.escape < 0 else self.escape
        attributes = ((m, v) for m in self._names for name, v in vars(m).items() if name not in TABLES)
        self.storing = frozenset(
            m for m, value in attributes if any(map(self._is_of_images, tensors_of(value, depth=2)))
        )

    def alive(self) -> list[int]:
        """Return how many storages of the images are needed later, after each number of operations: [now + 1]."""
        return self._open((made, self.last.get(storage, made)) for storage, made in self.made.items())

    def shared(self, names: set[str]) -> list[int]:
        """Return how many of the parameters `names` are used before and after each number of operations: [now + 1]."""
        return self._open((self.uses[name][0], self.uses[name][-1]) for name in names & self.uses.keys())

    def is_written(self, passing: Passing) -> bool:
        """Return whether a later operation writes into a tensor, or into one that stands for it behind a module."""
        return self._written.get(self._root(passing.storage), 0) > passing.at

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        out = func(*args, **kwargs)
        self.now += 1
        outs = [a for a in pytree.tree_leaves(out) if isinstance(a, torch.Tensor)]
        self._held += [StorageWeakRef(a.untyped_storage()) for a in outs]
        ins = {_storage(a) for a in pytree.tree_leaves((args, kwargs)) if isinstance(a, torch.Tensor)}
        names = frozenset[str]().union(*(self._from[s] for s in ins if s not in self.made))
        if torch.Tag.nondeterministic_seeded in func.tags:
            names |= {RANDOM}
        if not ins.isdisjoint(self.made):
            self.last.update((s, self.now) for s in ins if s in self.made)
            for call in self._stack:
                call.sees_images = True
            for name in names:
                self.uses[name].append(self.now)
            for tensor in outs:
                self.made.setdefault(_storage(tensor), self.now)
            for argument, value in zip(func._schema.arguments, args, strict=False):
                if argument.alias_info is not None and argument.alias_info.is_write and isinstance(value, torch.Tensor):
                    self._written[self._root(_storage(value))] = self.now
            if not outs and self.escape < 0:
                self.escape = self.now - 1
        else:
            for tensor in outs:
                self._from[_storage(tensor)] |= names
        if (count := flop_registry.get(func._overloadpacket)) is not None:
            self.flops[self.now] = int(count(*args, **kwargs, out_val=out))
        return out

    def _note_given(self, module: nn.Module, args: Any, kwargs: Any) -> None:
        for tensor in reversed(list(tensors_of((args, kwargs)))):  # of several of the images the first one counts
            if self._is_of_images(tensor):
                self.image = form_of(tensor)
            else:
                self._from[_storage(tensor)] |= {GIVEN}

    def _begin(self, module: nn.Module, args: Any) -> Any:
        if module not in self._names:
            return None
        self.now += 1
        call = ModuleCall(self._names[module], module, self.now)
        self.calls.append(call)
        self._stack.append(call)
        if not args or not self._is_of_images(args[0]):
            return None
        entry, call.entry = self._passed(args[0])
        call.begin = self.now
        return (entry, *args[1:])

    def _end(self, module: nn.Module, _: Any, output: Any) -> Any:
        if module not in self._names:
            return None
        while (call := self._stack.pop()).module is not module:  # a call that was broken off by an error
            self.calls.remove(call)
        self.now += 1
        if _is_dropout(module):
            self.uses[RANDOM].append(self.now)
        if self._is_of_images(output):
            output, call.exit = self._passed(output)
        call.end = self.now
        seen = sum(isinstance(leaf, torch.Tensor) for leaf in pytree.tree_leaves(output))
        call.is_plain = seen == len(list(tensors_of(output)))
        call.output = pytree.tree_map_only(torch.Tensor, form_of, output) if call.is_plain else None
        return output

    def _passed(self, tensor: torch.Tensor) -> tuple[torch.Tensor, Passing]:
        copy = tensor.clone()
        self._copy_of[_storage(copy)] = self._root(_storage(tensor))
        return copy, Passing(self.now, _storage(copy), form_of(tensor))

    def _is_of_images(self, value: Any) -> bool:
        return isinstance(value, torch.Tensor) and value.layout == torch.strided and _storage(value) in self.made

    def _root(self, storage: int) -> int:
        return self._copy_of.get(storage, storage)

    def _open(self, spans: Iterator[tuple[int, int]]) -> list[int]:
        """The number of spans (begin, end) that each number of operations lies in; the end is outside."""
        steps = [0] * (self.now + 3)
        for begin, end in spans:
            steps[begin] += 1
            steps[end] -= 1
        return list(accumulate(steps))[: self.now + 1]


def tensors_of(value: Any, *, depth: int = 6) -> Iterator[torch.Tensor]:
    """Yield the tensors in a value of nested containers, mappings, dataclasses and other objects with attributes, such as
    those of torch.distributions."""
    if isinstance(value, torch.Tensor):
        yield value
    elif depth and not isinstance(value, type | nn.Module):
        if isinstance(value, dict):
            items: Any = value.values()
        elif isinstance(value, list | tuple | set):
            items = value
        elif is_dataclass(value):
            items = [getattr(value, field.name, None) for field in fields(value)]
        else:
            items = getattr(value, "__dict__", {}).values()
        for item in items:
            yield from tensors_of(item, depth=depth - 1)


def _is_dropout(module: nn.Module) -> bool:
    kind = type(module).__name__
    known = isinstance(module, nn.modules.dropout._DropoutNd) or kind == "StochasticDepth"
    return known or "Dropout" in kind or "DropPath" in kind


def _storage(tensor: torch.Tensor) -> int:
    return int(tensor.untyped_storage()._cdata)
