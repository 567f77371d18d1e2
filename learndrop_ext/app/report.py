"""What a comparison shows: a table for the terminal, metrics.jsonl, and a page that opens without a network.

A result is the object that `learndrop compare --json` prints: ``{"config": {...}, "baseline": R, "learndrop": R,
"speedup": x}`` and, when asked for, ``"freeze-only": R`` and ``"short": R``; runs that have not ended are not in it.
"""

from __future__ import annotations

import importlib.util
import json
import math
import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any

__all__ = ["Reporter", "format_table", "read_metrics", "render_report", "write_metrics", "write_report"]

RUNS = ("baseline", "learndrop", "freeze-only", "short")

COLUMNS = ("run", "wall-clock time", "of which fill", "forward FLOPs", "test accuracy", "layers dropped, and when")


class Reporter:
    """Writes ``metrics.jsonl`` as a comparison goes on and ``report.html`` when a run has ended, into one folder.

    As a context manager it also brings the page up to date on leaving, so that a comparison that was cut short
    leaves both files readable. Raises OSError where the folder cannot be made or written, and ImportError where what
    the page needs is not installed, before anything is trained.
    """

    def __init__(self, folder: str | Path) -> None:
        _check_extras("Reporter")
        self.folder = Path(folder)
        self.folder.mkdir(parents=True, exist_ok=True)
        self._metrics = (self.folder / "metrics.jsonl").open("w", encoding="utf-8")
        self._records: list[Mapping[str, Any]] = []
        self._result: Mapping[str, Any] = {}
        self._stale = False

    def __enter__(self) -> Reporter:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def add(self, record: Mapping[str, Any]) -> None:
        """Write one epoch's record as one line, at once.

        A record is ``{"run", "epoch" (from 1), "seconds" (of training so far, without evaluation), "train_loss",
        "accuracy" (percent), "prefix", "layers", "lr", "scores" ({layer name: score} or None), "reason"}``.
        """
        self._metrics.write(_line(record))
        self._metrics.flush()
        self._records.append(dict(record))
        self._stale = True

    def write(self, result: Mapping[str, Any]) -> None:
        """Write ``report.html`` of a result and the records so far."""
        self._result = result
        write_report(self.folder / "report.html", result, self._records)
        self._stale = False

    def close(self) -> None:
        """Close metrics.jsonl and, if records have come since the last page, write the page again."""
        self._metrics.close()
        if self._stale:
            self.write(self._result)


def write_metrics(path: str | Path, records: Iterable[Mapping[str, Any]]) -> None:
    """Write records as JSON, one object a line, each flushed before the next; infinities and NaN become null."""
    with Path(path).open("w", encoding="utf-8") as file:
        for record in records:
            file.write(_line(record))
            file.flush()


def read_metrics(path: str | Path) -> list[dict[str, Any]]:
    """Read the records of a metrics.jsonl; a last line that was cut short is left out.

    Raises ValueError naming the line for anything else that is not a JSON object.
    """
    lines = Path(path).read_text(encoding="utf-8").split("\n")
    records = []
    for number, line in enumerate(lines[:-1], start=1):
        try:
            record = json.loads(line)
        except json.JSONDecodeError as error:
            raise ValueError(
                f"read_metrics: line {number} of {path} must be a JSON object, got {line[:80]!r}"
            ) from error
        if not isinstance(record, dict):
            raise ValueError(f"read_metrics: line {number} of {path} must be a JSON object, got {line[:80]!r}")
        records.append(record)
    return records


def _line(record: Mapping[str, Any]) -> str:
    return json.dumps(_finite(record), allow_nan=False, ensure_ascii=False) + "\n"


def _finite(value: Any) -> Any:
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, Mapping):
        return {key: _finite(entry) for key, entry in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(entry) for entry in value]
    return value


def format_table(result: Mapping[str, Any]) -> str:
    """Lay out the runs of a result as a table for a terminal, with a last line that sums up what dropping gave."""
    rows = [COLUMNS, *(_row(result, run) for run in RUNS if run in result)]
    widths = [max(len(row[column]) for row in rows) for column in range(len(COLUMNS))]
    lines = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]
    lines.insert(1, "  ".join("-" * width for width in widths))
    summary = summarize(result)
    return "\n".join([*lines, "", summary] if summary else lines)


