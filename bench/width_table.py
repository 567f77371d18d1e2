"""Writes the tables of docs/width.md as Markdown from the files in bench/results/width/.

python bench/width_table.py [FILE.json ...]
"""

from __future__ import annotations

import json
import statistics
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from fine_tuning_table import machine_of

ROOT = Path(__file__).resolve().parent.parent
NOT_MEASURED = "not measured"

#: The runs of each system, and what its abstract says.
SYSTEMS: dict[str, tuple[str, tuple[str, ...], str]] = {
    "Pruning filters while training (2003.02800)": (
        '`criterion="l1"`, also `"random"`, `"activation"`',
        ("l1", "random"),
        "80 % of VGG-16's filters on CIFAR-10 for less than 1 % of accuracy; l1 is the best of its three criteria",
    ),
    "DropNet (2207.06646)": (
        '`criterion="activation", schedule=Iterative(0.2)`',
        ("activation",),
        "up to 90 % of nodes or filters without a significant loss of accuracy",
    ),
    "Zero-keep filter pruning": (
        '`criterion="zeros"`',
        ("zeros",),
        "better than random filter pruning, with many more zeros and a marginal loss",
    ),
    "Pruning at a glance (1912.00200)": (
        '`scope="global"`',
        ("global",),
        "VGG-16 and two ResNets on CIFAR-10, highly compressed without a loss of accuracy",
    ),
    "One-cycle pruning (2107.02086)": (
        "`schedule=OneCycle()`",
        ("one-cycle", "one-shot"),
        "better than one-shot, iterative and gradual schedules in a given training budget, at 80 to 95 % of weights",
    ),
    "Play and prune (1905.04446)": (
        "`controller=Tolerance(1.0)`, `orthogonality(model)`",
        ("tolerance",),
        "VGG-16 with 17.5 times fewer parameters and 6.43 times fewer FLOPs, no loss of accuracy",
    ),
    "DropNeuron (1606.07326)": (
        '`in_norms(model) + out_norms(model)`, `criterion="connections", scope=Below(1e-2)`',
        ("penalty",),
        "simpler networks of comparable performance; no number",
    ),
    "Data-independent pruning via coresets (1907.04018)": (
        '`criterion="coreset"`',
        ("coreset",),
        "LeNet-300-100 on MNIST compressed by 90 %, with better accuracy",
    ),
    "Pruning without retraining": (
        '`sparsify(model, amount, rule="flat")`, also `"triangular"`, `"relative"`',
        ("sparse-flat", "sparse-triangular", "sparse-relative"),
        "not at hand: the rules are our own reading of their names",
    ),
    "Pruning weightless neural networks (ESANN 2022)": (
        "`examples/weightless.py`",
        (),
        "40 % smaller on average for at most 1 % of accuracy",
    ),
}

#: All runs, in the order of the tables: what the rules are compared with, the rules, and depth.
RUNS = (
    *("full", "short-0.75", "short-0.5", "short-0.25", "narrow-from-start"),
    *(run for _, runs, _ in SYSTEMS.values() for run in runs),
    *("drops", "drops-and-one-cycle"),
)

Records = Sequence[Mapping[str, Any]]


def systems(studies: Sequence[Mapping[str, Any]]) -> str:
    """One line a system: how it is called here, what its abstract says, and what its runs lost in the largest study."""
    records: Records = max((study["records"] for study in studies), key=len, default=[])
    lines = [
        "| system | here | its abstract says | points of accuracy against `full` (parameters left), keeping 0.5 and 0.2 |",
        "|---|---|---|---|",
    ]
    for system, (here, runs, said) in SYSTEMS.items():
        found = [f"**{run}** {cells}" for run in runs if (cells := _against_full(records, run))]
        seen = "<br>".join(found) or (
            NOT_MEASURED if runs else "printed by the example, tested in `tests/app/test_examples.py`"
        )
        lines.append(f"| {system} | {here} | {said} | {seen} |")
    return "\n".join(lines)


def _against_full(records: Records, run: str) -> str:
    groups, cells = _groups(records), {}
    for (dataset, model, name, _), own in groups.items():
        full = groups.get((dataset, model, "full", None))
        if name == run and full is not None:
            lost = _mean(own, "accuracy") - _mean(full, "accuracy")
            left = _mean(own, "parameters") / _mean(full, "parameters")
            cells.setdefault(f"{model}, {dataset}", []).append(f"{lost:+.1f} ({100 * left:.0f} %)")
    return "; ".join(f"{network}: {', '.join(found)}" for network, found in cells.items())


def table(study: Mapping[str, Any]) -> str:
    """Means over the seeds, one line for each network, share and method."""
    machine = study["machine"]
    lines = [
        f"{machine_of(study)}; torch {machine['torch']}, {machine['date']}",
        "",
        "| set, network | method | keep | epochs | seconds | MFLOP an image | parameters | test accuracy | seeds |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    groups = _groups(study["records"])
    for (dataset, model, run, keep), records in groups.items():
        full = groups.get((dataset, model, "full", None), records)
        cells = [
            f"{dataset}, {model}",
            run,
            "" if keep is None else f"{keep:g}",
            f"{_mean(records, 'epochs'):g}",
            f"{_mean(records, 'seconds'):.1f} ({_mean(full, 'seconds') / _mean(records, 'seconds'):.2f}x)",
            f"{_mean(records, 'flops') / 1e6:.2f}",
            f"{_mean(records, 'parameters'):,.0f}",
            f"{_mean(records, 'accuracy'):.2f} %",
            str(len(records)),
        ]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def _groups(records: Records) -> dict[tuple[str, str, str, float | None], list[Mapping[str, Any]]]:
    """The records by set, network, run and share kept, in the order of the tables."""
    found: dict[tuple[str, str, str, float | None], list[Mapping[str, Any]]] = {}
    for record in records:
        key = (record["dataset"], record["model"], record["run"], record["keep"])
        found.setdefault(key, []).append(record)

    def order(key: tuple[str, str, str, float | None]) -> tuple[str, str, float, int]:
        dataset, model, run, keep = key
        return dataset, model, -(keep or 1), RUNS.index(run)

    return {key: found[key] for key in sorted(found, key=order)}


def _mean(records: Records, key: str) -> float:
    return statistics.fmean(record[key] for record in records)


def main() -> int:
    files = [Path(name) for name in sys.argv[1:]] or sorted((ROOT / "bench" / "results" / "width").glob("*.json"))
    studies = [json.loads(file.read_text()) for file in files]
    print("\n\n".join([systems(studies), *map(table, studies)]))
    return 0


if __name__ == "__main__":
    sys.exit(main())
