"""The points where a traced model can be cut, and the subgraphs between them."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx, nn

from learndrop_ext.graph.trace import Trace

_NORM_MODULES = (nn.modules.batchnorm._NormBase, nn.LayerNorm, nn.GroupNorm, nn.RMSNorm)
_NORM_FUNCTIONS = ("batch_norm", "layer_norm", "group_norm", "instance_norm", "rms_norm")
_RANDOM_MODULES = (nn.modules.dropout._DropoutNd, nn.RReLU)
_RANDOM_FUNCTIONS = frozenset(
    ("dropout", "dropout1d", "dropout2d", "dropout3d", "dropout_", "feature_dropout", "alpha_dropout")
) | frozenset(("alpha_dropout_", "feature_alpha_dropout", "rrelu", "stochastic_depth", "drop_path"))


@dataclass(frozen=True)
class Subgraph:
    """The nodes between two cut points. `key` identifies the first of these by the weights used before it."""

    nodes: tuple[fx.Node, ...]
    source: fx.Node  # the tensor that enters
    result: Any  # the node that leaves; for the last subgraph a structure of nodes
    shape: tuple[int, ...] | None
    key: tuple[frozenset[str], tuple[str, ...]]


class Splitter:
    """Finds the subgraphs of one trace.

    `layers` are the modules that start a layer, if the user has named them. `random_modules` are modules known to draw
    random numbers in the other mode.
    """

    def __init__(
        self, root: nn.Module, trace: Trace, layers: Sequence[str] | None, random_modules: frozenset[str]
    ) -> None:
        self.root = root
        self.trace = trace
        self.layers = layers
        self.random_modules = random_modules
        nodes = trace.graph.nodes
        self.source, *self.others = (n for n in nodes if n.op == "placeholder")
        self.output = next(n for n in nodes if n.op == "output")
        skipped = ("placeholder", "get_attr", "output")
        self.nodes = [n for n in nodes if n.op not in skipped and n not in trace.batch_sizes]
        if self.others:
            self._delay_others()

    def _delay_others(self) -> None:
        """Move nodes that depend only on the other inputs to where they meet the image. Random draws stay in order."""
        from_image, from_others = self._made_of([self.source]), self._made_of(self.others)
        random = self.trace.random
        waiting: list[fx.Node] = []
        ordered: list[fx.Node] = []
        for node in self.nodes:
            if node in from_others and node not in from_image:
                waiting.append(node)
                continue
            if node in from_others or (node in random and not random.isdisjoint(waiting)):
                ordered += waiting
                waiting = []
            ordered.append(node)
        self.nodes = ordered + waiting

    def _made_of(self, inputs: Sequence[fx.Node]) -> set[fx.Node]:
        """The nodes that depend on one of these inputs, by more than the batch size."""
        found: set[fx.Node] = set()
        for node in self.nodes:
            if any(n in found or n in inputs for n in node.all_input_nodes):
                found.add(node)
        return found

    def subgraphs(self) -> list[Subgraph]:
        """The subgraphs with weights, each with the norms, activations and pools that follow."""
        bounds = [(0, self.source), *self._cut_points(), (len(self.nodes), None)]
        pieces = [(self.nodes[a:b], before) for (a, before), (b, _) in itertools.pairwise(bounds)]
        groups: list[tuple[list[fx.Node], fx.Node]] = []
        weighted = False
        pending: list[tuple[list[fx.Node], fx.Node]] = []  # from a dropout up to the next weights

        def join(piece: list[fx.Node], entering: fx.Node) -> None:
            if groups:
                groups[-1][0].extend(piece)
            else:
                groups.append((list(piece), entering))

        for piece, entering in pieces:
            starts = any(self._has_weights(n) for n in piece)
            if starts and weighted:
                head = [n for p, _ in pending for n in p]
                groups.append(([*head, *piece], pending[0][1] if pending else entering))
                pending = []
            elif not starts and weighted and (pending or any(self._is_random(n) for n in piece)):
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
            result = self.output.args[0] if last else groups[i + 1][1]
            shape = self.trace.shapes.get(result, (None, None))[0] if isinstance(result, fx.Node) else None
            made.append(Subgraph(tuple(run), entering, result, shape[1:] if shape else None, (frozenset(used), tail)))
            used |= {name for n in run for name in self._tensors(n)}
            tail = self._tail(run)
        return made

    def _cut_points(self) -> list[tuple[int, fx.Node]]:
        """(position, live tensor) of each possible cut point.

        One tensor is live there, with one row per sample. No weight is used on both sides, and no later operation writes
        into the tensor in place. Batch sizes do not count as live, since each subgraph reads them from its input. Nor do
        other inputs of the model, but there is no cut after their first use.
        """
        nodes, shapes = self.nodes, self.trace.shapes
        position = {n: i for i, n in enumerate(nodes)} | {self.output: len(nodes), self.source: -1}
        last_use = {n: max((position[u] for u in n.users if u in position), default=-1) for n in [self.source, *nodes]}
        first, final = self._spans()
        batch = shapes[self.source]
        from_others = self._made_of(self.others)
        found = []
        live: list[fx.Node] = [self.source]
        for i, node in enumerate(nodes[:-1]):
            if node in from_others:
                break
            live = [n for n in [*live, node] if last_use[n] > i]
            if len(live) != 1:
                continue
            tensor = live[0]
            pair = shapes[tensor]
            if any(s is None or b is None or s[0] != b[0] for s, b in zip(pair, batch, strict=True)):
                continue
            if len({s[1:] for s in pair if s}) != 1 or len(pair[0] or ()) < 2:
                continue
            if any(first[t] <= i < final[t] for t in first):
                continue
            if any(self._writes_in_place(user, tensor) for user in tensor.users if position.get(user, -1) > i):
                continue
            found.append((i + 1, tensor))
        return found

    def _spans(self) -> tuple[dict[str, int], dict[str, int]]:
        """First and last position at which each parameter or buffer is used."""
        first: dict[str, int] = {}
        final: dict[str, int] = {}
        for i, node in enumerate(self.nodes):
            for tensor in self._tensors(node):
                first.setdefault(tensor, i)
                final[tensor] = i
        return first, final

    def _module_of(self, node: fx.Node) -> nn.Module | None:
        return self.root.get_submodule(str(node.target)) if node.op == "call_module" else None

    def _tensors(self, node: fx.Node) -> set[str]:
        """Identities of the parameters and buffers that a node reads; a shared one counts once."""
        module = self._module_of(node)
        held = [*module.parameters(), *module.buffers()] if module is not None else []
        held += [attribute(self.root, str(n.target)) for n in node.all_input_nodes if n.op == "get_attr"]
        return {str(id(t)) for t in held if isinstance(t, torch.Tensor)}

    def _has_weights(self, node: fx.Node) -> bool:
        if self.layers is not None:
            return node.op == "call_module" and str(node.target).removeprefix("model.") in self.layers
        return has_weights(self.root, node)

    def _is_random(self, node: fx.Node) -> bool:
        if node in self.trace.random:
            return True
        module = self._module_of(node)
        if module is not None:
            return isinstance(module, _RANDOM_MODULES) or str(node.target) in self.random_modules
        return _called(node) in _RANDOM_FUNCTIONS

    def _writes_in_place(self, node: fx.Node, tensor: fx.Node) -> bool:
        """Whether a node writes into a tensor it uses, in this mode or the other."""
        if self.trace.storage[tensor] in self.trace.writes.get(node, ()):
            return True
        module = self._module_of(node)
        return bool(getattr(module, "inplace", False)) or node.kwargs.get("inplace") is True

    def writes_its_input(self, part: Subgraph) -> bool:
        """Whether a subgraph writes into the tensor that enters it, or into a view of it."""
        entered = self.trace.storage[part.source]
        return any(entered in self.trace.writes.get(node, ()) for node in part.nodes)

    def _tail(self, run: Sequence[fx.Node]) -> tuple[str, ...]:
        """What follows a layer's last weights, except dropout. Both modes must agree on it at a shared cut point."""
        tail: list[str] = []
        for node in run:
            if self._has_weights(node):
                tail = []
            elif not self._is_random(node):
                tail.append(f"{node.op}:{_called(node)}")
        return tuple(tail)

    def ends(self, part: Subgraph) -> bool:
        """Whether a subgraph is the last one, which takes the model's other inputs."""
        return part.result is self.output.args[0]

    def module(self, part: Subgraph) -> fx.GraphModule:
        """The nodes of a subgraph as a module whose submodules are the model's own."""
        graph = fx.Graph()
        made: dict[fx.Node, fx.Node] = {part.source: graph.placeholder("x")}
        if self.ends(part):
            made |= {node: graph.placeholder(f"other{i}") for i, node in enumerate(self.others)}

        def mapped(node: fx.Node) -> fx.Node:
            if node not in made:
                if node.op == "call_method" and node in self.trace.batch_sizes:
                    made[node] = graph.call_method("size", (made[part.source], 0))
                else:
                    constant = node.op == "get_attr" or node in self.trace.batch_sizes
                    assert constant, f"{node} is read across a cut point"
                    made[node] = graph.node_copy(node, mapped)
            return made[node]

        for node in part.nodes:
            made[node] = graph.node_copy(node, mapped)
        graph.output(fx.map_arg(part.result, mapped))
        return fx.GraphModule(self.root, graph)


