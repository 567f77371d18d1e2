"""Training runs for the command line: one recipe, trained plainly, with dropping, frozen only, or shortened."""

from __future__ import annotations

import dataclasses
import resource
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from learndrop_ext.app.datasets import ImageSet, Split, make_loader
from learndrop_ext.app.models import MODELS, build_model
from learndrop_ext.cache.config import CacheConfig
from learndrop_ext.decide import costs
from learndrop_ext.decide.policy import Fixed, Policy, StoppedLearning
from learndrop_ext.graph.chain import split_layers
from learndrop_ext.scheduler import DropScheduler

#: Called with the run's name, the steps done, the steps in all, and a few words.
Progress = Callable[[str, int, int, str], None]


@dataclass(frozen=True)
class Recipe:
    """Everything that a run depends on but its kind: SGD with Nesterov momentum under a one-cycle learning rate.

    epochs and batch_size count as usual, lr is the peak. amp: None or "bf16" autocast. codec, views: of the
    cache. threshold, patience, warmup, max_dropped, min_saving: of `StoppedLearning`.
    """

    model: str
    stem: str
    width: int
    epochs: int
    batch_size: int
    lr: float
    weight_decay: float = 5e-4
    seed: int = 0
    device: str = "cpu"
    amp: str | None = None
    augment: str | None = None
    codec: str = "fp16"
    views: int = 1
    threshold: float = StoppedLearning.threshold
    patience: int = StoppedLearning.patience
    warmup: int = StoppedLearning.warmup
    max_dropped: float = StoppedLearning.max_dropped
    min_saving: float = StoppedLearning.min_saving

    def __post_init__(self) -> None:
        if self.model.removesuffix("_bn") not in MODELS:
            raise ValueError(f"Recipe: model must be one of {', '.join(MODELS)}, got {self.model!r}")
        default_policy(self)
        CacheConfig(codec=self.codec, views=self.views)


@dataclass(frozen=True)
class Dropped:
    """One drop of a run: after which epoch, to how many layers and which, why, and what its rows took."""

    epoch: int
    prefix: int
    layers: list[str]
    reason: str
    fill_seconds: float
    row_bytes: int
    tier: str


@dataclass(frozen=True)
class Result:
    """What a run took and reached.

    seconds: training wall clock, with fill, measurement and the splitting of the model, without evaluation;
    forward_flops: of all training steps and fills; accuracy: of the test part after the last epoch, in percent.
    """

    seconds: float
    fill_seconds: float
    measure_seconds: float
    eval_seconds: float
    forward_flops: int
    accuracy: float
    peak_memory_bytes: int
    drops: list[Dropped]


def train(
    name: str,
    split: Split,
    recipe: Recipe,
    *,
    policy: Policy | None = None,
    caches: bool = True,
    on_epoch: Callable[[dict[str, Any]], None] = lambda record: None,
    progress: Progress = lambda name, done, total, words: None,
) -> tuple[Result, nn.Module]:
    """Train one model and evaluate it after each epoch; with `policy` by DropScheduler, else by a plain loop.

    caches: whether a dropped prefix's outputs are kept or run again at each step. on_epoch gets one record of plain
    values an epoch, progress a call a step. Same recipe and seed: same initial weights and same order of samples.
    """
    device = torch.device(recipe.device)
    torch.manual_seed(recipe.seed)
    _reset_peak(device)
    train_set, test_set = split.train.to(device).augmented(recipe.augment), split.test.to(device)
    loader = make_loader(train_set, recipe.batch_size, shuffle=True, seed=recipe.seed)
    model = build_model(
        recipe.model,
        num_classes=len(split.classes),
        in_channels=split.channels,
        stem=recipe.stem,
        width=recipe.width,
        seed=recipe.seed,
    ).to(device)
    if device.type == "cuda":
        model = model.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    optimizer = torch.optim.SGD(
        model.parameters(), lr=recipe.lr, momentum=0.9, nesterov=True, weight_decay=recipe.weight_decay
    )
    steps = recipe.epochs * len(loader)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, recipe.lr, total_steps=steps)
    criterion = nn.CrossEntropyLoss()
    drop = None
    if policy is not None:
        begin = time.perf_counter()
        config = CacheConfig(codec=recipe.codec, views=recipe.views if caches else 1)
        drop = DropScheduler(
            model,
            optimizer,
            loader,
            policy=policy,
            epochs=recipe.epochs,
            cache=config if caches else None,
            seed=recipe.seed,
        )
        flops = 0
        seconds = measure_seconds = time.perf_counter() - begin
    else:
        chain = split_layers(model, train_set[0][0][None])
        flops = costs.forward_flops(costs.measure_layers(chain, train_set[0][0][None], repeats=1))
        seconds = measure_seconds = 0.0
    fill_seconds = eval_seconds = accuracy = 0.0
    forward_flops, done = 0, 0
    drops: list[Dropped] = []
    for epoch in range(1, recipe.epochs + 1):
        begin = time.perf_counter()
        model.train()
        total_loss = torch.zeros((), device=device)
        batches: Iterable[Any] = loader if drop is None else drop.loader
        live = model if drop is None else drop.model
        lr = optimizer.param_groups[0]["lr"]
        for x, y in batches:
            with torch.autocast(device.type, torch.bfloat16, enabled=recipe.amp is not None):
                loss = criterion(live(x), y)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
            total_loss += loss.detach()
            done += 1
            progress(name, done, steps, f"epoch {epoch}/{recipe.epochs}")
        reason, prefix = "", 0
        scores = relative = cosine = None
        if drop is not None:
            before = drop.prefix
            record = drop.step()
            reason, prefix = record.reason, record.prefix
            scores, relative, cosine = (
                dict(zip(drop.chain.names, values, strict=True))
                for values in (record.scores, record.relative, record.cosine)
            )
            fill_seconds += record.fill_seconds
            measure_seconds += record.measure_seconds
            forward_flops += record.forward_flops + record.fill_flops
            if prefix > before:
                names = list(drop.chain.names[:prefix])
                tier = slowest_tier(drop)
                drops.append(Dropped(epoch, prefix, names, reason, record.fill_seconds, record.row_bytes, tier))
        else:
            forward_flops += flops * len(train_set)
        train_loss = float(total_loss) / len(loader)
        seconds += time.perf_counter() - begin
        begin = time.perf_counter()
        accuracy = evaluate(model, test_set, batch_size=512, amp=recipe.amp)
        eval_seconds += time.perf_counter() - begin
        on_epoch(
            {
                "run": name,
                "epoch": epoch,
                "seconds": seconds,
                "train_loss": train_loss,
                "accuracy": accuracy,
                "prefix": prefix,
                "layers": len(drop.chain) if drop is not None else len(chain),
                "lr": lr,
                "scores": scores,
                "relative": relative,
                "cosine": cosine,
                "reason": reason,
            }
        )
        progress(name, done, steps, f"epoch {epoch}/{recipe.epochs}, {accuracy:.1f} %")
    result = Result(
        seconds=seconds,
        fill_seconds=fill_seconds,
        measure_seconds=measure_seconds,
        eval_seconds=eval_seconds,
        forward_flops=forward_flops,
        accuracy=accuracy,
        peak_memory_bytes=_peak(device),
        drops=drops,
    )
    return result, model


