"""The forward graph of a model by torch.fx, and the points where it can be cut. Used by `layers` alone."""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx, nn

_NORM_MODULES = (nn.modules.batchnorm._NormBase, nn.LayerNorm, nn.GroupNorm, nn.RMSNorm)
_NORM_FUNCTIONS = ("batch_norm", "layer_norm", "group_norm", "instance_norm", "rms_norm")
_RANDOM_MODULES = (nn.modules.dropout._DropoutNd, nn.RReLU)
_RANDOM_FUNCTIONS = frozenset(
    ("dropout", "dropout1d", "dropout2d", "dropout3d", "dropout_", "feature_dropout", "alpha_dropout")
) | frozenset(("alpha_dropout_", "feature_alpha_dropout", "rrelu", "stochastic_depth", "drop_path"))


class OneInput(nn.Module):
    """The model with its one required input only: optional arguments keep their defaults."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, x: torch.Tensor) -> Any:
        return self.model(x)


class _Tracer(fx.Tracer):
    def __init__(self, whole: Sequence[str]) -> None:
        super().__init__()
        self.whole = {f"model.{name}" for name in whole}

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        return module_qualified_name in self.whole or super().is_leaf_module(m, module_qualified_name)


def trace(root: nn.Module, model: nn.Module, layers: Sequence[str] | None) -> fx.Graph:
    try:
        return _Tracer(layers or ()).trace(root)
    except (fx.proxy.TraceError, TypeError, ValueError, RuntimeError, AttributeError, NotImplementedError) as error:
        raise ValueError(
            f"split_layers: model must be traceable by torch.fx, or layers= must name modules to keep whole; "
            f"{type(model).__name__} stopped the tracer: {error}"
        ) from error


@contextlib.contextmanager
def deterministic_algorithms(x: torch.Tensor) -> Iterator[None]:
    """The same algorithm at each call, so that equal inputs give equal bits on a GPU too."""
    if x.device.type != "cuda":
        yield
        return
    with torch.backends.cudnn.flags(deterministic=True, benchmark=False):
        yield


def node_shapes(root: nn.Module, graph: fx.Graph, x: torch.Tensor) -> dict[str, tuple[int, ...] | None]:
    """Shape of every node's value where it is one floating-point tensor, else None; of the input in any dtype."""
    shapes: dict[str, tuple[int, ...] | None] = {}

    class Recorder(fx.Interpreter):
        def run_node(self, n: fx.Node) -> Any:
            value = super().run_node(n)
            fits = isinstance(value, torch.Tensor) and (value.is_floating_point() or n.op == "placeholder")
            is_rows = fits and value.dim() > 0
            shapes[n.name] = tuple(value.shape) if is_rows else None
            return value

    with deterministic_algorithms(x):
        Recorder(fx.GraphModule(root, graph)).run(x.clone())
    return shapes


@dataclass(frozen=True)
class Subgraph:
    """A run of nodes between two cuts. `key` names its first cut by the weights used before it."""

    nodes: tuple[fx.Node, ...]
    source: fx.Node  # the tensor that enters
    result: Any  # the node, or for the last part the structure of nodes, that leaves
    shape: tuple[int, ...] | None
    key: tuple[frozenset[str], tuple[str, ...]]


