"""The batches of an epoch: those of a DataLoader's sampler, or those of a loader with ids."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator
from itertools import chain, islice
from typing import Any

import numpy as np
import torch
from torch import distributed
from torch.utils.data import (
    BatchSampler,
    DistributedSampler,
    RandomSampler,
    SequentialSampler,
    SubsetRandomSampler,
    WeightedRandomSampler,
)

from learndrop_ext.data.extras import to_device
from learndrop_ext.data.id_source import END, IdSource, length_of
from learndrop_ext.data.places import Places, Plan
from learndrop_ext.data.reading import NoBatch, id_of
from learndrop_ext.data.share import Share
from learndrop_ext.data.source import DatasetSource
from learndrop_ext.distributed import several_processes
from learndrop_ext.rows.rowset import RowSet
from learndrop_ext.warn import warn

#: Batches without an image to read after which those of an endless sampler are not drawn ahead any more.
IDLE = 64


def draws_at_once(batch_sampler: Any) -> bool:
    """Return whether all random numbers of an epoch are drawn with its first batch, or after its last one, so that nobody
    can see when the batches between are drawn. A sampler of the user's own may look at anything."""
    if type(batch_sampler) is not BatchSampler:
        return False
    sampler: Any = batch_sampler.sampler
    if type(sampler) is RandomSampler:  # with replacement, or for more samples than there are, it draws on the way
        return not sampler.replacement and sampler.num_samples <= len(sampler.data_source)
    if type(sampler) is SubsetRandomSampler:
        return type(sampler.indices) in (list, tuple, range)
    return type(sampler) in (SequentialSampler, WeightedRandomSampler, DistributedSampler)


