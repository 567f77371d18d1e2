"""Splits a model into a chain of layers, and proves that the chain computes the same."""

from __future__ import annotations

import contextlib
import inspect
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from learndrop_ext.cudnn import without_benchmark
from learndrop_ext.graph.call import CalledWith, ModelCall
from learndrop_ext.graph.cuts import Splitter, Subgraph, layer_name, merge_subgraphs, random_modules
from learndrop_ext.graph.layers import Chain, Layer, Segment
from learndrop_ext.graph.proof import AS_IT_IS, difference
from learndrop_ext.graph.state import ModelState
from learndrop_ext.graph.trace import HOOKS, Trace, UntraceableError, ValueTracer
from learndrop_ext.graph.watch import Watch, is_lazy
from learndrop_ext.rng import fork_rng

__all__ = ["Chain", "Layer", "Segment", "split_layers"]

_BY_PROOF = "its trace does not compute what it does"


def split_layers(
    model: nn.Module,
    example: torch.Tensor,
    *,
    layers: Sequence[str] | None = None,
    inputs: tuple[Sequence[Any], Mapping[str, Any]] | None = None,
) -> Chain:
    """Split a model into its chain of layers, and prove on the example that the chain computes the same.

    The proof compares outputs, gradients of parameters and input, and writes to buffers, in eval and train mode, with
    several random seeds, and with all weights changed. All must be equal to the bit, gradients within rounding. A module
    that torch.fx cannot represent is kept whole: the chain calls the user's own module. The model is restored with its
    training flags, buffers, attributes and gradients; so is the random state of torch, numpy and Python.

    Args:
        model (nn.Module): the model, called with one tensor. Further inputs need defaults, or must be given in `inputs`.
        example (Tensor): [B, ...], a batch of its inputs on its device, B >= 1. At most three samples of it are used.
        layers (Sequence[str], optional): names of modules, in order. Each is kept whole and starts a layer, and no other
            module does.
        inputs (tuple, optional): positional and keyword arguments of the model, with `example` itself among them. Default:
            `example` alone. Other tensors are inputs of the last layer, so there is no cut after the first use of one;
            those with B rows have one per sample. All other arguments are constants.

    Returns:
        Chain: at least two layers, in the model's mode.

    Raises:
        TypeError: if the model, the example or the inputs have the wrong type.
        ValueError: if the model has several inputs that are not given, its own forward cannot be traced, or it has no cut
            point.
        RuntimeError: if the proof fails.
    """
    _check_arguments(model, example, layers, given=inputs is not None)
    call = ModelCall(model, example, *(inputs or ((example,), {})))
    with _preserved(model) as state:
        split = _Split(model, call, layers, state)
        whole = {f"model.{name}": "named in layers=" for name in layers or ()}
        chain = split.chain(whole)
        found = split.difference(chain)
        if found:
            chain = split.chain(split.whole_by_proof(whole, found))
            found = split.difference(chain)
        if found:
            raise RuntimeError(split.not_equal(found))
        chain.moving, chain.stored = state.moving(), state.stored()
    for module in chain.modules():
        if isinstance(module, Chain | Layer) or module in split.graphs:
            module.training = model.training
    return chain


def difference_now(chain: Chain, model: nn.Module) -> str | None:
    """Say in what the chain now differs from the model, or return None.

    Runs both on two samples in both modes, to find what `Chain.stale` cannot see: a changed global variable or closure. The
    model is restored, and the user's hooks are not called.
    """
    if chain.call is None:
        return None
    image, others = chain.call.first(2)
    with _without_hooks(model), _preserved(model) as state:
        found = difference(CalledWith(model, chain.call), chain, (image, *others), state, situations=AS_IT_IS)
    return found and f"the model computes something else than when it was split, in {found}"


