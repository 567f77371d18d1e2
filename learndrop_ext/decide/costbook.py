"""The costs of layers, rows and images in this run: measured once, then corrected by the time epochs take."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from learndrop_ext.decide import costs
from learndrop_ext.decide.forecast import RunCosts
from learndrop_ext.decide.probes import tier_speeds
from learndrop_ext.decide.timing import StepCosts
from learndrop_ext.rows.config import CacheConfig
from learndrop_ext.rows.plan import Budgets

#: Weight of the newest epoch in the correction of the cost model.
NEWEST = 0.5
#: Largest factor by which one epoch may change the correction.
LARGEST_STEP = 4.0


class CostBook:
    """The costs of a run, for policies and forecasts. config: how rows are kept; None if none are."""

    def __init__(
        self, layers: Sequence[costs.LayerCost], config: CacheConfig | None, device: torch.device, *, samples: int
    ) -> None:
        self.layers = tuple(layers)
        self.samples = samples
        self.image_seconds = 0.0
        self.other_seconds = 0.0
        self.optimizer_seconds = 0.0
        self.scale = 1.0
        self.measured = False
        self.fixed_seconds = 0.0  # that an epoch with dropped layers takes before its first batch
        self.wrap_seconds = 0.0  # that the first step after a drop takes longer, with `wrap=`
        self.budgets = Budgets(device=0)  # those of the next decision, read by the owner
        self._config = config
        self._device = device
        self._speeds: tuple[float, float, float] | None = None
        self._observed = False

    def choices(self, cut: int, rows: int) -> list[costs.CutChoice]:
        """Return for each prefix length where its rows would be kept. cut: that of existing rows; rows: their number."""
        config = self._config
        if config is None:
            return [costs.CutChoice(0, 0, "frozen, no rows kept")] * len(self.layers)
        return [
            costs.choose_cut(
                self.layers, k, kept=cut if k >= cut else 0, rows=rows, codec=config.codec, budgets=self.budgets
            )
            for k in range(len(self.layers))
        ]

    def run_costs(self, choices: Sequence[costs.CutChoice], *, views: int) -> RunCosts:
        """Return the costs of this run for policies."""
        seconds = tuple(map(self._row_seconds, choices))
        return RunCosts(
            layers=self.layers,
            cuts=tuple(choice.cut for choice in choices),
            row_seconds=seconds,
            write_seconds=seconds,  # storing a row moves the same bytes as gathering it
            image_seconds=self.image_seconds,
            other_seconds=self.other_seconds,
            samples=self.samples,
            views=views,
            scale=self.scale,
            optimizer_seconds=self.optimizer_seconds,
            fixed_seconds=self.fixed_seconds,
            wrap_seconds=self.wrap_seconds,
        )

    def note_step(self, step: StepCosts, *, read_seconds: float, workers: int, batch: float) -> None:
        """Take the costs of a timed training step of `batch` samples, and the seconds that a process reads a sample.

        Workers read during the step, so training waits only for what reading takes longer.
        """
        self.measured = True
        self.layers = step.layers
        self.other_seconds, self.optimizer_seconds = step.other_seconds, step.optimizer_seconds
        self.image_seconds = (
            read_seconds if workers == 0 else max(0.0, read_seconds / workers - step.step_seconds / batch)
        )

    def observe(self, modelled: float, measured: float) -> None:
        """Correct the cost model by the time of an epoch. modelled: its seconds at a scale of 1."""
        if modelled > 0 and measured > 0:
            # Limited, since something else may have disturbed this epoch.
            newest = min(max(measured / modelled, self.scale / LARGEST_STEP), self.scale * LARGEST_STEP)
            self.scale = NEWEST * newest + (1 - NEWEST) * self.scale if self._observed else newest
            self._observed = True

    def _row_seconds(self, choice: costs.CutChoice) -> float:
        """Seconds to gather a row; 0 until layers are timed. The speeds of the tiers are measured then, once."""
        config, plan = self._config, choice.plan
        if config is None or plan is None or not self.measured:
            return 0.0
        if self._speeds is None:
            self._speeds = tier_speeds(self.budgets, config, self._device)
        shape = self.layers[choice.cut - 1].shape
        assert shape is not None
        return costs.row_seconds(shape, config.codec, plan, self._speeds)
