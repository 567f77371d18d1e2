"""The experiments of the paper: nine networks from scratch on MNIST, CIFAR-10 and Imagenette, with rivals beside dropping.

    python bench/bench_paper.py --data-root DIR [--seeds 2] [--parts recipe paper rules scores long] [--device cpu|cuda]

DIR holds MNIST/raw, cifar-10-batches-py and an imagenette folder. Each run is added to the file of this machine in
bench/results/paper/ when it ends, and runs in the file are skipped, so that the study can be interrupted and continued.
bench/paper_cases.py has the runs and their order; bench/table.py makes the tables and plots from the files. The recipe's
learning rate is the one with the best accuracy on validation images in the part `recipe`; the other parts report on test
images. --device cuda trains the full width on all images. Several processes may add to one file, a core and --cases each:

    OMP_NUM_THREADS=1 taskset -c 0 python bench/bench_paper.py --data-root DIR --cases 'mnist-*'

--toy is a rehearsal on the digits of scikit-learn.
"""

from __future__ import annotations

import argparse
import dataclasses
import sys
import time
from collections.abc import Mapping
from fnmatch import fnmatch
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
from paper_cases import PARTS, SCALES, SIDES, Case, Scale, plan
from run import add, copy_limit, describe_machine, file_name, results_to_continue, run_tests

from learndrop_ext.app import runs
from learndrop_ext.app.datasets import Split, load_dataset
from learndrop_ext.app.recipe import Recipe, default_views
from learndrop_ext.forward.chain import split_layers

ROOT = Path(__file__).resolve().parent.parent
#: What a side may change of the recipe.
SIDE_KEYS = {"seed", "steps", "epochs"}


def load_split(dataset: str, root: Path | None, scale: Scale) -> Split:
    """Read a dataset with a validation part, behind the images to train on."""
    size = None if scale.size is None else scale.size.get(dataset)
    count = scale.images[dataset]
    whole = load_dataset(dataset, root, limit=None if count is None else count + scale.validation, size=size)
    whole = whole.map(lambda images: images.decoded())
    count = count or len(whole.train) - scale.validation
    return dataclasses.replace(
        whole,
        train=whole.train.subset(range(count)),
        validation=whole.train.subset(range(count, count + scale.validation)),
        test=whole.test.subset(range(min(scale.test or len(whole.test), len(whole.test)))),
    )


def chosen_lr(study: Mapping[str, Any], case: Case, scale: Scale) -> float:
    """The learning rate that was best on validation images for a network of the family, or the default."""
    tried = {
        record["recipe"]["lr"]: record["validation_accuracy"]
        for record in study["records"]
        if record["setting"] == "recipe" and (record["dataset"], record["model"][:3]) == (case.dataset, case.model[:3])
    }
    return max(tried, key=lambda lr: tried[lr]) if tried else scale.default_lr


def recipe_of(case: Case, split: Split, study: Mapping[str, Any], scale: Scale, *, device: str) -> Recipe:
    """The plain recipe of a case."""
    is_long = case.setting.startswith("long")
    epochs = scale.long_epochs if is_long else study["epochs"]
    augment = None if case.dataset in ("mnist", "digits") else "standard"
    return Recipe(
        model=case.model,
        stem="small" if split.size <= 64 else "imagenet",
        width=scale.width,
        epochs=epochs,
        batch_size=scale.batch_size,
        lr=case.lr or chosen_lr(study, case, scale),
        schedule=case.setting.removeprefix("long ") if is_long else "one-cycle",
        seed=case.seed,
        device=device,
        amp="bf16" if device.startswith("cuda") else None,
        augment=augment,
        views=default_views(augment, epochs, "stopped"),
    )


class NotRunError(Exception):
    """Why a case has no record."""