@dataclass
class _Split:
    """The splitting of one model: traces it with a given set of modules kept whole."""

    model: nn.Module
    call: ModelCall
    layers: Sequence[str] | None
    state: ModelState
    root: CalledWith = field(init=False)
    tensors: tuple[torch.Tensor, ...] = field(init=False)  # two samples, since batch statistics need two values
    graphs: set[nn.Module] = field(default_factory=set)

    def __post_init__(self) -> None:
        self.root = CalledWith(self.model, self.call)
        self.tensors = self._first(2)

    def _first(self, count: int) -> tuple[torch.Tensor, ...]:
        image, others = self.call.first(count)
        return tuple(t.detach() for t in (image, *others))

    def difference(self, twin: nn.Module) -> str | None:
        """What the twin computes differently from the model, or None."""
        return difference(self.root, twin, self.tensors, self.state)

    def traces(self, whole: Mapping[str, str]) -> dict[bool, Trace]:
        """The traces of both modes, with the same modules kept whole."""
        longer = self._first(3)
        while True:
            made: dict[bool, Trace] = {}
            known = dict(whole)
            for training in (True, False):
                self.model.train(training)
                # With and without gradients, so that a no_grad or enable_grad in the forward changes one of the modes.
                with torch.set_grad_enabled(training), without_benchmark(longer[0].device, deterministic=True):
                    tracer = ValueTracer(self.root, (self.tensors, longer), known)
                    try:
                        made[training] = tracer.run()
                    except UntraceableError as error:
                        raise ValueError(
                            "split_layers: model must be traceable by torch.fx except for its submodules; the forward of "
                            f"{type(self.model).__name__} itself is not: {error}"
                        ) from error
                    finally:
                        self.state.restore()
                known = dict(made[training].whole)
            if made[True].whole.keys() == known.keys():
                return made
            whole = known

    def chain(self, whole: Mapping[str, str]) -> Chain:
        """The chain with these modules kept whole, and those that the tracer adds."""
        traces = self.traces(whole)
        drawing = random_modules(traces[True]) | random_modules(traces[False])
        splitters = {mode: Splitter(self.root, traces[mode], self.layers, drawing) for mode in traces}
        parts = {mode: splitters[mode].subgraphs() for mode in traces}
        known = {part.key for part in parts[False]}
        common = [part.key for part in parts[True] if part.key in known]
        if len(common) < 2:
            raise ValueError(self._no_cut(traces[True].whole))
        merged = {mode: merge_subgraphs(parts[mode], common) for mode in parts}
        return self._assemble(traces, splitters, merged)

    def _assemble(
        self, traces: dict[bool, Trace], splitters: dict[bool, Splitter], parts: dict[bool, list[Subgraph]]
    ) -> Chain:
        taken: dict[str, int] = {}
        made: list[Layer] = []
        entered: tuple[int, ...] | None = tuple(self.call.image.shape[1:])
        fixed = any(trace.reads_sizes for trace in traces.values())
        switches = self._switches(traces, parts)
        for pair in zip(parts[True], parts[False], strict=True):
            graphs = [splitters[mode].module(part) for mode, part in zip((True, False), pair, strict=True)]
            self.graphs |= {module for graph in graphs for module in graph.modules()} - set(self.model.modules())
            made.append(
                Layer(
                    _unique(layer_name(self.root, pair[0]), taken),
                    pair[0].shape,
                    graphs[0],
                    graphs[1],
                    fixed_input=entered if fixed else None,
                    writes_input=any(
                        splitters[m].writes_its_input(p) for m, p in zip((True, False), pair, strict=True)
                    ),
                    others=self.call.shapes if splitters[True].ends(pair[0]) else (),
                    switches=switches[len(made)],
                )
            )
            entered = pair[0].shape
        whole = {name.removeprefix("model."): reason for name, reason in traces[True].whole.items()}
        return Chain(made, kept_whole=whole, call=self.call, watch=Watch(self.root, traces.values()))

    def _switches(self, traces: dict[bool, Trace], parts: dict[bool, list[Subgraph]]) -> list[list[nn.Module]]:
        """For each layer, the modules that it alone replaces and whose forward reads their training flag.

        A module shared between layers follows each layer's own mode: a frozen prefix stays in eval mode.
        """
        asking = traces[True].mode_reads | traces[False].mode_reads
        replaced = [
            {path for mode in traces for node in parts[mode][i].nodes for path in traces[mode].frames[node]} & asking
            for i in range(len(parts[True]))
        ]
        layers_of = Counter(path for paths in replaced for path in paths)
        return [[self.root.get_submodule(p) for p in sorted(paths) if layers_of[p] == 1] for paths in replaced]

    def whole_by_proof(self, whole: Mapping[str, str], found: str) -> dict[str, str]:
        """The modules to keep whole for the proof to hold, found by trial.

        At first every submodule is kept whole, and only the model's own forward is traced. Then submodules of one class are
        opened together, or one by one, as long as the proof holds.
        """
        flattened = {p: m for t in self.traces(whole).values() for p, m in t.flattened.items() if p != "model"}

        def children(path: str) -> list[str]:
            inside = [p for p in flattened if p.startswith(f"{path}.")]
            return [p for p in inside if not any(p.startswith(f"{q}.") for q in inside)]

        kept = {**whole, **dict.fromkeys(children("model"), _BY_PROOF)}
        if not flattened or not self._holds(kept):
            raise RuntimeError(self.not_equal(found))
        waiting = _by_class(children("model"), flattened)
        while waiting:
            group = waiting.pop(0)
            inner = [p for path in group for p in children(path)]
            trial = {p: reason for p, reason in kept.items() if p not in group} | dict.fromkeys(inner, _BY_PROOF)
            if self._holds(trial):
                kept = trial
                waiting += _by_class(inner, flattened)
            elif len(group) > 1:
                waiting += [[path] for path in group]
        return kept

    def _holds(self, whole: Mapping[str, str]) -> bool:
        traces = self.traces(whole)
        graphs = {}
        for mode, trace in traces.items():
            splitter = Splitter(self.root, trace, None, frozenset())
            everything = Subgraph(
                tuple(splitter.nodes), splitter.source, splitter.output.args[0], None, (frozenset(), ())
            )
            graphs[mode] = splitter.module(everything)
        twin = Layer("model", None, graphs[True], graphs[False], others=self.call.shapes)
        return self.difference(twin) is None

    def not_equal(self, found: str) -> str:
        """The error text for a model that its trace does not equal."""
        return (
            f"split_layers: the chain of {type(self.model).__name__} must equal the model to the bit, and it does not in "
            f"{found}: the forward of {type(self.model).__name__} itself is not a function of its input, parameters and "
            "random state that torch.fx can hold; move that code into a submodule, which is then kept whole"
        )

    def _no_cut(self, whole: Mapping[str, str]) -> str:
        kept = [
            f"{path.removeprefix('model.')} ({type(self.root.get_submodule(path)).__name__}): {reason}"
            for path, reason in whole.items()
        ]
        return (
            "split_layers: model must have a cut point, where exactly one tensor is live between two operations with "
            f"weights; {type(self.model).__name__} has none"
            + (f" before its first use of {' or '.join(self.call.names)}" if self.call.names else "")
            + (f"; kept whole: {'; '.join(kept)}" if kept else "")
        )


