"""The costs of the run: measured once, then corrected by the time that epochs take, and what is expected from them."""

from __future__ import annotations

import dataclasses
import statistics
from collections.abc import Callable, Sequence
from typing import Any

import torch

from learndrop_ext.data.extras import BatchExtras
from learndrop_ext.data.loader import DropLoader
from learndrop_ext.data.source import Source
from learndrop_ext.decide import costs
from learndrop_ext.decide.forecast import RunCosts
from learndrop_ext.decide.probes import tier_speeds
from learndrop_ext.decide.timing import time_step, untimed
from learndrop_ext.distributed import smallest_of_ranks
from learndrop_ext.forward.chain import Chain
from learndrop_ext.history import Record
from learndrop_ext.rows.plan import Budgets, budgets_of
from learndrop_ext.rows.rowset import RowSet

#: Weight of the newest epoch in the correction of the cost model.
NEWEST = 0.5
#: Largest factor by which one epoch may change the correction.
LARGEST_STEP = 4.0


class Ledger:
    """The costs of a run."""

    def __init__(
        self, chain: Chain, rows: RowSet, loader: DropLoader, source: Source, extras: BatchExtras, *, keeps_rows: bool
    ) -> None:
        self._chain, self._rows, self._loader, self._source, self._extras = chain, rows, loader, source, extras
        self._config = rows.config if keeps_rows else None
        self.measured = False  # whether training steps were timed since costs have changed
        self.scale = 1.0  # measured over modelled seconds so far
        self._setup_seconds = 0.0  # time spent constructing the scheduler
        self._prefix_before = 0  # layers that were dropped before the last drop
        self._just_wrapped = False  # whether the live layers were wrapped anew: their first step may take longer
        self._layers = self._of_samples(untimed(chain))
        self._image_seconds = self._other_seconds = self._optimizer_seconds = 0.0
        self._fixed_seconds = 0.0  # that an epoch with dropped layers takes before its first batch
        self._wrap_seconds = 0.0  # that the first step after a drop takes longer, with `wrap=`
        self._budgets = Budgets(device=0)  # those of the next decision
        self._speeds: tuple[float, float, float] | None = None  # of the tiers
        self._observed = False  # whether an epoch has corrected the scale

    def note_setup(self, seconds: float) -> None:
        """Note the time that it took to construct the scheduler."""
        self._setup_seconds = seconds

    def note_drop(self, before: int) -> None:
        """Note a drop from `before` layers."""
        self._prefix_before = before

    def note_wrapped(self) -> None:
        """Note that the live layers were wrapped anew."""
        self._just_wrapped = True

    def resume(self, scale: float) -> None:
        """Go on with the scale of another process."""
        self.scale = scale

    def forget_times(self) -> None:
        """Time training steps again when costs are next asked for."""
        self.measured = False

    def read_budgets(self) -> None:
        """Read the bytes that rows may take, once for each decision: in each tier the fewest of all ranks."""
        if self._config is None:
            return
        mine = budgets_of(self._config, self._rows.device, beside=self.extras_bytes, there=self._extras.nbytes)
        assert mine.device is not None
        device, host, disk = smallest_of_ranks((mine.device, mine.host, mine.disk))
        self._budgets = dataclasses.replace(mine, device=device, host=host, disk=disk)

    @property
    def extras_device(self) -> torch.device:
        """Where the next drop keeps what is beside the rows."""
        return torch.device("cpu") if self._budgets.beside_on_host else self._rows.device

    @property
    def extras_bytes(self) -> int:
        """Bytes of what is kept beside all rows, lists aside."""
        return 0 if self._config is None else self._extras.row_bytes * self._loader.batches.expected_rows()

    def follow_widths(self) -> None:
        """Take the layers' new FLOPs and shapes, and time training steps again when costs are next asked for."""
        self._layers = self._of_samples(untimed(self._chain))
        self.forget_times()

    def measure(self, run: Callable[[], Any], optimizer: torch.optim.Optimizer, *, batch: int) -> None:
        """Time training steps: `run` calls the model on a batch of `batch` images."""
        samples = batch / self._rows.images
        step = time_step(self._chain, run, optimizer, batch=samples, device=self._rows.device)
        read_seconds, workers = self._source.reading()
        if workers:
            # Workers read during the step, so training waits only for what reading takes longer.
            read_seconds = max(0.0, read_seconds / workers - step.step_seconds / samples)
        self.measured = True
        self._layers, self._image_seconds = self._of_samples(step.layers), read_seconds
        self._other_seconds, self._optimizer_seconds = step.other_seconds, step.optimizer_seconds

    def row_shape(self, k: int) -> tuple[int, ...]:
        """Return the shape of a row behind the first k layers."""
        shape = self._layers[k - 1].shape
        assert shape is not None
        return shape

    def _of_samples(self, layers: Sequence[costs.LayerCost]) -> tuple[costs.LayerCost, ...]:
        """The layers of one image with the FLOPs and the rows of a sample, which may have several."""
        n = self._rows.images
        return tuple(
            dataclasses.replace(one, flops=n * one.flops, shape=one.shape and (n * one.shape[0], *one.shape[1:]))
            for one in layers
        )

    def run_costs(self) -> tuple[RunCosts, list[costs.CutChoice]]:
        """Return the costs that policies see, and for each prefix length where its rows would be kept."""
        rows = self._loader.batches.expected_rows()
        choices = [self._choice(k, rows) for k in range(len(self._layers))]
        seconds = tuple(map(self._row_seconds, choices))
        run = RunCosts(
            layers=self._layers,
            cuts=tuple(choice.cut for choice in choices),
            row_seconds=seconds,
            write_seconds=seconds,  # storing a row moves the same bytes as gathering it
            image_seconds=self._image_seconds,
            other_seconds=self._other_seconds,
            samples=self._source.expected(),
            views=self._rows.views,
            scale=self.scale,
            optimizer_seconds=self._optimizer_seconds,
            fixed_seconds=self._fixed_seconds,
            wrap_seconds=self._wrap_seconds,
        )
        return run, choices

    def _choice(self, prefix: int, rows: int) -> costs.CutChoice:
        """Where `rows` rows of a prefix would be kept."""
        if self._config is None:
            return costs.CutChoice(0, 0, "frozen, no rows kept")
        if shapes := self._loader.shapes:
            return costs.CutChoice(0, 0, f"no rows: images must have one shape, and had {shapes[0]} and {shapes[1]}")
        codec, kept = self._config.codec, self._rows.cut
        return costs.choose_cut(self._layers, prefix, kept=kept, rows=rows, codec=codec, budgets=self._budgets)

    def _row_seconds(self, choice: costs.CutChoice) -> float:
        """Seconds to gather a row; 0 until layers are timed. The speeds of the tiers are measured then, once."""
        if self._config is None or choice.plan is None or not self.measured:
            return 0.0
        if self._speeds is None:
            self._speeds = tier_speeds(self._budgets, self._config, self._rows.device)
        return costs.row_seconds(self.row_shape(choice.cut), self._config.codec, choice.plan, self._speeds)

    def elapsed(self, history: Sequence[Record]) -> float:
        """Return the seconds of the run so far, the construction of the scheduler included."""
        return self._setup_seconds + sum(r.epoch_seconds + r.measure_seconds for r in history)

    def wrapping(self) -> float:
        """Return the seconds that wrapping took in the epoch that has ended, 0 if the live layers were wrapped before."""
        if not self._just_wrapped or not self._loader.counts[0]:
            return 0.0
        self._just_wrapped = False
        self._wrap_seconds = self._loader.first_step_excess
        return self._wrap_seconds

    def observe(self, prefix: int, *, wrap_seconds: float) -> None:
        """Correct the cost model by the time of the epoch that has ended, which had `prefix` dropped layers."""
        if not self.measured:
            return
        (samples, seconds, beginning), (images, older, _) = self._loader.counts, self._rows.counts
        made, read = images + older, self._loader.relabelled
        if prefix and not made:
            self._fixed_seconds = beginning
        fixed = self._fixed_seconds if prefix else 0.0
        run = dataclasses.replace(self.run_costs()[0], scale=1.0, fixed_seconds=0.0)
        filling = run.fill_seconds(self._prefix_before, prefix) if made else 0.0
        whole = run.epoch_seconds(prefix) * samples + filling * made + run.image_seconds * run.samples * read
        modelled, measured = whole / max(1, run.samples), seconds - wrap_seconds - fixed
        if modelled > 0 and measured > 0:
            # Limited, since something else may have disturbed this epoch.
            newest = min(max(measured / modelled, self.scale / LARGEST_STEP), self.scale * LARGEST_STEP)
            self.scale = NEWEST * newest + (1 - NEWEST) * self.scale if self._observed else newest
            self._observed = True

    def flops(self) -> tuple[int, int]:
        """Return the FLOPs of the epoch that has ended: of training (forward), and of computing rows.

        Frozen layers behind the rows run in each step, and all of them if no rows are kept.
        """
        layers, cut, (images, older, _) = self._layers, self._rows.cut, self._rows.counts
        before = self._rows.path[-2] if len(self._rows.path) > 1 else 0
        fill = images * costs.forward_flops(layers[:cut]) + older * costs.forward_flops(layers[before:cut])
        return self._loader.counts[0] * costs.forward_flops(layers[cut:]), fill

    def full_epoch_seconds(self, history: Sequence[Record], newest: float | None) -> float:
        """Return the seconds of an epoch without drops: the median of those in the run, or an estimate.

        newest: seconds of the epoch that has just ended, without wrapping, if nothing was dropped in it.
        """
        before = [0, *(record.prefix for record in history)]
        whole = (r for r, prefix in zip(history, before, strict=False) if r.epoch and prefix == 0)
        seconds = [r.epoch_seconds - r.wrap_seconds for r in whole]
        seconds += [newest] if newest is not None else []
        if seconds:
            return statistics.median(seconds)
        if not self.measured:
            return 0.0
        # Training steps are timed for only a second or two before the run. If epochs with dropped layers then take longer
        # than forecast, an epoch without drops would take at least as many seconds longer.
        run = self.run_costs()[0]
        plain, prefix = dataclasses.replace(run, scale=1.0), history[-1].prefix if history else 0
        return plain.epoch_seconds(0) + run.epoch_seconds(prefix) - plain.epoch_seconds(prefix)

    def expect(self, prefix: int) -> float | None:
        """Return the expected seconds of the next epoch; None if no training step was timed."""
        if not self.measured:
            return None
        run = self.run_costs()[0]
        rows, wrapping = self._rows, run.wrap_seconds if self._just_wrapped else 0.0
        if prefix and rows.cache is not None and not bool(rows.cache.filled.all()):
            return wrapping + run.filling_seconds(self._prefix_before, prefix)
        return wrapping + run.epoch_seconds(prefix)
