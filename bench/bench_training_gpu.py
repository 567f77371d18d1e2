"""Training with dropping compared with an expert's baseline on a GPU; a stage of bench/on_gpu.sh.

    python bench/bench_training_gpu.py --out FILE [--cases NAME ...] [--seeds 0 ...] [--seconds 480] [--device cpu --toy]

The baseline is what an expert would run: bf16 autocast, channels_last, images and augmentation on the GPU, a fused
optimizer, and torch.compile if the whole run, compilation included, is then expected to be shorter. Dropping trains the
same way with DropScheduler. `short` is the baseline with as many steps as fit into the time that dropping took. A few
steps of both are thrown away before, so that no side pays for cuDNN's choices and for loading kernels: on a new machine
the first DropScheduler of a process takes seconds to make (`first_setup_seconds`). Seconds include compiling, measuring and
filling, but not evaluation.

LEARNDROP_DATA is the folder with MNIST/raw, cifar-10-batches-py and clothing-160; LEARNDROP_WEIGHTS is the file of
EfficientNet-Lite0's published weights. A case without data or time is recorded as not run, with the reason. The file is
written after each run, so that an interrupted stage keeps its results.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from training_cases import CASES, NotRunError, Setting, Work, load

from learndrop_ext import CacheConfig, DropScheduler, Fixed, backend_info
from learndrop_ext.app.image_set import ImageSet, make_loader

Batch = tuple[Tensor, Tensor]
#: Steps of which the time is taken, after as many to warm up, before eager or compiled steps are chosen.
PROBE_STEPS = 10
#: torch.compile is not tried for eager runs below so many seconds: it takes half a minute for a ResNet-18.
COMPILE_ABOVE = 60.0


def optimizer_of(work: Work, model: nn.Module, steps: int) -> tuple[torch.optim.Optimizer, Callable[[], object]]:
    """Return the optimizer, fused on a GPU, and what to call after each step."""
    fused = work.device.type == "cuda"
    if work.case.adam:
        return torch.optim.Adam(model.parameters(), lr=work.case.lr, fused=fused), lambda: None
    sgd = torch.optim.SGD(
        model.parameters(), lr=work.case.lr, momentum=0.9, nesterov=True, weight_decay=5e-4, fused=fused
    )
    return sgd, torch.optim.lr_scheduler.OneCycleLR(sgd, work.case.lr, total_steps=steps).step


def on_device(model: nn.Module, device: torch.device) -> nn.Module:
    return model.to(device, memory_format=torch.channels_last)  # type: ignore[call-overload,no-any-return]


def predict(live: nn.Module, x: Tensor) -> Any:
    """Call a model as training does: in bf16 on a GPU."""
    with torch.autocast(x.device.type, torch.bfloat16, enabled=x.device.type == "cuda"):
        return live(x)


def train_step(live: nn.Module, optimizer: torch.optim.Optimizer, batch: Batch, device: torch.device) -> None:
    x, y = (part.to(device, non_blocking=True) for part in batch)
    loss = nn.functional.cross_entropy(predict(live, x), y)
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()


def synchronized(device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()


def warm_up(work: Work) -> tuple[Work, dict[str, Any]]:
    """Train on a few batches, which is thrown away, and choose eager or compiled steps; on a CPU steps are eager."""
    batch = work.case.batch_size
    few = work.train.subset(range(min(len(work.train), 4 * batch + len(work.train) % batch)))
    first = fit(work, work.make_model(), epochs=1, drops=False, train=few)
    dropping = dataclasses.replace(work, policy=Fixed({0: 1}))
    second = fit(dropping, work.make_model(), epochs=3, drops=True, train=few)
    found: dict[str, Any] = {"compiled": False, "first_steps_seconds": first["seconds"]}
    found["first_setup_seconds"] = second["setup_seconds"]
    if work.device.type == "cpu":
        return work, found | {"reason": "not tried on a CPU"}
    run_steps = work.case.epochs * -(-len(work.train) // batch)
    warm, step = probe_steps(work, compiled=False)
    found["eager_step_seconds"] = step
    if run_steps * step < COMPILE_ABOVE:
        return work, found | {"reason": f"{run_steps * step:.0f} s of eager steps, under {COMPILE_ABOVE:.0f}"}
    warm, compiled_step = probe_steps(work, compiled=True)
    faster = warm + run_steps * compiled_step < run_steps * step
    found |= {"compiled": faster, "compiling_seconds": warm, "compiled_step_seconds": compiled_step}
    return dataclasses.replace(work, compiled=faster), found


def probe_steps(work: Work, *, compiled: bool) -> tuple[float, float]:
    """Return the seconds of the first steps of a throw-away network, and of one step after them."""
    x = torch.stack([work.train[i][0] for i in range(work.case.batch_size)]).to(work.device)
    x = x.contiguous(memory_format=torch.channels_last)
    y = torch.zeros(len(x), dtype=torch.int64, device=work.device)
    model = on_device(work.make_model(), work.device)
    live = torch.compile(model) if compiled else model
    optimizer, _ = optimizer_of(work, model, 2 * PROBE_STEPS)
    begin = synchronized(work.device)
    for _ in range(PROBE_STEPS):
        train_step(live, optimizer, (x, y), work.device)  # type: ignore[arg-type]
    middle = synchronized(work.device)
    for _ in range(PROBE_STEPS):
        train_step(live, optimizer, (x, y), work.device)  # type: ignore[arg-type]
    return middle - begin, (synchronized(work.device) - middle) / PROBE_STEPS


def fit(
    work: Work,
    model: nn.Module,
    *,
    epochs: int,
    drops: bool,
    train: ImageSet | None = None,
    steps: int | None = None,
) -> dict[str, Any]:
    """Train `model` for some epochs, or some steps of them, and return what it took and reached, as plain values."""
    case, device = work.case, work.device
    torch.manual_seed(work.seed)
    images = work.train if train is None else train
    loader = make_loader(images, case.batch_size, shuffle=True, seed=work.seed, num_workers=case.workers or 0)
    model = on_device(model, device)
    steps = steps or epochs * len(loader)
    optimizer, after_step = optimizer_of(work, model, steps)
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    wrap = torch.compile if work.compiled else None
    seconds, fill_seconds, prefixes = 0.0, 0.0, []
    begin = synchronized(device)
    scheduler = None
    if drops:
        config = CacheConfig(codec="fp16", views=4 if case.augment else 1, seed=work.seed)
        scheduler = DropScheduler(
            model,
            optimizer,
            loader,
            policy=work.policy,
            epochs=epochs,
            cache=config,
            wrap=wrap,
            call=lambda model, batch: predict(model, batch[0]),
        )
    setup_seconds = synchronized(device) - begin
    live = scheduler.model if scheduler is not None else model if wrap is None else wrap(model)
    done = 0
    for _ in range(epochs):
        model.train()
        for batch in loader if scheduler is None else scheduler.loader:
            train_step(live, optimizer, batch, device)  # type: ignore[arg-type]
            after_step()
            done += 1
            if done == steps:
                break
        if scheduler is not None:
            record = scheduler.step()
            fill_seconds += record.fill_seconds
            prefixes.append(record.prefix)
    seconds += synchronized(device) - begin
    peak = torch.cuda.max_memory_allocated(device) if device.type == "cuda" else None
    return {
        "seed": work.seed,
        "epochs": done / len(loader),
        "seconds": seconds,
        "fill_seconds": fill_seconds,
        "accuracy": accuracy(model, work.test),
        "prefixes": prefixes,
        "setup_seconds": None if scheduler is None else setup_seconds,
        "epoch_seconds": [] if scheduler is None else [r.epoch_seconds for r in scheduler.history if r.epoch],
        "layers": None if scheduler is None else len(scheduler.chain),
        "peak_memory_bytes": peak,
    }


@torch.no_grad()
def accuracy(model: nn.Module, images: ImageSet) -> float:
    """Return the percentage of images that are classified right."""
    model.eval()
    right = torch.zeros((), dtype=torch.int64, device=images.device)
    with torch.autocast(images.device.type, torch.bfloat16, enabled=images.device.type == "cuda"):
        for x, y in make_loader(images, 512):
            right += (model(x).argmax(1) == y).sum()
    return 100 * int(right) / len(images)


def compare(work: Work, add: Callable[[str, dict[str, Any]], None]) -> None:
    """Train plainly, with dropping, and plainly for as long as dropping took."""
    plain = fit(work, work.make_model(), epochs=work.case.epochs, drops=False)
    add("baseline", plain)
    dropping = fit(work, work.make_model(), epochs=work.case.epochs, drops=True)
    add("learndrop", dropping | {"speedup": plain["seconds"] / dropping["seconds"]})
    batches = -(-len(work.train) // work.case.batch_size)
    steps = max(1, int(min(1.0, dropping["seconds"] / plain["seconds"]) * work.case.epochs * batches))
    add("short", fit(work, work.make_model(), epochs=-(-steps // batches), steps=steps, drops=False))


def warm_start(work: Work, add: Callable[[str, dict[str, Any]], None]) -> None:
    """Ash and Adams (NeurIPS 2020): half of the images first, then all, from these weights or from fresh ones.

    Sides: fresh weights on all images; the half's weights; these with dropping; and these shrunk to 0.4 and perturbed by
    0.1 of fresh weights, which is the paper's remedy.
    """
    epochs = work.case.epochs
    half = work.train.subset(range(len(work.train) // 2))
    started = work.make_model()
    add("half", fit(work, started, epochs=epochs, drops=False, train=half))
    weights = {name: value.detach().clone() for name, value in started.state_dict().items()}

    def from_half() -> nn.Module:
        model = work.make_model()
        model.load_state_dict(weights)
        return model

    def shrunk() -> nn.Module:
        model, fresh = from_half(), work.make_model()
        with torch.no_grad():
            for parameter, other in zip(model.parameters(), fresh.parameters(), strict=True):
                parameter.mul_(0.4).add_(other.to(parameter.device), alpha=0.1)
        return model

    add("fresh", fit(work, work.make_model(), epochs=epochs, drops=False))
    add("warm", fit(work, from_half(), epochs=epochs, drops=False))
    add("warm, learndrop", fit(work, from_half(), epochs=epochs, drops=True))
    add("shrink and perturb", fit(work, shrunk(), epochs=epochs, drops=False))


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--cases", nargs="+", choices=[case.name for case in CASES], help="default: all, in order")
    parser.add_argument("--seeds", nargs="+", type=int, default=[0], help="each case is run with each of them")
    parser.add_argument("--seconds", type=float, default=480, help="no case and no further seed begins after so many")
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--toy", action="store_true", help="digits, narrow networks, two epochs, one drop: a rehearsal")
    args = parser.parse_args()
    root, weights = os.environ.get("LEARNDROP_DATA"), os.environ.get("LEARNDROP_WEIGHTS")
    setting = Setting(
        device=torch.device(args.device),
        toy=args.toy,
        data=None if root is None else Path(root),
        weights=None if weights is None else Path(weights),
    )
    if setting.device.type == "cuda":
        torch.set_float32_matmul_precision("high")
    info = dataclasses.asdict(backend_info())
    result: dict[str, Any] = {"machine": info, "toy": args.toy, "cases": {}}
    if setting.device.type == "cuda":
        result["gpu"] = torch.cuda.get_device_name(setting.device)
    begin = time.perf_counter()
    failed = 0
    for case in CASES:
        if args.cases is not None and case.name not in args.cases:
            continue
        entry: dict[str, Any] = {"case": dataclasses.asdict(case), "runs": {}}
        result["cases"][case.name] = entry

        def add(run: str, found: dict[str, Any], entry: dict[str, Any] = entry, name: str = case.name) -> None:
            entry["runs"].setdefault(run, []).append(found)
            write(args.out, result)
            print(f"{name} {run}: {found['seconds']:.1f} s, {found['accuracy']:.2f} %", flush=True)

        try:
            for seed in args.seeds:
                if time.perf_counter() - begin > args.seconds:
                    raise NotRunError(f"the {args.seconds:g} seconds were over before seed {seed}")
                torch.backends.cudnn.benchmark = case.tunes
                if seed == args.seeds[0]:
                    small = dataclasses.replace(case, epochs=2, batch_size=16, workers=case.workers and 1)
                    work, entry["steps"] = warm_up(load(small if args.toy else case, setting))
                if args.toy:
                    work = dataclasses.replace(work, policy=Fixed({1: 1}))
                compare_sides = warm_start if case.name == "warm-start" else compare
                compare_sides(dataclasses.replace(work, seed=seed), add)
        except NotRunError as reason:
            entry["not_run"] = str(reason)
            print(f"{case.name}: not run, {reason}", flush=True)
        except Exception as error:  # one case must not cost the others their minutes
            entry["error"] = f"{type(error).__name__}: {error}"
            failed += 1
            print(f"{case.name}: failed, {entry['error']}", flush=True)
        write(args.out, result)
    return 1 if failed else 0


def write(path: Path, result: dict[str, Any]) -> None:
    aside = path.with_suffix(".part")
    aside.write_text(json.dumps(result, indent=1) + "\n")
    aside.replace(path)


if __name__ == "__main__":
    raise SystemExit(main())
