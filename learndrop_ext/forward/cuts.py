"""The cuts of a model's forward, and the layers between them, from recorded forwards.

A *cut* is the output of a module after which exactly one tensor computed from the images is still needed. A *layer* is what
runs between two cuts: it starts at an operation with weights (a convolution, a linear map, or a residual block, inside
which two tensors are needed) and includes the norms, activations and pools that follow. Dropout belongs to the next layer,
so that its noise stays fresh.
"""

from __future__ import annotations

import contextlib
import copy
import warnings
from bisect import bisect_right
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from types import FunctionType, ModuleType
from typing import Any

import torch
from torch import nn
from torch.utils.checkpoint import CheckpointFunction

from learndrop_ext.cudnn import without_benchmark
from learndrop_ext.forward.record import ModuleCall, Recording, tensors_of
from learndrop_ext.rng import fork_rng


@dataclass(frozen=True)
class Cut:
    """The end of a layer: the output of `module`.

    Args:
        path: name of the module.
        module: the module.
        shape: shape of its output without the batch dimension.
        written: whether a later operation of the forward writes into the output.
        call: its call in the recorded forward.
    """

    path: str
    module: nn.Module = field(repr=False)
    shape: tuple[int, ...]
    written: bool
    call: ModuleCall = field(repr=False)


@dataclass(frozen=True)
class Layer:
    """One layer of a model.

    Args:
        name: path of the innermost module that holds all of its weights, or of the first one with weights.
        cut: where it ends; None for the last layer.
        tensors: names in the model of its parameters.
        flops: forward FLOPs per sample.
        first_flops: those of its first operation with some.
    """

    name: str
    cut: Cut | None
    tensors: tuple[str, ...]
    flops: int
    first_flops: int

    @property
    def shape(self) -> tuple[int, ...] | None:
        """Shape of its output without the batch dimension; None for the last layer."""
        return None if self.cut is None else self.cut.shape


@dataclass(frozen=True)
class Recorded:
    """What two recorded forwards of a model say.

    Args:
        layers: the layers.
        calls: the module calls in eval mode.
        samples: number of samples that were recorded.
        storing: modules with an attribute in which forward has stored a tensor of the images.
        reentrant: whether a reentrant checkpoint ran, whose part learns only if its input has a gradient.
    """

    layers: tuple[Layer, ...]
    calls: tuple[ModuleCall, ...] = field(repr=False)
    samples: int
    storing: frozenset[nn.Module] = field(repr=False, default=frozenset())
    reentrant: bool = False


def record_layers(model: nn.Module, call: Callable[[], Any], image: torch.Tensor) -> Recorded:
    """Find a model's layers by recording two forwards of a few samples, in eval and in train mode.

    The model is left as it was: modes, buffers, attributes and gradients, and the random state.

    Args:
        model: the model.
        call: calls it on `image`; for models that take more, with the rest.
        image: [B, ...], B >= 2 samples, because batch statistics need two values.

    Raises:
        ValueError: the model has no cut.
    """
    with preserved(model), torch.no_grad(), without_benchmark(image.device), warnings.catch_warnings():
        # A checkpoint says so of its input, which has no gradient here.
        warnings.filterwarnings("ignore", "None of the inputs have requires_grad=True")
        recordings = []
        for training in (False, True):
            model.train(training)
            recordings.append(Recording(model, image))
            with _reentrant_checkpoints() as reentrant:
                recordings[-1].run(call)
    evaluated, trained = recordings
    cuts = _cuts(model, evaluated, trained, len(image))
    if not cuts:
        raise ValueError(
            "split_layers: model must have a cut, a module after which exactly one tensor is still needed, with weights "
            f"before and after it; {type(model).__name__} has none"
        )
    layers = _layers(model, evaluated, cuts, len(image))
    return Recorded(layers, tuple(evaluated.calls), len(image), evaluated.storing | trained.storing, bool(reentrant))


