"""Forecasts: measured costs -> the seconds of every epoch of a run, for any drops. Pure arithmetic.

Rows are filled lazily. After a drop each batch comes from its source (images, or rows of an earlier drop), goes through the
newly frozen layers, is stored as rows and trains the rest. With V views each epoch draws one view of each sample, in turn,
and so reads what was stored V epochs before: images in the first V epochs after the first drop, and then rows. Rows that
would not be read again before the run ends are not stored.
"""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from learndrop_ext.decide.costs import CutChoice, LayerCost, format_bytes, live_seconds
from learndrop_ext.rows.plan import TierPlan

TIERS = ("device", "host", "disk")


@dataclass(frozen=True)
class RunCosts:
    """The costs of a run.

    Args:
        layers: costs of all L layers, per sample.
        cuts: for each prefix length 0..L-1, the number of layers after which its rows are kept; 0 for no rows.
        row_seconds: for each prefix length, seconds to gather one row; 0.0 if there are no rows.
        write_seconds: for each prefix length, seconds to store one row.
        image_seconds: seconds to read one image, as far as training waits for it.
        other_seconds: seconds of a step outside of layers and optimizer, per sample: loss, overhead.
        samples: number of samples in an epoch.
        views: number of rows of each sample.
        scale: measured over modelled seconds so far; all seconds but the last two are multiplied by it.
        optimizer_seconds: seconds of the optimizer with all layers live, per sample; proportional to live parameters.
        fixed_seconds: measured seconds that an epoch with dropped layers takes before its first batch.
        wrap_seconds: measured seconds that `wrap=` takes once after each drop: compiling, or capturing graphs.

    Raises:
        ValueError: a table does not have L entries, or a cut is not within 0..prefix.
    """

    layers: tuple[LayerCost, ...]
    cuts: tuple[int, ...]
    row_seconds: tuple[float, ...]
    write_seconds: tuple[float, ...]
    image_seconds: float
    other_seconds: float
    samples: int
    views: int = 1
    scale: float = 1.0
    optimizer_seconds: float = 0.0
    fixed_seconds: float = 0.0
    wrap_seconds: float = 0.0

    def __post_init__(self) -> None:
        for name in ("cuts", "row_seconds", "write_seconds"):
            if len(getattr(self, name)) != len(self.layers):
                raise ValueError(
                    f"RunCosts: {name} must have an entry for each of the {len(self.layers)} layers, "
                    f"got {len(getattr(self, name))}"
                )
        if any(not 0 <= cut <= k for k, cut in enumerate(self.cuts)):
            raise ValueError(f"RunCosts: cuts must lie within the prefix, got {list(self.cuts)}")
        if self.views < 1:
            raise ValueError(f"RunCosts: views must be at least 1, got {self.views}")

    def epoch_seconds(self, prefix: int) -> float:
        """Return the seconds of an epoch with `prefix` layers dropped and all of its rows stored."""
        return self.filling_seconds(prefix, prefix)

    def filling_seconds(self, before: int, after: int, *, stored: bool = True) -> float:
        """Return the seconds of an epoch that reads what prefix `before` reads and trains behind prefix `after`.

        The rows of `after` are computed on the way, and stored unless `stored` is False. If both prefixes keep rows at the
        same cut, none are computed.
        """
        read = self.row_seconds[before] if self.cuts[before] else self.image_seconds
        frozen = self._frozen_before[after] - self._frozen_before[self.cuts[before]]
        written = self.write_seconds[after] if stored and self.cuts[after] > self.cuts[before] else 0.0
        per_sample = read + frozen + written + self._live_behind[after]
        return per_sample * self.samples * self.scale + (self.fixed_seconds if after else 0.0)

    def fill_seconds(self, before: int, after: int) -> float:
        """Return the extra seconds of an epoch that computes the rows of `after` over one that reads them; at least 0."""
        return max(0.0, self.filling_seconds(before, after) - self.epoch_seconds(after))

    def read_seconds(self, prefix: int) -> float:
        """Return the seconds an epoch spends gathering rows; 0 if there are none."""
        return self.row_seconds[prefix] * self.samples * self.scale if self.cuts[prefix] else 0.0

    def drop_estimates(self, prefix: int) -> tuple[tuple[float, ...], tuple[float, ...]]:
        """Return what a drop from `prefix` to each prefix length costs once, and what it saves per epoch.

        Returns:
            Seconds to wrap the live layers and to fill all V views, and seconds saved per epoch; both [L], 0 up to `prefix`.
        """
        lengths, now = range(len(self.layers)), self.epoch_seconds(prefix)
        once = (self.wrap_seconds + self.views * self.fill_seconds(prefix, k) if k > prefix else 0.0 for k in lengths)
        saved = (now - self.epoch_seconds(k) if k > prefix else 0.0 for k in lengths)
        return tuple(once), tuple(saved)

    @cached_property
    def _frozen_before(self) -> list[float]:
        """Seconds of the first k layers on one sample while they are frozen, k from 0 to L."""
        return list(itertools.accumulate((layer.seconds for layer in self.layers), initial=0.0))

    @cached_property
    def _live_behind(self) -> list[float]:
        """Seconds of training the layers behind a prefix on one sample, including optimizer and loss."""
        parameters = sum(layer.parameters for layer in self.layers)
        seconds = []
        for k in range(len(self.layers)):
            live = sum(layer.parameters for layer in self.layers[k:])
            optimizer = self.optimizer_seconds * (live / parameters if parameters else 1.0)
            seconds.append(live_seconds(self.layers[k:]) + optimizer + self.other_seconds)
        return seconds


