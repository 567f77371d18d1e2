"""Model -> chain of layers: the points of the forward graph where one tensor is live, and the modules between them.

A *cut* is a point of the graph where exactly one tensor is live. A *layer* is the part between two chosen cuts: it
starts at an operation with weights (a convolution, a linear map, a residual block, in which two tensors are live) and
takes along the norms, activations and pools that follow. Dropout goes with the layer after it, so that a cached
activation is the tensor before the dropout and the noise stays fresh.
"""

from __future__ import annotations

import contextlib
import inspect
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import fx, nn
from torch.utils import _pytree as pytree

from learndrop_ext.graph.trace import (
    OneInput,
    Subgraph,
    deterministic_algorithms,
    find_subgraphs,
    layer_name,
    merge_subgraphs,
    node_shapes,
    subgraph_module,
    trace,
)


class Layer(nn.Module):
    """One layer of a chain; its parameters are the model's own.

    `name` is the module path of what it starts with, `shape` the shape of one sample of the tensor that leaves it
    (without the batch dimension; None for the last layer of a model that returns no single tensor).
    """

    def __init__(
        self, name: str, shape: tuple[int, ...] | None, train: fx.GraphModule, evaluate: fx.GraphModule
    ) -> None:
        super().__init__()
        self.name = name
        self.shape = shape
        self.train_graph = train
        # A module that asks for self.training has it baked in by the tracer: then there are two graphs.
        self.eval_graph = evaluate if evaluate.code != train.code else train

    def forward(self, x: torch.Tensor) -> Any:
        return self.train_graph(x) if self.training else self.eval_graph(x)


class Segment(nn.Module):
    """Some neighbouring layers of a chain, run one after the other; `Segment([])` is the identity."""

    def __init__(self, layers: Sequence[Layer]) -> None:
        super().__init__()
        self.layers = nn.ModuleList(layers)

    def forward(self, x: torch.Tensor) -> Any:
        for layer in self.layers:
            x = layer(x)
        return x


class Chain(nn.Module):
    """A model as a sequence of layers: `chain(x)` equals `model(x)` and shares its parameters and buffers."""

    def __init__(self, layers: Sequence[Layer]) -> None:
        super().__init__()
        self.layers = nn.ModuleList(layers)

    def __len__(self) -> int:
        return len(self.layers)

    def forward(self, x: torch.Tensor) -> Any:
        for layer in self.layers:
            x = layer(x)
        return x

    def layer(self, i: int) -> Layer:
        """The i-th layer, 0 <= i < len(chain)."""
        found = self.layers[i]
        assert isinstance(found, Layer)
        return found

    @property
    def names(self) -> tuple[str, ...]:
        """The names of all layers, in order."""
        return tuple(self.layer(i).name for i in range(len(self)))

    def segment(self, start: int, stop: int) -> Segment:
        """The layers start..stop-1 as one module. Raises IndexError unless 0 <= start <= stop <= len(chain)."""
        if not 0 <= start <= stop <= len(self):
            raise IndexError(f"Chain: layers must be within 0..{len(self)} and in order, got {start}..{stop}")
        return Segment([self.layer(i) for i in range(start, stop)])

    def prefix(self, k: int) -> Segment:
        """The first k layers as one module."""
        return self.segment(0, k)

    def suffix(self, k: int) -> Segment:
        """All layers from the k-th on as one module."""
        return self.segment(k, len(self))


