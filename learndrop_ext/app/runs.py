"""The training runs of the command line: a recipe without dropping, with dropping, freezing only, or shortened."""

from __future__ import annotations

import contextlib
import dataclasses
import resource
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn

from learndrop_ext.app.datasets import Split
from learndrop_ext.app.image_set import ImageSet, make_loader
from learndrop_ext.app.recipe import Recipe, make_narrower, make_scheduler, policy_of, set_up
from learndrop_ext.app.report import MEASURED
from learndrop_ext.decide.policy import Decision, Fixed, Policy, Situation
from learndrop_ext.forward.chain import split_layers
from learndrop_ext.history import Record
from learndrop_ext.scheduler import DropScheduler

#: Called with the name of the run, the number of steps done, the total number of steps and a short text.
Progress = Callable[[str, int, int, str], None]


@dataclass
class Dropped:
    """A drop."""

    epoch: int  # number of epochs done before it
    prefix: int  # number of layers dropped in all
    layers: list[str]
    reason: str
    fill_seconds: float  # spent computing the rows, in the following epochs
    row_bytes: int
    tier: str  # see `RowSet.tier`


@dataclass
class Result:
    """The time, accuracy and drops of a run, as far as it got."""

    seconds: float = 0.0  # of training, including fills, measurements and splitting the model, without evaluation
    fill_seconds: float = 0.0
    measure_seconds: float = 0.0
    eval_seconds: float = 0.0
    forward_flops: int = 0  # of all training steps and fills
    accuracy: float = 0.0  # on the test part after the last epoch, in percent
    peak_memory_bytes: int = 0  # see `peak_bytes`
    drops: list[Dropped] = field(default_factory=list)


def train(
    name: str,
    split: Split,
    recipe: Recipe,
    *,
    policy: Policy | None = None,
    caches: bool = True,
    narrow: tuple[str, float] | None = None,
    on_epoch: Callable[[dict[str, Any]], None] = lambda record: None,
    progress: Progress = lambda name, done, total, text: None,
) -> tuple[Result, nn.Module]:
    """Train a model and evaluate it after each epoch. Return the result and the trained model.

    policy: decides on drops, not that of the recipe; None for a plain loop without a DropScheduler. caches: whether to cache
    the outputs of dropped layers; otherwise these layers run at each step. narrow: takes channels out of the model after
    each epoch, see `parse_narrow`. on_epoch: called with the record of each epoch, see `Reporter.add`.
    """
    device = torch.device(recipe.device)
    reset_peak(device)
    setup = set_up(split, recipe)
    criterion = nn.CrossEntropyLoss()
    steps = recipe.steps or recipe.epochs * len(setup.loader)
    result, done = Result(), 0
    drop: DropScheduler | None = None
    if policy is not None:
        begin = time.perf_counter()
        drop = make_scheduler(setup, recipe, policy, caches=caches)
        result.seconds = result.measure_seconds = time.perf_counter() - begin
    example = setup.train[0][0][None]
    chain = split_layers(setup.model, example) if drop is None else drop.chain
    flops = sum(layer.flops for layer in chain)
    begin = time.perf_counter()
    width = None if narrow is None else make_narrower(setup, recipe, narrow, example)
    result.seconds += time.perf_counter() - begin
    full_widths = {} if width is None else width.widths
    for epoch in range(1, recipe.epochs + 1):
        begin = time.perf_counter()
        setup.model.train()
        total_loss, samples, begun = torch.zeros((), device=device), 0, done
        batches: Iterable[Any] = setup.loader if drop is None else drop.loader
        lr = setup.optimizer.param_groups[0]["lr"]
        for x, y in batches:
            with torch.autocast(device.type, torch.bfloat16, enabled=recipe.amp is not None):
                loss = criterion(setup.model(x), y)
            setup.optimizer.zero_grad()
            loss.backward()
            setup.optimizer.step()
            if setup.schedule is not None:
                setup.schedule.step()
            total_loss += loss.detach()
            samples += len(x)
            done += 1
            progress(name, done, steps, f"epoch {epoch}/{recipe.epochs}")
            if done == steps:
                break
        measured: dict[str, Any] = {"reason": "", "scores": None, "relative": None, "cosine": None}
        if drop is not None:
            measured = _measured(drop.step(), drop.chain.names)
        else:
            result.forward_flops += flops * samples
        if width is not None and width.step().removed:
            if drop is not None:
                drop.follow_widths()
            else:
                flops = sum(layer.flops for layer in split_layers(setup.model, example))
        train_loss = float(total_loss) / (done - begun)
        result.seconds += time.perf_counter() - begin
        begin = time.perf_counter()
        result.accuracy = evaluate(setup.model, setup.test, batch_size=512, amp=recipe.amp)
        result.eval_seconds += time.perf_counter() - begin
        on_epoch(
            {
                "run": name,
                "epoch": epoch,
                "seconds": result.seconds,
                "train_loss": train_loss,
                "accuracy": result.accuracy,
                "prefix": 0 if drop is None else drop.prefix,
                "layers": len(chain),
                "lr": lr,
                "widths": None if width is None else width.widths,
                "full_widths": full_widths,
                **measured,
            }
        )
        progress(name, done, steps, f"epoch {epoch}/{recipe.epochs}, {result.accuracy:.1f} %")
    if width is not None:
        width.close()
    if drop is not None:
        _add_measured(result, drop)
        drop.close()
    result.peak_memory_bytes = peak_bytes(device)
    return result, setup.model


