"""A model as a chain of layers.

A *cut point* is a point of the forward graph where exactly one tensor is live. A *layer* is the part between two cut points:
it starts at an operation with weights (a convolution, a linear map, or a residual block, inside which two tensors are live)
and includes the norms, activations and pools that follow. Dropout belongs to the next layer, so that the cached activation
is the tensor before the dropout, and its noise stays fresh.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import fx, nn

from learndrop_ext.graph.call import ModelCall
from learndrop_ext.graph.state import MODULE_NAMES
from learndrop_ext.graph.trace import HOOKS
from learndrop_ext.graph.watch import Watch


class Layer(nn.Module):
    """One layer of a chain. Its parameters and buffers are the model's own.

    Attributes:
        name: path of the module that the layer starts with, or that holds all of it.
        shape: shape of its output without the batch dimension; None for the last layer of a model that does not return a
            single tensor.
        train_graph: the graph of train mode.
        eval_graph: the graph of eval mode; the same object if both are equal.
        others: number of the model's other inputs that it takes after its own: all of them or none.
    """

    def __init__(
        self,
        name: str,
        shape: tuple[int, ...] | None,
        train: fx.GraphModule,
        evaluate: fx.GraphModule,
        *,
        fixed_input: tuple[int, ...] | None = None,
        writes_input: bool = False,
        others: Sequence[tuple[int | None, ...]] = (),
        switches: Sequence[nn.Module] = (),
    ) -> None:
        super().__init__()
        self.name = name
        self.shape = shape
        self.train_graph = train
        # The tracer turns a read of self.training into a constant: then there are two graphs.
        self.eval_graph = evaluate if evaluate.code != train.code else train
        self.fixed_input = fixed_input
        self.writes_input = writes_input
        self.others = len(others)
        self.other_shapes = tuple(others)  # None is the batch size
        #: Modules of the model that the layer replaces. In train mode their flags choose the graph.
        self.switches: tuple[nn.Module, ...] = tuple(switches) if self.eval_graph is not train else ()

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "switches": ()}

    def train(self, mode: bool = True) -> Layer:
        """Set the mode of the layer, its modules, and the modules of the model that it replaces."""
        super().train(mode)
        for module in self.switches:
            module.training = mode
        return self

    def forward(self, x: torch.Tensor, *others: torch.Tensor) -> Any:
        if len(others) != self.others:
            raise TypeError(
                f"Chain: layer {self.name} takes {self.others} inputs of the model beside its own, got {len(others)}"
            )
        if self.fixed_input is not None and tuple(x.shape[1:]) != self.fixed_input:
            raise ValueError(
                f"Chain: the input of layer {self.name} must be [B, {', '.join(map(str, self.fixed_input))}] as in the "
                f"example, because the model's forward reads sizes; got {list(x.shape)}"
            )
        if self.fixed_input is not None:
            self._check_others(others)
        if self.writes_input:
            x = x.clone()
        return self.train_graph(x, *others) if self._trains() else self.eval_graph(x, *others)

    def _check_others(self, others: Sequence[torch.Tensor]) -> None:
        for i, (wanted, tensor) in enumerate(zip(self.other_shapes, others, strict=True), 1):
            got = tuple(tensor.shape)
            if len(got) != len(wanted) or any(w not in (None, g) for w, g in zip(wanted, got, strict=True)):
                sizes = ", ".join("B" if size is None else str(size) for size in wanted)
                raise ValueError(
                    f"Chain: further input {i} of layer {self.name} must be [{sizes}] as in the example, because the "
                    f"model's forward reads sizes; got {list(got)}"
                )

    def _trains(self) -> bool:
        if not self.training or not self.switches:
            return self.training
        flags = {module.training for module in self.switches}
        if len(flags) == 2:
            raise RuntimeError(
                f"Chain: the modules of layer {self.name} must be in one mode, got some in train and some in eval mode: "
                f"{', '.join(type(m).__name__ for m in self.switches if not m.training)} in eval mode"
            )
        return flags.pop()


class Segment(nn.Module):
    """Consecutive layers of a chain. `Segment([])` is the identity.

    The model's other inputs are given after the image, and go to the layer that takes them.
    """

    def __init__(self, layers: Sequence[Layer]) -> None:
        super().__init__()
        self.layers = nn.ModuleList(layers)

    def forward(self, x: torch.Tensor, *others: torch.Tensor) -> Any:
        return _run(self.layers, x, others)


class Chain(nn.Module):
    """A model as a sequence of layers: `chain(x)` equals `model(x)`, with the same parameters and buffers.

    Made by `split_layers`. It can be copied and pickled; a copy is independent of the model. If the model has other tensor
    inputs, they are given in the order of its parameters: `chain(x, *others)`.

    Attributes:
        layers: the layers, in order.
        kept_whole: name -> reason of modules that the graphs call because torch.fx cannot represent them.
        call: how the model is called, with an example; None in a copy.
        moving: (id of a module, name) of each attribute that the model's forward changes; empty in a copy.
        stored: those of them that hold a tensor for the caller.
    """

    def __init__(
        self,
        layers: Sequence[Layer],
        *,
        kept_whole: Mapping[str, str] | None = None,
        call: ModelCall | None = None,
        moving: frozenset[tuple[int, str]] = frozenset(),
        watch: Watch | None = None,
    ) -> None:
        super().__init__()
        self.layers = nn.ModuleList(layers)
        self.kept_whole = dict(kept_whole or {})
        self.call = call
        self.moving = moving
        self.stored: frozenset[tuple[int, str]] = frozenset()
        self._watch = watch

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_watch": None, "call": None, "moving": frozenset(), "stored": frozenset()}

    def __len__(self) -> int:
        return len(self.layers)

    def forward(self, x: torch.Tensor, *others: torch.Tensor) -> Any:
        return _run(self.layers, x, others)

    def layer(self, i: int) -> Layer:
        """Return the i-th layer, 0 <= i < len(chain)."""
        found = self.layers[i]
        assert isinstance(found, Layer)
        return found

    @property
    def names(self) -> tuple[str, ...]:
        """The names of all layers, in order."""
        return tuple(self.layer(i).name for i in range(len(self)))

    def segment(self, start: int, stop: int) -> Segment:
        """Return layers start..stop-1 as one module.

        Raises:
            IndexError: unless 0 <= start <= stop <= len(chain).
        """
        if not 0 <= start <= stop <= len(self):
            raise IndexError(f"Chain: layers must be within 0..{len(self)} and in order, got {start}..{stop}")
        return Segment([self.layer(i) for i in range(start, stop)])

    def prefix(self, k: int) -> Segment:
        """Return the first k layers as one module."""
        return self.segment(0, k)

    def suffix(self, k: int) -> Segment:
        """Return all layers from layer k on as one module."""
        return self.segment(k, len(self))

    def stale(self) -> str | None:
        """Say what has changed in the model that the chain holds as a constant.

        Compares attributes that the model's forward reads, replaced submodules and parameters, and hooks on modules that the
        chain does not call. Values of parameters and buffers are shared and never stale. Takes well under a millisecond.

        Returns:
            The first change in words ("temperature of block2.attn was 1.0 when the model was split, and is 0.5"), or
            None. A copy always returns None.
        """
        return self._watch.moved() if self._watch is not None else None


def _run(layers: nn.ModuleList, x: torch.Tensor, others: tuple[torch.Tensor, ...]) -> Any:
    for layer in layers:
        assert isinstance(layer, Layer)
        x = layer(x, *others) if layer.others else layer(x)
    return x


def same_layers(one: Chain, other: Chain, k: int) -> bool:
    """Return whether the first k layers of two chains of a model compute the same with the same modules and tensors."""
    pairs = [(one.layer(i), other.layer(i)) for i in range(k)]
    return all(built_of(a) == built_of(b) and _held(a) == _held(b) for a, b in pairs)


def _held(layer: Layer) -> set[int]:
    """Identities of the modules that a layer calls, and of its tensors."""
    nodes = [(g, n) for g in (layer.train_graph, layer.eval_graph) for n in g.graph.nodes if n.op == "call_module"]
    modules = (graph.get_submodule(str(node.target)) for graph, node in nodes)
    return {id(held) for held in (*modules, *layer.parameters(), *layer.buffers())}


def built_of(layer: Layer) -> tuple[Any, ...]:
    """Return the structure of a layer: everything it computes except the values of its weights."""
    return tuple(
        _node_built(graph, node, {n: i for i, n in enumerate(graph.graph.nodes)})
        for graph in dict.fromkeys((layer.train_graph, layer.eval_graph))
        for node in graph.graph.nodes
    )


def _node_built(graph: fx.GraphModule, node: fx.Node, places: Mapping[fx.Node, int]) -> tuple[Any, ...]:
    target: Any = node.target
    if node.op == "call_module":
        target = tuple(_module_built(m) for m in graph.get_submodule(str(target)).modules())
    elif node.op == "get_attr":
        owner, _, name = str(target).rpartition(".")
        target = _value_built(getattr(graph.get_submodule(owner), name))
    return node.op, target, repr(fx.map_arg((node.args, node.kwargs), lambda n: places[n]))


def _module_built(module: nn.Module) -> tuple[Any, ...]:
    tensors = {**module._parameters, **module._buffers}
    plain = {name: value for name, value in vars(module).items() if name not in MODULE_NAMES}
    held = tuple((name, _value_built(value)) for name, value in sorted({**tensors, **plain}.items()))
    hooks = tuple(id(hook) for name in HOOKS for hook in vars(module)[name].values())
    return type(module), tuple(module._modules), held, hooks


def _value_built(value: Any) -> Any:
    if isinstance(value, torch.Tensor):
        return tuple(value.shape), value.stride(), value.dtype, value.requires_grad
    if isinstance(value, int | float | str | torch.dtype | None):
        return type(value), value
    return tuple(map(_value_built, value)) if isinstance(value, tuple) else id(value)
