"""The arguments of the command line and their defaults."""

from __future__ import annotations

import argparse
from functools import partial
from pathlib import Path
from typing import Any

from learndrop_ext import __version__
from learndrop_ext.app.models import STEMS
from learndrop_ext.app.recipe import MAX_SEED, OPTIMIZERS, POLICY_FORMS, Recipe
from learndrop_ext.ops import CODECS

RIVALS = ("freeze-only", "short")

#: Defaults of each dataset, by field of Recipe; options override them.
PRESETS: dict[str, dict[str, Any]] = {
    "digits": {"model": "resnet10", "width": 32, "epochs": 20, "batch_size": 64, "lr": 0.1},
    "mnist": {"model": "resnet18", "width": 64, "epochs": 10, "batch_size": 128, "lr": 0.1},
    "fashion-mnist": {"model": "resnet18", "width": 64, "epochs": 15, "batch_size": 128, "lr": 0.1},
    "cifar10": {"model": "resnet18", "width": 64, "epochs": 30, "batch_size": 128, "lr": 0.2, "augment": "standard"},
    "cifar100": {"model": "resnet18", "width": 64, "epochs": 30, "batch_size": 128, "lr": 0.2, "augment": "standard"},
    "imagenette": {"model": "resnet18", "width": 64, "epochs": 30, "batch_size": 64, "lr": 0.1, "augment": "standard"},
    "folder": {"model": "resnet18", "width": 64, "epochs": 5, "batch_size": 32, "lr": 2e-3}
    | {"optimizer": "adamw", "weight_decay": 0.01},
}


def _rivals(text: str) -> tuple[str, ...]:
    names = tuple(text.split(","))
    for name in names:
        if name not in RIVALS:
            raise argparse.ArgumentTypeError(f"must be of {', '.join(RIVALS)}, separated by commas, got {name!r}")
    return names


def _whole(text: str, lowest: int, wanted: str, highest: int | None = None) -> int:
    # int() refuses more than 4,300 digits with its own ValueError.
    value = int(text) if text.lstrip("+-").isdecimal() and len(text) < 4000 else lowest - 1
    if value < lowest or (highest is not None and value > highest):
        raise argparse.ArgumentTypeError(f"must be {wanted}, got {text[:40]!r}")
    return value


_count = partial(_whole, lowest=1, wanted="a whole number of at least 1")
_size = partial(_whole, lowest=0, wanted="a number of bytes of at least 0")
_seed = partial(_whole, lowest=0, wanted=f"a whole number within 0..{MAX_SEED}", highest=MAX_SEED)


