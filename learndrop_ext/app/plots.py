"""The plots of a report and of a forecast, as self-contained SVG.

A record describes one epoch of one run, see `learndrop_ext.app.report.Reporter.add`.
"""

from __future__ import annotations

import io
import math
import re
import warnings
from collections.abc import Mapping, Sequence
from typing import Any

import matplotlib
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Patch
from matplotlib.ticker import MaxNLocator

Records = Sequence[Mapping[str, Any]]

#: Colour (Okabe and Ito's colour-blind safe palette), dash and marker of each run.
RUN_STYLES: Mapping[str, tuple[str, str, str]] = {
    "baseline": ("#555555", "-", "o"),
    "learndrop": ("#0072b2", "-", "s"),
    "freeze-only": ("#d55e00", "--", "^"),
    "short": ("#009e73", ":", "D"),
}

SETTINGS: dict[Any, Any] = {
    "font.size": 10.0,
    "svg.fonttype": "none",
    "svg.hashsalt": "learndrop_ext",
    "text.parse_math": False,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "hatch.linewidth": 0.6,
}

#: A map of scores with more cells is embedded as an image: as shapes it would take megabytes.
MAX_CELLS = 4000


@matplotlib.rc_context(SETTINGS)
def plot_scores(records: Records) -> str | None:
    """Draw a map of the score of each layer after each epoch, for the first run that has scores; None without one.

    Cells of layers dropped before the epoch are hatched.
    """
    runs = list(_runs([record for record in records if record.get("scores")]).values())
    if not runs:
        return None
    scored = runs[0]
    layers = list(dict.fromkeys(name for record in scored for name in record["scores"]))
    epochs = [int(record["epoch"]) for record in scored]
    # A layer dropped after an epoch was still measured in that epoch: it is hatched from the next record on.
    dropped = [_dropped_at_first(scored), *(int(record["prefix"]) for record in scored[:-1])]
    shown = [dict(list(record["scores"].items())[gone:]) for record, gone in zip(scored, dropped, strict=True)]
    cells = [[math.nan if (value := column.get(layer)) is None else value for column in shown] for layer in layers]
    values = [value for line in cells for value in line if math.isfinite(value)]
    figure, axes = _map(layers, epochs, cells, highest=max([1.0, *values]), label="score (0: not learning)")
    axes.set_facecolor("#e8e8e8")
    hatched: dict[str, Any] = {"edgecolor": "#999999", "hatch": "////", "facecolor": "none"}
    for column, prefix in enumerate(dropped):
        if prefix:
            axes.bar(epochs[column], prefix, width=1.0, bottom=-0.5, lw=0, **hatched)
    if any(dropped):
        _draw_legend(axes, handles=[Patch(**hatched | {"facecolor": "#e8e8e8"}, label="dropped")])
    return _svg(figure, prefix="scores", label=f"Map of the score of each of {len(layers)} layers after each epoch")


@matplotlib.rc_context(SETTINGS)
def plot_widths(records: Records) -> str | None:
    """Draw a map of the share of its channels that each layer has left after each epoch; None without widths."""
    narrowed = [record for record in records if record.get("widths")]
    if not narrowed:
        return None
    layers = list(narrowed[0]["widths"])
    cells = [[record["widths"][layer] / record["full_widths"][layer] for record in narrowed] for layer in layers]
    figure, _ = _map(layers, [int(record["epoch"]) for record in narrowed], cells, highest=1.0, label="channels left")
    return _svg(figure, prefix="widths", label=f"Map of the share of channels left in {len(layers)} layers")


def _map(
    layers: Sequence[str], epochs: Sequence[int], cells: Sequence[Sequence[float]], *, highest: float, label: str
) -> tuple[Figure, Axes]:
    """Draw a map of one number a layer and epoch, from 0 to `highest`. cells: [layers][epochs], NaN for none."""
    figure, axes = _figure(height=1.6 + 0.2 * max(len(layers), 8))
    mesh = axes.pcolormesh(
        [*(epoch - 0.5 for epoch in epochs), epochs[-1] + 0.5],
        [row - 0.5 for row in range(len(layers) + 1)],
        cells,
        cmap="viridis",
        edgecolor="face",
        linewidth=0.3,
        vmin=0.0,
        vmax=highest,
        rasterized=len(layers) * len(epochs) > MAX_CELLS,
    )
    axes.set_xlim(epochs[0] - 0.5, epochs[-1] + 0.5)
    axes.set_ylim(len(layers) - 0.5, -0.5)
    step = 1 + (len(layers) - 1) // 40
    axes.set_yticks(range(0, len(layers), step), layers[::step])
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.set_xlabel("epoch")
    axes.set_ylabel("layer, from the input (top) to the output")
    figure.colorbar(mesh, ax=axes, label=label, pad=0.02)
    return figure, axes


def _dropped_at_first(records: Records) -> int:
    """The layers that were dropped before the first step of a run: they have no score in its first epoch."""
    return sum(score is None for score in (records[0].get("scores") or {}).values())


@matplotlib.rc_context(SETTINGS)
def plot_dropped(records: Records) -> str | None:
    """Draw the number of dropped layers against the training time, for the runs that may drop layers; None without one."""
    records = [record for record in records if record["run"] not in ("baseline", "short")]
    if not records:
        return None
    figure, axes = _figure(height=3.2)
    for run, part in _runs(records).items():
        axes.step(
            [0.0, *(float(record["seconds"]) for record in part)],
            [_dropped_at_first(part), *(int(record["prefix"]) for record in part)],
            where="post",
            label=run,
            **_style(run, len(part)),
        )
    most = max(int(record["layers"]) for record in records)
    _draw_limit(axes, most, f"all {most} layers")
    axes.set_ylim(-0.04 * most, 1.15 * most)
    axes.yaxis.set_major_locator(MaxNLocator(integer=True))
    axes.set_ylabel("layers dropped")
    _finish_time_axis(axes)
    return _svg(figure, prefix="dropped", label="Number of dropped layers against training time")


