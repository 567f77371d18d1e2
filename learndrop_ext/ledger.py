"""The costs of a run: measured so far, and expected."""

from __future__ import annotations

import dataclasses
import statistics
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

#: The most samples on which the layers are timed. A whole batch where it has no more, since a small one tells another
#: story: of EfficientNet-Lite0 at 96 px on a CPU the first half of the layers takes 29 % of a step's time with 8 samples
#: and 50 % with 32, for the late layers' time goes into reading weights.
TIMED_SAMPLES = 32


class Ledger:
    """The costs of a run. Layers are timed at construction, whole training steps by `probe`.

    Args:
        chain: the model's layers.
        optimizer: the user's.
        rows: of the run.
        loader: of the run.
        keeps_rows: whether rows are cached.
        inputs: batch -> the arguments that the model is called with; None for its input alone.
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
        self.setup_seconds = 0.0  # spent constructing the scheduler
        self.prefix_before = 0  # layers dropped before the last drop, whose rows the present ones are made of
        assert chain.call is not None
        image, others = chain.call.first(max(2, min(len(rows.example), loader.batches.batch_size, TIMED_SAMPLES)))
        self.costs = CostBook(
            costs.measure_layers(chain, image, others=others),
            rows.config if keeps_rows else None,
            rows.device,
            samples=rows.source.expected(),
        )
        self._optimizer = optimizer
        self._inputs = inputs
        self._rows = rows
        self._loader = loader

    def run_costs(self) -> tuple[RunCosts, list[costs.CutChoice]]:
        """Return the costs as policies see them, and for each prefix length where its rows would be kept."""
        count = self._loader.batches.expected_rows()
        self.costs.samples = self._rows.source.expected()
        choices = self.costs.choices(self._rows.cut, count)
        return self.costs.run_costs(choices, count, views=self._rows.views), choices

    def probe(self, model: nn.Module) -> None:
        """Time training steps on a copy of the model, and reading a batch. Only the first call measures."""
        if self.costs.probed:
            return
        batch, read_seconds, workers = self._rows.source.timed(self._loader.batches.batch_size)
        batch = to_device(batch, self._rows.device)
        x = input_of(batch, self._loader.key)
        step = probe_training_step(model, self._optimizer, x, inputs=arguments_of(self._inputs, batch))
        self.costs.probe(step, batch=len(x), read_seconds=read_seconds, workers=workers)

    def elapsed(self, history: Sequence[Record]) -> float:
        """Return the seconds of the run so far, the construction of the scheduler included."""
        return self.setup_seconds + sum(r.epoch_seconds + r.measure_seconds for r in history)

    def observe(self, prefix: int, *, samples: int, made: int, seconds: float) -> None:
        """Calibrate the cost model with one measured epoch.

        Args:
            prefix: layers that were dropped in it.
            samples: that were trained.
            made: rows that were made in it.
            seconds: that it took.
        """
        run = dataclasses.replace(self.run_costs()[0], scale=1.0)
        filling = run.fill_seconds(self.prefix_before, prefix) if made else 0.0
        modelled = run.epoch_seconds(prefix) * samples + filling * made
        self.costs.observe(modelled / max(1, self.costs.samples), seconds)

    def full_epoch_seconds(self, history: Sequence[Record], newest: float | None) -> float:
        """Return the seconds of an epoch without drops: the median of those in the run, else an estimate.

        Args:
            history: of the run.
            newest: seconds of the epoch that has just ended, if nothing was dropped in it.
        """
        before = [0, *(record.prefix for record in history)]
        seconds = [r.epoch_seconds for r, prefix in zip(history, before, strict=False) if r.epoch and prefix == 0]
        seconds += [newest] if newest is not None else []
        if seconds:
            return statistics.median(seconds)
        # A training step is timed for a second or two before the run. By as many seconds as epochs with dropped layers
        # then go slower than forecast, one without drops would too, at least.
        run = self.run_costs()[0]
        plain, prefix = dataclasses.replace(run, scale=1.0), history[-1].prefix if history else 0
        return plain.epoch_seconds(0) + run.epoch_seconds(prefix) - plain.epoch_seconds(prefix)

    def expect(self, prefix: int) -> float:
        """Return the seconds that the next epoch is expected to take."""
        run = self.run_costs()[0]
        if prefix and not self._rows.complete(self._loader.batches.needed(), self._loader.epochs):
            return run.filling_seconds(self.prefix_before, prefix)
        return run.epoch_seconds(prefix)