def _positive(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = 0.0
    if not 0 < value < float("inf"):
        raise argparse.ArgumentTypeError(f"must be a number above 0, got {text!r}")
    return value


#: Each command's line in the list of commands, and its description.
COMMANDS = {
    "compare": (
        "train the same model without and with dropping and show what it saved",
        "Train the same model twice with the same seed and recipe, without and with dropping. Print a table and write "
        "report.html and metrics.jsonl. Without arguments: a small ResNet on the handwritten digits that come with "
        "scikit-learn, in under two minutes on two CPU cores.",
    ),
    "train": (
        "train once with dropping and save the model",
        "Train one model with dropping and write model.pt (its state_dict), metrics.jsonl and report.html.",
    ),
    "forecast": (
        "forecast the time and memory of a run before training",
        "Measure the costs of each layer. Print and plot (forecast.html) the time of the run for each number of dropped "
        "layers and each start, and the memory of the rows. Nothing is trained.",
    ),
    "store": (
        "list, check and remove the rows in a store",
        "List the rows in the folder of CacheConfig(store=DIR), and check, remove and compact them.",
    ),
    "info": ("show what this installation supports", "Show CUDA, driver, GPUs, Triton, torch and CPU instructions."),
}

#: Groups of the options of compare, train and forecast: name, type or choices, placeholder, default, help.
TRAINING: dict[str, list[tuple[str, Any, str | None, Any, str]]] = {
    "data": [
        ("dataset", list(PRESETS), None, "digits", "what to train on"),
        (
            *("data-root", Path, "DIR", None),
            "folder with the original files of the dataset; for --dataset folder, one with a folder per class, or with "
            "train/ and test/, val/ or validation/ that hold a folder per class",
        ),
        ("test-share", float, "X", None, "share of photos to test on, without a test folder (default: 0.2)"),
        ("limit", _count, "N", None, "use only the first N training and N test images"),
        ("image-size", _count, "PIXELS", None, "side of the images (default: unchanged; photos: 128)"),
        (
            *("augment", ["none", "flip", "standard", "crop"], None, None),
            "random flip, shift and flip, or crop and flip (default: depends on the dataset)",
        ),
    ],
    "recipe (defaults depend on the dataset)": [
        (
            *("model", str, "NAME", None),
            "vgg11, vgg13, vgg16, vgg19, resnet10, resnet18, ..., resnet152, timm:NAME or torchvision:NAME",
        ),
        (
            *("weights", str, "FILE", None),
            "initial weights: a safetensors file or state_dict, or 'default' for those of timm or torchvision (default: "
            "random weights)",
        ),
        ("stem", list(STEMS), None, None, "3x3 for small images, or 7x7 (default: depends on --image-size)"),
        ("width", _count, "N", None, "channels of the first stage of vgg.. and resnet.."),
        ("epochs", _count, "N", None, "passes over the training images"),
        ("batch-size", _count, "N", None, "images per step"),
        ("lr", _positive, "X", None, "peak learning rate of the one-cycle schedule"),
        ("optimizer", OPTIMIZERS, None, None, "sgd with Nesterov momentum, or adamw"),
        ("seed", _seed, "N", 0, "random seed"),
        ("device", str, "NAME", "auto", "cpu, cuda, or auto: cuda if available"),
        ("amp", ["bf16"], None, None, "dtype of mixed precision"),
    ],
    "dropping": [
        (
            *("policy", str, "POLICY", Recipe.policy),
            "stopped: drop layers that have stopped learning; budget:2.0: finish in half the time; fixed:0=3,1=4: drop "
            "the first 3 layers before the first step and the first 4 after epoch 1; all forms: " + POLICY_FORMS,
        ),
        ("codec", CODECS, None, Recipe.codec, "how cached activations are stored"),
        (
            *("views", _count, "V", None),
            "augmented views kept of each image (default: epochs / (2 speedup), at least 2; 1 with --augment none)",
        ),
        ("mirror", bool, None, False, "keep each image and its mirror image; needs --augment none"),
    ],
    "the policy stopped": [
        ("threshold", float, "X", Recipe.threshold, "score below which a layer has stopped"),
        ("patience", _count, "N", Recipe.patience, "measurements in a row below the threshold"),
        ("warmup", int, "N", Recipe.warmup, "epochs before the first drop"),
        ("max-dropped", float, "X", Recipe.max_dropped, "largest share of layers to drop"),
        ("min-saving", float, "X", Recipe.min_saving, "share of the run that a drop must save"),
    ],
    "output": [
        ("out", Path, "DIR", Path("learndrop-report"), "folder for the output files"),
        ("json", bool, None, False, "print one JSON object instead of the table"),
    ],
}


def _training_options(parser: argparse.ArgumentParser) -> None:
    for title, options in TRAINING.items():
        group = parser.add_argument_group(title)
        for name, kind, metavar, default, text in options:
            if kind is bool:
                group.add_argument(f"--{name}", action="store_true", help=text)
                continue
            text += "" if default is None else " (default: %(default)s)"
            values: dict[str, Any] = {"type": kind, "metavar": metavar} if callable(kind) else {"choices": kind}
            group.add_argument(f"--{name}", default=default, help=text, **values)


def make_parser() -> argparse.ArgumentParser:
    """Return the parser of the command line."""
    parser = argparse.ArgumentParser(
        prog="learndrop",
        description="Train a convolutional network faster: layers that have stopped learning are dropped from the "
        "training step, and the rest trains on their cached outputs.",
    )
    parser.add_argument("--version", action="version", version=f"learndrop {__version__}")
    added = parser.add_subparsers(dest="command", metavar="COMMAND")
    commands = {name: added.add_parser(name, help=short, description=long) for name, (short, long) in COMMANDS.items()}
    for name in ("compare", "train", "forecast"):
        _training_options(commands[name])
    commands["compare"].add_argument(
        "--with",
        dest="rivals",
        type=_rivals,
        default=(),
        metavar="RIVALS",
        help="also train these, separated by commas: freeze-only (the same drops, nothing cached) and short (the plain "
        "recipe with as many steps as fit into the time that dropping took)",
    )
    commands["train"].add_argument("--plain", action="store_true", help="train without dropping")
    commands["train"].add_argument(
        "--narrow",
        metavar="CRITERION:KEEP",
        help="take channels out of the model while it trains: l1:0.5 leaves half of them, those with the largest weights",
    )
    for name in ("store", "info"):
        commands[name].add_argument("--json", action="store_true", help="print one JSON object instead of lines")
    store = commands["store"]
    store.add_argument("folder", type=Path, metavar="DIR", help="the folder of CacheConfig(store=DIR)")
    store.add_argument("--check", action="store_true", help="compare all rows with their checksums")
    store.add_argument(
        "--remove-older-than", type=_positive, metavar="DAYS", help="remove rows not used for this many days"
    )
    store.add_argument(
        "--keep-bytes", type=_size, metavar="N", help="remove the least recently used rows until N bytes are left"
    )
    store.add_argument("--compact", action="store_true", help="write files with removed rows anew, without them")
    return parser
