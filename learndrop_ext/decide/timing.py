"""Whole training steps of the user's model, timed: which part of a step each layer takes.

Layers are timed where they run, by hooks at their cuts, so that what the host does between them counts too.
"""

from __future__ import annotations

import contextlib
import copy
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from learndrop_ext.cudnn import without_benchmark
from learndrop_ext.decide.costs import LayerCost
from learndrop_ext.decide.probes import copy_bytes_per_second, wait_for
from learndrop_ext.forward.chain import Chain
from learndrop_ext.forward.cuts import Cut
from learndrop_ext.forward.record import tensors_of
from learndrop_ext.preserve import preserved

#: Training steps that are timed after one to warm up; the shorter of the two counts, because other work on the machine only
#: makes a step longer.
STEPS = 2
#: Bytes that an optimizer which cannot be timed is assumed to move for each parameter, in fp32: weight, gradient and two
#: states are read, weight and states written.
ASSUMED_BYTES = 7 * 4
#: Share of an operation's backward pass that computes the gradient of its input and not of its weights. The first live layer
#: does not need it of its first operation.
INPUT_GRADIENT = 0.5


@dataclass(frozen=True)
class StepCosts:
    """Costs per sample of a training step.

    Args:
        layers: cost of each layer.
        other_seconds: seconds of a step outside of layers and optimizer: loss, overhead.
        optimizer_seconds: seconds of the optimizer with all layers live.
        step_seconds: seconds of the whole step for the batch.
    """

    layers: tuple[LayerCost, ...]
    other_seconds: float
    optimizer_seconds: float
    step_seconds: float


def untimed(chain: Chain) -> tuple[LayerCost, ...]:
    """Return the layers' FLOPs and shapes, without times."""
    return tuple(
        LayerCost(layer.name, layer.flops, 0.0, 0.0, layer.shape, parameters=_elements(chain, i))
        for i, layer in enumerate(chain)
    )


def time_step(
    chain: Chain, run: Callable[[], Any], optimizer: torch.optim.Optimizer, *, batch: int, device: torch.device
) -> StepCosts:
    """Time training steps of the model: forward, backward, and `optimizer.step()` on a copy of the optimizer.

    In place of the user's loss it takes the sum of the mean squares of all floating-point outputs. Model, optimizer,
    gradients and the random state are not changed.

    Args:
        chain: the model's layers.
        run: calls the model on a batch, in the loop's way.
        optimizer: the user's optimizer.
        batch: number of samples in the batch.
        device: the model's device.
    """
    steps = []
    with preserved(chain.model), _without_hooks(chain.model), without_benchmark(device), torch.enable_grad():
        chain.model.train()
        for _ in range(1 + STEPS):
            steps.append(_laps(chain, run, device))
            for parameter in chain.model.parameters():
                parameter.grad = None
        best = min(steps[1:], key=lambda laps: laps.total)
        seconds = _optimizer_seconds(optimizer, chain.model, device)
    layers = []
    for i, layer in enumerate(chain):
        forward, backward = best.forward[i] / batch, best.backward[i] / batch
        first = layer.first_flops / layer.flops if layer.flops and best.has_input_gradient[i] else 0.0
        layers.append(
            LayerCost(
                layer.name,
                layer.flops,
                forward,
                forward + backward,
                layer.shape,
                first_seconds=forward + backward * (1 - INPUT_GRADIENT * first),
                parameters=_elements(chain, i),
            )
        )
    other = max(0.0, best.total / batch - sum(layer.train_seconds for layer in layers))
    return StepCosts(tuple(layers), other, seconds / batch, best.total + seconds)


@contextlib.contextmanager
def _without_hooks(model: nn.Module) -> Iterator[None]:
    """Take the hooks of the parameters' gradients away inside: one may call the user's optimizer."""
    hooks = [h for p in model.parameters() for h in (p._backward_hooks, p._post_accumulate_grad_hooks) if h]
    held = [dict(one) for one in hooks]
    for one in hooks:
        one.clear()
    try:
        yield
    finally:
        for one, before in zip(hooks, held, strict=True):
            one.update(before)


