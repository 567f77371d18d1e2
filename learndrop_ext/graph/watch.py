"""What a split relies on in the user's model: constants of the graphs, the modules they call, hooks."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import fx, nn

from learndrop_ext.graph.state import Mark
from learndrop_ext.graph.trace import HOOKS, Trace

_MISSING = object()


class Watch:
    """Compares a model with what it was when it was split."""

    def __init__(self, root: nn.Module, traces: Iterable[Trace]) -> None:
        self.flattened: dict[str, nn.Module] = {}
        self.reads: list[tuple[str, str, nn.Module, Mark]] = []
        # (dictionary of a module, key, what it holds, path): submodules, parameters and buffers that the graphs hold.
        self.held: list[tuple[Mapping[str, Any], str, Any, str]] = []
        seen: set[tuple[int, str]] = set()
        reads: dict[tuple[str, str], Mark] = {}
        for trace in traces:
            self.flattened |= {path.removeprefix("model").lstrip("."): m for path, m in trace.flattened.items()}
            reads |= trace.reads
            for node in trace.graph.nodes:
                if node.op in ("call_module", "get_attr"):
                    self._hold(root, node, seen)
        for (path, name), mark in reads.items():
            module = root.get_submodule(path)
            self.reads.append((path.removeprefix("model").lstrip("."), name, module, mark))
        for path, module in self.flattened.items():
            self.held.append((vars(module), "forward", vars(module).get("forward", _MISSING), f"{path}.forward"))

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
        """What differs first from the time of the split, in words; None where nothing does."""
        for table, name, value, path in self.held:
            if table.get(name, _MISSING) is not value:
                return f"{path.lstrip('.')} was replaced after the model was split"
        for path, module in self.flattened.items():
            table = vars(module)
            for hooks in HOOKS:
                if table[hooks]:
                    return f"a hook was added to {path or type(module).__name__} after the model was split"
        for path, name, module, mark in self.reads:
            try:
                now = getattr(module, name)
            except AttributeError:
                return f"{name} of {path or type(module).__name__} was removed after the model was split"
            if not mark.holds(now):
                return f"{name} of {path or type(module).__name__} {mark.told(now)}"
        return None


def is_lazy(model: nn.Module) -> bool:
    """Whether a model has parameters or buffers that its first call makes."""
    return any(torch.nn.parameter.is_lazy(t) for t in (*model.parameters(), *model.buffers()))
