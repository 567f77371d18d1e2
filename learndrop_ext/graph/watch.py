"""Watches what a split relies on in the user's model: constants of the graphs, the modules they call, hooks."""

from __future__ import annotations

import contextlib
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import fx, nn

from learndrop_ext.graph.state import MODULE_NAMES, Mark
from learndrop_ext.graph.trace import HOOKS, Trace

_MISSING = object()


class Watch:
    """Compares a model with its state when it was split."""

    def __init__(self, root: nn.Module, traces: Iterable[Trace]) -> None:
        flattened: dict[str, nn.Module] = {}
        # (dictionary of a module, attribute, path, module, value)
        self.reads: list[tuple[Mapping[str, Any], str, str, nn.Module, Mark]] = []
        # (dictionary of a module, key, value, path) of submodules, parameters and buffers that the graphs hold
        self.held: list[tuple[Mapping[str, Any], str, Any, str]] = []
        seen: set[tuple[int, str]] = set()
        reads: dict[tuple[str, str], Mark] = {}
        for trace in traces:
            flattened |= trace.flattened
            reads |= trace.reads
            for node in trace.graph.nodes:
                if node.op in ("call_module", "get_attr"):
                    self._hold(root, node, seen)
        for (path, name), mark in reads.items():
            module = root.get_submodule(path)
            self.reads.append((vars(module), name, _shown(path, module), module, mark))
        self.hooks = [(vars(m)[hooks], _shown(path, m)) for path, m in flattened.items() for hooks in HOOKS]
        for path, module in flattened.items():
            forward = vars(module).get("forward", _MISSING)
            self.held.append((vars(module), "forward", forward, f"forward of {_shown(path, module)}"))

    def _hold(self, root: nn.Module, node: fx.Node, seen: set[tuple[int, str]]) -> None:
        module = root
        parts = str(node.target).split(".")
        for depth, name in enumerate(parts):
            table = next((t for t in (module._modules, module._parameters, module._buffers) if name in t), vars(module))
            value = table.get(name)
            if (id(table), name) not in seen and depth > 0:
                seen.add((id(table), name))
                self.held.append((table, name, value, ".".join(parts[1 : depth + 1])))
            if not isinstance(value, nn.Module):
                return
            module = value

    def moved(self) -> str | None:
        """Return the first change since the split in words, or None."""
        for table, name, value, path in self.held:
            if table.get(name, _MISSING) is not value:
                return f"{path} was replaced after the model was split"
        for hooks, path in self.hooks:
            if hooks:
                return f"a hook was added to {path} after the model was split"
        for table, name, path, module, mark in self.reads:
            now = table.get(name, _MISSING)
            if mark.constant and now is mark.value:
                continue
            now = getattr(module, name, _MISSING)
            if now is _MISSING:
                return f"{name} of {path} was removed after the model was split"
            if not mark.holds(now):
                return f"{name} of {path} {mark.told(now)}"
        return None


class Attributes:
    """The attributes and forward hooks of modules at one moment, except those of torch.nn.Module itself.

    Args:
        modules: path and module.
        moving: (id of a module, name) of attributes to ignore, because forward changes them.
        since: description of the moment.
    """

    def __init__(
        self, modules: Sequence[tuple[str, nn.Module]], moving: Collection[tuple[int, str]], *, since: str
    ) -> None:
        self._modules = [(path, m, {name for name in vars(m) if name not in MODULE_NAMES}) for path, m in modules]
        self._moving = moving
        self._marks = [
            (path, m, name, Mark(vars(m)[name], since=since, writes=True))
            for path, m, names in self._modules
            for name in sorted(names)
            if (id(m), name) not in moving
        ]
        self._hooks = [(path, vars(m)[hooks], dict(vars(m)[hooks])) for path, m in modules for hooks in HOOKS[:2]]
        self._since = since

    def moved(self) -> str | None:
        """Return the first change in words, or None."""
        for path, module, name, mark in self._marks:
            now = vars(module).get(name, _MISSING)
            if now is _MISSING:
                return f"{name} of {path} was removed after {self._since}"
            if not mark.holds(now):
                return f"{name} of {path} {mark.told(now)}"
        for path, module, names in self._modules:
            for name in vars(module):
                if name not in names and name not in MODULE_NAMES and (id(module), name) not in self._moving:
                    return f"{name} of {path} was added after {self._since}"
        for path, hooks, before in self._hooks:
            if hooks != before:
                return f"a forward hook of {path} was added or removed after {self._since}"
        return None

    @contextlib.contextmanager
    def put_back(self) -> Iterator[bool]:
        """Restore the attributes inside. Gives False if hooks or a value changed in place cannot be restored."""
        now = [(vars(module), dict(vars(module))) for _, module, _ in self._modules]
        possible = all(hooks == before for _, hooks, before in self._hooks)
        try:
            for _, module, name, mark in self._marks:
                if not mark.holds(vars(module).get(name, _MISSING)):
                    vars(module)[name] = mark.value
                    possible &= mark.holds(mark.value)
            for _, module, names in self._modules:
                for name in set(vars(module)) - names - MODULE_NAMES:
                    if (id(module), name) not in self._moving:
                        del vars(module)[name]
            yield possible
        finally:
            for held, values in now:
                held.update(values)


def _shown(path: str, module: nn.Module) -> str:
    return path.removeprefix("model").lstrip(".") or type(module).__name__


def is_lazy(model: nn.Module) -> bool:
    """Return whether a model has parameters or buffers that its first call creates."""
    return any(torch.nn.parameter.is_lazy(t) for t in (*model.parameters(), *model.buffers()))
