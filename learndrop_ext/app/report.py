"""The output of a comparison: a table for the terminal, metrics.jsonl, and a self-contained HTML page.

A result is the object that `learndrop compare --json` prints: `{"config": {...}, "baseline": R, "learndrop": R,
"speedup": x}`, plus `"freeze-only": R` and `"short": R` on request. It holds finished runs only.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from learndrop_ext.app.page import FORECAST, REPORT, check_extras, render_page, replacing
from learndrop_ext.decide.forecast import Forecast, align_columns

RUNS = ("baseline", "learndrop", "freeze-only", "short")

#: Measurements of a layer's change, in the column order of the page.
MEASURED = ("l1", "l2", "maximum", "w_l1", "w_l2", "relative", "cosine", "nonfinite")

COLUMNS = ("run", "wall-clock time", "of which fill", "forward FLOPs", "test accuracy", "layers dropped, and when")


class Reporter:
    """Writes `metrics.jsonl` after each epoch and `report.html` after each run to a folder, which it creates.

    On leaving the context it updates the page, so that an interrupted comparison leaves both files readable.
    """

    def __init__(self, folder: str | Path) -> None:
        check_extras("Reporter")
        self.folder = Path(folder)
        self.folder.mkdir(parents=True, exist_ok=True)
        self._metrics = (self.folder / "metrics.jsonl").open("w", encoding="utf-8")
        self._records: list[Mapping[str, Any]] = []
        self._result: Mapping[str, Any] = {}
        self._stale = False

    def __enter__(self) -> Reporter:
        return self

    def __exit__(self, *_: object) -> None:
        self._metrics.close()
        if self._stale:
            self.write(self._result)

    def add(self, record: Mapping[str, Any]) -> None:
        """Write the record of one epoch as one line. Infinities and NaN become null.

        Args:
            record: "run"; "epoch", from 1; "seconds" of training so far, without evaluation; "train_loss"; "accuracy" in
                percent; "prefix"; "layers"; "lr"; "scores" ({layer name: score} or None); "reason". Optional:
                "epoch_seconds", the measured time of the epoch, and its "forecast_seconds"; "changes" ({layer name:
                {a key of `MEASURED`: value}, or None for a dropped layer}); "widths" and "full_widths" ({layer name:
                number of channels} after the epoch and at first).
        """
        self._metrics.write(json.dumps(_finite(record), allow_nan=False, ensure_ascii=False) + "\n")
        self._metrics.flush()
        self._records.append(dict(record))
        self._stale = True

    def write(self, result: Mapping[str, Any]) -> None:
        """Write `report.html` of a result and the records so far."""
        self._result = result
        with replacing(self.folder / "report.html") as path:
            path.write_text(render_report(result, self._records), encoding="utf-8")
        self._stale = False


def _finite(value: Any) -> Any:
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, Mapping):
        return {key: _finite(entry) for key, entry in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(entry) for entry in value]
    return value


def format_table(result: Mapping[str, Any]) -> str:
    """Format a result as a table for a terminal, one line per run, followed by a summary."""
    rows = [COLUMNS, *(table_row(result, run) for run in RUNS if run in result)]
    rows.insert(1, tuple("-" * max(map(len, column)) for column in zip(*rows, strict=True)))
    summary = summarize(result)
    return "\n".join([*align_columns(rows), *(["", summary] if summary else [])])


def summarize(result: Mapping[str, Any]) -> str:
    """Return what dropping changed against the baseline, and against `short` if that ran; "" until both have finished."""
    if "baseline" not in result or "learndrop" not in result:
        return ""
    baseline, dropping = result["baseline"], result["learndrop"]
    if not dropping["drops"]:
        return "No layer was dropped: both runs did the same work, so dropping made no difference."
    difference = dropping["accuracy"] - baseline["accuracy"]
    saved = 100 * (1 - dropping["forward_flops"] / baseline["forward_flops"])
    speedup = result.get("speedup", baseline["seconds"] / dropping["seconds"])
    text = (
        f"Dropping took {_seconds(dropping['seconds'])} against {_seconds(baseline['seconds'])} "
        f"({speedup:.2f}x as fast), with {abs(saved):.1f} % {'fewer' if saved >= 0 else 'more'} forward FLOPs "
        f"and a test accuracy {abs(difference):.2f} points {'higher' if difference > 0 else 'lower'}."
    )
    if "short" not in result:
        return text
    short = result["short"]
    better = short["accuracy"] - dropping["accuracy"]
    rival = f"The plain recipe, shortened to {_seconds(short['seconds'])}, was "
    if not better:
        return f"{text} {rival}as good."
    return f"{text} {rival}{abs(better):.2f} points {'better: dropping did not pay here' if better > 0 else 'worse'}."


def table_row(result: Mapping[str, Any], run: str) -> tuple[str, ...]:
    """Return the cells of a run, one per entry of `COLUMNS`."""
    numbers, baseline = result[run], result.get("baseline")
    seconds, flops = _seconds(numbers["seconds"]), _flops(numbers["forward_flops"])
    accuracy = f"{numbers['accuracy']:.2f} %"
    if baseline is not None and run != "baseline":
        seconds += f" ({baseline['seconds'] / numbers['seconds']:.2f}x)"
        flops += f" ({100 * (numbers['forward_flops'] / baseline['forward_flops'] - 1):+.1f} %)"
        accuracy += f" ({numbers['accuracy'] - baseline['accuracy']:+.2f})"
    drops = [
        f"{drop['prefix']} after epoch {drop['epoch']}" if drop["epoch"] else f"{drop['prefix']} before the first step"
        for drop in numbers["drops"]
    ] or ["none"]
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


def render_report(result: Mapping[str, Any], records: Sequence[Mapping[str, Any]]) -> str:
    """Return the page as HTML, with inline plots and no reference to another file. records: see `Reporter.add`."""
    from learndrop_ext.app import plots

    records = [record for record in records if record.get("accuracy") is not None]
    scored = "How much each layer was still learning: the score of its change since the previous measurement."
    dropped = "The number of first layers that were not in the training step."
    accurate = "Test accuracy after each epoch. Early epochs may be below the axis."
    widths = plots.plot_widths(records)
    narrowed = [("Widths over epochs", "The share of its channels that each layer had left.", widths)] if widths else []
    figures = (
        ("Score per layer and epoch", scored, plots.plot_scores(records)),
        ("Layers dropped over time", dropped, plots.plot_dropped(records)),
        *narrowed,
        ("Accuracy against time", accurate, plots.plot_accuracy(records)),
    )
    finished = [run for run in RUNS if run in result]
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
        for run in finished
        for drop in result[run]["drops"]
    ]
    epochs = {str(record["run"]): int(record["epoch"]) for record in records}
    return render_page(
        "report",
        REPORT,
        summary=summarize(result),
        columns=COLUMNS,
        rows=[table_row(result, run) for run in finished],
        memory=[(run, _bytes(result[run]["peak_memory_bytes"])) for run in finished],
        unfinished=[(run, epoch) for run, epoch in epochs.items() if run not in finished],
        figures=figures,
        drops=drops,
        changes=_changes(records),
        forecasts=_forecasts(records),
        config=result.get("config", {}),
    )


def _changes(records: Sequence[Mapping[str, Any]]) -> dict[str, Any] | None:
    """Return the last measured change of each layer, {"run", "epoch", "rows"}, or None if nothing was measured."""
    last = next((record for record in reversed(records) if record.get("changes")), None)
    if last is None:
        return None
    dropped = ("dropped", *[""] * (len(MEASURED) - 1))
    rows = [
        (layer, *([_number(change.get(key)) for key in MEASURED] if change else dropped))
        for layer, change in last["changes"].items()
    ]
    return {"run": last["run"], "epoch": last["epoch"], "rows": rows}


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.4g}"


def _forecasts(records: Sequence[Mapping[str, Any]]) -> list[tuple[str, ...]]:
    """Return the forecast and the measured seconds of each epoch, and their sums over each run."""
    pairs: dict[str, list[tuple[str, float, float]]] = {}
    for record in records:
        if record.get("forecast_seconds") is not None and record.get("epoch_seconds") is not None:
            line = (str(record["epoch"]), float(record["forecast_seconds"]), float(record["epoch_seconds"]))
            pairs.setdefault(str(record["run"]), []).append(line)
    lines: list[tuple[str, ...]] = []
    for run, epochs in pairs.items():
        total = ("all", sum(forecast for _, forecast, _ in epochs), sum(measured for _, _, measured in epochs))
        for epoch, forecast, measured in (*epochs, total):
            off = f"{100 * (forecast / measured - 1):+.1f} %" if measured else "-"
            lines.append((run, epoch, f"{forecast:.2f} s", f"{measured:.2f} s", off))
    return lines


def write_forecast(folder: Path, forecast: Forecast) -> Path:
    """Write `forecast.html` to a folder, which is created, and return its path."""
    check_extras("write_forecast")
    from learndrop_ext.app import plots

    values = forecast.as_dict()
    figures = [svg for svg in (plots.plot_forecast(values), plots.plot_row_bytes(values)) if svg]
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / "forecast.html"
    with replacing(path) as temporary:
        page = render_page("forecast", FORECAST, table_text=forecast.format_table(), figures=figures)
        temporary.write_text(page, encoding="utf-8")
    return path
