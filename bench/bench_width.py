"""The study of narrowing: time, size and accuracy of networks whose channels are taken out while they train.

    python bench/bench_width.py --data-root DIR [--sets mnist cifar10] [--models vgg16 resnet18 mlp] [--keeps 0.5 0.2]
        [--methods full l1 ...] [--seeds 3]
    python bench/bench_width.py --toy                 the digits of scikit-learn, two epochs, in seconds

DIR holds MNIST/raw/ and cifar-10-batches-py/. Each run is added to the file of this machine in bench/results/width/ when
it ends, and runs in the file are skipped, so that the study can be interrupted and continued. Several processes may add to
one file, each with its --sets or --models. `bench/width_table.py` makes the tables of docs/width.md from these files.
"""

from __future__ import annotations

import argparse
import copy
import itertools
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from run import add, copy_limit, describe_machine, file_name, results_to_continue, run_tests
from torch import Tensor, nn

from learndrop_ext import DropScheduler, Fixed, split_layers
from learndrop_ext.app import runs
from learndrop_ext.app.datasets import Split, load_dataset
from learndrop_ext.app.image_set import make_loader
from learndrop_ext.app.models import build_model
from learndrop_ext.width import (
    Below,
    Iterative,
    Linear,
    OneCycle,
    OneShot,
    Tolerance,
    WidthScheduler,
    in_norms,
    orthogonality,
    out_norms,
    sparsify,
)

ROOT = Path(__file__).resolve().parent.parent
#: Training and test images.
LIMITS = {"mnist": 10_000, "cifar10": 10_000, "digits": 128}


@dataclass(frozen=True)
class Method:
    """One way to train.

    Args:
        narrow: options of WidthScheduler; None for a width that stays.
        penalty: added to the loss.
        share: of the epochs, each run with its own learning-rate schedule.
        narrow_from_start: build the network with the share of channels that the others end with.
        sparse: rule by which single weights are masked after training.
        drops: whether half of the layers are dropped, after a third of the epochs.
        models: for which networks. Default: all
    """

    narrow: dict[str, Any] | None = None
    penalty: Callable[[nn.Module], Tensor] | None = None
    share: float = 1.0
    narrow_from_start: bool = False
    sparse: str | None = None
    drops: bool = False
    models: tuple[str, ...] = ("vgg16", "resnet18", "mlp")

    @property
    def free(self) -> bool:
        """Whether it ends with a share of channels of its own, whatever is asked for."""
        narrow = self.narrow or {}
        found_out = "controller" in narrow or isinstance(narrow.get("scope"), Below)
        return found_out or not (narrow or self.narrow_from_start or self.sparse)


CONVOLUTIONAL = ("vgg16", "resnet18")
METHODS: dict[str, Method] = {
    "full": Method(),
    **{f"short-{share:g}": Method(share=share) for share in (0.25, 0.5, 0.75)},
    "narrow-from-start": Method(narrow_from_start=True),
    "l1": Method({"criterion": "l1", "schedule": Linear()}),
    "random": Method({"criterion": "random", "schedule": Linear()}),
    "activation": Method({"criterion": "activation", "schedule": Iterative(0.2)}),
    "zeros": Method({"criterion": "zeros", "schedule": Linear()}),
    "one-cycle": Method({"criterion": "l1", "schedule": OneCycle()}),
    "one-shot": Method({"criterion": "l1", "schedule": OneShot(1)}),
    "global": Method({"criterion": "l1", "schedule": OneCycle(), "scope": "global"}),
    "tolerance": Method({"criterion": "l1", "controller": Tolerance(1.0)}, lambda model: 1e-4 * orthogonality(model)),
    "penalty": Method(
        {"criterion": "connections", "scope": Below(1e-2), "schedule": Linear()},
        lambda model: 1e-3 * (in_norms(model) + out_norms(model)),
    ),
    "coreset": Method({"criterion": "coreset", "schedule": Linear()}, models=("mlp",)),
    **{f"sparse-{rule}": Method(sparse=rule) for rule in ("flat", "triangular", "relative")},
    "drops": Method(drops=True, models=CONVOLUTIONAL),
    "drops-and-one-cycle": Method({"criterion": "l1", "schedule": OneCycle()}, drops=True, models=CONVOLUTIONAL),
}


