"""The command line: `learndrop compare`, `learndrop train`, `learndrop info`."""

from __future__ import annotations

import argparse
import dataclasses
import importlib.util
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from learndrop_ext import __version__, backend_info
from learndrop_ext.app import report, runs
from learndrop_ext.app.datasets import load_dataset
from learndrop_ext.app.runs import Recipe
from learndrop_ext.ops import CODECS

RIVALS = ("freeze-only", "short")
INTERRUPTED = 130

#: What a newcomer gets without options: model, base width, epochs, batch size, peak learning rate, augmentation, views.
PRESETS: dict[str, dict[str, Any]] = {
    "digits": {"model": "resnet10", "width": 32, "epochs": 20, "batch_size": 64, "lr": 0.1},
    "mnist": {"model": "resnet18", "width": 64, "epochs": 10, "batch_size": 128, "lr": 0.1},
    "fashion-mnist": {"model": "resnet18", "width": 64, "epochs": 15, "batch_size": 128, "lr": 0.1},
    "cifar10": {"model": "resnet18", "width": 64, "epochs": 30, "batch_size": 128, "lr": 0.2, "augment": "standard"},
    "cifar100": {"model": "resnet18", "width": 64, "epochs": 30, "batch_size": 128, "lr": 0.2, "augment": "standard"},
    "imagenette": {"model": "resnet18", "width": 64, "epochs": 30, "batch_size": 64, "lr": 0.1, "augment": "standard"},
}


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command and return its exit status: 0, 2 for arguments that cannot be used, 130 after Ctrl-C."""
    parser = _parser()
    args = parser.parse_args(argv)
    if args.command is None:
        parser.print_help()
        return 2
    try:
        return int(args.run(args))
    except (ValueError, TypeError, ImportError, OSError) as error:
        print(f"learndrop {args.command}: error: {error}", file=sys.stderr)
        return 2


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="learndrop",
        description="Train a convolutional network faster: layers that have stopped learning are dropped from the "
        "training step, and the rest trains on their cached outputs.",
    )
    parser.add_argument("--version", action="version", version=f"learndrop {__version__}")
    commands = parser.add_subparsers(dest="command", metavar="COMMAND")
    compare = commands.add_parser(
        "compare",
        help="train the same model without and with dropping and show what it saved",
        description="Train the same model twice, same seed, same recipe: plainly, and with dropping. Prints a table "
        "and writes report.html and metrics.jsonl. Without arguments: a small ResNet on the handwritten digits that "
        "come with scikit-learn, under two minutes on two CPU cores.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    _training_options(compare)
    compare.add_argument(
        "--with",
        dest="rivals",
        type=_rivals,
        default=(),
        metavar="RIVALS",
        help="also train the honest rivals, separated by commas: freeze-only (same drops, nothing cached) and short "
        "(the plain recipe with as many epochs as fit into the time that dropping took)",
    )
    compare.set_defaults(run=_compare)
    train = commands.add_parser(
        "train",
        help="train once with dropping and save the model",
        description="Train one model with dropping and write model.pt (its state_dict), metrics.jsonl and report.html.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    _training_options(train)
    train.add_argument("--plain", action="store_true", help="train without dropping")
    train.set_defaults(run=_train)
    info = commands.add_parser("info", help="say what this installation can do")
    info.add_argument("--json", action="store_true", help="print one JSON object instead of lines")
    info.set_defaults(run=_info)
    return parser


def _training_options(parser: argparse.ArgumentParser) -> None:
    data = parser.add_argument_group("data")
    data.add_argument("--dataset", choices=list(PRESETS), default="digits", help="what to train on")
    data.add_argument("--data-root", type=Path, metavar="DIR", help="folder with the dataset's original files")
    data.add_argument("--limit", type=_count, metavar="N", help="use only the first N training and N test images")
    data.add_argument("--image-size", type=_count, metavar="PIXELS", help="side of Imagenette's images (default: 128)")
    data.add_argument("--augment", choices=["none", "standard"], help="random shift and flip (default: by dataset)")
    recipe = parser.add_argument_group("recipe (defaults depend on the dataset)")
    recipe.add_argument(
        "--model", metavar="NAME", help="vgg11, vgg13, vgg16, vgg19, resnet10, resnet18, ..., resnet152"
    )
    recipe.add_argument("--stem", choices=["small", "imagenet"], help="3x3 for small images or 7x7 (default: by size)")
    recipe.add_argument("--width", type=_count, metavar="N", help="channels of the first stage")
    recipe.add_argument("--epochs", type=_count, metavar="N", help="passes over the training images")
    recipe.add_argument("--batch-size", type=_count, metavar="N", help="images a step")
    recipe.add_argument("--lr", type=_positive, metavar="X", help="peak learning rate of the one-cycle schedule")
    recipe.add_argument("--seed", type=int, default=0, metavar="N", help="of the weights, the order and the views")
    recipe.add_argument("--device", default="auto", metavar="NAME", help="cpu, cuda, or auto: cuda where there is one")
    recipe.add_argument("--amp", choices=["bf16"], help="mixed precision")
    dropping = parser.add_argument_group("dropping")
    dropping.add_argument("--codec", choices=CODECS, default=Recipe.codec, help="how cached activations are stored")
    dropping.add_argument(
        "--views", type=_count, metavar="V", help="augmented views kept of an image (default: 4 or 1)"
    )
    dropping.add_argument(
        "--threshold", type=float, default=Recipe.threshold, metavar="X", help="a score under this has stopped"
    )
    dropping.add_argument(
        "--patience", type=_count, default=Recipe.patience, metavar="N", help="for so many measurements"
    )
    dropping.add_argument("--warmup", type=int, default=Recipe.warmup, metavar="N", help="epochs before the first drop")
    dropping.add_argument(
        "--max-dropped", type=float, default=Recipe.max_dropped, metavar="X", help="largest share of layers to drop"
    )
    dropping.add_argument(
        "--min-saving",
        type=float,
        default=Recipe.min_saving,
        metavar="X",
        help="share of the run that a drop must save",
    )
    output = parser.add_argument_group("output")
    output.add_argument("--out", type=Path, default=Path("learndrop-report"), metavar="DIR", help="where files go")
    output.add_argument("--json", action="store_true", help="print one JSON object instead of the table")


def _recipe(args: argparse.Namespace) -> tuple[Any, Any]:
    """The split and the recipe that the options ask for."""
    preset = PRESETS[args.dataset]
    device = _device(args.device, torch.cuda.is_available())
    split = load_dataset(args.dataset, args.data_root, limit=args.limit, size=args.image_size)
    augment = args.augment or preset.get("augment")
    augment = None if augment == "none" else augment
    chosen = {
        k: preset[k] if getattr(args, k) is None else getattr(args, k) for k in ("model", "width", "epochs", "lr")
    }
    batch_size = args.batch_size or preset["batch_size"]
    if args.data_root is not None and args.dataset == "imagenette":
        split = dataclasses.replace(split, train=split.train.decoded(), test=split.test.decoded())
    recipe = Recipe(
        **chosen,
        batch_size=min(batch_size, len(split.train)),
        stem=args.stem or ("small" if split.size <= 64 else "imagenet"),
        seed=args.seed,
        device=device,
        amp=args.amp,
        augment=augment,
        codec=args.codec,
        views=args.views or (4 if augment else 1),
        threshold=args.threshold,
        patience=args.patience,
        warmup=args.warmup,
        max_dropped=args.max_dropped,
        min_saving=args.min_saving,
    )
    return split, recipe


def _device(name: str, has_cuda: bool) -> str:
    if name == "auto":
        return "cuda" if has_cuda else "cpu"
    if name.partition(":")[0] not in ("cpu", "cuda"):
        raise ValueError(f"--device must be auto, cpu or cuda, got {name!r}")
    if name.startswith("cuda") and not has_cuda:
        raise ValueError(
            "--device cuda wants a GPU that this torch can use, and torch.cuda.is_available() is False here: "
            "install a CUDA build of torch and a driver, or use --device cpu"
        )
    return name


def _compare(args: argparse.Namespace) -> int:
    split, recipe = _recipe(args)
    with report.Reporter(args.out) as reporter, _Bar() as bar:
        result: dict[str, Any] = {}
        try:
            for result in runs.compare(split, recipe, rivals=args.rivals, on_epoch=reporter.add, progress=bar):
                result["config"] |= {"dataset": args.dataset, "limit": args.limit}
                reporter.write(result)
        except KeyboardInterrupt:
            return _interrupted(args.out, bar)
    return _print(result, args)


def _train(args: argparse.Namespace) -> int:
    split, recipe = _recipe(args)
    policy = None if args.plain else runs.default_policy(recipe)
    name = "baseline" if args.plain else "learndrop"
    with report.Reporter(args.out) as reporter, _Bar() as bar:
        try:
            trained, model = runs.train(name, split, recipe, policy=policy, on_epoch=reporter.add, progress=bar)
        except KeyboardInterrupt:
            return _interrupted(args.out, bar)
        config = dataclasses.asdict(recipe) | {"dataset": args.dataset, "limit": args.limit}
        result = {"config": config, name: dataclasses.asdict(trained)}
        runs.save_model(model, args.out / "model.pt")
        reporter.write(result)
    return _print(result, args)


def _info(args: argparse.Namespace) -> int:
    found = dataclasses.asdict(backend_info())
    if args.json:
        print(json.dumps(found))
        return 0
    for name, value in found.items():
        shown = ", ".join(map(str, value)) or "none" if isinstance(value, list | tuple) else value
        print(f"{name.replace('_', ' '):<20} {'none' if shown is None else shown}")
    return 0


def _print(result: dict[str, Any], args: argparse.Namespace) -> int:
    if args.json:
        print(json.dumps(result))
    else:
        print(report.format_table(result))
        print(f"\nreport: {args.out / 'report.html'}")
    return 0


def _interrupted(out: Path, bar: _Bar) -> int:
    bar.close()
    print(f"interrupted; what was measured so far is in {out}", file=sys.stderr)
    return INTERRUPTED


class _Bar:
    """One progress bar a run on stderr, by tqdm; silent where stderr is no terminal."""

    def __init__(self) -> None:
        if importlib.util.find_spec("tqdm") is None:
            raise ImportError('the command line needs its extras: pip install "learndrop_ext[cli]"')
        self.name = ""
        self.bar: Any = None

    def __enter__(self) -> _Bar:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def __call__(self, name: str, done: int, total: int, words: str) -> None:
        from tqdm import tqdm

        if self.bar is None or name != self.name:
            self.close()
            self.name = name
            self.bar = tqdm(total=total, desc=f"{name:<11}", disable=None, unit="step", mininterval=0.2)
        self.bar.set_postfix_str(words, refresh=False)
        self.bar.update(done - self.bar.n)

    def close(self) -> None:
        if self.bar is not None:
            self.bar.close()
            self.bar = None


def _rivals(text: str) -> tuple[str, ...]:
    names = tuple(text.split(","))
    for name in names:
        if name not in RIVALS:
            raise argparse.ArgumentTypeError(f"must be of {', '.join(RIVALS)}, separated by commas, got {name!r}")
    return names


def _count(text: str) -> int:
    value = int(text) if text.lstrip("+-").isdigit() else 0
    if value < 1:
        raise argparse.ArgumentTypeError(f"must be a whole number of at least 1, got {text!r}")
    return value


def _positive(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = 0.0
    if not 0 < value < float("inf"):
        raise argparse.ArgumentTypeError(f"must be a number above 0, got {text!r}")
    return value
