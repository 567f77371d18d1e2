"""The proof that a chain computes what its model does: values, gradients and side effects, to the bit."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from learndrop_ext.graph.state import ModelState, flatten
from learndrop_ext.rng import fork_rng

#: Mode (training or not), random state, and whether all weights are moved first: what was computed from a weight while
#: tracing is then found out.
_SITUATIONS = ((False, 0, False), (False, 1, True), (True, 2, False), (True, 3, False), (True, 4, True))


@dataclass(frozen=True)
class _Run:
    """What one forward and backward pass gives."""

    outputs: tuple[tuple[str, Any], ...]
    gradients: dict[str, torch.Tensor | None] | None  # None: the backward pass failed, or there is nothing to derive
    effects: dict[str, torch.Tensor]  # tensors of the model that were written to


@contextlib.contextmanager
def deterministic_algorithms(x: torch.Tensor) -> Iterator[None]:
    """The same algorithm at each call, so that equal inputs give equal bits on a GPU too."""
    if x.device.type != "cuda":
        yield
        return
    with torch.backends.cudnn.flags(deterministic=True, benchmark=False):
        yield


def difference(model: nn.Module, twin: nn.Module, x: torch.Tensor) -> str | None:
    """Compare a module that shares a model's weights with the model, in both modes and several random states.

    Args:
        model: the model.
        twin: a module that should compute the same, from the same parameters and buffers.
        x: a batch of the model's inputs, [B, ...].

    Returns:
        What differs first ("train mode: the gradient of fc.weight"), or None. The model is left as it was found.
    """
    state = ModelState(model)
    flags = [(m, m.training) for m in twin.modules()]
    try:
        for training, seed, moved in _SITUATIONS:

            def run(module: nn.Module, training: bool = training, seed: int = seed, moved: bool = moved) -> _Run:
                model.train(training)
                twin.train(training)
                return _run(module, model, x, state, seed=seed, moved=moved)

            try:
                wanted = run(model)
            except Exception:
                if moved:  # the model itself refuses such weights
                    continue
                raise
            try:
                got = run(twin)
            except Exception as error:
                found: str | None = f"the call, which fails: {error}"
            else:
                found = _compare(wanted, got, lambda: run(model), x)
            if found:
                return f"{'train' if training else 'eval'} mode: {found}"
        return None
    finally:
        state.restore()
        for module, training in flags:
            module.training = training


def _run(module: nn.Module, model: nn.Module, x: torch.Tensor, state: ModelState, *, seed: int, moved: bool) -> _Run:
    weights = {name: p for name, p in model.named_parameters() if p.requires_grad}
    try:
        with fork_rng(seed), deterministic_algorithms(x):
            if moved:
                with torch.no_grad():
                    for tensor in state.floating():
                        tensor.mul_(0.984375)
            entering = x.detach().clone()
            if entering.is_floating_point():
                weights["the input"] = entering.requires_grad_()
            with torch.enable_grad():
                outputs = tuple(flatten(module(entering.clone())))
                gradients = _gradients(outputs, weights)
        kept = tuple((path, v.detach().clone() if isinstance(v, torch.Tensor) else v) for path, v in outputs)
        marks = tuple((path, v.requires_grad) for path, v in outputs if isinstance(v, torch.Tensor))
        return _Run((*kept, *((f"{path}.requires_grad", value) for path, value in marks)), gradients, state.changes())
    finally:
        state.restore()


def _gradients(
    outputs: tuple[tuple[str, Any], ...], weights: dict[str, torch.Tensor]
) -> dict[str, torch.Tensor | None] | None:
    """Gradients of a random linear function of all outputs."""
    tensors = [v for _, v in outputs if isinstance(v, torch.Tensor) and v.requires_grad and v.is_floating_point()]
    if not tensors:
        return None
    generator = torch.Generator().manual_seed(0)
    directions = [torch.randn(v.shape, generator=generator).to(v.device, v.dtype) for v in tensors]
    try:
        found = torch.autograd.grad(tensors, list(weights.values()), directions, allow_unused=True)
    except RuntimeError:
        return None
    return dict(zip(weights, found, strict=True))


def _compare(wanted: _Run, got: _Run, again: Callable[[], _Run], x: torch.Tensor) -> str | None:
    if [path for path, _ in wanted.outputs] != [path for path, _ in got.outputs]:
        return "the structure of the output"
    for (path, a), (_, b) in zip(wanted.outputs, got.outputs, strict=True):
        if not _same(a, b):
            return f"output{path}"
    for name in wanted.effects.keys() | got.effects.keys():
        if not _same(wanted.effects.get(name), got.effects.get(name)):
            return f"the buffer {name} after the call"
    one, two = wanted.gradients, got.gradients
    if one is None or two is None:
        return None if one is two else "whether there are gradients"
    repeated: dict[str, torch.Tensor | None] | None = None
    for name in one:
        if _same(one[name], two[name]):
            continue
        if x.device.type == "cuda" and one[name] is not None and two[name] is not None:
            # Some backward passes on a GPU add in no fixed order: where the model does not repeat its own bits, the
            # twin must be as near to it as rounding allows.
            repeated = repeated or again().gradients or {}
            a, b = one[name], two[name]
            assert a is not None and b is not None
            if not _same(a, repeated.get(name)) and bool((a - b).abs().max() <= 1e-3 * a.abs().max()):
                continue
        return f"the gradient of {name}"
    return None


def _same(a: Any, b: Any) -> bool:
    if isinstance(a, torch.Tensor) and isinstance(b, torch.Tensor):
        if a.shape != b.shape or a.dtype != b.dtype:
            return False
        return torch.equal(a, b) or bool((a.isnan() & b.isnan() | (a == b)).all())
    if isinstance(a, torch.Tensor) or isinstance(b, torch.Tensor):
        return False
    return a is b or bool(a == b)
