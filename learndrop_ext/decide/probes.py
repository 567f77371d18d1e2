"""Measurements: the bandwidth of each tier, and the time of a training step."""

from __future__ import annotations

import copy
import inspect
import math
import os
import statistics
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from time import perf_counter
from typing import Any

import torch
from torch import nn
from torch.utils import _pytree as pytree

from learndrop_ext.cache.config import CacheConfig
from learndrop_ext.cache.plan import Budgets
from learndrop_ext.cudnn import without_benchmark
from learndrop_ext.rng import fork_rng


@dataclass(frozen=True)
class TierCost:
    """One tier of the cache: the limit on its bytes, and its bandwidth in bytes per second."""

    budget_bytes: int
    bytes_per_second: float


@dataclass(frozen=True)
class StepSeconds:
    """Seconds of one training step, and of those parts that are not in the layers.

    Args:
        step: seconds of the whole step.
        optimizer: seconds of `optimizer.step()`.
        loss: seconds of the loss, forward and backward to the outputs, and of `zero_grad()`.
    """

    step: float
    optimizer: float
    loss: float = 0.0


def median_seconds(run: Callable[[], object], device: torch.device, *, repeats: int, warmup: int = 1) -> float:
    """Return the median seconds of `run()`, including the device's work.

    Args:
        run: the function to time.
        device: device to synchronise before and after each run.
        repeats: number of timed runs, at least 1.
        warmup: number of runs before them that are not timed.
    """

    def laps() -> Iterator[None]:
        run()
        yield

    times = [_laps(laps, device)[0] for _ in range(warmup + repeats)]
    return statistics.median(times[warmup:])


def shortest_laps(
    run: Callable[..., Iterator[None]],
    device: torch.device,
    *,
    repeats: int,
    prepare: Callable[[], tuple[Any, ...]],
) -> tuple[float, ...]:
    """Return the shortest time of each lap of `run(*prepare())`, a generator that yields at the end of a lap.

    The shortest, because other work on the machine and the warm-up of the first run only make a lap longer.

    Args:
        run: the generator function to time, including the device's work.
        device: device to synchronise before the first lap and after each.
        repeats: number of runs, at least 1.
        prepare: makes new arguments for each run; not timed.
    """
    times = [_laps(run, device, *prepare()) for _ in range(repeats)]
    return tuple(min(lap) for lap in zip(*times, strict=True))


def _laps(run: Callable[..., Iterator[None]], device: torch.device, *arguments: Any) -> list[float]:
    _wait_for(device)
    laps = []
    begin = perf_counter()
    for _ in run(*arguments):
        _wait_for(device)
        now = perf_counter()
        laps.append(now - begin)
        begin = now
    return laps