def plan_seconds(costs: RunCosts, prefixes: Sequence[int], *, past: Sequence[int] = ()) -> tuple[float, ...]:
    """Return the seconds of each of the last epochs of a run.

    Args:
        costs: costs of the run.
        prefixes: the prefix of each of these epochs.
        past: the prefix of each epoch before them, or of at least the last V.
    """
    seen = [*past, *prefixes]
    seconds = []
    for i, prefix in enumerate(prefixes, len(past)):
        window = seen[max(0, i - costs.views) : i]
        # An epoch without dropped layers stores nothing, and undrop() frees what was stored.
        source = window[0] if len(window) == costs.views and all(window) else 0
        wrapping = costs.wrap_seconds if prefix > (seen[i - 1] if i else 0) else 0.0
        stored = len(seen) - i > costs.views  # else the run ends before they are read
        seconds.append(wrapping + costs.filling_seconds(source, prefix, stored=stored))
    return tuple(seconds)


@dataclass(frozen=True)
class DropForecast:
    """A whole run with one drop of `prefix` layers after `start` epochs."""

    prefix: int
    start: int
    seconds: float
    speedup: float  # time of the run without drops over `seconds`
    fill_seconds: float  # the part of `seconds` spent computing and storing rows
    read_seconds: float  # the part of `seconds` spent gathering rows


def one_drop(costs: RunCosts, epochs: int, *, prefix: int, start: int) -> DropForecast:
    """Forecast a whole run that drops `prefix` >= 1 layers once, after `start` epochs."""
    full, steady = costs.epoch_seconds(0), costs.epoch_seconds(prefix)
    storing, passing = (costs.filling_seconds(0, prefix, stored=stored) for stored in (True, False))
    left = epochs - start
    images = min(costs.views, left)
    # Rows stored in an epoch are read V epochs later.
    stores = min(images, max(0, left - costs.views))
    making = stores * storing + (images - stores) * passing
    seconds = start * full + costs.wrap_seconds + making + (left - images) * steady
    speedup = epochs * full / seconds if seconds > 0 else math.inf
    fill = stores * max(0.0, storing - steady) + (images - stores) * max(0.0, passing - steady)
    return DropForecast(prefix, start, seconds, speedup, fill, (left - images) * costs.read_seconds(prefix))


