"""Where the rows of the next batches are, looked up for many batches at once. B samples in a batch, n in all of them."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from learndrop_ext.data.extras import BatchExtras
from learndrop_ext.data.keys import LabelsOf
from learndrop_ext.rows.rowset import RowSet
from learndrop_ext.rows.slots import filled_at

NOWHERE = torch.empty(0, dtype=torch.int64)


@dataclass(slots=True)
class Plan:
    """A batch of samples, and where their rows are."""

    ids: torch.Tensor  # [B] int64 (CPU)
    #: [m] positions in the batch, ascending, of the samples to read: for their images, or for what is kept beside the rows
    reads: torch.Tensor
    level: int = 0  # number of layers that samples with a row need not run; 0 if none has one
    some: torch.Tensor | None = None  # [B] bool, which samples have no row at `level`, if others have one
    at: torch.Tensor = NOWHERE  # [B] places of their rows; empty if nothing was looked up
    where: torch.Tensor = NOWHERE  # the same on the device
    slow: bool = False  # whether there are rows in slower tiers
    filled: torch.Tensor | None = None  # the table of rows in which the places were found
    version: int = 0  # that of the table at that time

    @staticmethod
    def whole(ids: torch.Tensor) -> Plan:
        """Return the plan of a batch [B] that is read."""
        return Plan(ids, torch.arange(len(ids)))


class Places:
    """Finds the rows of samples, and what is kept beside them.

    by_sample: whether samples can be read one by one. If not, a batch of which some have no row runs whole.
    """

    def __init__(self, rows: RowSet, extras: BatchExtras, labels: LabelsOf | None, *, by_sample: bool) -> None:
        self._rows, self._extras, self._labels, self._by_sample = rows, extras, labels, by_sample

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
            return [Plan.whole(part) for part in parts]
        level, at = self._rows.locate(ids)
        reads, some = NOWHERE, None
        if not (self._has_rest(ids, at) and level == self._rows.cut and level):
            if len(parts) > 1:
                return [Plan.whole(part) for part in parts]
            level, lacking = self._nearest(level, at)
            some = lacking if level and bool(lacking.any()) else None
            reads = torch.nonzero(lacking | ~filled_at(self._extras, at)).flatten()
        filled, version, slow = cache.filled, cache.filled._version, cache.plan.staging > 0
        where = at.to(self._extras.device, non_blocking=True)
        return [
            Plan(part, reads, level, some, places, there, slow, filled, version)
            for part, places, there in zip(parts, at.split(sizes), where.split(sizes), strict=True)
        ]

    def _has_rest(self, ids: torch.Tensor, at: torch.Tensor) -> bool:
        """Whether all that stands beside the images of samples [n] is at their places [n], or the dataset offers it."""
        if self._extras.has(at):
            return True
        if self._labels is None or not len(at):
            return False
        there = at >= 0
        if bool(there.any()):
            self._label(ids[there], at[there])
        return bool(there.all())

    def _label(self, ids: torch.Tensor, at: torch.Tensor) -> None:
        assert self._labels is not None
        labels = self._labels(ids)
        assert labels is not None
        self._extras.put_labels(at, labels)

    def current(self, plan: Plan) -> Plan:
        """Return the plan, made again if rows have come or gone since."""
        filled = None if self._rows.cache is None else self._rows.cache.filled
        if plan.filled is filled and (filled is None or plan.version == filled._version):
            return plan
        (plan,) = self.plans(plan.ids, [len(plan.ids)])
        return plan

    def _nearest(self, level: int, at: torch.Tensor) -> tuple[int, torch.Tensor]:
        """The cut at which the fewest samples at places [B] have no row, the latest of such, or 0 if none has one; and which
        have none there: [B] bool. level: the latest at which all have one, or 0."""
        if level:
            return level, torch.zeros(len(at), dtype=torch.bool)
        if not self._by_sample:
            return 0, torch.ones(len(at), dtype=torch.bool)
        rows = self._rows
        lacking = {
            k: ~filled_at(store, at) for k, store in zip(rows.cuts[::-1], (rows.cache, rows.older), strict=False)
        }
        level = min(lacking, key=lambda k: int(lacking[k].sum()))
        return 0 if bool(lacking[level].all()) else level, lacking[level]
