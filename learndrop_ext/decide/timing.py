"""Whole training steps of the user's model, timed: which part of a step each layer takes.

Layers are timed where they run, by hooks at their cuts, so that what the host does between them counts too.
"""

from __future__ import annotations

import contextlib
import copy
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import nn

from learndrop_ext.cudnn import without_benchmark
from learndrop_ext.decide.costs import LayerCost
from learndrop_ext.decide.probes import copy_bytes_per_second, wait_for
from learndrop_ext.forward.chain import Chain
from learndrop_ext.forward.cuts import Cut
from learndrop_ext.forward.record import tensors_of
from learndrop_ext.preserve import preserved
from learndrop_ext.warn import warn

#: Training steps. The first one also warms up; the shorter one counts, because other work on the machine only makes a step
#: longer. With the optimizer's and the recorded forward, making a DropScheduler with `Budget` takes about three steps.
STEPS = 2
#: Bytes that an optimizer which cannot be timed is assumed to move for each parameter, in fp32: weight, gradient and two
#: states are read, weight and states written.
ASSUMED_BYTES = 7 * 4
#: Share of an operation's backward pass that computes the gradient of its input and not of its weights. The first live layer
#: does not need it of its first operation.
INPUT_GRADIENT = 0.5


@dataclass(frozen=True)
class StepCosts:
    """Costs of a training step, per sample but for `step_seconds`."""

    layers: tuple[LayerCost, ...]
    other_seconds: float  # outside of layers and optimizer: loss, overhead
    optimizer_seconds: float  # with all layers live
    step_seconds: float  # of the whole batch


def untimed(chain: Chain) -> tuple[LayerCost, ...]:
    """Return the layers' FLOPs and shapes, without times."""
    layers = []
    for i, layer in enumerate(chain):
        elements = sum(p.numel() for p in chain.parameters(i, i + 1) if p.requires_grad)
        layers.append(LayerCost(layer.name, layer.flops, 0.0, 0.0, layer.shape, parameters=elements))
    return tuple(layers)


def time_step(
    chain: Chain, run: Callable[[], Any], optimizer: torch.optim.Optimizer, *, batch: float, device: torch.device
) -> StepCosts:
    """Time training steps of the model: forward, backward, and `optimizer.step()` on a copy of the optimizer.

    `run` calls the model on a batch of `batch` samples, in the loop's way. In place of the user's loss, the sum of the mean
    squares of all floating-point outputs is taken. Model, optimizer, gradients and the random state are not changed.
    """
    steps = []
    with preserved(chain.model), _without_hooks(chain.model), without_benchmark(device), torch.enable_grad():
        chain.model.train()
        for _ in range(STEPS):
            steps.append(_laps(chain, run, device))
            chain.model.zero_grad()
        best = min(steps, key=lambda laps: laps.total)
        seconds = _optimizer_seconds(optimizer, chain.model, device)
    layers = []
    for i, (layer, cost) in enumerate(zip(chain, untimed(chain), strict=True)):
        forward, backward = best.forward[i] / batch, best.backward[i] / batch
        share = layer.first_flops / layer.flops if layer.flops and best.has_input_gradient[i] else 0.0
        first = forward + backward * (1 - INPUT_GRADIENT * share)
        layers.append(replace(cost, seconds=forward, train_seconds=forward + backward, first_seconds=first))
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


class _Laps(NamedTuple):
    """Seconds of each layer's forward and backward pass, and of the whole step."""

    forward: list[float]
    backward: list[float]
    has_input_gradient: list[bool]  # whether a layer's backward pass computes the gradient of its input
    total: float


def _laps(chain: Chain, run: Callable[[], Any], device: torch.device) -> _Laps:
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
                row.register_hook(partial(enter, is_again))

        def enter(is_again: bool, _: torch.Tensor) -> None:
            entered.setdefault(i, again[0] if is_again and again else now())
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
    forward, backward, has_input_gradient = [], [], []
    before, after = first, end
    for i in range(last + 1):  # in train mode a layer may be passed by
        forward.append(between(before, left.get(i, before)))
        backward.append(between(entered.get(i, after), after))
        has_input_gradient.append(any(j in entered for j in range(i)))
        before, after = left.get(i, before), entered.get(i, after)
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
        warn(
            f"DropScheduler: {type(optimizer).__name__}.step() cannot be timed on a copy ({said}), as it may need a "
            f"closure: forward and backward were timed once, and a step of it is assumed to take {1e3 * seconds:.1f} ms; "
            "the first epochs correct that"
        )
        return seconds
