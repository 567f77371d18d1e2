"""Traces the forward graph of a model by torch.fx, with values.

Each node is run as it is recorded, on two batches of different length. Sizes equal in both are constants; others depend on
the batch and stay in the graph. A module is traced through only if a graph can represent it. One whose forward stops the
tracer, draws random numbers in Python, sets an attribute, or changes the autograd or autocast state is kept whole: the graph
calls the user's own module. So is a module with hooks, without submodules, or of torch.nn.
"""

from __future__ import annotations

import contextlib
import operator
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any
from weakref import WeakValueDictionary

import torch
from torch import fx, nn
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils import _pytree as pytree

from learndrop_ext.graph.call import CalledWith
from learndrop_ext.graph.observe import modes, observed, random_state
from learndrop_ext.graph.state import MODULE_NAMES, Mark, contents_of, is_mutable, refill, version
from learndrop_ext.graph.values import TracedShape, TracedValue, Values

Shape = tuple[int, ...]

_CONTAINERS = (nn.Sequential, nn.ModuleList, nn.ModuleDict)
HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
_METADATA = frozenset(
    ("size", "dim", "ndimension", "numel", "nelement", "element_size", "is_floating_point", "is_complex")
)


class UntraceableError(Exception):
    """A graph cannot represent the forward of the whole model; the message says why."""


@dataclass(frozen=True)
class Trace:
    """A traced model and what was observed while tracing. Paths are those in `CalledWith`."""

    graph: fx.Graph
    shapes: Mapping[fx.Node, tuple[Shape | None, Shape | None]]  # shapes of floating-point tensors for both batches
    batch_sizes: frozenset[fx.Node]  # integers that depend on the batch size alone
    random: frozenset[fx.Node]  # nodes that drew random numbers
    storage: Mapping[fx.Node, int]
    writes: Mapping[fx.Node, frozenset[int]]  # storages that a node wrote into
    frames: Mapping[fx.Node, tuple[str, ...]]  # modules whose forward was running, outermost first
    flattened: Mapping[str, nn.Module]  # modules that were traced through
    whole: Mapping[str, str]  # modules that had to be kept whole -> reason
    reads: Mapping[tuple[str, str], Mark]  # attributes that are constants of the graph
    mode_reads: frozenset[str]  # modules whose training flag was read
    reads_sizes: bool  # whether sizes of the input are constants of the graph


@dataclass
class _Frame:
    """A running forward of a module that is being traced through."""

    path: str
    context: tuple[Any, ...]
    contents: dict[str, tuple[Any, Mark, Any]]  # mutable attributes: the object, its mark, its copy
    reason: str | None = None
    undo: list[Callable[[], object]] = field(default_factory=list)