@contextlib.contextmanager
def _reentrant_checkpoints() -> Iterator[list[None]]:
    """Give a list to which each reentrant checkpoint inside adds an entry."""
    found: list[None] = []
    forward = CheckpointFunction.forward

    def note(*args: Any) -> Any:
        found.append(None)
        return forward(*args)

    CheckpointFunction.forward = staticmethod(note)
    try:
        yield found
    finally:
        CheckpointFunction.forward = staticmethod(forward)


@contextlib.contextmanager
def preserved(model: nn.Module) -> Iterator[None]:
    """Restore modes, attributes, buffers and gradients of the model, and the random state, on leaving."""
    buffers = [(b, b.detach().clone()) for b in model.buffers()]
    gradients = [(p, p.grad) for p in model.parameters()]
    for parameter, _ in gradients:
        parameter.grad = None
    try:
        with attributes_preserved(model), fork_rng(0):
            yield
    finally:
        with torch.no_grad():
            for buffer, value in buffers:
                buffer.copy_(value)
        for parameter, gradient in gradients:
            parameter.grad = gradient


@contextlib.contextmanager
def attributes_preserved(model: nn.Module) -> Iterator[None]:
    """Restore the attributes of all modules on leaving. Of one that is a list, a dict, a set or an object with attributes,
    what it holds is restored too."""
    modules = list(model.modules())
    attributes = [dict(vars(module)) for module in modules]
    tables = [held for module in modules for held in map(_contents, vars(module).values()) if held is not None]
    copies = [copy.copy(held) for held in tables]
    try:
        yield
    finally:
        for module, before in zip(modules, attributes, strict=True):
            vars(module).clear()
            vars(module).update(before)
        for held, content in zip(tables, copies, strict=True):
            held.clear()
            held.extend(content) if isinstance(held, list) else held.update(content)


def _contents(value: Any) -> list[Any] | dict[Any, Any] | set[Any] | None:
    """What can be emptied and filled again of an attribute's value."""
    if isinstance(value, list | dict | set):
        return value
    if isinstance(value, nn.Module | torch.Tensor | type | ModuleType | FunctionType):
        return None
    return getattr(value, "__dict__", None)


def _cuts(model: nn.Module, evaluated: Recording, trained: Recording, samples: int) -> list[Cut]:
    """The last cut of each gap between two operations with weights, before any dropout there."""
    weighted = sorted({when for name, uses in evaluated.uses.items() if _is_weight(model, name) for when in uses})
    learning = {name for name, p in model.named_parameters(remove_duplicate=False) if p.requires_grad}
    also = {call.path for call in _candidates(trained, model, learning, samples)}
    missing = {call.path for call in evaluated.calls} - {call.path for call in trained.calls}
    gaps: dict[int, list[ModuleCall]] = {}
    for call in _candidates(evaluated, model, learning, samples):
        gap = bisect_right(weighted, call.end)
        if 0 < gap < len(weighted) and (call.path in also or call.path in missing):
            gaps.setdefault(gap, []).append(call)
    dropouts = [call for call in evaluated.calls if _is_dropout(call.module)]
    found = []
    for gap, calls in sorted(gaps.items()):
        noisy = min((d.order for d in dropouts if bisect_right(weighted, d.end) == gap), default=None)
        quiet = [call for call in calls if noisy is None or call.order < noisy] or calls
        end = max(call.end for call in quiet)
        best = min((call for call in quiet if call.end == end), key=lambda call: call.depth)
        found.append(best)
    return [
        Cut(
            call.path,
            call.module,
            tuple(call.output.shape[1:]),
            evaluated.written.get(call.output.untyped_storage()._cdata, 0) > call.end,
            call,
        )
        for call in found
    ]