def _add_measured(result: Result, drop: DropScheduler) -> None:
    """Add what the scheduler measured and dropped in a run."""
    prefix = 0
    for record in drop.history:
        result.fill_seconds += record.fill_seconds
        result.measure_seconds += record.measure_seconds
        result.forward_flops += record.forward_flops + record.fill_flops
        if result.drops:
            result.drops[-1].fill_seconds += record.fill_seconds
        if record.prefix != prefix:
            prefix = record.prefix
            names = list(drop.chain.names[:prefix])
            result.drops.append(Dropped(record.epoch, prefix, names, record.reason, 0.0, record.row_bytes, record.tier))


def _measured(record: Record, names: tuple[str, ...]) -> dict[str, Any]:
    """Return the measurements of a record by layer name, and the measured and forecast seconds of its epoch."""
    changes = [c if c is None else {key: getattr(c, key) for key in MEASURED} for c in record.changes]
    by_layer = {key: getattr(record, key) for key in ("scores", "relative", "cosine")} | {"changes": changes}
    return {
        "reason": record.reason,
        **{key: dict(zip(names, values, strict=True)) for key, values in by_layer.items()},
        "epoch_seconds": record.epoch_seconds,
        "forecast_seconds": record.forecast_seconds,
    }


def warm_up(split: Split, recipe: Recipe) -> None:
    """Train a throwaway model for a few steps, without and with half of its layers dropped.

    One-time costs of the process (imports, kernel compilation, allocation) are then not part of any run.
    """
    two_batches = range(len(split.train))[: 2 * recipe.batch_size]
    few = dataclasses.replace(split, train=split.train.subset(two_batches), test=split.test.subset(range(1)))
    short = dataclasses.replace(recipe, epochs=1, steps=None, augment=None, views=1, mirror=False)
    train("warm-up", few, short)

    # One epoch without drops, one that computes rows and one that reads them.
    def half_after_the_first_epoch(situation: Situation) -> Decision:
        return Decision(min(situation.epoch, 1) * (len(situation.layers) // 2), "warm-up")

    train("warm-up", few, dataclasses.replace(short, epochs=3), policy=half_after_the_first_epoch)


def shortened(split: Split, recipe: Recipe, *, seconds: float) -> Recipe:
    """Return the plain recipe with as many steps as fit into `seconds`, at least one and at most its own.

    A fortieth of the run's steps, at most an epoch of them, are timed first: on a machine whose speed changes, a run of a
    while ago is no clock. A throwaway model is trained for two epochs of so many batches; the second, without the costs of
    a beginning, counts.
    """
    batches = _batches(split, recipe)
    whole = recipe.epochs * batches
    timed = range(len(split.train))[: max(4, whole // 40) * recipe.batch_size]
    few = dataclasses.replace(split, train=split.train.subset(timed), test=split.test.subset(range(1)))
    ends: list[float] = []
    two = dataclasses.replace(recipe, epochs=2, steps=None)
    train("timing", few, two, on_epoch=lambda record: ends.append(record["seconds"]))
    steps = max(1, min(whole, int(seconds * _batches(few, recipe) / (ends[1] - ends[0]))))
    return dataclasses.replace(recipe, epochs=-(-steps // batches), steps=steps)


def _batches(split: Split, recipe: Recipe) -> int:
    return -(-len(split.train) // recipe.batch_size)


def evaluate(model: nn.Module, images: ImageSet, *, batch_size: int, amp: str | None) -> float:
    """Return the accuracy of a model on an image set, in percent."""
    training = model.training
    model.eval()
    right = torch.zeros((), dtype=torch.int64, device=images.device)
    with torch.no_grad(), torch.autocast(images.device.type, torch.bfloat16, enabled=amp is not None):
        for x, y in make_loader(images, batch_size):
            right += (model(x).argmax(1) == y).sum()
    model.train(training)
    return 100 * int(right) / len(images)


def compare(
    split: Split,
    recipe: Recipe,
    *,
    rivals: Iterable[str] = (),
    on_epoch: Callable[[dict[str, Any]], None] = lambda record: None,
    progress: Progress = lambda name, done, total, text: None,
) -> Iterator[dict[str, Any]]:
    """Train without and with dropping, then each rival. Yield the result so far, in the format of `--json`, after each run.

    rivals: "freeze-only" (the same drops, but the frozen layers run at each step) and "short" (the plain recipe with as many
    steps as fit into the time that dropping took, see `shortened`).
    """
    out: dict[str, Any] = {"config": dataclasses.asdict(recipe)}
    warm_up(split, recipe)
    run = partial(train, split=split, on_epoch=on_epoch, progress=progress)
    baseline, _ = run("baseline", recipe=recipe)
    out["baseline"] = dataclasses.asdict(baseline)
    yield out
    dropping, _ = run("learndrop", recipe=recipe, policy=policy_of(recipe))
    out["learndrop"] = dataclasses.asdict(dropping)
    out["speedup"] = baseline.seconds / dropping.seconds
    yield out
    for rival in rivals:
        if rival == "freeze-only":
            same = Fixed({d.epoch: d.prefix for d in dropping.drops}, recalibrate=True)
            result, _ = run(rival, recipe=recipe, policy=same, caches=False)
        else:
            short = shortened(split, recipe, seconds=dropping.seconds)
            out["config"]["short_epochs"] = round((short.steps or 0) / _batches(split, recipe), 2)
            result, _ = run(rival, recipe=short)
        out[rival] = dataclasses.asdict(result)
        yield out


def reset_peak(device: torch.device) -> None:
    """Reset the peak memory of a device to the memory in use now."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        return
    with contextlib.suppress(OSError):  # The peak is then that of the process since its start.
        Path("/proc/self/clear_refs").write_text("5", encoding="ascii")


def peak_bytes(device: torch.device) -> int:
    """Return the peak memory in bytes since `reset_peak`: of the allocator on a GPU, of the process on a CPU."""
    if device.type == "cuda":
        return int(torch.cuda.max_memory_allocated(device))
    for line in Path("/proc/self/status").read_text(encoding="ascii").splitlines():
        if line.startswith("VmHWM:"):
            return int(line.split()[1]) * 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
