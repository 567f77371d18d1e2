"""The cuts of a model's forward, and the layers between them, from recorded forwards.

A *cut* is the output of a module, or the first argument that a module gets, after which exactly one tensor computed from
the images is still needed. A *layer* is what runs between two cuts: it starts at an operation with weights (a convolution,
a linear map, or a residual block, inside which two tensors are needed) and includes the norms, activations and pools that
follow. Dropout belongs to the next layer, so that its noise stays fresh.
"""

from __future__ import annotations

import contextlib
import math
import warnings
from bisect import bisect_right
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import nn
from torch.utils.checkpoint import CheckpointFunction

from learndrop_ext.cudnn import without_benchmark
from learndrop_ext.forward.images import Form
from learndrop_ext.forward.record import GIVEN, RANDOM, ModuleCall, Recording
from learndrop_ext.preserve import preserved


class Hook:
    """A hook on a module of the user's model. A copy of the model, by `copy` or `pickle`, has one that does nothing."""

    def __init__(self, function: Callable[..., Any]) -> None:
        self.function = function

    def __call__(self, *args: Any) -> Any:
        return self.function(*args)

    @property
    def __name__(self) -> str:
        """Asked for by torch.jit.script, which would compile the hook: AttributeError."""
        raise AttributeError("torch.jit.script must get a model without dropped layers: call drop.close() first")

    def __reduce__(self) -> Any:
        return Hook, (_nothing,)


@dataclass(frozen=True)
class Cut:
    """The end of a layer: where a tensor leaves `module` or, at its entry, enters it."""

    path: str  # name of the module
    module: nn.Module = field(repr=False)
    is_entry: bool  # whether the tensor enters the module
    at: int = field(repr=False)  # number of operations before it in the recorded forward
    shape: tuple[int, ...]  # without the batch dimension
    dtype: torch.dtype
    written: bool = field(repr=False)  # whether a later operation of the forward writes into the tensor

    def watch(self, function: Callable[[Any], Any]) -> Any:
        """Call `function` on each tensor that passes, before all other hooks; what it returns goes on, unless it is None.
        Return a handle with a method `remove`."""
        if not self.is_entry:
            return self.module.register_forward_hook(Hook(lambda _, args, output: function(output)), prepend=True)

        def enter(_: nn.Module, args: tuple[Any, ...]) -> Any:
            other = function(args[0])
            return None if other is None else (other, *args[1:])

        return self.module.register_forward_pre_hook(Hook(enter), prepend=True)


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
    """What two recorded forwards of a model say. Cuts are numbered by the layers before them."""

    model: nn.Module = field(repr=False)
    layers: tuple[Layer, ...]
    calls: tuple[ModuleCall, ...] = field(repr=False)  # those in eval mode, in the order in which they began
    image: Form  # what the model was given of the images
    samples: int  # number of samples that were recorded
    storing: frozenset[nn.Module] = field(repr=False)  # modules in an attribute of which forward stored a tensor
    reentrant: bool  # whether a reentrant checkpoint ran, whose part learns only if its input has a gradient

    def cut(self, k: int) -> Cut:
        """Return the cut behind the first k layers."""
        cut = self.layers[k - 1].cut
        assert cut is not None
        return cut

    def calls_before(
        self, k: int, within: Sequence[int] = (), opened: Callable[[ModuleCall], bool] = lambda call: False
    ) -> Iterator[ModuleCall]:
        """Yield the outermost calls that have ended at cut k, of modules that are not called later, with none of the cuts
        `within` inside them; and those inside calls that are `opened`."""
        at, inner, spans = self.cut(k).at, [self.cut(other).at for other in within], self._spans
        used = {name for layer in self.layers[:k] for name in layer.tensors}
        until = 0
        for call in self.calls:
            if call.begin < until or spans[call.module][1] > at or any(map(call.has_within, inner)):
                continue
            # One that runs first, on other inputs, may be a part of the layers behind the cut.
            if call.sees_images or any(f"{call.path}.{name}" in used for name, _ in call.module.named_parameters()):
                yield call
                until = until if opened(call) else call.end

    @property
    def _spans(self) -> dict[nn.Module, tuple[int, int]]:
        """When the first call of each module began, and the last one ended."""
        spans: dict[nn.Module, tuple[int, int]] = {}
        for call in self.calls:
            begin, end = spans.get(call.module, (call.begin, 0))
            spans[call.module] = begin, max(end, call.end)
        return spans

    def ended(self, k: int) -> list[nn.Module]:
        """Return the modules that have seen the images and are not called any more, or not returned from, after cut k."""
        seen = {call.module for call in self.calls if call.sees_images}
        return [module for module, (_, end) in self._spans.items() if module in seen and end <= self.cut(k).at]

    def across(self, k: int) -> list[nn.Module]:
        """Return the modules that run before cut k and after it: those `around`, and others that are called twice."""
        at = self.cut(k).at
        return [module for module, (begin, end) in self._spans.items() if begin < at < end]

    def before(self, k: int) -> list[nn.Module]:
        """Return the outermost modules that only the first k layers run."""
        return [call.module for call in self.calls_before(k)] if k else []

    def around(self, k: int) -> list[nn.Module]:
        """Return the modules that run some of the first k layers and others: the model itself, and parts of it."""
        return list(dict.fromkeys(call.module for call in self.calls if call.has_within(self.cut(k).at)))

    def behind(self, k: int) -> list[nn.Module]:
        """Return the outermost modules that the first k layers do not run."""
        passed = {m for before in self.before(k) for m in before.modules()} | set(self.around(k))
        found: list[nn.Module] = []
        for module in self.model.modules():
            if module not in passed:
                found.append(module)
                passed |= set(module.modules())
        return found