def summarize(result: Mapping[str, Any]) -> str:
    """Say in one sentence what dropping gave over the baseline; empty until both have ended."""
    if "baseline" not in result or "learndrop" not in result:
        return ""
    baseline, dropping = result["baseline"], result["learndrop"]
    if not dropping["drops"]:
        return "No layer was dropped: both runs did the same work, and dropping can claim no difference between them."
    difference = dropping["accuracy"] - baseline["accuracy"]
    saved = 100 * (1 - dropping["forward_flops"] / baseline["forward_flops"])
    speedup = result.get("speedup", baseline["seconds"] / dropping["seconds"])
    return (
        f"Dropping took {_seconds(dropping['seconds'])} against {_seconds(baseline['seconds'])} "
        f"({speedup:.2f}x as fast), with {abs(saved):.1f} % {'fewer' if saved >= 0 else 'more'} forward FLOPs "
        f"and a test accuracy {abs(difference):.2f} points {'higher' if difference > 0 else 'lower'}."
    )


def _row(result: Mapping[str, Any], run: str) -> tuple[str, ...]:
    numbers, baseline = result[run], result.get("baseline")
    seconds, flops, accuracy = (
        _seconds(numbers["seconds"]),
        _flops(numbers["forward_flops"]),
        f"{numbers['accuracy']:.2f} %",
    )
    if baseline is not None and run != "baseline":
        seconds += f" ({baseline['seconds'] / numbers['seconds']:.2f}x)"
        flops += f" ({100 * (numbers['forward_flops'] / baseline['forward_flops'] - 1):+.1f} %)"
        accuracy += f" ({numbers['accuracy'] - baseline['accuracy']:+.2f})"
    drops = [f"{drop['prefix']} after epoch {drop['epoch']}" for drop in numbers["drops"]] or ["none"]
    if len(drops) > 4:
        drops[2:-1] = [f"{len(drops) - 3} more"]
    fill = _seconds(numbers["fill_seconds"]) if numbers["drops"] else "-"
    return run, seconds, fill, flops, accuracy, ", ".join(drops)


def _seconds(value: float) -> str:
    return f"{value:.1f} s" if value < 600 else f"{value / 60:.1f} min"


def _flops(value: float) -> str:
    for unit, size in (("E", 1e18), ("P", 1e15), ("T", 1e12), ("G", 1e9)):
        if value >= size:
            return f"{value / size:.2f} {unit}FLOP"
    return f"{value / 1e6:.2f} MFLOP"


def _bytes(value: float) -> str:
    for unit, size in (("GiB", 2**30), ("MiB", 2**20), ("KiB", 2**10)):
        if value >= size:
            return f"{value / size:.1f} {unit}"
    return f"{value:.0f} B"


@dataclass(frozen=True)
class _Figure:
    title: str
    caption: str
    svg: str | None


def render_report(result: Mapping[str, Any], records: Sequence[Mapping[str, Any]]) -> str:
    """Return the page as HTML: one file with its style and three inline SVG plots, and no reference to another.

    Raises ImportError where matplotlib or jinja2 is not installed.
    """
    _check_extras("render_report")
    import jinja2

    from learndrop_ext.app import plots

    records = [record for record in records if record.get("accuracy") is not None]
    figures = (
        _Figure(
            "Score per layer and epoch",
            "How much each layer still learned, by the change of its parameters since the measurement before.",
            plots.plot_scores(records),
        ),
        _Figure(
            "Layers dropped over time",
            "How many layers at the input side were out of the training step.",
            plots.plot_dropped(records),
        ),
        _Figure(
            "Accuracy against time",
            "Test accuracy after each epoch. Early epochs may lie below the axis.",
            plots.plot_accuracy(records),
        ),
    )
    ended = [run for run in RUNS if run in result]
    drops = [
        (
            run,
            drop["epoch"],
            drop["prefix"],
            " to ".join(dict.fromkeys((drop["layers"][0], drop["layers"][-1]))),
            drop["reason"],
            _seconds(drop["fill_seconds"]),
            _bytes(drop["row_bytes"]),
            drop["tier"],
        )
        for run in ended
        for drop in result[run]["drops"]
    ]
    epochs: dict[str, int] = {}
    for record in records:
        epochs[str(record["run"])] = int(record["epoch"])
    page = jinja2.Environment(autoescape=True, trim_blocks=True, lstrip_blocks=True).from_string(TEMPLATE)
    return page.render(
        summary=summarize(result),
        columns=COLUMNS,
        rows=[_row(result, run) for run in ended],
        memory=[(run, _bytes(result[run]["peak_memory_bytes"])) for run in ended],
        unfinished=[(run, epoch) for run, epoch in epochs.items() if run not in ended],
        figures=figures,
        drops=drops,
        config=result.get("config", {}),
    )