def largest_speedup(costs: RunCosts, epochs: int, *, start: int = 0) -> float:
    """Return the largest speedup of a whole run by one drop, after `start` epochs or later; at least 1.0."""
    drops = itertools.product(range(1, len(costs.layers)), range(start, epochs))
    return max([1.0, *(one_drop(costs, epochs, prefix=k, start=begin).speedup for k, begin in drops)])


@dataclass(frozen=True)
class RowsForecast:
    """The rows of one prefix length."""

    cut: int  # number of layers after which they are kept; 0 for none
    bytes: tuple[int, int, int]  # of all of them in each tier: device, host, disk


@dataclass(frozen=True)
class Forecast:
    """The time of a run without drops, and with one drop of each length after each number of epochs.

    Args:
        epochs: length of the run.
        layers: names of the layers.
        views: number of rows of each sample.
        full_seconds: time of the run without drops.
        runs: forecasts by prefix length 1..L-1 (first index) and start 0..epochs-1 (second).
        rows: rows by prefix length 1..L-1.
        largest_speedup: the largest speedup in `runs`, at least 1.0.
        extras_bytes: bytes of what is kept beside all rows (labels, masks), without lists.
    """

    epochs: int
    layers: tuple[str, ...]
    views: int
    full_seconds: float
    runs: tuple[tuple[DropForecast, ...], ...]
    rows: tuple[RowsForecast, ...]
    largest_speedup: float
    extras_bytes: int = 0

    def as_dict(self) -> dict[str, Any]:
        """Return the forecast as plain values for JSON."""
        return dataclasses.asdict(self)

    def format_table(self, *, starts: int = 6) -> str:
        """Format a table: a line per prefix length, up to `starts` columns of starts, with seconds and speedup."""
        # Evenly spaced from the first to the last.
        shown = sorted({round(i * (self.epochs - 1) / max(1, starts - 1)) for i in range(starts)})
        head = ["layers", *(f"from epoch {start}" for start in shown), "rows"]
        lines = [head]
        for runs, rows in zip(self.runs, self.rows, strict=True):
            fields = (f"{runs[start].seconds:.1f} s {runs[start].speedup:.2f}x" for start in shown)
            lines.append([f"{runs[0].prefix} ({self.layers[runs[0].prefix - 1]})", *fields, _rows_text(rows)])
        full = f"{self.epochs} epochs without drops: {self.full_seconds:.1f} s"
        return "\n".join([full, *align_columns(lines), f"largest speedup: {self.largest_speedup:.2f}x"])

    def __str__(self) -> str:
        return self.format_table()


def forecast(costs: RunCosts, epochs: int, choices: Sequence[CutChoice], *, extras_bytes: int = 0) -> Forecast:
    """Forecast a whole run without drops, and with one drop of each length after each number of epochs.

    choices: where the rows of each prefix length 0..L-1 are kept, as `costs` has it; extras_bytes: as in `Forecast`.
    """
    if not isinstance(epochs, int) or epochs < 1:
        raise ValueError(f"forecast: epochs must be a whole number >= 1, got {epochs!r}")
    full = costs.epoch_seconds(0) * epochs
    runs = tuple(
        tuple(one_drop(costs, epochs, prefix=k, start=start) for start in range(epochs))
        for k in range(1, len(costs.layers))
    )
    rows = []
    for choice in choices[1:]:
        size, plan = choice.row_bytes, choice.plan or TierPlan(0)
        rows.append(RowsForecast(choice.cut, (plan.device * size, plan.host * size, plan.disk * size)))
    largest = max([1.0, *(run.speedup for row in runs for run in row)])
    names = tuple(layer.name for layer in costs.layers)
    return Forecast(epochs, names, costs.views, full, runs, tuple(rows), largest, extras_bytes)


def align_columns(rows: Sequence[Sequence[str]]) -> list[str]:
    """Return one line per row, with each column padded to its widest cell."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]


def _rows_text(rows: RowsForecast) -> str:
    held = (
        f"{format_bytes(count, decimals=1)} on {tier}" for tier, count in zip(TIERS, rows.bytes, strict=True) if count
    )
    return ", ".join(held) or ("none" if rows.cut == 0 else f"after layer {rows.cut}")