def probe_training_step(
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    batch_input: torch.Tensor,
    *,
    inputs: tuple[Sequence[Any], Mapping[str, Any]] | None = None,
    repeats: int = 3,
    autocast: torch.dtype | None = None,
) -> StepSeconds | None:
    """Time a training step: zero_grad, forward, backward and optimizer.step, on a copy of model and optimizer.

    In place of the user's loss it takes the sum of the mean squares of all floating-point outputs. The model, the optimizer,
    their gradients and the random state are not changed.

    Args:
        model: the whole model; its copy runs in train mode.
        optimizer: the optimizer of the model's parameters.
        batch_input: [B, ...], the input of one batch on the model's device.
        inputs: the model's positional and keyword arguments. Default: `batch_input` alone
        repeats: number of timed steps, after one to warm up; the median is taken.
        autocast: autocast dtype of the training step; None for no autocast.

    Returns:
        Seconds of a step of B samples, or None if no step can be timed: model and optimizer cannot be copied, the
        optimizer needs a closure, or no output has a gradient.
    """
    closure = inspect.signature(optimizer.step).parameters.get("closure")
    if closure is not None and closure.default is inspect.Parameter.empty:
        return None
    try:
        # In one call, so that the copied optimizer refers to the parameters of the copied model.
        net, steps = copy.deepcopy((model, optimizer))
    except Exception:  # a module may raise any error of its own
        return None
    net.train()
    device = batch_input.device
    args, kwargs = inputs or ((batch_input,), {})

    def forward() -> list[torch.Tensor]:
        with torch.autocast(device.type, dtype=autocast, enabled=autocast is not None):
            outputs = net(*args, **kwargs)
        return [y for y in pytree.tree_leaves(outputs) if isinstance(y, torch.Tensor) and y.is_floating_point()]

    def loss(outputs: list[torch.Tensor]) -> torch.Tensor:
        return torch.stack([torch.zeros((), device=device), *(y.float().square().mean() for y in outputs)]).sum()

    def step() -> None:
        steps.zero_grad()
        loss(forward()).backward()
        steps.step()

    def around(outputs: list[torch.Tensor]) -> None:
        steps.zero_grad()
        loss(outputs).backward()

    with fork_rng(0), without_benchmark(device), torch.enable_grad():
        outputs = forward()
        if not loss(outputs).requires_grad:
            return None
        leaves = [y.detach().requires_grad_() for y in outputs]
        whole = median_seconds(step, device, repeats=repeats)
        # The last step's gradients are still there.
        optimizer_seconds = median_seconds(steps.step, device, repeats=repeats, warmup=0)
        return StepSeconds(whole, optimizer_seconds, median_seconds(lambda: around(leaves), device, repeats=repeats))


def copy_bytes_per_second(device: torch.device, *, size: int = 1 << 26, copies: int = 1) -> float:
    """Return bytes read plus bytes written per second by a copy of `size` bytes on the device: the limit of a gather.

    copies: number of copies in a row. The time of a single one on a GPU includes the launch and the synchronisation.
    """
    source = torch.ones(size, dtype=torch.uint8, device=device)
    target = torch.zeros_like(source)

    def copy_all() -> None:
        for _ in range(copies):
            target.copy_(source)

    return 2 * size * copies / median_seconds(copy_all, device, repeats=3)


def host_bytes_per_second(device: torch.device, *, size: int = 1 << 26) -> float:
    """Return the bytes per second that a GPU's copy engine reads from pinned host memory."""
    source = torch.ones(size, dtype=torch.uint8).pin_memory()
    target = torch.empty(size, dtype=torch.uint8, device=device)
    return size / median_seconds(lambda: target.copy_(source, non_blocking=True), device, repeats=3)


def disk_bytes_per_second(folder: Path, *, size: int = 1 << 25) -> float:
    """Return the bytes per second of reading a new file in a folder sequentially, without the page cache.

    Raises OSError if it cannot be written.
    """
    with tempfile.TemporaryFile(dir=folder) as file:
        file.write(bytes(size))
        file.flush()
        os.fsync(file.fileno())
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)

        def read() -> None:
            at = 0
            while at < size:
                at += len(os.pread(file.fileno(), 1 << 20, at))

        return size / median_seconds(read, torch.device("cpu"), repeats=1, warmup=0)


def tier_costs(budgets: Budgets, speeds: Sequence[float]) -> list[TierCost]:
    """Return the costs of each tier. speeds: bytes per second of device, host and disk."""
    assert budgets.device is not None
    held = (budgets.device, budgets.host, budgets.disk)
    return [TierCost(budget, speed) for budget, speed in zip(held, speeds, strict=True)]


def tier_speeds(budgets: Budgets, config: CacheConfig, device: torch.device) -> tuple[float, float, float]:
    """Measure the bytes per second of device, host and disk; infinite for a tier without a budget.

    Raises OSError if the folder of the file cannot be written.
    """
    host = disk = math.inf
    if budgets.host and device.type != "cpu":
        host = host_bytes_per_second(device)
    if budgets.disk and config.disk_dir is not None:
        disk = disk_bytes_per_second(Path(config.disk_dir))
    return copy_bytes_per_second(device), host, disk


def _wait_for(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