def _check_extras(owner: str) -> None:
    for name in ("matplotlib", "jinja2"):
        if importlib.util.find_spec(name) is None:
            raise ImportError(f'{owner}: {name} is not installed: pip install "learndrop_ext[cli]"')


def write_report(path: str | Path, result: Mapping[str, Any], records: Sequence[Mapping[str, Any]]) -> None:
    """Render the page, write it aside and rename it to ``path``, so that ``path`` is never half a page."""
    page = render_report(result, records)
    path = Path(path)
    aside = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        aside.write_text(page, encoding="utf-8")
        aside.replace(path)
    finally:
        aside.unlink(missing_ok=True)


TEMPLATE = """\
<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>Learn &amp; drop: report</title>
<style>
body { font: 16px/1.5 sans-serif; color: #222; background: #fff; max-width: 60rem; margin: 2rem auto; padding: 0 1rem; }
h1 { font-size: 1.6rem; } h2 { font-size: 1.2rem; margin-top: 2.5rem; }
.wide { overflow-x: auto; }
table { border-collapse: collapse; font-size: 0.9rem; }
caption { text-align: left; color: #555; padding-bottom: 0.4rem; }
th, td { text-align: left; vertical-align: top; padding: 0.35rem 0.8rem 0.35rem 0; border-bottom: 1px solid #ddd; }
thead th { border-bottom: 2px solid #888; }
figure { margin: 0; } figcaption { color: #555; font-size: 0.9rem; }
svg { width: 100%; height: auto; }
td, tbody th { white-space: nowrap; } td.words { white-space: normal; min-width: 12rem; }
.note { border-left: 4px solid #d55e00; padding-left: 0.8rem; }
</style>
</head>
<body>
<h1>Learn &amp; drop: report</h1>
{% if summary %}
<p>{{ summary }}</p>
{% endif %}
{% for run, epoch in unfinished %}
<p class="note">The run {{ run }} has not ended: the plots show it up to epoch {{ epoch }}.</p>
{% endfor %}
{% if rows %}
<div class="wide"><table>
<caption>Time is training with fills and measurements, without evaluation; in brackets: against the baseline.</caption>
<thead><tr>{% for column in columns %}<th scope="col">{{ column }}</th>{% endfor %}</tr></thead>
<tbody>
{% for row in rows %}
<tr><th scope="row">{{ row[0] }}</th>{% for cell in row[1:-1] %}<td>{{ cell }}</td>{% endfor %}
<td class="words">{{ row[-1] }}</td></tr>
{% endfor %}
</tbody>
</table></div>
{% else %}
<p class="note">No run has ended.</p>
{% endif %}
{% for figure in figures %}
<h2>{{ figure.title }}</h2>
{% if figure.svg %}
<figure>{{ figure.svg | safe }}<figcaption>{{ figure.caption }}</figcaption></figure>
{% else %}
<p>Nothing was measured for this plot.</p>
{% endif %}
{% endfor %}
<h2>Drops</h2>
{% set words = ' class="words"' | safe %}
{% if drops %}
<div class="wide"><table>
<thead><tr><th scope="col">run</th><th scope="col">after epoch</th><th scope="col">layers dropped in all</th>
<th scope="col">which</th><th scope="col">reason</th><th scope="col">fill</th><th scope="col">size of a row</th>
<th scope="col">tier</th></tr></thead>
<tbody>
{% for drop in drops %}
<tr>{% for cell in drop %}<td{{ words if loop.index == 5 }}>{{ cell }}</td>{% endfor %}</tr>
{% endfor %}
</tbody>
</table></div>
{% else %}
<p>No layer was dropped.</p>
{% endif %}
{% if memory %}
<p>Peak memory: {% for run, size in memory %}{{ run }} {{ size }}{{ ", " if not loop.last }}{% endfor %}.</p>
{% endif %}
{% if config %}
<h2>Settings</h2>
<div class="wide"><table>
<tbody>
{% for name, value in config.items() %}
<tr><th scope="row">{{ name }}</th><td class="words">{{ value }}</td></tr>
{% endfor %}
</tbody>
</table></div>
{% endif %}
</body>
</html>
"""