def _by_class(paths: Sequence[str], modules: Mapping[str, nn.Module]) -> list[list[str]]:
    groups: dict[type, list[str]] = {}
    for path in paths:
        groups.setdefault(type(modules[path]), []).append(path)
    return list(groups.values())


def _check_arguments(model: nn.Module, example: torch.Tensor, layers: Sequence[str] | None, *, given: bool) -> None:
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
    if len(required) != 1 and not given:
        raise ValueError(
            f"split_layers: model must have one input, got {len(required)}: {', '.join(required) or 'none'}; say with "
            "inputs= what it is called with, or wrap it in a module that takes the image alone"
        )
    if any(vars(model)[hooks] for hooks in HOOKS):
        raise ValueError(
            f"split_layers: model must have no hooks of its own, which would not run after a drop, got some on "
            f"{type(model).__name__}; put them on its submodules, or remove them"
        )
    if is_lazy(model):
        raise ValueError("split_layers: model must have its parameters, got lazy ones; call it once on a batch before")
    known = dict(model.named_modules())
    for name in layers or ():
        if name not in known:
            raise ValueError(f"split_layers: layers must name modules of the model, got {name!r}")


def user_hooks(module: nn.Module) -> dict[str, list[int]]:
    """The keys of a module's hooks by kind, except those of torch itself (weight_norm)."""
    return {
        kind: [key for key, hook in vars(module)[kind].items() if not type(hook).__module__.startswith("torch.")]
        for kind in HOOKS
    }


@contextlib.contextmanager
def _without_hooks(model: nn.Module) -> Iterator[None]:
    """Remove the user's hooks inside, because this is not a training step."""
    held = [(vars(m)[kind], keys, dict(vars(m)[kind])) for m in model.modules() for kind, keys in user_hooks(m).items()]
    try:
        for table, keys, _ in held:
            for key in keys:
                del table[key]
        yield
    finally:
        for table, keys, hooks in held:
            if keys:
                table.clear()
                table.update(hooks)


@contextlib.contextmanager
def _preserved(model: nn.Module) -> Iterator[ModelState]:
    """Restore the model and all random states on leaving."""
    state = ModelState(model)
    try:
        with fork_rng(0):
            yield state
    finally:
        state.restore()


def _unique(name: str, taken: dict[str, int]) -> str:
    taken[name] = taken.get(name, 0) + 1
    return name if taken[name] == 1 else f"{name}#{taken[name]}"