class PlannedBatches:
    """The batches of a DataLoader's sampler, of which only the samples without rows are read.

    It is also the batch sampler of the loader that reads these. That loader asks for them some steps ahead; the plans of all
    batches wait in their order.
    """

    def __init__(self, source: DatasetSource, rows: RowSet, places: Places) -> None:
        self.seen = torch.zeros(len(source), dtype=torch.bool)  # the samples drawn so far: [N]
        self._source, self._rows, self._places = source, rows, places
        self._sampler: Any = source.loader.batch_sampler
        shares = several_processes() and rows.config.partition == "share"
        self._share = Share(seed=rows.config.seed, rank=distributed.get_rank()) if shares else None
        self._plans: deque[Plan] = deque()
        self._drawn: Iterator[Plan] = iter(())  # the plans of the epoch from which `_plans` are taken
        self._grown = False  # whether the dataset has, since the epoch before
        self._known = self._new = 0  # samples drawn before this epoch, and those of them that were new in the last one
        self._seeded = False  # whether persistent workers have been given their seed

    def __len__(self) -> int:
        return len(self._sampler)

    def __iter__(self) -> Iterator[list[int]]:
        self._drawn, since = self._draw(), 0  # batches since one of which something is read
        for plan in self._drawn:
            self._plans.append(plan)
            since += 1
            if reads := len(plan.reads):
                since = 0
                yield (plan.ids if reads == len(plan.ids) else plan.ids[plan.reads]).tolist()
            elif since == IDLE and ((length := length_of(self)) is None or length > len(self.seen)):
                return  # so many batches are drawn that one of which something is read may never come

    def begin(self) -> None:
        """Begin an epoch; the dataset may have grown, and the epoch before may have been broken off."""
        more = self._rows.follow_size(len(self._source))
        self._grown = more > 0
        self.seen = torch.cat([self.seen, torch.zeros(more, dtype=torch.bool)])
        known = int(self.seen.sum())
        self._known, self._new = known, known - self._known
        if self._share is not None and (more or self._rows.cache is None):
            self._share.forget()
        self._plans.clear()

    def reads_images(self) -> bool:
        """Return whether a sample drawn so far, or one of this rank's share, has to be read, or none was drawn yet, or the
        dataset has grown, or a batch or more of new ones was drawn in the last epoch and there are others: reading a batch
        by number begins a worker."""
        if self._share is not None and self._share.ids is not None:
            return self._grown or self._places.needs_images(self._share.ids)
        drawn = torch.nonzero(self.seen).flatten()
        has_more = self._new >= self._batch_size and len(drawn) < len(self.seen)
        goes_on = has_more and self._source.loader.num_workers > 0
        return self._grown or goes_on or not len(drawn) or self._places.needs_images(drawn)

    def images(self, loader: Any) -> Iterator[tuple[Plan, Any]]:
        """Yield the plans in the sampler's order, each with what `loader` has read of its batch, or None."""
        self._seeded = self._has_persistent_workers()
        read, plans = iter(loader), self._plans
        while True:
            batch = next(read, END)
            while plans and not len(plans[0].reads):
                yield plans.popleft(), None
            if batch is END:
                break
            plan = plans.popleft()
            if batch is NoBatch:
                # Those without rows alone may leave nothing to a collate_fn that leaves out what cannot be read.
                plan.reads = torch.arange(len(plan.ids))
                batch = self._source.read(plan.ids.tolist(), self._rows.epoch)
            yield plan, batch
        for plan in self._drawn:  # of an endless sampler, once all samples have rows
            yield plan, None

    def rows(self) -> Iterator[Plan]:
        """Return the plans in the sampler's order."""
        if not self._seeded:
            # A DataLoader draws its workers' seed before the sampler draws the order. Draw it too, so that the order is the
            # one of training on images. Persistent workers get their seed in the first epoch only.
            torch.empty((), dtype=torch.int64).random_(generator=self._source.loader.generator)
        self._seeded = self._has_persistent_workers()
        return self._draw(at_once=True)

    def expected_rows(self) -> int:
        """Return the number of rows a drop will keep: of all samples, of those drawn so far if they are less than half, or
        of one rank's share."""
        size, drawn = len(self.seen), int(self.seen.sum())
        if self._share is None:
            kept = drawn if 0 < 2 * drawn < size else size
        elif self._share.ids is not None:
            kept = len(self._share.ids)
        else:
            kept = min(size, len(self) * self._batch_size)
        return kept * self._rows.views

    @property
    def _batch_size(self) -> int:
        """That of the sampler, or a typical one."""
        size = getattr(self._sampler, "batch_size", None)
        return size if isinstance(size, int) else 32

    def load(self, seen: torch.Tensor) -> None:
        """Mark the samples that an earlier process has seen."""
        self.seen[: len(seen)] = seen

    def _draw(self, *, at_once: bool = False) -> Iterator[Plan]:
        """Yield the plans of an epoch. at_once: draw all batches, and find all rows, with the first, where that is not seen.

        The last batch is drawn when it is its turn: a RandomSampler then draws one permutation more.
        """
        order, left = self._order()
        all_seen = bool(self.seen.all())
        while batches := [list(batch) for batch in islice(order, max(1, left - 1) if at_once else 1)]:
            left -= len(batches)
            ids = self._checked(list(chain.from_iterable(batches)))
            new = not all_seen and not bool(self.seen[ids].all())
            for plan in self._places.plans(ids, [len(batch) for batch in batches]):
                if new:
                    self.seen[plan.ids] = True
                yield plan

    def _order(self) -> tuple[Iterator[Any], int]:
        """The batches of an epoch: the user's, or those of this rank's share; and their number, 0 if the user may see when
        they are drawn."""
        share, sampler = self._share, self._sampler
        count = len(sampler) if draws_at_once(sampler) else 0
        if share is None or self._rows.cache is None:
            return iter(sampler), count
        if share.ids is not None:
            return share.batches(self._rows.epoch), len(share)
        return share.note(sampler, len(sampler) if hasattr(sampler, "__len__") else None), count

    def _checked(self, drawn: list[Any]) -> torch.Tensor:
        """What a sampler has drawn as ids [n] of the dataset."""
        size = len(self.seen)
        ids = drawn if set(map(type, drawn)) == {int} else [id_of(i) for i in drawn]
        if ids and (min(ids) < 0 or max(ids) >= size):
            outside = next(i for i in ids if not 0 <= i < size)
            raise IndexError(
                f"drop.loader: the sampler must name samples of the dataset, within 0..{size - 1}, got {outside}"
            )
        return torch.from_numpy(np.array(ids, dtype=np.int64))  # in a third of the time of torch.tensor

    def _has_persistent_workers(self) -> bool:
        loader = self._source.loader
        return loader.num_workers > 0 and loader.persistent_workers