@dataclass(frozen=True)
class _Laps:
    """Seconds of each layer's forward and backward pass, whether the latter has a gradient of the layer's input, and
    seconds of the whole."""

    forward: Sequence[float]
    backward: Sequence[float]
    has_input_gradient: Sequence[bool]
    total: float


def _laps(chain: Chain, run: Callable[[], Any], device: torch.device) -> _Laps:
    """Seconds of each layer in one forward and backward pass."""
    on_gpu = device.type == "cuda"

    def now() -> Any:
        if not on_gpu:
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def between(begin: Any, end: Any) -> float:
        return float(begin.elapsed_time(end)) / 1e3 if on_gpu else end - begin

    last = len(chain) - 1
    left: dict[int, Any] = {}  # when the forward left a layer
    entered: dict[int, Any] = {}  # when the backward had the gradient of a layer's output

    # A checkpoint runs its part again in the backward pass. One that is reentrant runs it without gradients before that, so
    # that only the second run says when the gradients of its outputs are there: that of the last one before it began.
    again: list[Any] = []  # when modules began to run again

    def watch(i: int, cut: Cut) -> tuple[Any, Any]:
        def begin(module: nn.Module, _: Any) -> None:
            if i in left:
                again.append(now())

        def leave(row: Any) -> None:
            is_again = i in left
            left.setdefault(i, now())
            if isinstance(row, torch.Tensor) and row.requires_grad:
                row.register_hook(enter_again if is_again else enter)

        def enter(_: torch.Tensor) -> None:
            entered.setdefault(i, now())
            again.clear()

        def enter_again(_: torch.Tensor) -> None:
            entered.setdefault(i, again[0] if again else now())
            again.clear()

        return cut.watch(leave), cut.module.register_forward_pre_hook(begin, prepend=True)

    hooks = [hook for i, one in enumerate(chain) if one.cut is not None for hook in watch(i, one.cut)]
    try:
        wait_for(device)
        begun, first = time.perf_counter(), now()
        outputs = [y for y in tensors_of(run()) if y.is_floating_point() and y.requires_grad]
        left[last] = now()
        if outputs:
            loss = torch.stack([y.float().square().mean() for y in outputs]).sum()
            entered[last] = now()
            loss.backward()
        end = now()
        wait_for(device)
        total = time.perf_counter() - begun
    finally:
        for one in hooks:
            one.remove()
    at = [first]
    for i in range(last + 1):  # in train mode a layer may be passed by
        at.append(left.get(i, at[-1]))
    forward = [between(at[i], at[i + 1]) for i in range(last + 1)]
    backward, after = [0.0] * (last + 1), end
    for i in range(last + 1):
        if i in entered:
            backward[i] = between(entered[i], after)
            after = entered[i]
    has_input_gradient = [any(j in entered for j in range(i)) for i in range(last + 1)]
    return _Laps(forward, backward, has_input_gradient, total)


def _optimizer_seconds(optimizer: torch.optim.Optimizer, model: nn.Module, device: torch.device) -> float:
    """Seconds of a step of a copy of the optimizer; for one that cannot be stepped without a closure, an assumption."""
    try:
        steps = copy.deepcopy(optimizer)
        for group in steps.param_groups:
            for parameter in group["params"]:
                parameter.grad = torch.zeros_like(parameter) if parameter.requires_grad else None
        times = []
        for _ in range(2):
            wait_for(device)
            begin = time.perf_counter()
            steps.step()
            wait_for(device)
            times.append(time.perf_counter() - begin)
        return min(times)
    except Exception as error:  # an optimizer may raise any error of its own
        said = f"{type(error).__name__}: {error}".removesuffix(": ")
        elements = sum(p.numel() for p in model.parameters())
        seconds = ASSUMED_BYTES * elements / copy_bytes_per_second(device)
        warnings.warn(
            f"DropScheduler: {type(optimizer).__name__}.step() cannot be timed on a copy ({said}), as it may need a "
            f"closure: forward and backward were timed once, and a step of it is assumed to take {1e3 * seconds:.1f} ms; "
            "the first epochs correct that",
            RuntimeWarning,
            stacklevel=6,  # who made the DropScheduler, or called its step() or forecast()
        )
        return seconds


def _elements(chain: Chain, i: int) -> int:
    return sum(p.numel() for p in chain.parameters(i, i + 1) if p.requires_grad)