def attribute(root: nn.Module, path: str) -> Any:
    """The attribute of a module of `root` to which a get_attr node refers."""
    owner, _, name = path.rpartition(".")
    return getattr(root.get_submodule(owner), name)


def has_weights(root: nn.Module, node: fx.Node) -> bool:
    """Whether a node uses weights other than those of a norm."""
    if node.op == "call_module":
        module = root.get_submodule(str(node.target))
        return not isinstance(module, _NORM_MODULES) and any(True for _ in module.parameters())
    reads = any(
        isinstance(attribute(root, str(n.target)), nn.Parameter) for n in node.all_input_nodes if n.op == "get_attr"
    )
    return reads and _called(node) not in _NORM_FUNCTIONS


def _called(node: fx.Node) -> str:
    return str(node.target) if node.op == "call_method" else str(getattr(node.target, "__name__", node.target))


def random_modules(trace: Trace) -> frozenset[str]:
    """The modules that were called whole and drew random numbers."""
    return frozenset(str(n.target) for n in trace.random if n.op == "call_module")


def merge_subgraphs(parts: list[Subgraph], keys: list[tuple[frozenset[str], tuple[str, ...]]]) -> list[Subgraph]:
    """Join each subgraph whose first cut point is not among the keys to its predecessor."""
    merged: list[Subgraph] = []
    for part in parts:
        if merged and part.key not in keys:
            before = merged.pop()
            part = Subgraph((*before.nodes, *part.nodes), before.source, part.result, part.shape, before.key)
        merged.append(part)
    return merged


def layer_name(root: nn.Module, part: Subgraph) -> str:
    """The path of the innermost module that holds all weights of a subgraph, or of the first one with weights."""
    owners = [str(n.target) for n in part.nodes if n.op == "call_module" and has_weights(root, n)]
    owners += [
        str(a.target).rpartition(".")[0]
        for n in part.nodes
        for a in n.all_input_nodes
        if a.op == "get_attr" and has_weights(root, n)
    ]
    if not owners:
        return "layer"
    paths = [o.split(".")[1:] for o in owners]
    depth = 0
    while all(len(p) > depth for p in paths) and len({p[depth] for p in paths}) == 1:
        depth += 1
    return ".".join(paths[0][:depth] or paths[0]) or "layer"