def _candidates(recording: Recording, model: nn.Module, learning: set[str], samples: int) -> Iterator[ModuleCall]:
    """The calls of modules called once after whose output alone the forward goes on."""
    alive, shared = recording.alive(), recording.shared(learning)
    often: dict[nn.Module, int] = {}
    for call in recording.calls:
        often[call.module] = often.get(call.module, 0) + 1
    for call in sorted(recording.calls, key=lambda call: call.order):
        out = call.output
        if call.module is model or often[call.module] > 1 or isinstance(call.module, torch.jit.ScriptModule):
            continue
        if not isinstance(out, torch.Tensor) or not recording.of_images(out) or call.end > recording.escape:
            continue
        if out.dim() < 2 or len(out) != samples or not out.is_floating_point() or alive[call.end] != 1:
            continue
        if not shared[call.end] and recording.last.get(out.untyped_storage()._cdata, 0) > call.end:
            yield call


def _layers(model: nn.Module, recording: Recording, cuts: Sequence[Cut], samples: int) -> tuple[Layer, ...]:
    ends = [cut.call.end for cut in cuts]
    tensors: list[list[str]] = [[] for _ in range(len(cuts) + 1)]
    for name, _ in model.named_parameters():
        # What the recorded forward did not use counts as part of the last layer.
        at = bisect_right(ends, recording.uses[name][0] - 1) if recording.uses.get(name) else len(cuts)
        tensors[at].append(name)
    flops, first_flops = [0] * (len(cuts) + 1), [0] * (len(cuts) + 1)
    for when, count in recording.flops.items():
        at = bisect_right(ends, when - 1)
        first_flops[at] = first_flops[at] or count
        flops[at] += count
    taken: dict[str, int] = {}
    layers = []
    for i in range(len(cuts) + 1):
        name = _name([n for n in tensors[i] if _is_weight(model, n) and recording.uses.get(n)] or tensors[i])
        taken[name] = taken.get(name, 0) + 1
        unique = name if taken[name] == 1 else f"{name}#{taken[name]}"
        cut = cuts[i] if i < len(cuts) else None
        layers.append(Layer(unique, cut, tuple(tensors[i]), flops[i] // samples, first_flops[i] // samples))
    return tuple(layers)


def _name(weights: Sequence[str]) -> str:
    """The path of the innermost module that holds all of these parameters, or of the first one's module."""
    owners = [name.split(".")[:-1] for name in weights]
    depth = 0
    while owners and all(len(o) > depth for o in owners) and len({o[depth] for o in owners}) == 1:
        depth += 1
    return ".".join(owners[0][:depth] or owners[0]) if owners and owners[0] else "layer"


def _is_weight(model: nn.Module, name: str) -> bool:
    """Whether a parameter is more than one value per channel, and not of a norm."""
    parameter = model.get_parameter(name)
    owner = model.get_submodule(name.rpartition(".")[0])
    return parameter.dim() > 1 and parameter.numel() > max(parameter.shape) and "Norm" not in type(owner).__name__


def _is_dropout(module: nn.Module) -> bool:
    kind = type(module).__name__
    return (
        isinstance(module, nn.modules.dropout._DropoutNd)
        or "Dropout" in kind
        or "DropPath" in kind
        or kind == "StochasticDepth"
    )


def outermost(calls: Sequence[ModuleCall], cut: ModuleCall, inside: Sequence[ModuleCall] = ()) -> list[ModuleCall]:
    """Return the outermost calls that end before `cut` does, of modules that are not called after it.

    Args:
        calls: all calls of the forward.
        cut: the call at the cut.
        inside: calls of earlier cuts; calls around them are not returned, but those within.
    """
    last: dict[nn.Module, int] = {}
    for call in calls:
        last[call.module] = max(last.get(call.module, 0), call.order)
    stops = (cut, *inside)
    before = [c for c in calls if last[c.module] < cut.order and not any(c.around(s) or c is s for s in stops)]
    found: list[ModuleCall] = []
    until = -1
    for call in before:  # in the order in which they began
        if call.order > until:
            found.append(call)
            until = call.order
    return found


def has_plain_output(call: ModuleCall) -> bool:
    """Return whether all tensors of a call's output can be seen, so that others can stand for them."""
    leaves = torch.utils._pytree.tree_leaves(call.output)
    return sum(isinstance(leaf, torch.Tensor) for leaf in leaves) == len(list(tensors_of(call.output)))
