"""Writes the tables of README.md and docs/ between their markers, and the plots of docs/paper.md, from bench/results/.

python bench/table.py [--check]      with --check: exit 1 if a table does not match the files
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import re
import statistics
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import fine_tuning_table
import paper_table
import sweep_table
import width_table
from training_cases import CASES

from learndrop_ext.app.report import COLUMNS, table_row

ROOT = Path(__file__).resolve().parent.parent
RUNS = ("baseline", "learndrop", "freeze-only", "short")


def training_table(results: list[dict[str, Any]]) -> str:
    """Means over the seeds, one line a run."""
    lines = [
        "| machine | dataset, model | run | epochs | wall clock | of which fill | forward FLOPs | test accuracy | seeds |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    has_gpu = False
    for result in results:
        machine = result["machine"]["gpu"] or fine_tuning_table.machine_of(result)
        groups: dict[tuple[str, str], dict[str, list[dict[str, Any]]]] = {}
        for record in result["records"]:
            if record["suite"] == "training":
                has_gpu = has_gpu or bool(result["machine"]["gpu"])
                key = (record["dataset"], record["model"])
                groups.setdefault(key, {}).setdefault(record["run"], []).append(record)
        for (dataset, model), by_run in groups.items():
            base = mean(by_run["baseline"], "seconds")
            flops = mean(by_run["baseline"], "forward_flops")
            for run in RUNS:
                if run not in by_run:
                    continue
                records = by_run[run]
                seconds = mean(records, "seconds")
                share = 100 * (mean(records, "forward_flops") / flops - 1)
                cells = [
                    machine,
                    f"{dataset}, {model}",
                    run,
                    f"{mean(records, 'epochs'):.4g}",
                    f"{seconds:.1f} s" + ("" if run == "baseline" else f" ({base / seconds:.2f}x)"),
                    f"{mean(records, 'fill_seconds'):.2f} s",
                    f"{mean(records, 'forward_flops') / 1e9:,.0f} G"
                    + ("" if run == "baseline" else f" ({share:+.1f} %)"),
                    f"{mean(records, 'accuracy'):.2f} %",
                    str(len(records)),
                ]
                lines.append(f"| {' | '.join(cells)} |")
    if not has_gpu:
        lines.append("| a GPU | see docs/results.md | | | | | | | |")
    return "\n".join(lines)


def kernel_table(results: list[dict[str, Any]]) -> str:
    lines = [
        "| machine | suite, case | time | GB/s | of a copy | peer | times as fast |",
        "|---|---|---|---|---|---|---|",
    ]
    has_gpu = False
    for result in results:
        machine = result["machine"]["gpu"] or fine_tuning_table.machine_of(result)
        for record in result["records"]:
            if record["suite"] in ("training", "overhead"):
                continue
            has_gpu = has_gpu or record["device"] == "cuda"
            ratio = "" if record["ratio"] is None else f"{record['ratio']:.2f}"
            cells = [machine, f"{record['suite']}, {record['case']}", f"{record['median_s'] * 1e3:.3f} ms"]
            share = record["share_of_limit"]
            cells += [
                f"{record['gb_s']:.1f}",
                "" if share is None else f"{100 * share:.0f} %",
                record["peer"] or "",
                ratio,
            ]
            lines.append(f"| {' | '.join(cells)} |")
    if not has_gpu:
        lines.append("| a GPU | all | not measured | | | | |")
    return "\n".join(lines)


def overhead_table(results: list[dict[str, Any]]) -> str:
    lines = ["| machine | what | time | beside it |", "|---|---|---|---|"]
    for result in results:
        machine = result["machine"]["gpu"] or fine_tuning_table.machine_of(result)
        for record in result["records"]:
            if record["suite"] != "overhead":
                continue
            if record["run"] == "never drops":
                what = f"a policy that never drops, {record['model']}, batches of {record['batch']}"
                time = f"{record['us_per_step']:.0f} us a step more"
                beside = f"a plain step: {record['step_ms']:.1f} ms ({100 * record['share']:+.1f} %)"
            elif record["run"] == "step on rows":
                what = f"a step on rows, {record['model']}, batches of {record['batch']}"
                time = f"{record['us_per_step']:.0f} us a step, {record['epoch_begin_ms']:.0f} ms to begin an epoch"
                beside = f"the same layer alone: {record['head_us_per_step']:.0f} us a step"
            else:
                size = f" of {record['row_bytes']:,} bytes" if "row_bytes" in record else ""
                what = f"the loader, batches of {record['batch']} {record['codec']} rows{size}"
                time = f"{record['us_per_batch']:.0f} us a batch, {record['epoch_begin_ms']:.0f} ms to begin an epoch"
                beside = f"a DataLoader over a TensorDataset: {record['tensor_dataset_us_per_batch']:.0f} us a batch"
            lines.append(f"| {machine} | {what} | {time} | {beside} |")
    return "\n".join(lines if len(lines) > 2 else [*lines, "| all | not measured | | |"])


def host_time_table(_: list[dict[str, Any]]) -> str:
    """Steps on rows and the constructor, beside the code that copied the model's forward; see bench_overhead.py."""
    folder = ROOT / "bench" / "results" / "host-time"
    sides = [
        {(r["run"], r["model"].split(",")[0], r["batch"]): r for r in map(json.loads, file.read_text().splitlines())}
        for file in (folder / "own-forward.jsonl", folder / "copied-forward.jsonl")
    ]
    lines = [
        "| network, layers dropped | batch | a step on rows | before | the live layer alone | with all parameters in its "
        "optimizer | to begin an epoch | before |",
        "|---|---|---|---|---|---|---|---|",
    ]
    parts = ["| network, batch | part of a step on the host | on rows | the live layer alone |", "|---|---|---|---|"]
    makes = []
    for key, now in sides[0].items():
        before = sides[1][key]
        if now["run"] == "constructor":
            makes.append(
                f"{key[1]}, batches of {now['batch']}: {now['budget_steps']:.1f} steps with `Budget` (before "
                f"{before['budget_steps']:.1f}), {now['steps']:.1f} with `StoppedLearning` (before {before['steps']:.1f})"
            )
            continue
        step, head = f"{now['us_per_step']:.0f} us", f"{now['head_us_per_step']:.0f} us"
        old = f"{before['us_per_step']:.0f} us beside {before['head_us_per_step']:.0f}"
        walking = f"{now['same_optimizer_us_per_step']:.0f} us"
        begins = f"{now['epoch_begin_ms']:.1f} ms | {before['epoch_begin_ms']:.1f} ms"
        model = now["model"].replace(" layers dropped", "")
        lines.append(f"| {model} | {now['batch']} | {step} | {old} | {head} | {walking} | {begins} |")
        for name, taken in now["parts_us"].items():
            alone = now["head_parts_us"][name]
            parts.append(f"| {key[1]}, {now['batch']} | {name} | {taken:.0f} us | {alone:.0f} us |")
    return "\n".join([*lines, "", *parts, "", "Making a scheduler takes, in training steps: " + "; ".join(makes) + "."])


