"""Writes the table of the fine-tuning study as Markdown, and its plot as SVG, from bench/results/fine-tuning/.

python bench/fine_tuning_table.py [--plot FILE.svg] [FILE.json ...]
"""

from __future__ import annotations

import argparse
import io
import itertools
import json
import re
import statistics
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent

#: Methods that are one curve, from the shortest to the longest run.
CURVES = {
    "plain recipe, 1, 2, 3 and all epochs": ("short-1", "short-2", "short-3", "full"),
    "Budget 6, 5, 4, 3, 2 and 1.5, from the first step": (
        "budget-6",
        "budget-5",
        "budget-4",
        "budget-3",
        "budget-2",
        "budget-1.5",
    ),
    "Budget 2, after epoch 1": ("budget-2-start-1",),
    "set by hand, growing": ("growing",),
    "set by hand, at once": ("static",),
    "growing, no rows kept": ("freeze-only",),
    "linear probe": ("linear-probe",),
}
PLAIN, BUDGETS = list(CURVES.values())[:2]
#: What the flips and the codec are compared in.
AUGMENTED = {
    "full-flip": "live flips in every epoch",
    "budget-2-mirror": "both mirror images, in turn",
    "budget-2-views": "four stored views of live flips",
    "budget-2-flip": "flipped rows",
    "budget-2": "no flips, fp16",
    "budget-2-uint8": "no flips, uint8",
}
COLOURS = ("#555555", "#0072b2", "#56b4e9", "#009e73", "#e69f00", "#d55e00", "#cc79a7")

Records = Sequence[Mapping[str, Any]]


def by_method(records: Records, dataset: str) -> dict[str, list[Mapping[str, Any]]]:
    found: dict[str, list[Mapping[str, Any]]] = {}
    for record in records:
        if record["dataset"] == dataset:
            found.setdefault(record["run"], []).append(record)
    return found


def mean(records: Records, key: str) -> float:
    return statistics.fmean(record[key] for record in records)


def plain_at(methods: Mapping[str, Records], seconds: float) -> float | None:
    """Accuracy of the plain recipe shortened to a time: between its runs by a straight line, None before the first."""
    points = sorted((mean(methods[run], "seconds"), mean(methods[run], "accuracy")) for run in PLAIN if run in methods)
    if not points or seconds < points[0][0]:
        return None
    for (left, low), (right, high) in itertools.pairwise(points):
        if seconds <= right:
            return low + (high - low) * (seconds - left) / (right - left)
    return points[-1][1]


def machine_of(study: Mapping[str, Any]) -> str:
    machine = study["machine"]
    cores = "1 core" if machine["cores"] == 1 else f"{machine['cores']} cores"
    return f"{machine['gpu'] or machine['cpu']}, {cores}"


