"""The command line: `learndrop compare`, `train`, `forecast`, `store` and `info`."""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import importlib.util
import json
import os
import re
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch

from learndrop_ext import backend_info
from learndrop_ext.app import report, runs
from learndrop_ext.app.datasets import Split, load_dataset, load_folder
from learndrop_ext.app.networks import check_network, is_external, pixel_statistics
from learndrop_ext.app.options import PRESETS, make_parser
from learndrop_ext.app.page import replacing
from learndrop_ext.app.recipe import (
    STOPPED_OPTIONS,
    Recipe,
    default_views,
    make_forecast,
    make_network,
    parse_narrow,
    parse_policy,
    policy_of,
)
from learndrop_ext.decide.forecast import align_columns
from learndrop_ext.ops import free_bytes
from learndrop_ext.rows.store.keeping import check_rows, compact, list_rows, remove_rows
from learndrop_ext.rows.store.store import INDEX, RowStore


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command and return its exit status: 0, 2 after an error, 130 after Ctrl-C.

    Errors are printed as one line, or raised if the environment has LEARNDROP_TRACEBACK=1.
    """
    parser = make_parser()
    args = parser.parse_args(argv)
    if args.command is None:
        parser.print_help()
        return 2
    run = {"compare": _compare, "train": _train, "forecast": _forecast, "store": _store, "info": _info}[args.command]
    try:
        run(args)
        return 0
    except KeyboardInterrupt as stop:
        print(str(stop) or "interrupted", file=sys.stderr)
        return 130
    except (ValueError, TypeError, ImportError, OSError, RuntimeError, MemoryError) as error:
        if os.environ.get("LEARNDROP_TRACEBACK") == "1":
            raise
        print(f"learndrop {args.command}: error: {error}", file=sys.stderr)
        return 2


def _recipe(args: argparse.Namespace) -> tuple[Split, Recipe]:
    """Return the data and the recipe that the options describe. Cheap checks come before images are read."""
    device = _device(args.device)
    _check_out(args.out)
    fields = {field.name for field in dataclasses.fields(Recipe)}
    given = {name: value for name, value in vars(args).items() if name in fields and value is not None}
    chosen = PRESETS[args.dataset] | given
    check_network(chosen["model"])
    _check_options(args, chosen["model"])
    split = _load(args)
    if chosen.get("augment") == "none":
        chosen["augment"] = None
    chosen |= {"device": device, "batch_size": min(chosen["batch_size"], len(split.train))}
    chosen.setdefault("stem", "small" if split.size <= 64 else "imagenet")
    chosen.setdefault("views", default_views(chosen.get("augment"), chosen["epochs"], args.policy))
    recipe = Recipe(**chosen)
    network = make_network(split, recipe)
    if network.note:
        print(network.note, file=sys.stderr)
    if statistics := pixel_statistics(recipe.model):
        split = split.map(lambda part: part.normalized(*statistics))
    return _decoded(split, torch.device(device)), recipe


def _load(args: argparse.Namespace) -> Split:
    if args.dataset != "folder":
        if args.test_share is not None:
            raise ValueError(f"--test-share is for --dataset folder, got --dataset {args.dataset}")
        return load_dataset(args.dataset, args.data_root, limit=args.limit, size=args.image_size)
    if args.data_root is None:
        raise ValueError("--dataset folder needs --data-root DIR, the folder of the photos, got none")
    return load_folder(args.data_root, limit=args.limit, size=args.image_size, test_share=args.test_share)


def _check_options(args: argparse.Namespace, model: str) -> None:
    """Refuse options that the chosen model or policy does not use."""
    if is_external(model):
        for name in ("width", "stem"):
            if getattr(args, name) is not None:
                raise ValueError(f"--{name} is for the models vgg.. and resnet.., got --model {model}")
    parse_policy(args.policy)
    if args.policy != "stopped":
        for name in STOPPED_OPTIONS:
            if getattr(args, name) != getattr(Recipe, name):
                raise ValueError(f"--{name.replace('_', '-')} is for --policy stopped, got --policy {args.policy}")


def _decoded(split: Split, device: torch.device) -> Split:
    """Return the split with its photos decoded if they fit into half of the free memory."""
    wanted = sum(part.bytes_decoded for part in (split.train, split.test, split.validation) if part is not None)
    free = min(free_bytes(place) for place in {torch.device("cpu"), device})
    if wanted <= free // 2:
        return split.map(lambda part: part.decoded())
    sizes = f"the images take {wanted / 2**30:.1f} GiB and {free / 2**30:.1f} GiB are free"
    print(f"{sizes}: photos are decoded each time they are read", file=sys.stderr)
    return split


def _device(name: str) -> str:
    if name == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    found = re.fullmatch(r"cpu(?::0)?|cuda(?::(\d+))?", name)
    if found is None:
        raise ValueError(f"--device must be auto, cpu, cuda or cuda:N, got {name!r}")
    if name.startswith("cpu"):
        return "cpu"
    if not torch.cuda.is_available():
        raise ValueError(
            "--device cuda needs a GPU that this torch can use, and torch.cuda.is_available() is False here: "
            "install a CUDA build of torch and a driver, or use --device cpu"
        )
    if int(found[1] or 0) >= torch.cuda.device_count():
        raise ValueError(f"--device must be one of {torch.cuda.device_count()} GPUs, cuda:0 and on, got {name!r}")
    return name


def _check_out(folder: Path) -> None:
    """Refuse a folder that cannot be created or written."""
    existing = next(path for path in (folder, *folder.absolute().parents) if path.exists())
    if not existing.is_dir() or not os.access(existing, os.W_OK | os.X_OK):
        kind = "which cannot be written" if existing.is_dir() else f"where {existing} is a file"
        raise ValueError(f"--out must be a folder that can be written, got {folder}, {kind}")


def _compare(args: argparse.Namespace) -> None:
    split, recipe = _recipe(args)
    with _output(args) as (reporter, bar):
        result: dict[str, Any] = {}
        for result in runs.compare(split, recipe, rivals=args.rivals, on_epoch=reporter.add, progress=bar):
            result["config"] |= _data_config(args)
            reporter.write(result)
    _print(result, args)


def _train(args: argparse.Namespace) -> None:
    narrow = None if args.narrow is None else parse_narrow(args.narrow)
    split, recipe = _recipe(args)
    policy = None if args.plain else policy_of(recipe)
    name = "baseline" if args.plain else "learndrop"
    with _output(args) as (reporter, bar):
        trained, model = runs.train(
            name, split, recipe, policy=policy, narrow=narrow, on_epoch=reporter.add, progress=bar
        )
        config = dataclasses.asdict(recipe) | _data_config(args) | {"narrow": args.narrow}
        result = {"config": config, name: dataclasses.asdict(trained)}
        with replacing(args.out / "model.pt") as path:
            torch.save(model.state_dict(), path)
        reporter.write(result)
    _print(result, args)


@contextlib.contextmanager
def _output(args: argparse.Namespace) -> Iterator[tuple[report.Reporter, _Bar]]:
    """Give the report and the progress bar of a command. Ctrl-C says where what was measured is."""
    try:
        with report.Reporter(args.out) as reporter, contextlib.closing(_Bar()) as bar:
            yield reporter, bar
    except KeyboardInterrupt:
        raise KeyboardInterrupt(f"interrupted; what was measured so far is in {args.out}") from None


def _data_config(args: argparse.Namespace) -> dict[str, Any]:
    return {name: getattr(args, name) for name in ("dataset", "limit", "image_size", "test_share")}


def _forecast(args: argparse.Namespace) -> None:
    split, recipe = _recipe(args)
    found = make_forecast(split, recipe)
    page = report.write_forecast(args.out, found)
    print(json.dumps(found.as_dict()) if args.json else f"{found.format_table()}\n\ndrawn in: {page}")


def _store(args: argparse.Namespace) -> None:
    """Check, remove and compact the rows of a store as the options ask for, and list what is left, a dict per fingerprint.

    What is "in_use" exceeds a limit but a run uses it.
    """
    folder: Path = args.folder
    if not (folder / INDEX).is_file():
        kind = "a file" if folder.is_file() else "a folder without an index" if folder.is_dir() else "not there"
        raise ValueError(f"DIR must be a store of rows, got {folder}, which is {kind}")
    with contextlib.closing(RowStore(folder)) as store:
        damaged = check_rows(store) if args.check else {}
        age = None if args.remove_older_than is None else 24 * 3600 * args.remove_older_than
        removed, in_use = remove_rows(store, older_than_seconds=age, keep_bytes=args.keep_bytes)
        saved = compact(store) if args.compact else 0
        listed = {"removed": removed, "in_use": in_use, "rows": list_rows(store)}
    listing = {"folder": str(folder), "damaged": damaged, "saved_bytes": saved} | {
        name: [dataclasses.asdict(one) for one in rows] for name, rows in listed.items()
    }
    print(json.dumps(listing) if args.json else _format_listing(listing))


def _format_listing(listing: dict[str, Any]) -> str:
    """Format a listing for a terminal, one line for each fingerprint."""
    lines = [
        f"{file}: {count} damaged rows, which will be computed again" for file, count in listing["damaged"].items()
    ]
    lines += [f"removed {len(listing['removed'])} files"] if listing["removed"] else []
    lines += [f"kept {one['file']}, which a run uses" for one in listing["in_use"]]
    lines += [f"saved {listing['saved_bytes']:,} bytes"] if listing["saved_bytes"] else []
    rows = listing["rows"]
    if not rows:
        return "\n".join([*lines, f"no rows in {listing['folder']}"])
    cells = [[f"{v:.0f}" if isinstance(v, float) else str(v)[:60] for v in row.values()] for row in rows]
    return "\n".join([*lines, *align_columns([list(rows[0]), *cells])])


def _info(args: argparse.Namespace) -> None:
    found = dataclasses.asdict(backend_info())
    if args.json:
        print(json.dumps(found))
        return
    for name, value in found.items():
        shown = ", ".join(map(str, value)) or "none" if isinstance(value, list | tuple) else value
        print(f"{name.replace('_', ' '):<20} {'none' if shown is None else shown}")


def _print(result: dict[str, Any], args: argparse.Namespace) -> None:
    if args.json:
        print(json.dumps(result))
    else:
        print(f"{report.format_table(result)}\n\nreport: {args.out / 'report.html'}")


class _Bar:
    """A tqdm progress bar for each run, on stderr if that is a terminal."""

    def __init__(self) -> None:
        if importlib.util.find_spec("tqdm") is None:
            raise ImportError('the command line needs its extras: pip install "learndrop_ext[cli]"')
        self.name = ""
        self.bar: Any = None

    def __call__(self, name: str, done: int, total: int, text: str) -> None:
        from tqdm import tqdm

        if name != self.name:
            self.close()
            self.name = name
            self.bar = tqdm(total=total, desc=f"{name:<11}", disable=None, unit="step", mininterval=0.2)
        self.bar.set_postfix_str(text, refresh=False)
        self.bar.update(done - self.bar.n)

    def close(self) -> None:
        if self.bar is not None:
            self.bar.close()