def find_subgraphs(
    root: nn.Module, graph: fx.Graph, values: list[dict[str, tuple[int, ...] | None]], layers: Sequence[str] | None
) -> list[Subgraph]:
    nodes = [n for n in graph.nodes if n.op not in ("placeholder", "get_attr", "output")]
    source = next(n for n in graph.nodes if n.op == "placeholder")
    output = next(n for n in graph.nodes if n.op == "output")
    cuts = _cut_points(root, nodes, source, output, values)
    bounds = [(0, source), *cuts, (len(nodes), None)]
    pieces = [(nodes[a:b], before) for (a, before), (b, _) in itertools.pairwise(bounds)]
    groups: list[tuple[list[fx.Node], fx.Node]] = []
    weighted = False
    pending: list[tuple[list[fx.Node], fx.Node]] = []  # from a dropout on, up to the next weights

    def join(piece: list[fx.Node], entering: fx.Node) -> None:
        if groups:
            groups[-1][0].extend(piece)
        else:
            groups.append((list(piece), entering))

    for piece, entering in pieces:
        starts = any(_has_weights(root, n, layers) for n in piece)
        if starts and weighted:
            head = [n for p, _ in pending for n in p]
            groups.append(([*head, *piece], pending[0][1] if pending else entering))
            pending = []
        elif not starts and weighted and (pending or any(_is_random(root, n) for n in piece)):
            pending.append((piece, entering))
        else:
            join(piece, entering)
        weighted = weighted or starts
    for piece, entering in pending:
        join(piece, entering)
    made = []
    used: set[str] = set()
    tail: tuple[str, ...] = ()
    for i, (run, entering) in enumerate(groups):
        last = i + 1 == len(groups)
        result = output.args[0] if last else groups[i + 1][1]
        shape = values[0].get(result.name) if isinstance(result, fx.Node) else None
        made.append(Subgraph(tuple(run), entering, result, shape[1:] if shape else None, (frozenset(used), tail)))
        used |= {name for n in run for name in _tensors(root, n)}
        tail = _tail(root, run, layers)
    return made


def _cut_points(
    root: nn.Module,
    nodes: list[fx.Node],
    source: fx.Node,
    output: fx.Node,
    values: list[dict[str, tuple[int, ...] | None]],
) -> list[tuple[int, fx.Node]]:
    """(position, live tensor) of each point that can be cut.

    One tensor is live there, with one row a sample; no weight is used on both sides, and no operation writes into the
    tensor in place right after it.
    """
    position = {n: i for i, n in enumerate(nodes)} | {output: len(nodes), source: -1}
    last_use = {n: max((position[u] for u in n.users if u in position), default=-1) for n in [source, *nodes]}
    first, final = _spans(root, nodes)
    batch = [shapes[source.name] for shapes in values]
    found = []
    live: list[fx.Node] = [source]
    for i, node in enumerate(nodes[:-1]):
        live = [n for n in [*live, node] if last_use[n] > i]
        if len(live) != 1:
            continue
        tensor = live[0]
        shapes = [shape[tensor.name] for shape in values]
        if any(s is None or b is None or s[0] != b[0] for s, b in zip(shapes, batch, strict=True)):
            continue
        if len({s[1:] for s in shapes if s}) != 1 or len(shapes[0] or ()) < 2:
            continue
        if any(first[t] <= i < final[t] for t in first):
            continue
        if any(_writes_in_place(root, user) for user in tensor.users if position.get(user, -1) > i):
            continue
        found.append((i + 1, tensor))
    return found


def _spans(root: nn.Module, nodes: list[fx.Node]) -> tuple[dict[str, int], dict[str, int]]:
    """First and last position at which each parameter or buffer is used."""
    first: dict[str, int] = {}
    final: dict[str, int] = {}
    for i, node in enumerate(nodes):
        for tensor in _tensors(root, node):
            first.setdefault(tensor, i)
            final[tensor] = i
    return first, final


def _module_of(root: nn.Module, node: fx.Node) -> nn.Module | None:
    return root.get_submodule(str(node.target)) if node.op == "call_module" else None


def _tensors(root: nn.Module, node: fx.Node) -> set[str]:
    """Identities of the parameters and buffers that a node reads: shared ones are one."""
    module = _module_of(root, node)
    held = [*module.parameters(), *module.buffers()] if module is not None else []
    held += [_attribute(root, str(n.target)) for n in node.all_input_nodes if n.op == "get_attr"]
    return {str(id(t)) for t in held if isinstance(t, torch.Tensor)}