def largest(studies: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """The study with the most runs."""
    return max(studies, key=lambda study: len(study["records"]))


def with_seeds_of(methods: Mapping[str, Records], records: Records) -> dict[str, list[Mapping[str, Any]]]:
    """The runs with the seeds of some records: what these are to be compared with."""
    seeds = {record["seed"] for record in records}
    kept = {run: [record for record in found if record["seed"] in seeds] for run, found in methods.items()}
    return {run: found for run, found in kept.items() if found}


def table(study: Mapping[str, Any], *, only: Sequence[str] | None = None) -> str:
    """Means over the seeds, one line per method and set. A method is compared with runs of the same seeds.

    Args:
        study: contents of a file.
        only: the methods to show. Default: all, the plain recipe and Budget first.
    """
    lines = [
        f"{machine_of(study)}; torch {study['machine']['torch']}, {study['machine']['date']}",
        "",
        "| set | method | epochs | seconds | test accuracy | against full | against the plain recipe of that time | seeds |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for dataset in dict.fromkeys(record["dataset"] for record in study["records"]):
        methods = by_method(study["records"], dataset)
        for run in dict.fromkeys((*PLAIN, *BUDGETS, *methods) if only is None else only):
            if run not in methods:
                continue
            records = methods[run]
            same = with_seeds_of(methods, records)
            full = same.get("full")
            seconds, accuracy = mean(records, "seconds"), mean(records, "accuracy")
            spread = statistics.stdev(r["accuracy"] for r in records) if len(records) > 1 else None
            plain = None if run in PLAIN else plain_at(same, seconds)
            cells = [
                dataset,
                run,
                f"{mean(records, 'epochs'):g}",
                f"{seconds:.1f}" + (f" ({mean(full, 'seconds') / seconds:.2f}x)" if full and run != "full" else ""),
                f"{accuracy:.2f} %" + (f" ± {spread:.2f}" if spread is not None else ""),
                f"{accuracy - mean(full, 'accuracy'):+.2f}" if full and run != "full" else "",
                f"{accuracy - plain:+.2f}" if plain is not None else "",
                str(len(records)),
            ]
            lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def seconds_to(methods: Mapping[str, Records], accuracy: float) -> float | None:
    """Seconds in which Budget reaches an accuracy: between its runs by a straight line, None where none does."""
    points = sorted(
        (mean(methods[run], "seconds"), mean(methods[run], "accuracy")) for run in BUDGETS if run in methods
    )
    if points and points[0][1] >= accuracy:
        return points[0][0]
    for (left, low), (right, high) in itertools.pairwise(points):
        if low < accuracy <= high:
            return left + (right - left) * (accuracy - low) / (high - low)
    return None


def aims(study: Mapping[str, Any]) -> str:
    """What the study was to show and what it shows, as means over the sets."""
    sets = [by_method(study["records"], name) for name in dict.fromkeys(r["dataset"] for r in study["records"])]

    def accuracy(run: str) -> Callable[[Mapping[str, Records]], float | None]:
        return lambda methods: mean(methods[run], "accuracy") if run in methods else None

    def plain_for(run: str) -> Callable[[Mapping[str, Records]], float | None]:
        return lambda methods: plain_at(methods, mean(methods[run], "seconds")) if run in methods else None

    def share_of_time(methods: Mapping[str, Records]) -> float | None:
        if "short-2" not in methods:
            return None
        reached = seconds_to(methods, mean(methods["short-2"], "accuracy"))
        return None if reached is None else reached / mean(methods["short-2"], "seconds")

    lines = ["| | aim | measured |", "|---|---|---|"]
    for words, aim, one, other in (
        ("Budget(2.0) against the full run", "-0.5 or more", accuracy("budget-2"), accuracy("full")),
        ("Budget(2.0) against the plain recipe of its time", "+1 or more", accuracy("budget-2"), plain_for("budget-2")),
        ("Budget(4.0) against the plain recipe of its time", "+5 or more", accuracy("budget-4"), plain_for("budget-4")),
    ):
        pairs = [(one(methods), other(methods)) for methods in sets]
        points = [a - b for a, b in pairs if a is not None and b is not None]
        shown = f"{statistics.fmean(points):+.2f} points" if points else "not measured"
        lines.append(f"| {words} | {aim} | {shown} |")
    shares = [share for share in map(share_of_time, sets) if share is not None]
    shown = f"{statistics.fmean(shares):.2f}" if shares else "not measured"
    lines.append(
        f"| time of Budget to the accuracy of the plain recipe's 2 epochs, of their time | 0.5 or less | {shown} |"
    )
    return "\n".join(lines)


def augmented(study: Mapping[str, Any]) -> str:
    """Accuracy of flips and codecs less that of the full run without flips, a column for each set and part of the images."""
    sets = list(dict.fromkeys(record["dataset"] for record in study["records"]))
    parts = {"test": "accuracy", "validation": "validation_accuracy"}
    columns = [f"{name}, {part}" for name in sets for part in parts]
    lines = [f"| method | | {' | '.join(columns)} |", f"|---|---|{'---|' * len(columns)}"]
    for run, words in AUGMENTED.items():
        cells = []
        for name in sets:
            methods = by_method(study["records"], name)
            same = with_seeds_of(methods, methods.get(run, []))
            for key in parts.values():
                shown = run in methods and "full" in same
                cells.append(f"{mean(methods[run], key) - mean(same['full'], key):+.2f}" if shown else "not measured")
        lines.append(f"| `{run}` | {words} | {' | '.join(cells)} |")
    return "\n".join(lines)


#: What Budget gives as the reason of a drop.
ASKED = re.compile(r"budget ([\d.]+)x: .*forecast [\d.]+ s of ([\d.]+) s")


def exactness(study: Mapping[str, Any]) -> str:
    """How exactly the runs of Budget kept the time asked for, each beside the full run of its seed and its augmentation."""
    runs = [record for record in study["records"] if record["run"] in ("full", "full-flip")]
    full = {(record["dataset"], record["seed"], record["recipe"]["augment"]): record["seconds"] for record in runs}
    kept, estimated, speedups = [], [], []
    for record in study["records"]:
        asked = [ASKED.match(drop["reason"]) for drop in record["drops"]]
        if not asked or asked[0] is None or asked[-1] is None:
            continue
        kept.append(record["seconds"] / float(asked[-1][2]))
        whole = full.get((record["dataset"], record["seed"], record["recipe"]["augment"]))
        if whole is not None and record["drops"][0]["epoch"] == 0:
            estimated.append(float(asked[0][1]) * float(asked[0][2]) / whole)
            speedups += [whole / record["seconds"]] if record["run"] == "budget-2" else []
    lines = ["| | runs | within 5 % of 1 | least | median | largest |", "|---|---|---|---|---|---|"]
    for words, found in (
        ("time taken, of the time asked for at the last drop", kept),
        ("full run as estimated before the first step, of the one measured", estimated),
        ("`budget-2`: how many times as fast as the full run", speedups),
    ):
        if not found:
            continue
        within = "" if found is speedups else str(sum(0.95 <= x <= 1.05 for x in found))
        cells = (words, str(len(found)), within, *(f"{f(found):.2f}" for f in (min, statistics.median, max)))
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def plot(study: Mapping[str, Any]) -> str:
    """Draw accuracy against time as SVG, a panel a set and a curve a method; bars span the seeds."""
    from matplotlib import rc_context
    from matplotlib.backends.backend_svg import FigureCanvasSVG
    from matplotlib.figure import Figure

    sets = list(dict.fromkeys(record["dataset"] for record in study["records"]))
    with rc_context({"svg.fonttype": "none", "svg.hashsalt": "learndrop_ext", "font.size": 10.0}):
        figure = Figure(figsize=(5.2 * len(sets), 4.6), layout="constrained")
        FigureCanvasSVG(figure)
        axes_of = figure.subplots(1, len(sets), squeeze=False)[0]
        for axes, dataset in zip(axes_of, sets, strict=True):
            methods = by_method(study["records"], dataset)
            for (label, runs), colour in zip(CURVES.items(), COLOURS, strict=True):
                found = [methods[run] for run in runs if run in methods]
                if not found:
                    continue
                accuracy = [mean(records, "accuracy") for records in found]
                lowest = [min(record["accuracy"] for record in records) for records in found]
                highest = [max(record["accuracy"] for record in records) for records in found]
                axes.errorbar(
                    [mean(records, "seconds") for records in found],
                    accuracy,
                    yerr=[
                        [value - low for value, low in zip(accuracy, lowest, strict=True)],
                        [high - value for value, high in zip(accuracy, highest, strict=True)],
                    ],
                    label=label,
                    color=colour,
                    marker="o",
                    markersize=4,
                    capsize=3,
                )
            axes.set_title(dataset)
            axes.set_xlim(left=0.0)
            axes.set_xlabel("training time (s)")
            axes.set_ylabel("test accuracy (%)")
            axes.grid(axis="y", color="#dddddd")
        handles, labels = axes_of[0].get_legend_handles_labels()
        figure.legend(handles, labels, loc="outside lower center", ncols=2, frameon=False)
        text = io.StringIO()
        figure.savefig(text, format="svg", metadata={"Date": None, "Creator": None})
    return text.getvalue()


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("files", nargs="*", type=Path, help="the study's files (default: bench/results/fine-tuning/)")
    parser.add_argument("--plot", type=Path, help="where the plot of the largest study goes")
    args = parser.parse_args(argv)
    files = args.files or sorted((ROOT / "bench" / "results" / "fine-tuning").glob("*.json"))
    if not files:
        sys.exit("bench/fine_tuning_table.py: no study yet, run bench/bench_fine_tuning.py")
    studies = [json.loads(path.read_text()) for path in files]
    print("\n\n".join(table(study) for study in studies))
    if args.plot is not None:
        args.plot.write_text(plot(largest(studies)))
    return 0


if __name__ == "__main__":
    sys.exit(main())