@matplotlib.rc_context(SETTINGS)
def plot_accuracy(records: Records) -> str | None:
    """Draw the test accuracy in percent against the training time in seconds; None without records.

    The lower limit of the axis is that of the second halves of the runs: early epochs may be below it.
    """
    if not records:
        return None
    runs = _runs(records)
    figure, axes = _figure(height=3.8)
    for run, part in runs.items():
        axes.plot(
            [float(record["seconds"]) for record in part],
            [float(record["accuracy"]) for record in part],
            label=run,
            **_style(run, len(part)),
        )
    late = [float(record["accuracy"]) for part in runs.values() for record in part[len(part) // 2 :]]
    low, high = min(late), max(float(record["accuracy"]) for record in records)
    margin = 0.08 * (high - low) or 1.0
    axes.set_ylim(low - margin, high + margin)
    axes.set_ylabel("test accuracy (%)")
    axes.grid(axis="y", color="#dddddd", linewidth=0.8)
    _finish_time_axis(axes)
    return _svg(figure, prefix="accuracy", label="Test accuracy of each run against training time")


@matplotlib.rc_context(SETTINGS)
def plot_forecast(forecast: Mapping[str, Any]) -> str:
    """Draw the time of a run against the number of layers dropped, one line for each of up to four starts.

    forecast: see `Forecast.as_dict`.
    """
    runs, epochs = forecast["runs"], int(forecast["epochs"])
    starts = sorted({0, min(1, epochs - 1), epochs // 4, epochs // 2})
    figure, axes = _figure(height=3.8)
    for start, (colour, dash, marker) in zip(starts, RUN_STYLES.values(), strict=False):
        axes.plot(
            [int(by_start[start]["prefix"]) for by_start in runs],
            [float(by_start[start]["seconds"]) for by_start in runs],
            label="before the first step" if start == 0 else f"after epoch {start}",
            color=colour,
            linestyle=dash,
            marker=marker,
            markersize=4,
        )
    _draw_limit(axes, float(forecast["full_seconds"]), "nothing dropped")
    axes.set_ylim(bottom=0.0)
    axes.set_xlabel("layers dropped")
    axes.set_ylabel(f"time of {epochs} epochs (s)")
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    _draw_legend(axes)
    return _svg(figure, prefix="forecast", label="Forecast time of a run against the layers dropped")


@matplotlib.rc_context(SETTINGS)
def plot_row_bytes(forecast: Mapping[str, Any]) -> str | None:
    """Draw the memory of the rows in each tier against the number of layers dropped; None without rows."""
    rows = forecast["rows"]
    if not any(sum(row["bytes"]) for row in rows):
        return None
    figure, axes = _figure(height=2.8)
    below = [0.0] * len(rows)
    for tier, (name, colour) in enumerate((("device", "#0072b2"), ("host", "#009e73"), ("disk", "#d55e00"))):
        sizes = [row["bytes"][tier] / 2**20 if tier < len(row["bytes"]) else 0.0 for row in rows]
        if any(sizes):
            axes.bar(range(1, len(rows) + 1), sizes, bottom=below, color=colour, label=name)
        below = [low + size for low, size in zip(below, sizes, strict=True)]
    axes.set_xlabel("layers dropped")
    axes.set_ylabel("rows (MiB)")
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    _draw_legend(axes)
    return _svg(figure, prefix="row-bytes", label="Memory of the rows in each tier against the layers dropped")


def _figure(*, height: float) -> tuple[Figure, Axes]:
    figure = Figure(figsize=(8.0, height), layout="constrained")
    return figure, figure.add_subplot()


def _draw_limit(axes: Axes, y: float, label: str) -> None:
    axes.axhline(y, color="#999999", linewidth=0.8)
    place = ("axes fraction", "data")
    axes.annotate(label, (1.0, y), xycoords=place, ha="right", va="bottom", color="#555555")


def _draw_legend(axes: Axes, **options: Any) -> None:
    axes.legend(loc="lower left", bbox_to_anchor=(0.0, 1.0), ncols=4, frameon=False, **options)


def _finish_time_axis(axes: Axes) -> None:
    axes.set_xlim(left=0.0)
    axes.set_xlabel("training time (s), without evaluation")
    _draw_legend(axes)


def _runs(records: Records) -> dict[str, list[Mapping[str, Any]]]:
    runs: dict[str, list[Mapping[str, Any]]] = {}
    for record in records:
        runs.setdefault(str(record["run"]), []).append(record)
    return runs


def _style(run: str, points: int) -> dict[str, Any]:
    colour, dash, marker = RUN_STYLES.get(run, ("#cc79a7", "-.", "v"))
    return {"color": colour, "linestyle": dash, "marker": marker if points <= 40 else "", "markersize": 4}


def _svg(figure: Figure, *, prefix: str, label: str) -> str:
    """Return a figure as an <svg> element without metadata, with `prefix` before its ids to make them unique in a page."""
    text = io.StringIO()
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Glyph .* missing from font")
        figure.savefig(text, format="svg", metadata={"Date": None, "Creator": None, "Format": None, "Type": None})
    svg = re.sub(r"\A.*?(?=<svg)|<metadata>.*?</metadata>", "", text.getvalue(), flags=re.DOTALL)
    svg = re.sub(r'\bid="', f'id="{prefix}-', svg)
    svg = re.sub(r'href="#', f'href="#{prefix}-', svg).replace("url(#", f"url(#{prefix}-")
    return svg.replace("<svg", f'<svg role="img" aria-label="{label}"', 1)