def read(folder: str) -> list[dict[str, Any]]:
    """The files of a folder in bench/results/, by name."""
    return [json.loads(file.read_text()) for file in sorted((ROOT / "bench" / "results" / folder).glob("*.json"))]


def fine_tuning_tables(_: list[dict[str, Any]]) -> str:
    """The study's table of each machine, see fine_tuning_table.py."""
    return "\n\n".join(map(fine_tuning_table.table, read("fine-tuning"))) or "not measured yet"


def fine_tuning_summary(_: list[dict[str, Any]]) -> str:
    """The plain recipe and Budget in the largest study."""
    only = (*fine_tuning_table.PLAIN, *fine_tuning_table.BUDGETS)
    return of_largest_study(lambda study: fine_tuning_table.table(study, only=only))


def augmented_table(_: list[dict[str, Any]]) -> str:
    """Flips and codecs in the largest study."""
    return of_largest_study(fine_tuning_table.augmented)


def exactness_table(_: list[dict[str, Any]]) -> str:
    """How exactly Budget kept its time in the largest study."""
    return of_largest_study(fine_tuning_table.exactness)


def of_largest_study(make: Callable[[dict[str, Any]], str]) -> str:
    studies = read("fine-tuning")
    return make(fine_tuning_table.largest(studies)) if studies else "not measured yet"


def sweep_tables(_: list[dict[str, Any]]) -> str:
    """Many runs on the same photos, see sweep_table.py."""
    return "\n\n".join(map(sweep_table.table, read("sweep"))) or "not measured yet"


def aims_tables(_: list[dict[str, Any]]) -> str:
    """What the study was to show and shows, see fine_tuning_table.py."""
    whole = [one for one in read("fine-tuning") if any(record["run"] == "budget-2" for record in one["records"])]
    tables = (f"{fine_tuning_table.machine_of(one)}:\n\n{fine_tuning_table.aims(one)}" for one in whole)
    return "\n\n".join(tables) or "not measured yet"