def run_case(case: Case, split: Split, recipe: Recipe, done: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
    """Train one model and return its record, in the form of docs/results.md. done: the records of the case's other sides."""
    side = SIDES[case.side]
    if missing := [name for name in side.follows if name not in done]:
        raise NotRunError(f"it follows {', '.join(missing)}")
    policy = None if side.policy is None else side.policy(done)
    if side.policy is not None and policy is None:
        raise NotRunError("nothing was dropped that it could choose otherwise")
    if side.shortened_to is not None:
        recipe = runs.shortened(split, recipe, seconds=done[side.shortened_to]["seconds"])
    epochs: list[dict[str, Any]] = []
    try:
        result, model = runs.train(case.side, split, recipe, policy=policy, caches=side.caches, on_epoch=epochs.append)
    except ValueError as error:
        if not str(error).startswith("Budget: speedup must be at most"):
            raise
        raise NotRunError(str(error)) from error
    assert split.validation is not None
    record = {
        "suite": "paper",
        **{key: getattr(case, key) for key in ("setting", "dataset", "model", "side", "seed")},
        "recipe": dataclasses.asdict(recipe),
        "policy": None if policy is None else repr(policy),
        "cache": recipe.codec if policy is not None and side.caches else None,
        "device": recipe.device,
        "epochs": recipe.steps / -(-len(split.train) // recipe.batch_size) if recipe.steps else recipe.epochs,
        **dataclasses.asdict(result),
        "validation_accuracy": runs.evaluate(model, split.validation.to(recipe.device), batch_size=512, amp=recipe.amp),
        "images": len(split.train),
        "layers": epochs[-1]["layers"],
        "curve": [(epoch["seconds"], epoch["accuracy"]) for epoch in epochs],
    }
    for drop in record["drops"]:
        del drop["layers"]  # their number is the prefix
    if case.side == "watched":
        example = split.train[0][0][None].to(recipe.device)
        record["layer_flops"] = [layer.flops for layer in split_layers(model, example)]
        record["relative"] = [list(epoch["relative"].values()) for epoch in epochs]
    return record


def check_recipe(study: Mapping[str, Any], case: Case, recipe: Recipe, images: int) -> None:
    """Raise ValueError if runs of a case in the file have another recipe or other images: they would be compared."""
    new = {"images": images} | {k: v for k, v in dataclasses.asdict(recipe).items() if k not in SIDE_KEYS}
    for record in study["records"]:
        same = case.setting != "recipe" and dataclasses.replace(case, side=record["side"], seed=record["seed"])
        if not same or not same.is_of(record):
            continue
        old = {"images": record["images"]} | record["recipe"]
        for key, value in new.items():
            if old[key] != value:
                raise ValueError(
                    f"the runs of {case.model} on {case.dataset} in this file have {key} = {old[key]!r}, "
                    f"got {value!r}: give --name"
                )


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--data-root", type=Path)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=list(PARTS))
    parser.add_argument("--seeds", type=int, default=2, help="how many seeds, from 0 on")
    parser.add_argument(
        "--cases", nargs="+", default=["*"], metavar="DATASET-NETWORK", help="only these, such as 'mnist-*'"
    )
    parser.add_argument("--seconds", type=float, default=float("inf"), help="begin no run after so many")
    parser.add_argument("--toy", action="store_true", help="a rehearsal: two networks on the digits of scikit-learn")
    parser.add_argument("--tests-passed", type=int, help="how many tests passed before; without it they are run first")
    parser.add_argument("--out", type=Path, default=ROOT / "bench" / "results" / "paper")
    parser.add_argument("--name", help="name of the file (default: GPU or CPU)")
    args = parser.parse_args(argv)
    begin = time.monotonic()
    scale = SCALES["toy" if args.toy else "gpu" if args.device.startswith("cuda") else "cpu"]
    machine = describe_machine(run_tests() if args.tests_passed is None else args.tests_passed)
    path = args.out / f"{args.name or file_name(machine)}.json"
    new = {"epochs": scale.epochs, "limits": {"copy_gb_s": copy_limit(args.device)}, "records": []}
    study = results_to_continue(path, machine) or new
    splits = lru_cache(lambda dataset: load_split(dataset, args.data_root, scale))
    args.out.mkdir(parents=True, exist_ok=True)
    warm = set()
    for case in plan(scale, parts=args.parts, seeds=args.seeds):
        if not any(fnmatch(f"{case.dataset}-{case.model}", pattern) for pattern in args.cases):
            continue
        if any(case.is_of(record) for record in study["records"]):
            continue
        if time.monotonic() - begin > args.seconds:
            print("the time is over: the rest is left for another run")
            break
        split = splits(case.dataset)
        if case.setting.startswith("long"):
            split = dataclasses.replace(split, train=split.train.subset(range(scale.long_images)))
        recipe = recipe_of(case, split, study, scale, device=args.device)
        try:
            check_recipe(study, case, recipe, len(split.train))
        except ValueError as error:
            sys.exit(f"bench_paper: {path.name}: {error}")
        if (case.dataset, case.model) not in warm:
            runs.warm_up(split, recipe)
            warm.add((case.dataset, case.model))
        done = {
            record["side"]: record
            for record in study["records"]
            if dataclasses.replace(case, side=record["side"], lr=None).is_of(record)
        }
        try:
            record = run_case(case, split, recipe, done)
        except NotRunError as reason:
            print(
                f"{case.setting} {case.dataset} {case.model} seed {case.seed} {case.side}: not run, {reason}",
                flush=True,
            )
            continue
        study = add(path, machine, new, record | {"commit": machine["commit"]})
        print(
            f"{case.setting} {case.dataset} {case.model} seed {case.seed} {case.side:<18} {record['seconds']:7.1f} s  "
            f"test {record['accuracy']:.2f} %",
            flush=True,
        )
    print(path)
    return 0


if __name__ == "__main__":
    sys.exit(main())
