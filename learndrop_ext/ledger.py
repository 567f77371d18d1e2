"""The costs of a run, measured and expected."""

from __future__ import annotations

import dataclasses
import statistics
import warnings
from collections.abc import Sequence

import torch
from torch import nn

from learndrop_ext.data.extras import input_of, to_device
from learndrop_ext.data.loader import DropLoader
from learndrop_ext.data.rowset import RowSet
from learndrop_ext.decide import costs
from learndrop_ext.decide.costbook import CostBook
from learndrop_ext.decide.forecast import RunCosts
from learndrop_ext.decide.probes import probe_training_step
from learndrop_ext.graph.call import Inputs, arguments_of
from learndrop_ext.graph.chain import Chain
from learndrop_ext.history import Record

#: The most samples on which layers are timed. A small batch does not represent a large one: with 8 samples the first half
#: of EfficientNet-Lite0 (96 px, CPU) takes 29 % of a step, with 32 samples 50 %, because late layers mostly read weights.
TIMED_SAMPLES = 32


class Ledger:
    """The costs of a run. Layers are timed at construction, whole training steps by `probe`.

    Args:
        chain: the model's layers.
        optimizer: the user's optimizer.
        rows: the run's rows; layers are timed under their autocast dtype.
        loader: the run's loader.
        keeps_rows: whether rows are cached.
        inputs: batch -> the model's arguments; None for its input alone.
    """

    def __init__(
        self,
        chain: Chain,
        optimizer: torch.optim.Optimizer,
        rows: RowSet,
        loader: DropLoader,
        *,
        keeps_rows: bool,
        inputs: Inputs | None,
    ) -> None:
        self.setup_seconds = 0.0  # time spent constructing the scheduler
        self.prefix_before = 0  # layers that were dropped before the last drop
        assert chain.call is not None
        image, others = chain.call.first(max(2, min(len(rows.example), loader.batches.batch_size, TIMED_SAMPLES)))
        self.costs = CostBook(
            costs.measure_layers(chain, image, others=others, autocast=rows.autocast),
            rows.config if keeps_rows else None,
            rows.device,
            samples=rows.source.expected(),
        )
        self._optimizer = optimizer
        self._inputs = inputs
        self._autocast = rows.autocast
        self._rows = rows
        self._loader = loader

    def run_costs(self) -> tuple[RunCosts, list[costs.CutChoice]]:
        """Return the costs that policies see, and for each prefix length where its rows would be kept."""
        count = self._loader.batches.expected_rows()
        self.costs.samples = self._rows.source.expected()
        choices = self.costs.choices(self._rows.cut, count)
        return self.costs.run_costs(choices, count, views=self._rows.views), choices

    def probe(self, model: nn.Module) -> None:
        """Time training steps on a copy of the model, and reading a batch, once."""
        if self.costs.probed:
            return
        batch, read_seconds, workers = self._rows.source.timed(self._loader.batches.batch_size)
        batch = to_device(batch, self._rows.device)
        x = input_of(batch, self._loader.key)
        given = arguments_of(self._inputs, batch)
        step = probe_training_step(model, self._optimizer, x, inputs=given, autocast=self._autocast)
        self.costs.probe(step, batch=len(x), read_seconds=read_seconds, workers=workers)

    def check_autocast(self, trained: torch.dtype | None) -> None:
        """Warn once if training steps were timed, for plans and forecasts, under another autocast dtype than the loop's."""
        if not self.costs.probed or trained == self._autocast:
            return
        said = [
            "without autocast" if dtype is None else f"under autocast of {dtype}" for dtype in (self._autocast, trained)
        ]
        warnings.warn(
            f"drop.step: training steps were timed {said[0]}, and the loop trains {said[1]}: the plan before the first step "
            f"and forecasts are of other times; give DropScheduler(autocast={trained})",
            RuntimeWarning,
            stacklevel=3,
        )
        self._autocast = trained

    def elapsed(self, history: Sequence[Record]) -> float:
        """Return the seconds of the run so far, the construction of the scheduler included."""
        return self.setup_seconds + sum(r.epoch_seconds + r.measure_seconds for r in history)

    def observe(self, prefix: int, *, samples: int, made: int, read: int, seconds: float) -> None:
        """Calibrate the cost model with one measured epoch.

        Args:
            prefix: number of layers that were dropped in it.
            samples: number of samples trained.
            made: number of rows computed in it.
            read: number of samples read in it whose rows were there.
            seconds: its time.
        """
        run = dataclasses.replace(self.run_costs()[0], scale=1.0)
        filling = run.fill_seconds(self.prefix_before, prefix) if made else 0.0
        modelled = run.epoch_seconds(prefix) * samples + filling * made + run.image_seconds * self.costs.samples * read
        self.costs.observe(modelled / max(1, self.costs.samples), seconds)

    def flops(self, samples: int, images: int, older: int) -> tuple[int, int]:
        """Return the FLOPs of training `samples` (forward), and of computing rows from `images` and from `older` rows."""
        layers, cut = self.costs.layers, self._rows.cut
        fill = images * costs.forward_flops(layers[:cut]) + older * costs.forward_flops(
            layers[self._rows.older_cut : cut]
        )
        return samples * costs.forward_flops(layers[cut:]), fill

    def full_epoch_seconds(self, history: Sequence[Record], newest: float | None) -> float:
        """Return the seconds of an epoch without drops: the median of those in the run, or an estimate.

        Args:
            history: the run's records.
            newest: seconds of the epoch that has just ended, if nothing was dropped in it.
        """
        before = [0, *(record.prefix for record in history)]
        seconds = [r.epoch_seconds for r, prefix in zip(history, before, strict=False) if r.epoch and prefix == 0]
        seconds += [newest] if newest is not None else []
        if seconds:
            return statistics.median(seconds)
        # Training steps are timed for only a second or two before the run. If epochs with dropped layers then take longer
        # than forecast, an epoch without drops would take at least as many seconds longer.
        run = self.run_costs()[0]
        plain, prefix = dataclasses.replace(run, scale=1.0), history[-1].prefix if history else 0
        return plain.epoch_seconds(0) + run.epoch_seconds(prefix) - plain.epoch_seconds(prefix)

    def expect(self, prefix: int) -> float:
        """Return the expected seconds of the next epoch."""
        run = self.run_costs()[0]
        if prefix and not self._rows.complete(self._loader.batches.needed(), self._loader.epochs):
            return run.filling_seconds(self.prefix_before, prefix)
        return run.epoch_seconds(prefix)
