"""Proves that a chain computes the same as its model: values and side effects to the bit, gradients within rounding."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import nn

from learndrop_ext.cudnn import without_benchmark
from learndrop_ext.graph.call import CalledWith
from learndrop_ext.graph.state import ModelState, flatten
from learndrop_ext.rng import fork_rng


@dataclass(frozen=True)
class _Situation:
    """A mode, a random seed, whether all weights are changed first, and whether gradients are compared.

    A value computed from a weight while tracing is a constant of the trace, and wrong for changed weights.
    """

    training: bool
    seed: int
    moved: bool
    gradients: bool = True


SITUATIONS = (_Situation(False, 0, True), _Situation(True, 1, False), _Situation(True, 2, True))

#: Quick, and writes to no parameter.
AS_IT_IS = (_Situation(False, 0, False, gradients=False), _Situation(True, 1, False, gradients=False))


@dataclass(frozen=True)
class _Run:
    """The results of one forward and backward pass."""

    outputs: tuple[tuple[str, Any], ...]
    gradients: dict[str, torch.Tensor | None] | None  # None: the backward pass failed, or nothing requires a gradient
    effects: dict[str, torch.Tensor]  # tensors of the model that were written to


def difference(
    model: CalledWith,
    twin: nn.Module,
    inputs: Sequence[torch.Tensor],
    state: ModelState,
    *,
    situations: Sequence[_Situation] = SITUATIONS,
) -> str | None:
    """Compare a module that shares a model's weights with the model, in both modes and with several random seeds.

    Args:
        model: the model, called with its tensors.
        twin: a module that should compute the same with the same parameters and buffers.
        inputs: a batch of the model's tensors, the image [B, ...] first.
        state: the model's current state, which is restored.
        situations: modes and seeds to compare in.

    Returns:
        The first difference ("train mode: the gradient of fc.weight"), or None.
    """
    flags = [(m, m.training) for m in twin.modules()]
    try:
        for situation in situations:
            found = _difference(model, twin, inputs, state, situation)
            if found:
                return f"{'train' if situation.training else 'eval'} mode: {found}"
        return None
    finally:
        state.restore()
        for module, training in flags:
            module.training = training


def _difference(
    model: CalledWith, twin: nn.Module, inputs: Sequence[torch.Tensor], state: ModelState, now: _Situation
) -> str | None:
    def run(module: nn.Module, situation: _Situation) -> _Run:
        model.train(situation.training)
        twin.train(situation.training)
        return _run(module, model, inputs, state, situation)

    try:
        wanted = run(model, now)
    except Exception:
        if not now.moved:
            raise
        now = replace(now, moved=False)  # the model itself cannot run with changed weights
        wanted = run(model, now)
    try:
        got = run(twin, now)
    except Exception as error:
        return f"the call, which fails: {error}"
    return _compare(wanted, got)


def _run(
    module: nn.Module, model: CalledWith, inputs: Sequence[torch.Tensor], state: ModelState, situation: _Situation
) -> _Run:
    weights: dict[str, torch.Tensor] = {name: p for name, p in model.model.named_parameters() if p.requires_grad}
    try:
        with fork_rng(situation.seed), without_benchmark(inputs[0].device, deterministic=True):
            if situation.moved:
                with torch.no_grad():
                    for tensor in state.floating():
                        tensor.mul_(0.984375)
            entering = [x.detach().clone() for x in inputs]
            for name, x in zip(("the input", *model.call.names), entering, strict=True):
                if x.is_floating_point():
                    weights[name] = x.requires_grad_()
            with torch.enable_grad():
                outputs = tuple(flatten(module(*(x.clone() for x in entering))))
                gradients = _gradients(outputs, weights) if situation.gradients else None
        values = [(path, v.detach().clone() if isinstance(v, torch.Tensor) else v) for path, v in outputs]
        values += [(f"{path}.requires_grad", v.requires_grad) for path, v in outputs if isinstance(v, torch.Tensor)]
        return _Run(tuple(values), gradients, state.changes(parameters=not situation.moved))
    finally:
        state.restore(noting=not situation.moved)


def _gradients(
    outputs: tuple[tuple[str, Any], ...], weights: dict[str, torch.Tensor]
) -> dict[str, torch.Tensor | None] | None:
    """The gradients of a random linear function of all outputs."""
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


def _compare(wanted: _Run, got: _Run) -> str | None:
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
    largest = max((float(g.abs().max()) for g in one.values() if g is not None and g.numel()), default=0.0)
    for name in one:
        a, b = one[name], two[name]
        if not _same(a, b) and not _within_rounding(a, b, largest):
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


def _within_rounding(a: torch.Tensor | None, b: torch.Tensor | None, largest: float) -> bool:
    """Whether two gradients differ by no more than the order of summation may cause, which for the weights of a convolution
    depends on threads and addresses. Another backward pass would differ by far more.

    largest: the largest value of all gradients. A gradient that is small in comparison may be nothing but rounding, as
    before a batch norm over two values.
    """
    if a is None or b is None or a.shape != b.shape:
        return False
    relative = 2e-2 if a.dtype.itemsize == 2 else 1e-4
    return bool((a - b).abs().max() <= relative * max(float(a.abs().max()), 1e-2 * largest))