class ValueTracer(fx.Tracer):
    """Traces a model on two batches of its tensors, the image first. whole: modules not to trace through -> reason."""

    def __init__(
        self, root: CalledWith, inputs: tuple[Sequence[torch.Tensor], Sequence[torch.Tensor]], whole: Mapping[str, str]
    ) -> None:
        super().__init__()
        self.wrapped = root
        self.inputs = tuple(zip(*inputs, strict=True))
        self.device = inputs[0][0].device
        self.whole = dict(whole)
        self.paths = {id(m): name for name, m in root.named_modules() if m is not root}
        self.tensors = {id(t): name for name, t in (*root.named_buffers(), *root.named_parameters())}
        self.executing = False
        self.frames: list[_Frame] = []
        self.flattened: dict[str, nn.Module] = {}
        self.reads: dict[tuple[str, str], Mark] = {}
        self.mode_reads: set[str] = set()
        self.reads_sizes = False
        self.proxies: dict[str, fx.Proxy] = {}
        self.values: WeakValueDictionary[fx.Node, Values] = WeakValueDictionary()
        self.held: list[Values] = []  # values of nodes without a proxy
        self.shapes: dict[fx.Node, tuple[Shape | None, Shape | None]] = {}
        self.batch_sizes: set[fx.Node] = set()
        self.drawing: set[fx.Node] = set()
        self.storage: dict[fx.Node, int] = {}
        self.writes: dict[fx.Node, frozenset[int]] = {}
        self.node_frames: dict[fx.Node, tuple[str, ...]] = {}
        self.storages: list[StorageWeakRef] = []  # kept, so that their numbers are not reused
        self.random_state = random_state(self.device)

    def run(self) -> Trace:
        """Trace the model in its current mode and gradient mode."""
        with observed(self):
            graph = self.trace(self.wrapped)
        kept = set(graph.nodes)
        return Trace(
            graph,
            {n: s for n, s in self.shapes.items() if n in kept},
            frozenset(self.batch_sizes & kept),
            frozenset(self.drawing & kept),
            self.storage,
            self.writes,
            self.node_frames,
            {p: m for p, m in self.flattened.items() if not _within(p, self.whole)},
            self.whole,
            {key: mark for key, mark in self.reads.items() if not _within(key[0], self.whole)},
            frozenset(p for p in self.mode_reads if not _within(p, self.whole)),
            self.reads_sizes,
        )

    # Methods that torch.fx calls

    def create_args_for_root(
        self, root_fn: Callable[..., Any], is_module: bool, concrete_args: Any = None
    ) -> tuple[Callable[..., Any], list[Any]]:
        inputs = [self.create_proxy("placeholder", f"x{i}", (), {}) for i in range(len(self.inputs))]
        return root_fn, [self.wrapped, *inputs]

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        if module_qualified_name in self.whole:
            return True
        if module_qualified_name == "model":
            return False
        if any(getattr(m, hooks) for hooks in HOOKS):
            self.whole[module_qualified_name] = "it has hooks"
            return True
        if isinstance(m, torch.jit.ScriptModule) or next(m.children(), None) is None:
            return True
        base = next(c for c in type(m).__mro__ if c.__module__.startswith("torch.nn"))
        return base is not nn.Module and base not in _CONTAINERS

    def call_module(
        self, m: nn.Module, forward: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Any:
        if self.executing:
            return forward(*args, **kwargs)
        path = self.path_of_module(m)
        if self.is_leaf_module(m, path):
            return self.create_proxy("call_module", path, args, kwargs)
        self._check_frame()
        before = next(iter(reversed(self.graph.nodes)))
        contents = {
            k: (v, Mark(v), contents_of(v)) for k, v in vars(m).items() if k not in MODULE_NAMES and is_mutable(v)
        }
        frame = _Frame(path, modes(), contents)
        self.frames.append(frame)
        self.flattened[path] = m
        try:
            result = forward(*args, **kwargs)
            self._check_frame()
            for name, (value, mark, _) in contents.items():
                if not mark.holds(value):
                    frame.reason = frame.reason or f"its forward changes {name}"
        except UntraceableError:
            raise
        except Exception as error:
            frame.reason = frame.reason or f"it stopped the tracer: {error}"
        finally:
            self.frames.pop()
        if frame.reason is None:
            return result
        if path == "model":
            raise UntraceableError(frame.reason)
        self._forget_after(before)
        for step in reversed(frame.undo):
            step()
        for value, _, copy in contents.values():
            refill(value, copy)
        self.random_state = random_state(self.device)
        self.whole[path] = frame.reason
        return self.create_proxy("call_module", path, args, kwargs)

    def getattr(self, attr: str, attr_val: Any, parameter_proxy_cache: dict[str, Any]) -> Any:
        path = self.tensors.get(id(attr_val)) if isinstance(attr_val, torch.Tensor) else None
        if self.executing or path is None:
            return attr_val
        if path not in self.proxies:
            self.proxies[path] = self.create_proxy("get_attr", path, (), {})
        return self.proxies[path]

    def create_arg(self, a: Any) -> Any:
        if type(a) is TracedValue:
            return a.node
        if isinstance(a, torch.Tensor) and id(a) in self.tensors:
            return self.create_node("get_attr", self.tensors[id(a)], (), {})
        if type(a) is TracedShape:
            return super().create_arg(self.constants(tuple(tuple.__iter__(a))))
        if isinstance(a, dict) and type(a) is not dict and hasattr(type(a), "__dataclass_fields__"):
            items = {key: self.create_arg(value) for key, value in a.items()}
            return self.create_node("call_function", type(a), (), items)
        return super().create_arg(a)

    def create_node(
        self,
        kind: str,
        target: Any,
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        name: str | None = None,
        type_expr: Any | None = None,
    ) -> fx.Node:
        if kind.startswith("call"):
            self._check_frame()
        node = super().create_node(kind, target, args, kwargs, name, type_expr)
        if kind == "output":
            return node
        self.node_frames[node] = tuple(frame.path for frame in self.frames)
        values = self._run_node(node)
        self.values[node] = values
        self.held.append(values)
        one, two = values.pair
        self.shapes[node] = (_shape(one, kind), _shape(two, kind))
        if isinstance(one, torch.Tensor):
            self.storage[node] = self._storage(one)
        integers = type(one) is int and type(two) is int and kind == "call_function"
        if integers and all(n in self.batch_sizes for n in node.all_input_nodes):
            self.batch_sizes.add(node)
        return node

    def proxy(self, node: fx.Node) -> fx.Proxy:
        values = self.values[node]
        if self.held and self.held[-1] is values:
            self.held.pop()
        return TracedValue(node, self, values)

    def create_proxy(self, kind: str, target: Any, args: Any, kwargs: Any, *more: Any, **options: Any) -> Any:
        first = args[0] if args else None
        if type(first) is TracedValue:
            if kind == "call_method" and target in _METADATA and isinstance(first.values.pair[0], torch.Tensor):
                return self.metadata(first, target, args[1:], kwargs)
            if target in (operator.eq, operator.ne) and type(args[1]) is TracedValue:
                found = [target(a, b) for a, b in zip(first.values.pair, args[1].values.pair, strict=True)]
                # Two sizes that depend on the batch and are equal, or different, for both batches are so for all.
                if first.node in self.batch_sizes and args[1].node in self.batch_sizes and found[0] is found[1]:
                    return found[0]
        made: Any = super().create_proxy(kind, target, args, kwargs, *more, **options)
        if kind.startswith("call") and made.values.pair == (None, None):
            return None
        return made

    # Sizes

    def metadata(self, proxy: TracedValue, name: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """The result of a tensor method that does not read values; a constant if both batches agree."""
        one, two = (getattr(value, name)(*args, **kwargs) for value in proxy.values.pair)
        if isinstance(one, torch.Size):
            shape = TracedShape(
                a if a == b else self._size_node(proxy, i) for i, (a, b) in enumerate(zip(one, two, strict=True))
            )
            shape.tracer = self
            return shape
        if name == "size":
            dim = args[0] if args else kwargs["dim"]
            return self.constants(one) if one == two else self._size_node(proxy, dim % proxy.values.pair[0].dim())
        if one == two:
            return self.constants(one) if name in ("numel", "nelement") else one
        return super().create_proxy("call_method", name, (proxy, *args), kwargs)

    def _size_node(self, proxy: TracedValue, dim: int) -> Any:
        made = super().create_proxy("call_method", "size", (proxy, dim), {})
        if self.values[made.node].pair == tuple(map(len, self.inputs[0])):
            self.batch_sizes.add(made.node)
        return made

    def constants(self, found: Any) -> Any:
        """Record that sizes become constants of the graph."""
        self.reads_sizes |= any(type(size) is int for size in (found if isinstance(found, tuple) else (found,)))
        return found

    # Methods that `observed` calls

    def note_read(self, module: nn.Module, name: str, value: Any) -> None:
        """Record an attribute of a module that Python code reads while tracing."""
        if self.executing or not self.frames or name.startswith("__"):
            return
        path = self.paths.get(id(module))
        if path is None or (path, name) in self.reads:
            return
        if name == "training":
            self.mode_reads.add(path)
        elif name not in MODULE_NAMES:
            own = name in object.__getattribute__(module, "__dict__")
            if own or isinstance(vars(type(module)).get(name), int | float | str | tuple | torch.Tensor):
                self.reads[path, name] = Mark(value)

    def note_write(self, module: nn.Module, name: str) -> None:
        """Keep the running module whole, since Python code sets an attribute while tracing."""
        if not self.executing and self.frames and id(module) in self.paths:
            frame = self.frames[-1]
            tables = (module._parameters, module._buffers, module._modules, vars(module))
            table = next((t for t in tables if name in t), None)
            if table is None:
                frame.undo.append(lambda: vars(module).pop(name, None))
            else:
                frame.undo.append(lambda table=table, value=table[name]: table.__setitem__(name, value))  # type: ignore[misc]
            frame.reason = frame.reason or f"its forward sets {self._attribute(module, name)}"

    def note_autocast(self) -> None:
        """Keep the running module whole, since it enters autocast while tracing."""
        if not self.executing and self.frames:
            self.frames[-1].reason = self.frames[-1].reason or "its forward enters autocast"

    def _attribute(self, module: nn.Module, name: str) -> str:
        return f"{self.paths[id(module)]}.{name}".removeprefix("model.")

    def _check_frame(self) -> None:
        """Keep the running module whole if it changed the modes of torch, or drew random numbers outside of a node."""
        if not self.frames:
            return
        frame = self.frames[-1]
        if modes() != frame.context:
            frame.reason = frame.reason or "its forward changes the autograd state or another mode of torch"
        state = random_state(self.device)
        if state != self.random_state:
            frame.reason = frame.reason or "its forward draws random numbers that the graph would keep as constants"
            self.random_state = state

    def _forget_after(self, last: fx.Node) -> None:
        for node in reversed(list(self.graph.nodes)):
            if node is last:
                break
            self.graph.erase_node(node)
        kept = set(self.graph.nodes)
        self.proxies = {name: proxy for name, proxy in self.proxies.items() if proxy.node in kept}

    def _storage(self, tensor: torch.Tensor) -> int:
        reference = StorageWeakRef(tensor.untyped_storage())
        self.storages.append(reference)
        return int(reference.cdata)

    def _run_node(self, node: fx.Node) -> Values:
        if node.op == "placeholder":
            one, two = self.inputs[int(str(node.target).removeprefix("x"))]
            return Values((one.clone(), two.clone()))
        if node.op == "get_attr":
            owner, _, name = str(node.target).rpartition(".")
            with self._execution():
                value = getattr(self.wrapped.get_submodule(owner), name)
            return Values((value, value))
        results = []
        with self._execution():
            for i in (0, 1):
                args, kwargs = fx.map_arg((node.args, node.kwargs), lambda n, i=i: self.values[n].pair[i])  # type: ignore[misc]
                tensors = [t for t in pytree.tree_leaves((args, kwargs)) if isinstance(t, torch.Tensor)]
                versions = [version(t) for t in tensors]
                results.append(self._call(node, args, kwargs))
                moved = [t for t, v in zip(tensors, versions, strict=True) if version(t) != v]
                self.writes[node] = frozenset(map(self._storage, moved)) | self.writes.get(node, frozenset())
        state = random_state(self.device)
        if state != self.random_state:
            self.drawing.add(node)
            self.random_state = state
        return Values((results[0], results[1]))

    def _call(self, node: fx.Node, args: Any, kwargs: Any) -> Any:
        if node.op == "call_module":
            return self.wrapped.get_submodule(str(node.target))(*args, **kwargs)
        if node.op == "call_method":
            return getattr(args[0], str(node.target))(*args[1:], **kwargs)
        assert callable(node.target)
        return node.target(*args, **kwargs)

    @contextlib.contextmanager
    def _execution(self) -> Iterator[None]:
        """Run real code, of which nothing is recorded."""
        self.executing = True
        try:
            with torch.no_grad(), torch.autocast(self.device.type, enabled=False):
                yield
        finally:
            self.executing = False


def _within(path: str, whole: Mapping[str, str]) -> bool:
    """Whether a path is that of a module kept whole, or inside one."""
    return any(path == name or path.startswith(f"{name}.") for name in whole)


def _shape(value: Any, kind: str) -> Shape | None:
    fits = isinstance(value, torch.Tensor) and (value.is_floating_point() or kind == "placeholder")
    return tuple(value.shape) if fits and value.dim() > 0 else None