def network(name: str, split: Split, *, width: int, seed: int) -> nn.Module:
    """VGG-16 or ResNet-18 with this many channels in the first stage, or LeNet-300-100 with 300 / 16 times as many."""
    if name != "mlp":
        return build_model(name, num_classes=len(split.classes), in_channels=split.channels, width=width, seed=seed)
    torch.manual_seed(seed)
    sizes = [split.channels * split.size**2, 300 * width // 16, 100 * width // 16]
    hidden = [layer for i, o in itertools.pairwise(sizes) for layer in (nn.Linear(i, o), nn.ReLU())]
    return nn.Sequential(nn.Flatten(), *hidden, nn.Linear(sizes[-1], len(split.classes)))


def train(
    method: Method, model_name: str, split: Split, args: argparse.Namespace, keep: float, seed: int
) -> tuple[nn.Module, dict[str, Any]]:
    """Train one network; return it and what was measured."""
    epochs = max(1, round(args.epochs * method.share))
    # Nothing is cut after the last epoch, for nothing would train on; after a linear schedule a quarter of the epochs does.
    linear = isinstance((method.narrow or {}).get("schedule"), Linear)
    steps = max(1, round(0.75 * epochs) if linear else epochs - 1)
    width = max(1, round(args.width * keep)) if method.narrow_from_start else args.width
    # Contiguous: see `learndrop_ext.app.recipe.make_narrower`.
    model = network(model_name, split, width=width, seed=seed)
    torch.manual_seed(seed)
    optimizer = torch.optim.SGD(model.parameters(), lr=args.lr, momentum=0.9, nesterov=True, weight_decay=5e-4)
    loader = make_loader(split.train, args.batch_size, shuffle=True, seed=seed)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, args.lr, total_steps=epochs * len(loader))
    example = next(iter(make_loader(split.test, 2)))[0]
    begin = time.perf_counter()
    drop = None
    if method.drops:  # by no clock and no score, so that it is the same at every width
        half = Fixed({max(1, epochs // 3): len(split_layers(model, example)) // 2})
        drop = DropScheduler(model, optimizer, loader, policy=half, epochs=epochs)
    narrow = None
    if method.narrow is not None:
        controls = {} if "controller" in method.narrow else {"epochs": steps}
        least = 0.1 if method.free else keep
        narrow = WidthScheduler(model, optimizer, example, keep=least, seed=seed, **controls, **method.narrow)
    seconds, curve = time.perf_counter() - begin, []
    for epoch in range(epochs):
        begin = time.perf_counter()
        model.train()
        for x, y in loader if drop is None else drop.loader:
            loss = nn.functional.cross_entropy(model(x), y)
            if method.penalty is not None:
                loss = loss + method.penalty(model)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
        if drop is not None:
            drop.step()
        seconds += time.perf_counter() - begin
        # The controller's accuracy is of 1,000 training images: not of those that are reported.
        chosen = runs.evaluate(model, split.train.subset(range(min(1000, len(split.train)))), batch_size=512, amp=None)
        begin = time.perf_counter()
        if narrow is not None and epoch < steps and narrow.step(chosen).removed and drop is not None:
            drop.follow_widths()
        seconds += time.perf_counter() - begin
        curve.append((seconds, runs.evaluate(model, split.test, batch_size=512, amp=None)))
    if narrow is not None:
        narrow.close()
    if drop is not None:
        drop.close()
    return model, {
        "seconds": seconds,
        "accuracy": runs.evaluate(model, split.test, batch_size=512, amp=None),
        "parameters": sum(p.numel() for p in model.parameters()),
        "flops": sum(layer.flops for layer in split_layers(model, example)),
        "widths": None if narrow is None else narrow.widths,
        "zeros": None,
        "prefix": 0 if drop is None else max(record.prefix for record in drop.history),
        "epochs": epochs,
        "curve": curve,
    }


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--data-root", type=Path)
    parser.add_argument("--sets", nargs="+", choices=list(LIMITS), default=["mnist", "cifar10"])
    parser.add_argument(
        "--models", nargs="+", choices=["vgg16", "resnet18", "mlp"], default=["vgg16", "resnet18", "mlp"]
    )
    parser.add_argument(
        "--keeps", nargs="+", type=float, default=[0.5, 0.2], help="shares of the channels left in the end"
    )
    parser.add_argument("--methods", nargs="+", choices=list(METHODS), default=list(METHODS))
    parser.add_argument("--seeds", type=int, default=3, help="how many seeds, from 0 on")
    parser.add_argument("--epochs", type=int, default=6)
    parser.add_argument("--width", type=int, default=16, help="channels of the first stage")
    parser.add_argument("--lr", type=float, default=0.1, help="peak learning rate")
    parser.add_argument("--batch-size", type=int, default=128)
    parser.add_argument("--toy", action="store_true", help="try the study out on the digits of scikit-learn")
    parser.add_argument("--tests-passed", type=int, help="how many tests passed before; without it they are run first")
    parser.add_argument("--out", type=Path, default=ROOT / "bench" / "results" / "width")
    parser.add_argument("--name", help="name of the file (default: CPU)")
    args = parser.parse_args(argv)
    if args.toy:
        args.sets, args.seeds, args.epochs, args.width, args.batch_size = ["digits"], 1, 2, 4, 64
    machine = describe_machine(run_tests() if args.tests_passed is None else args.tests_passed)
    path = args.out / f"{args.name or file_name(machine)}.json"
    study = results_to_continue(path, machine) or {"limits": {"copy_gb_s": copy_limit("cpu")}, "records": []}
    args.out.mkdir(parents=True, exist_ok=True)
    setting = {"epochs": args.epochs, "width": args.width, "lr": args.lr, "batch_size": args.batch_size}
    for dataset in args.sets:
        split = load_dataset(dataset, args.data_root, limit=LIMITS[dataset])
        few = split.map(lambda part: part.subset(range(min(2 * args.batch_size, len(part)))))
        warm, whole = False, {}
        # One seed of every method before the next: what is broken off early still compares them all.
        for seed, model, keep, name in itertools.product(range(args.seeds), args.models, args.keeps, args.methods):
            method = METHODS[name]
            asked = None if method.free else keep
            key = {"dataset": dataset, "model": model, "run": name, "keep": asked, "seed": seed}
            done = [record for record in study["records"] if key.items() <= record.items()]
            if done and done[0]["setting"] != setting:
                sys.exit(f"bench_width: {path.name}: its runs have {done[0]['setting']}, got {setting}: give --name")
            if done or model not in method.models:
                continue
            if not warm:  # what is imported and compiled once is not part of any run
                short = argparse.Namespace(**vars(args) | {"epochs": 2})
                train(METHODS["drops-and-one-cycle"], "resnet18", few, short, 0.5, 0)
                warm = True
            # Single weights are masked in the network that `full` has trained.
            net, measured = (method.sparse and whole.get((model, seed))) or train(
                method, model, split, args, keep, seed
            )
            if name == "full" or method.sparse:
                whole[model, seed] = net, measured
            if method.sparse is not None:
                net = copy.deepcopy(net)
                # Few weights are larger than half of the largest.
                amount = (1 - keep) / 10 if method.sparse == "relative" else 1 - keep
                zeros = sparsify(net, amount, method.sparse)
                masked = runs.evaluate(net, split.test, batch_size=512, amp=None)
                measured = measured | {"zeros": zeros, "accuracy": masked}
            record = {
                "suite": "width",
                **key,
                "setting": setting,
                "commit": machine["commit"],
                "images": len(split.train),
            }
            study = add(path, machine, study, record | measured)
            print(
                f"{dataset:<8} {model:<9} {name:<20} {asked or '':<4} seed {seed} {measured['seconds']:7.1f} s "
                f"{measured['parameters']:9,} parameters {measured['accuracy']:6.2f} %",
                flush=True,
            )
    print(path)
    return 0


if __name__ == "__main__":
    sys.exit(main())