def split_layers(model: nn.Module, example: torch.Tensor, *, layers: Sequence[str] | None = None) -> Chain:
    """Cut a model into its chain of layers, and prove on the example that the chain computes the same.

    model: any module that torch.fx can trace, with one tensor as its input. example: [B, ...], a batch of its inputs on
    its device, B >= 1. layers: module names, in order; each is then kept whole (control flow inside it is not traced)
    and starts a layer, and nothing else does.

    The proof: chain(example) equals model(example) to the bit, in eval mode and, from the same random state, in train
    mode. Buffers, random state, gradients and training flags of the model are as before when this returns.

    Raises TypeError for another model or example, ValueError when the model has several inputs, cannot be traced, or
    has no cut (fewer than two layers), and RuntimeError when the proof fails.
    """
    _check_arguments(model, example, layers)
    if example.shape[0] == 1:
        example = torch.cat([example, example])  # batch statistics need two values
    root = OneInput(model)
    with _preserve_state(model), torch.no_grad():
        parts: dict[bool, list[Subgraph]] = {}
        for training in (True, False):
            model.train(training)
            graph = trace(root, model, layers)
            values = [node_shapes(root, graph, x) for x in (example, torch.cat([example, example[:1]]))]
            parts[training] = find_subgraphs(root, graph, values, layers)
        names = [part.key for part in parts[True]]
        common = [key for key in names if key in {part.key for part in parts[False]}]
        merged = {training: merge_subgraphs(parts[training], common) for training in parts}
        if len(common) < 2:
            raise ValueError(
                "split_layers: model must have a cut, a point where exactly one tensor is live between two operations "
                f"with weights; {type(model).__name__} has none"
            )
        taken: dict[str, int] = {}
        made = []
        for train_part, eval_part in zip(merged[True], merged[False], strict=True):
            name = _unique(layer_name(root, train_part), taken)
            graphs = [subgraph_module(root, part) for part in (train_part, eval_part)]
            made.append(Layer(name, train_part.shape, graphs[0], graphs[1]))
        chain = Chain(made)
        _prove(model, chain, example)
    for layer in chain.modules():
        if isinstance(layer, Chain | Layer | fx.GraphModule):
            layer.training = model.training
    return chain


def _check_arguments(model: nn.Module, example: torch.Tensor, layers: Sequence[str] | None) -> None:
    if not isinstance(model, nn.Module):
        raise TypeError(f"split_layers: model must be a torch.nn.Module, got {type(model).__name__}")
    if type(model).__name__ in ("OptimizedModule", "DistributedDataParallel", "DataParallel"):
        raise TypeError(
            f"split_layers: model must be the plain module, got a {type(model).__name__}; "
            "give torch.compile or DistributedDataParallel as wrap= instead"
        )
    if not isinstance(example, torch.Tensor):
        raise TypeError(f"split_layers: example must be a tensor [B, ...], got {type(example).__name__}")
    if example.dim() < 2 or example.shape[0] < 1:
        raise ValueError(f"split_layers: example must be [B, ...] with B >= 1, got {list(example.shape)}")
    required = [
        p.name
        for p in inspect.signature(model.forward).parameters.values()
        if p.default is p.empty and p.kind not in (p.VAR_POSITIONAL, p.VAR_KEYWORD)
    ]
    if len(required) != 1:
        raise ValueError(
            f"split_layers: model must have one input, got {len(required)}: {', '.join(required) or 'none'}"
        )
    known = dict(model.named_modules())
    for name in layers or ():
        if name not in known:
            raise ValueError(f"split_layers: layers must name modules of the model, got {name!r}")


@contextlib.contextmanager
def _preserve_state(model: nn.Module) -> Iterator[None]:
    """Put training flags, buffers and random state back on leaving."""
    flags = [(m, m.training) for m in model.modules()]
    buffers = [(b, b.detach().clone()) for b in model.buffers()]
    devices = sorted({t.device.index or 0 for t in model.parameters() if t.device.type == "cuda"})
    try:
        with torch.random.fork_rng(devices=devices):
            yield
    finally:
        with torch.no_grad():
            for buffer, value in buffers:
                buffer.copy_(value)
        for module, training in flags:
            module.training = training


def _unique(name: str, taken: dict[str, int]) -> str:
    taken[name] = taken.get(name, 0) + 1
    return name if taken[name] == 1 else f"{name}#{taken[name]}"


def _prove(model: nn.Module, chain: Chain, example: torch.Tensor) -> None:
    devices = [example.device] if example.device.type == "cuda" else []

    def run(call: Callable[[torch.Tensor], Any]) -> list[Any]:
        with torch.random.fork_rng(devices=devices), _preserve_state(model), deterministic_algorithms(example):
            return pytree.tree_leaves(call(example.clone()))

    for training in (False, True):
        model.train(training)
        chain.train(training)
        wanted, got = run(model), run(chain)
        same = len(wanted) == len(got) and all(
            torch.equal(w, g) or bool((w.isnan() & g.isnan() | (w == g)).all())
            if isinstance(w, torch.Tensor) and isinstance(g, torch.Tensor) and w.shape == g.shape
            else w is g or w == g
            for w, g in zip(wanted, got, strict=False)
        )
        if not same:
            raise RuntimeError(
                f"split_layers: the chain of {type(model).__name__} must equal the model to the bit in "
                f"{'train' if training else 'eval'} mode, and it does not: its forward is not a function of its input, "
                "parameters and random state; name whole modules with layers=[...]"
            )
