"""Where the rows of the next batches are, looked up for many batches at once. B samples in a batch, n in all of them."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from learndrop_ext.data.extras import BatchExtras
from learndrop_ext.data.keys import Labels
from learndrop_ext.rows.rowset import RowSet

NOWHERE = torch.empty(0, dtype=torch.int64)


@dataclass(slots=True)
class Plan:
    """A batch of samples, and where their rows are.

    Args:
        ids: [B] int64 (CPU).
        level: number of layers that the samples need not run, see `RowSet.locate`.
        at: [B] places of their rows; empty if nothing was looked up.
        where: the same on the device.
        reads: whether the batch has to be read: for its images, or for what is kept beside the rows.
        slow: whether there are rows in slower tiers.
        filled: the table of rows in which the places were found.
        version: that of the table at that time.
    """

    ids: torch.Tensor
    level: int = 0
    at: torch.Tensor = NOWHERE
    where: torch.Tensor = NOWHERE
    reads: bool = True
    slow: bool = False
    filled: torch.Tensor | None = None
    version: int = 0


class Places:
    """Finds the rows of samples, and what is kept beside them."""

    def __init__(self, rows: RowSet, extras: BatchExtras, labels: Labels | None) -> None:
        self._rows, self._extras, self._labels = rows, extras, labels

    def relabel(self) -> None:
        """Take the labels of all samples that have rows from the dataset, where it offers them: they may have changed."""
        if self._labels is not None and self._rows.cache is not None and len(ids := self._rows.drawn()):
            self._label(ids, self._rows.places(ids))

    def needs_images(self, ids: torch.Tensor) -> bool:
        """Return whether any of the samples [n] has to be read: for its image, or for the rest of its batch."""
        level, at = self._rows.locate(ids)
        return not level or not self._has_rest(ids, at)

    def plans(self, ids: torch.Tensor, sizes: int | list[int]) -> list[Plan]:
        """Return the plans of batches of these sizes. If not all samples [n] have their last row, a batch is looked up when
        it is its turn."""
        cache, parts = self._rows.cache, ids.split(sizes)
        if cache is None:
            return [Plan(part) for part in parts]
        level, at = self._rows.locate(ids)
        whole = level > 0 and self._has_rest(ids, at)
        if len(parts) > 1 and not (whole and level == self._rows.cut):
            return [Plan(part) for part in parts]
        filled, version, slow = cache.filled, cache.filled._version, cache.plan.staging > 0
        where = at.to(self._extras.device, non_blocking=True)
        return [
            Plan(part, level, places, there, not whole, slow, filled, version)
            for part, places, there in zip(parts, at.split(sizes), where.split(sizes), strict=True)
        ]

    def _has_rest(self, ids: torch.Tensor, at: torch.Tensor) -> bool:
        """Whether all that stands beside the images of samples [n] is at their places [n], or the dataset offers it."""
        if self._extras.has(at):
            return True
        if self._labels is None or not len(at):
            return False
        self._label(ids, at)
        return True

    def _label(self, ids: torch.Tensor, at: torch.Tensor) -> None:
        assert self._labels is not None
        labels = self._labels.of(ids)
        assert labels is not None
        self._extras.put_labels(at, labels)

    def plan(self, ids: torch.Tensor) -> Plan:
        """Return the plan of one batch [B]."""
        (plan,) = self.plans(ids, [len(ids)])
        return plan

    def current(self, plan: Plan) -> Plan:
        """Return the plan, made again if rows have come or gone since."""
        cache = self._rows.cache
        if cache is not None and plan.filled is cache.filled and plan.version == plan.filled._version:
            return plan
        return self.plan(plan.ids)