def gpu_training_table(_: list[dict[str, Any]]) -> str:
    """What bench/bench_training_gpu.py wrote, means over the seeds, and what none of the files has."""
    lines = [
        "| GPU, run | case | side | epochs | seconds | where they went | accuracy | layers dropped | seeds |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    missing = {case.name: list(case.sides) for case in CASES}
    plans = {case.name: dataclasses.asdict(case) for case in CASES}
    for file in sorted((ROOT / "bench" / "results").glob("*/training*.json")):
        result = json.loads(file.read_text())
        for name, entry in result["cases"].items():
            for side, runs in entry["runs"].items():
                if entry["case"] == plans.get(name) and side in missing[name]:
                    missing[name].remove(side)
                seconds = mean(runs, "seconds")
                base = (
                    mean(entry["runs"]["baseline"][: len(runs)], "seconds") if "baseline" in entry["runs"] else seconds
                )
                # Older files have the seconds of the constructor alone.
                spent = [run.get("spent", {"constructor": run.get("setup_seconds") or 0.0}) for run in runs]
                went = {part: mean(spent, part) for part in spent[0]}
                cells = [
                    f"{result.get('gpu') or result['machine']['gpu']}, `{file.stem}`",
                    name,
                    side,
                    f"{mean(runs, 'epochs'):.2f}",
                    f"{seconds:.1f}" + ("" if side == "baseline" else f" ({base / seconds:.2f}x)"),
                    ", ".join(f"{part} {value:.1f}" for part, value in went.items() if value >= 0.05),
                    f"{mean(runs, 'accuracy'):.2f} %",
                    "; ".join(f"{run['prefixes'][-1]} of {run['layers']}" for run in runs if run["prefixes"]),
                    str(len(runs)),
                ]
                lines.append(f"| {' | '.join(cells)} |")
    lines += [
        f"| a GPU | {name} | {', '.join(sides)} | | not measured | | | | |" for name, sides in missing.items() if sides
    ]
    return "\n".join(lines)


def compare_tables(_: list[dict[str, Any]]) -> str:
    """What `learndrop compare` said on each machine, as means over its seeds."""
    return "\n\n".join(map(compare_table, read("compare"))) or "not measured yet"


def compare_summary(_: list[dict[str, Any]]) -> str:
    """The newest comparison of three seeds or more."""
    kept = [one for one in read("compare") if len(one["results"]) >= 3]
    return compare_table(max(kept, key=lambda one: one["machine"]["date"])) if kept else "not measured yet"


def compare_table(kept: dict[str, Any]) -> str:
    machine, results = kept["machine"], kept["results"]
    seeds = "1 seed" if len(results) == 1 else f"means over {len(results)} seeds"
    title = f"{fine_tuning_table.machine_of(kept)}; torch {machine['torch']}, {machine['date']}; {seeds}"
    rows = [COLUMNS, ("---",) * len(COLUMNS), *compare_rows(results)]
    lines = [title, "", *(f"| {' | '.join(row)} |" for row in rows)]
    if len(results) > 1:
        lines += ["", by_seed(results)]
    return "\n".join(lines)


def by_seed(results: list[dict[str, Any]]) -> str:
    """How far the seeds lie apart, each compared with the other runs of its own seed."""
    times = [result["baseline"]["seconds"] / result["learndrop"]["seconds"] for result in results]
    ranges = [f"By seed, learndrop was {min(times):.2f} to {max(times):.2f} times as fast as baseline"]
    for rival in ("baseline", "short", "freeze-only"):
        points = [result["learndrop"]["accuracy"] - result[rival]["accuracy"] for result in results if rival in result]
        if points:
            mean_of = f"{statistics.fmean(points):+.2f} in mean"
            ranges.append(f"{min(points):+.2f} to {max(points):+.2f} points ({mean_of}) against {rival}")
    return ", ".join(ranges) + "."


def compare_rows(results: list[dict[str, Any]]) -> list[tuple[str, ...]]:
    """A comparison's lines with the means over the seeds, the spread of the accuracies, and each seed's drops."""
    runs = [run for run in RUNS if all(run in result for result in results)]
    averaged = {
        run: {
            "drops": results[0][run]["drops"],
            **{
                key: mean([result[run] for result in results], key)
                for key in ("seconds", "fill_seconds", "forward_flops", "accuracy")
            },
        }
        for run in runs
    }
    rows = []
    for run in runs:
        *cells, accuracy, drops = table_row(averaged, run)
        if len(results) > 1:
            spread = statistics.stdev(result[run]["accuracy"] for result in results)
            accuracy = accuracy.replace(" %", f" % ± {spread:.2f}", 1)
            made = [result[run]["drops"] for result in results]
            if all(made):
                first, last = (
                    " to ".join(map(str, sorted({min(layers), max(layers)})))
                    for layers in ([of_seed[at]["prefix"] for of_seed in made] for at in (0, -1))
                )
                drops = f"{first} at first, {last} at last"
        rows.append((*cells, accuracy, drops))
    return rows


def of_paper(make: Callable[[dict[str, Any]], str]) -> Callable[[list[dict[str, Any]]], str]:
    """Return what makes a table of the study of the paper's networks on CPUs, and one of that on GPUs."""

    def tables(_: list[dict[str, Any]]) -> str:
        studies = paper_studies()
        parts = [f"{paper_table.title_of(study)}:\n\n{make(study)}" for study in studies]
        if len(studies) == 1:
            parts.append("On a GPU: not measured.")
        return "\n\n".join(parts or [make({"records": []})])

    return tables


def paper_studies() -> list[dict[str, Any]]:
    """The study at the scale of CPUs, and at that of GPUs, as far as there are any."""
    files = read("paper")
    by_scale = ([file for file in files if bool(file["machine"]["gpu"]) == on_gpu] for on_gpu in (False, True))
    return [dict(paper_table.combined(of_scale)) for of_scale in by_scale if of_scale]


def paper_summary(_: list[dict[str, Any]]) -> str:
    """A line for each network of the largest study."""
    studies = paper_studies()
    if not studies:
        return "Not measured yet: `python bench/bench_paper.py --data-root DIR` runs or continues the study."
    largest = fine_tuning_table.largest(studies)
    return f"{paper_table.title_of(largest)}; {largest['epochs']} epochs:\n\n{paper_table.summary(largest)}"


def paper_plots(_: list[dict[str, Any]]) -> str:
    """The plots of the study with the most runs."""
    if not paper_studies():
        return "The plots of FLOPs cut against depth, and of accuracy against time, are drawn from the study: not measured."
    return (
        "![Forward FLOPs cut against depth, one curve per dataset](paper-flops.svg)\n\n"
        "![Test accuracy against training time, one panel per network and dataset](paper-accuracy.svg)"
    )


def draw_paper_plots() -> None:
    if studies := paper_studies():
        for name, plot in paper_table.PLOTS.items():
            (ROOT / "docs" / name).write_text(plot(fine_tuning_table.largest(studies)))


def width_systems(_: list[dict[str, Any]]) -> str:
    """The ten systems of docs/width.md, see width_table.py."""
    return width_table.systems(read("width"))


def width_tables(_: list[dict[str, Any]]) -> str:
    """The study of narrowing on each machine."""
    return "\n\n".join(map(width_table.table, read("width"))) or width_table.NOT_MEASURED


TABLES = {
    "README.md": {
        "paper": paper_summary,
        "training": training_table,
        "compare": compare_summary,
        "fine-tuning": fine_tuning_summary,
    },
    "docs/results.md": {
        "kernels": kernel_table,
        "host-time": host_time_table,
        "overhead": overhead_table,
        "gpu-training": gpu_training_table,
    },
    "docs/when-it-pays.md": {
        "fine-tuning": fine_tuning_tables,
        "exactness": exactness_table,
        "augmented": augmented_table,
        "aims": aims_tables,
        "compare": compare_tables,
        "sweep": sweep_tables,
    },
    "docs/paper.md": {
        "paper": of_paper(paper_table.summary),
        "paper-aims": of_paper(paper_table.aims),
        "paper-plots": paper_plots,
        "paper-rows": of_paper(paper_table.rows),
        "paper-rules": of_paper(paper_table.rules),
        "paper-norms": of_paper(paper_table.norms),
        "paper-long": of_paper(paper_table.long),
        "paper-recipes": of_paper(paper_table.recipes),
    },
    "docs/scores.md": {
        "paper-scores": of_paper(paper_table.scores),
        "paper-thresholds": of_paper(paper_table.thresholds),
    },
    "docs/width.md": {"width-systems": width_systems, "width": width_tables},
}


def mean(records: list[dict[str, Any]], key: str) -> float:
    return statistics.fmean(record[key] for record in records)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("--check", action="store_true")
    args = parser.parse_args()
    results = read("")
    stale = []
    for name, tables in TABLES.items():
        path = ROOT / name
        text = path.read_text()
        for mark, make in tables.items():
            between = re.compile(f"(<!-- table:{mark} -->\n).*?(<!-- /table:{mark} -->)", re.DOTALL)
            if not between.search(text):
                sys.exit(f"bench/table.py: {name} must have the markers of table:{mark}, got none")
            table = make(results)
            text = between.sub(lambda found, table=table: f"{found[1]}{table}\n{found[2]}", text)
        if text != path.read_text():
            stale.append(name)
            if not args.check:
                path.write_text(text)
    if not args.check:
        draw_paper_plots()
    print("changed: " + ", ".join(stale) if stale else "all tables are as the files say")
    return 1 if stale and args.check else 0


if __name__ == "__main__":
    sys.exit(main())
