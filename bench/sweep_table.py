"""Writes the table of the study of the store as Markdown, from bench/results/sweep/; see bench_sweep.py."""

from __future__ import annotations

import statistics
from collections.abc import Mapping
from typing import Any


def table(study: Mapping[str, Any]) -> str:
    """The study as Markdown: for each part and side the runs, seconds, images read, and accuracy and drops of the best."""
    lines = [
        "| part | photos | side | runs | seconds | images read | validation accuracy, best run | its test accuracy "
        "| its layers dropped, at first and at last |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    groups: dict[tuple[str, int, str], list[Mapping[str, Any]]] = {}
    for record in study["records"]:
        groups.setdefault((record["part"], record["photos"], record["side"]), []).append(record)
    for (part, photos, side), runs in groups.items():
        whole = groups.get((part, photos, side.replace("store", "whole") if part != "sweep" else "whole"), runs)
        whole = groups.get((part, photos, "whole"), whole) if part == "seeds" else whole
        seconds, plain_seconds = (sum(run["seconds"] for run in of) for of in (runs, whole))
        longest = max(run["epochs"] for run in runs)
        final = [run for run in runs if run["epochs"] == longest]
        best = max(final, key=lambda run: run["validation_accuracy"])
        accuracy = f"{best['accuracy']:.2f} %"
        if part != "sweep":
            accuracy = f"{statistics.fmean(run['accuracy'] for run in runs):.2f} % in mean"
        read = sum(run["images_read"] for run in runs)
        ratio = "" if runs is whole else f" ({plain_seconds / seconds:.2f}x)"
        cells = [part, photos, side, len(runs), f"{seconds:.0f}{ratio}", f"{read:,}"]
        dropped = [str(k) for k in dict.fromkeys((best["prefixes"][0], best["prefixes"][-1]))]
        cells += [f"{best['validation_accuracy']:.2f} %", accuracy, ", ".join(dropped)]
        lines.append(f"| {' | '.join(map(str, cells))} |")
    machine = study["machine"]
    threads = study["setting"]["threads"]
    title = f"{machine['gpu'] or machine['cpu']}, cores: {machine['cores']}, threads of a run: {threads}; "
    title += f"torch {machine['torch']}, {machine['date']}"
    return "\n".join([title, "", *lines])