def _attribute(root: nn.Module, path: str) -> Any:
    owner, _, name = path.rpartition(".")
    return getattr(root.get_submodule(owner), name)


def _has_weights(root: nn.Module, node: fx.Node, layers: Sequence[str] | None) -> bool:
    module = _module_of(root, node)
    if layers is not None:
        return module is not None and str(node.target).removeprefix("model.") in layers
    if module is not None:
        return not isinstance(module, _NORM_MODULES) and any(True for _ in module.parameters())
    reads = any(
        isinstance(_attribute(root, str(n.target)), nn.Parameter) for n in node.all_input_nodes if n.op == "get_attr"
    )
    return reads and _called(node) not in _NORM_FUNCTIONS


def _called(node: fx.Node) -> str:
    return str(node.target) if node.op == "call_method" else str(getattr(node.target, "__name__", node.target))


def _is_random(root: nn.Module, node: fx.Node) -> bool:
    module = _module_of(root, node)
    if module is not None:
        return isinstance(module, _RANDOM_MODULES)
    return _called(node) in _RANDOM_FUNCTIONS


def _writes_in_place(root: nn.Module, node: fx.Node) -> bool:
    module = _module_of(root, node)
    if module is not None:
        return bool(getattr(module, "inplace", False))
    name = _called(node)
    in_place_name = name.endswith("_") and not name.endswith("__")
    in_place_operator = getattr(node.target, "__module__", "") == "_operator" and name in (
        "iadd",
        "isub",
        "imul",
        "itruediv",
    )
    return in_place_name or in_place_operator or node.kwargs.get("inplace") is True or "out" in node.kwargs


def _tail(root: nn.Module, run: Sequence[fx.Node], layers: Sequence[str] | None) -> tuple[str, ...]:
    """What follows a layer's last weights, dropout left out: train and eval graph must agree on it at a shared cut."""
    tail: list[str] = []
    for node in run:
        if _has_weights(root, node, layers):
            tail = []
        elif not _is_random(root, node):
            tail.append(f"{node.op}:{_called(node)}")
    return tuple(tail)


def merge_subgraphs(parts: list[Subgraph], keys: list[tuple[frozenset[str], tuple[str, ...]]]) -> list[Subgraph]:
    """Join each part whose first cut is not among the keys to the part before it."""
    merged: list[Subgraph] = []
    for part in parts:
        if merged and part.key not in keys:
            before = merged.pop()
            part = Subgraph((*before.nodes, *part.nodes), before.source, part.result, part.shape, before.key)
        merged.append(part)
    return merged


def layer_name(root: nn.Module, part: Subgraph) -> str:
    owners = [str(n.target) for n in part.nodes if n.op == "call_module" and _has_weights(root, n, None)]
    owners += [
        str(a.target).rpartition(".")[0]
        for n in part.nodes
        for a in n.all_input_nodes
        if a.op == "get_attr" and _has_weights(root, n, None)
    ]
    if not owners:
        return "layer"
    paths = [o.split(".")[1:] for o in owners]
    depth = 0
    while all(len(p) > depth for p in paths) and len({p[depth] for p in paths}) == 1:
        depth += 1
    return ".".join(paths[0][:depth] or paths[0]) or "layer"


def subgraph_module(root: nn.Module, part: Subgraph) -> fx.GraphModule:
    """The nodes of a part as a module whose submodules are the model's own."""
    graph = fx.Graph()
    made: dict[fx.Node, fx.Node] = {part.source: graph.placeholder("x")}

    def mapped(node: fx.Node) -> fx.Node:
        if node not in made:
            assert node.op == "get_attr", f"{node} is read across a cut"
            made[node] = graph.node_copy(node)
        return made[node]

    for node in part.nodes:
        made[node] = graph.node_copy(node, mapped)
    graph.output(fx.map_arg(part.result, mapped))
    return fx.GraphModule(root, graph)