class PassingBatches:
    """The batches of a loader with ids. Once all ids are known and have rows, batches are drawn from the ids.

    While images are read, some are compared with their rows: in batches 1, 2, 4, 8, ... of an epoch, and wherever an id
    comes twice in one epoch.
    """

    def __init__(
        self,
        source: IdSource,
        rows: RowSet,
        places: Places,
        # batch of images, ids [B], positions of ids that came before in the epoch -> whether any of them has a row
        compare: Callable[[Any, torch.Tensor, torch.Tensor | None], bool],
    ) -> None:
        self._source, self._rows, self._places, self._compare = source, rows, places, compare
        self._said_repeats = False

    def __len__(self) -> int:
        if self._source.whole and self._has_rows():
            return self._source.batches
        length = length_of(self._source.loader)
        if length is None:
            raise TypeError(f"object of type {type(self._source.loader).__name__!r} has no len()")
        return length

    @property
    def seen(self) -> torch.Tensor:
        """All samples, since only those that were read are known: [N] bool."""
        return torch.ones(len(self._source), dtype=torch.bool)

    def begin(self) -> None:
        """Begin an epoch."""
        source, rows = self._source, self._rows
        first = source.begin()
        rows.follow_size(len(source))
        unchecked, source.unchecked = source.unchecked, False
        if unchecked and rows.stores and not self._compare(to_device(source.first_batch, rows.device), first, None):
            source.whole = False

    def reads_images(self) -> bool:
        """Return whether the loader is iterated over: until every id is known and has its row."""
        if not self._has_rows():
            return True
        if self._source.repeats and not self._said_repeats:
            self._said_repeats = True
            warn(
                "drop.loader: an id came twice in one iteration over loader, so its order is not a plain shuffle: loader "
                "is iterated over in each epoch, though all rows are there"
            )
        return not self._source.whole

    def images(self, loader: Any) -> Iterator[tuple[Plan, Any]]:
        """Yield the batches of `loader`."""
        for i, (ids, read, again) in enumerate(self._source.iterate(loader)):
            self._rows.follow_size(len(self._source))
            if self._rows.stores and (i & (i + 1) == 0 or len(again)):  # 0, 1, 3, 7, ...
                self._compare(to_device(read, self._rows.device), ids, again)
            yield Plan.whole(ids), read

    def rows(self) -> Iterator[Plan]:
        """Yield the plans of an epoch of all known samples, shuffled."""
        yield from self._places.plans(self._source.order(self._rows.epoch), self._source.batch_size)

    def rest(self, loader: Any, given: int) -> Iterator[tuple[Plan, Any]]:
        """Return the remaining number of batches from the loader: rows have gone since the epoch began."""
        warn(
            "drop.loader: the rest of the epoch comes from loader, in its order: rows have been freed, and "
            "samples of a loader with ids= cannot be read by id"
        )
        return islice(self.images(loader), self._source.batches - given)

    def expected_rows(self) -> int:
        """Return the number of rows a drop will keep: of all samples that are known or expected."""
        return max(len(self._rows.slots), self._source.expected()) * self._rows.views

    def load(self, seen: torch.Tensor) -> None:
        """Do nothing: the source numbers the samples that were seen."""

    def _has_rows(self) -> bool:
        """Whether every known sample has its row for the epoch."""
        return not self._places.needs_images(torch.arange(len(self._source)))