def record_layers(model: nn.Module, call: Callable[[], Any], image: torch.Tensor) -> Recorded:
    """Find a model's layers by recording two forwards of a few samples, in eval and in train mode.

    The model is left as it was: modes, buffers, attributes and gradients, and the random state. `call` calls it on `image`
    [B, ...], B >= 2 samples, because batch statistics need two values; for models that take more, with the rest.

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
    storing = evaluated.storing | trained.storing
    return Recorded(model, layers, tuple(evaluated.calls), evaluated.image, len(image), storing, bool(reentrant))


@contextlib.contextmanager
def _reentrant_checkpoints() -> Iterator[list[None]]:
    """Give a list to which each reentrant checkpoint inside adds an entry."""
    found: list[None] = []
    forward: Any = CheckpointFunction.forward

    def note(*args: Any) -> Any:
        found.append(None)
        return forward(*args)

    CheckpointFunction.forward = staticmethod(note)  # type: ignore[method-assign]
    try:
        yield found
    finally:
        CheckpointFunction.forward = staticmethod(forward)  # type: ignore[method-assign]


def _cuts(model: nn.Module, evaluated: Recording, trained: Recording, samples: int) -> list[Cut]:
    """One cut in each gap between two operations with weights, before any dropout there.

    It is the last output of a module, or, where that makes the rows smaller, an input: that of the module behind a
    functional pool.
    """
    twins = {(cut.path, cut.is_entry): (cut, is_quiet) for cut, _, is_quiet in _candidates(trained, model, samples)}
    missing = {call.path for call in evaluated.calls} - {call.path for call in trained.calls}
    gaps: dict[int, list[tuple[Cut, bool]]] = {}
    for cut, gap, _ in _candidates(evaluated, model, samples):
        twin, is_quiet = twins.get((cut.path, cut.is_entry), (cut, True))
        if twin is not cut or cut.path in missing:
            gaps.setdefault(gap, []).append((replace(cut, written=cut.written or twin.written), is_quiet))
    cuts = []
    for _, found in sorted(gaps.items()):
        quiet = [cut for cut, is_quiet in found if is_quiet] or [cut for cut, _ in found]
        last = max([cut for cut in quiet if not cut.is_entry] or quiet[:1], key=lambda cut: cut.at)
        cuts.append(min((last, *(cut for cut in quiet if cut.is_entry)), key=lambda cut: math.prod(cut.shape)))
    return cuts


def _candidates(recording: Recording, model: nn.Module, samples: int) -> Iterator[tuple[Cut, int, bool]]:
    """The tensors that enter or leave modules called once, and from which alone the forward goes on. Of each, the operations
    with weights before it are counted, and whether no random numbers were drawn since the last of these."""
    learning = {name for name, p in model.named_parameters(remove_duplicate=False) if p.requires_grad}
    alive, shared = recording.alive(), recording.shared(learning)
    weighted = sorted(when for name, uses in recording.uses.items() if _is_weight(model, name) for when in uses)
    noise = recording.uses.get(RANDOM, [])
    met = min(recording.uses.get(GIVEN, ()), default=recording.now + 1)  # rows depend on the images alone
    often = Counter(call.module for call in recording.calls)
    for call in recording.calls:
        if call.module is model or often[call.module] > 1 or isinstance(call.module, torch.jit.ScriptModule):
            continue
        for passing in (call.entry, call.exit):
            if passing is None or passing.at > min(recording.escape, met - 1):
                continue
            if alive[passing.at] != 1 or shared[passing.at]:
                continue
            form, at, is_entry = passing.form, passing.at, passing is call.entry
            gap = bisect_right(weighted, at)
            is_row = len(form.shape) > 1 and form.shape[0] == samples and form.dtype.is_floating_point
            if is_row and 0 < gap < len(weighted) and recording.last.get(passing.storage, 0) > at:
                is_quiet = not any(weighted[gap - 1] < when <= at for when in noise)
                written = recording.is_written(passing)
                yield Cut(call.path, call.module, is_entry, at, form.shape[1:], form.dtype, written), gap, is_quiet


def _layers(model: nn.Module, recording: Recording, cuts: Sequence[Cut], samples: int) -> tuple[Layer, ...]:
    ends = [cut.at for cut in cuts]
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
    taken: Counter[str] = Counter()
    layers = []
    for i, cut in enumerate((*cuts, None)):
        name = _name([n for n in tensors[i] if _is_weight(model, n) and recording.uses.get(n)] or tensors[i])
        taken[name] += 1
        unique = name if taken[name] == 1 else f"{name}#{taken[name]}"
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
    if name in (RANDOM, GIVEN):
        return False
    parameter = model.get_parameter(name)
    owner = model.get_submodule(name.rpartition(".")[0])
    return parameter.dim() > 1 and parameter.numel() > max(parameter.shape) and "Norm" not in type(owner).__name__


def _nothing(*_: Any) -> None:
    """What a copy of the model has in place of a hook."""