def slowest_tier(drop: DropScheduler) -> str:
    """Where the last of the rows are: "device", "host", "disk", or "none" where none are kept."""
    if drop.loader.rows is None:
        return "none"
    plan = drop.loader.rows.cache.plan
    return "disk" if plan.disk else "host" if plan.host else "device"


def warm_up(split: Split, recipe: Recipe) -> None:
    """Train a throw-away model for two steps, so that what the first run of a process pays once counts for no run:
    imports, kernels' compilation, memory."""
    batch = 2 * recipe.batch_size
    few = dataclasses.replace(
        split, train=split.train.subset(range(min(batch, len(split.train)))), test=split.test.subset(range(1))
    )
    train("warm-up", few, dataclasses.replace(recipe, epochs=1))


def evaluate(model: nn.Module, images: ImageSet, *, batch_size: int, amp: str | None) -> float:
    """Accuracy of the whole model on an image set, in percent."""
    training = model.training
    model.eval()
    right = torch.zeros((), dtype=torch.int64, device=images.device)
    with torch.no_grad(), torch.autocast(images.device.type, torch.bfloat16, enabled=amp is not None):
        for x, y in make_loader(images, batch_size):
            right += (model(x).argmax(1) == y).sum()
    model.train(training)
    return 100 * int(right) / len(images)


def default_policy(recipe: Recipe) -> Policy:
    """The policy that the recipe's threshold, patience, warmup, max_dropped and min_saving describe."""
    return StoppedLearning(
        recipe.threshold, recipe.patience, recipe.warmup, max_dropped=recipe.max_dropped, min_saving=recipe.min_saving
    )


def compare(
    split: Split,
    recipe: Recipe,
    *,
    rivals: Iterable[str] = (),
    on_epoch: Callable[[dict[str, Any]], None] = lambda record: None,
    progress: Progress = lambda name, done, total, words: None,
) -> Iterator[dict[str, Any]]:
    """Train plainly, with dropping, and as the rivals named, and give the result so far after each run.

    rivals: "freeze-only" (the same drops, but the frozen prefix is run at each step) and "short" (the plain recipe with
    as many epochs as fit into the seconds that dropping took). The dict has the form that `--json` prints.
    """
    policy = default_policy(recipe)
    out: dict[str, Any] = {"config": dataclasses.asdict(recipe)}
    warm_up(split, recipe)
    baseline, _ = train("baseline", split, recipe, on_epoch=on_epoch, progress=progress)
    out["baseline"] = dataclasses.asdict(baseline)
    yield out
    dropping, _ = train("learndrop", split, recipe, policy=policy, on_epoch=on_epoch, progress=progress)
    out["learndrop"] = dataclasses.asdict(dropping)
    out["speedup"] = baseline.seconds / dropping.seconds
    yield out
    for rival in rivals:
        if rival == "freeze-only":
            same = Fixed({d.epoch: d.prefix for d in dropping.drops})
            result, _ = train(rival, split, recipe, policy=same, caches=False, on_epoch=on_epoch, progress=progress)
        else:
            fitting = max(1, int(min(1.0, dropping.seconds / baseline.seconds) * recipe.epochs))
            out["config"]["short_epochs"] = fitting
            short = dataclasses.replace(recipe, epochs=fitting)
            result, _ = train(rival, split, short, on_epoch=on_epoch, progress=progress)
        out[rival] = dataclasses.asdict(result)
        yield out


def save_model(model: nn.Module, path: Path) -> None:
    """Write the whole model's state_dict aside and rename it into place."""
    aside = path.with_name(path.name + ".part")
    torch.save(model.state_dict(), aside)
    aside.replace(path)


def _reset_peak(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        return
    try:
        Path("/proc/self/clear_refs").write_text("5", encoding="ascii")
    except OSError:
        return  # The peak is then that of the whole process so far.


def _peak(device: torch.device) -> int:
    """Peak memory of the run in bytes: of the GPU's allocator, or resident memory of the process on CPU."""
    if device.type == "cuda":
        return int(torch.cuda.max_memory_allocated(device))
    for line in Path("/proc/self/status").read_text(encoding="ascii").splitlines():
        if line.startswith("VmHWM:"):
            return int(line.split()[1]) * 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
