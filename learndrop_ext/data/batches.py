"""The batches of an epoch: those of a DataLoader's sampler, or those of a loader with ids."""

from __future__ import annotations

import itertools
import warnings
from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch.utils.data import DataLoader

from learndrop_ext.data.extras import to_device
from learndrop_ext.data.id_source import IdSource, length_of
from learndrop_ext.data.reading import id_of, rebuilt
from learndrop_ext.data.share import Share
from learndrop_ext.data.source import DatasetSource, Source
from learndrop_ext.distributed import process_rank, several_processes
from learndrop_ext.rows.plan import lengthened
from learndrop_ext.rows.rowset import RowSet

#: batch of images, ids [B], positions of ids that came before in the epoch -> whether any of them has a row
Compare = Callable[[Any, torch.Tensor, "torch.Tensor | None"], bool]


@dataclass(frozen=True)
class Plan:
    """A batch of samples `ids` [B], and whether its images are read."""

    ids: torch.Tensor
    read: bool


class Batches(Protocol):
    """The batches of an epoch, and the samples that have been drawn."""

    @property
    def seen(self) -> torch.Tensor:
        """The samples drawn so far: [N] bool."""

    @property
    def batch_size(self) -> int:
        """Samples in a batch."""

    def __len__(self) -> int:
        """Batches in an epoch."""

    def begin(self, epoch: int) -> None:
        """Begin an epoch; the dataset may have grown."""

    def reads_images(self) -> bool:
        """Return whether the epoch that begins reads images."""

    def images(self) -> Iterator[tuple[Plan, Any]]:
        """Yield the epoch's plans, each with the batch read for it, or None if nothing had to be read."""

    def rows(self) -> Iterator[Plan]:
        """Yield the epoch's plans if every sample has its row."""

    def rest(self, plan: Plan, given: int) -> Iterator[tuple[Plan, Any]] | None:
        """Return the rest of an epoch from `plan` on, after `given` batches, if its rows have gone and images are read."""

    def expected_rows(self) -> int:
        """Return the number of rows that a drop will keep."""

    def load(self, seen: torch.Tensor) -> None:
        """Mark the samples that an earlier process has seen."""


class Planner:
    """The batch sampler of the image loader: those of the user's batches that have no rows yet.

    It checks ids and records which were drawn. The plans of all batches wait in `plans`, in order.

    Args:
        batch_sampler: the user's.
        size: number of samples.
        needs_images: whether a batch of samples [B] has to be read.
        share: this rank's share of the samples, with several processes.
    """

    def __init__(
        self, batch_sampler: Any, size: int, needs_images: Callable[[torch.Tensor], bool], share: Share | None
    ) -> None:
        self.batch_sampler = batch_sampler
        self.needs_images = needs_images
        self.share = share
        self.seen = torch.zeros(size, dtype=torch.bool)
        self.plans: deque[Plan] = deque()
        self.epoch = 0
        self.dropped = False  # whether rows are kept

    def __iter__(self) -> Iterator[list[int]]:
        for plan in self.draw():
            self.plans.append(plan)
            if plan.read:
                yield plan.ids.tolist()

    def __len__(self) -> int:
        return len(self.batch_sampler)

    def draw(self, *, rows: bool = False) -> Iterator[Plan]:
        """Yield a plan for each batch of the epoch. rows: no batch is read, as far as is known when the epoch begins."""
        size, all_seen = len(self.seen), bool(self.seen.all())
        for batch in self._order():
            ids = list(batch) if set(map(type, batch)) == {int} else [id_of(i) for i in batch]
            if ids and (min(ids) < 0 or max(ids) >= size):
                outside = next(i for i in ids if not 0 <= i < size)
                raise IndexError(
                    f"drop.loader: the sampler must name samples of the dataset, within 0..{size - 1}, got {outside}"
                )
            index = torch.tensor(ids, dtype=torch.int64)
            if not all_seen:
                self.seen[index] = True
            yield Plan(index, not rows and self.needs_images(index))

    def needed(self) -> torch.Tensor:
        """Return the samples drawn so far, or those of this rank's share: [N] bool."""
        if self.share is None or self.share.ids is None:
            return self.seen
        return torch.zeros_like(self.seen).index_fill_(0, self.share.ids, True)

    def begin(self, epoch: int, *, more: int, dropped: bool) -> None:
        """Begin an epoch, with `more` new samples. Discards plans of an epoch that was broken off."""
        if more:
            self.seen = torch.cat([self.seen, torch.zeros(more, dtype=torch.bool)])
        if self.share is not None and (more or not dropped):
            self.share.forget()
        self.epoch, self.dropped = epoch, dropped
        self.plans.clear()

    def _order(self) -> Iterator[Any]:
        """The batches of an epoch: the user's, or those of this rank's share."""
        if self.share is None or not self.dropped:
            return iter(self.batch_sampler)
        if self.share.ids is not None:
            return self.share.batches(self.epoch)
        return self.share.note(self.batch_sampler, len(self) if hasattr(self.batch_sampler, "__len__") else None)


class PlannedBatches:
    """The batches of a DataLoader's sampler. A batch is read whole, or not at all."""

    def __init__(self, source: DatasetSource, rows: RowSet, needs_images: Callable[[torch.Tensor], bool]) -> None:
        share = None
        if several_processes() and rows.config.partition == "share":
            share = Share(seed=rows.config.seed, rank=process_rank())
        loader = source.loader
        self.planner = Planner(loader.batch_sampler, len(source), needs_images, share)
        self._source, self._rows = source, rows
        self._generator = loader.generator
        # The planner does not refer to this loader: without a reference cycle its workers end with it.
        self._images: DataLoader[Any] = rebuilt(loader, self.planner)
        self._persistent = False  # whether persistent workers have been given their seed

    def __len__(self) -> int:
        return len(self.planner)

    @property
    def seen(self) -> torch.Tensor:
        """The samples drawn so far: [N] bool."""
        return self.planner.seen

    @property
    def batch_size(self) -> int:
        """The user's batch size, or 32 if a batch sampler has none."""
        size = getattr(self.planner.batch_sampler, "batch_size", None)
        return size if isinstance(size, int) else 32

    def begin(self, epoch: int) -> None:
        """Begin an epoch."""
        more = self._rows.follow_size(len(self._source))
        self.planner.begin(epoch, more=more, dropped=self._rows.cache is not None)

    def reads_images(self) -> bool:
        """Return whether a sample drawn so far has to be read, or none was drawn yet."""
        needed = torch.nonzero(self.planner.needed()).flatten()
        return not len(needed) or self.planner.needs_images(needed)

    def images(self) -> Iterator[tuple[Plan, Any]]:
        """Yield the plans in the sampler's order, each with its batch if it is read."""
        self._start_workers()
        read = iter(self._images)
        plans = self.planner.plans
        ended = False
        while plans or not ended:
            # The image loader asks for batches some steps ahead, which adds their plans.
            if not plans or plans[0].read:
                batch = next(read, None)
                ended = batch is None
                if ended and not plans:
                    return
            else:
                batch = None
            while plans and not plans[0].read:
                yield plans.popleft(), None
            if batch is not None:
                yield plans.popleft(), batch

    def rows(self) -> Iterator[Plan]:
        """Yield the plans in the sampler's order."""
        if not self._persistent:
            # A DataLoader draws its workers' seed before the sampler draws the order. Draw it too, so that the order is the
            # one of training on images. Persistent workers get their seed in the first epoch only.
            torch.empty((), dtype=torch.int64).random_(generator=self._generator)
        self._start_workers()
        yield from self.planner.draw(rows=True)

    def rest(self, plan: Plan, given: int) -> None:
        """Return None: samples without a row are read by index."""

    def expected_rows(self) -> int:
        """Return the number of rows a drop will keep: of all samples, of those drawn so far if they are less than half, or
        of one rank's share."""
        share, size, drawn = self.planner.share, len(self.seen), int(self.seen.sum())
        if share is None:
            kept = drawn if 0 < 2 * drawn < size else size
        else:
            kept = min(size, len(self) * self.batch_size) if share.ids is None else len(share.ids)
        return kept * self._rows.views

    def load(self, seen: torch.Tensor) -> None:
        """Mark the samples that an earlier process has seen."""
        self.seen[: len(seen)] = seen

    def _start_workers(self) -> None:
        self._persistent = self._images.num_workers > 0 and self._images.persistent_workers


class PassingBatches:
    """The batches of a loader with ids. Once all ids are known and have rows, batches are drawn from the ids.

    While images are read, some are compared with their rows: in batches 1, 2, 4, 8, ... of an epoch, and wherever an id
    comes twice in one epoch.
    """

    def __init__(
        self, source: IdSource, rows: RowSet, needs_images: Callable[[torch.Tensor], bool], compare: Compare
    ) -> None:
        self._source, self._rows, self._needs_images, self._compare = source, rows, needs_images, compare
        self._seen = torch.zeros(0, dtype=torch.bool)  # grows in steps
        self._follow_size()
        self._said_repeats = False

    def __len__(self) -> int:
        if self._source.whole and self._has_rows():
            return self._source.batches(int(self.seen.sum()))
        length = length_of(self._source.loader)
        if length is None:
            raise TypeError(f"object of type {type(self._source.loader).__name__!r} has no len()")
        return length

    @property
    def seen(self) -> torch.Tensor:
        """The samples read so far: [N] bool."""
        return self._seen[: len(self._rows.slots)]

    @property
    def batch_size(self) -> int:
        """Samples in the first batch."""
        return self._source.batch_size

    def begin(self, epoch: int) -> None:
        """Begin an epoch."""
        self._source.follow_length()
        first = self._source.first_numbers()
        self._follow_size()
        unchecked, self._source.unchecked = self._source.unchecked, False
        if unchecked and self._rows.stores:
            batch = to_device(self._source.first_batch, self._rows.device)
            if not self._compare(batch, first, None):
                self._source.whole = False

    def reads_images(self) -> bool:
        """Return whether the loader is iterated over: until every id is known and has its row."""
        if not self._has_rows():
            return True
        if self._source.repeats and not self._said_repeats:
            self._said_repeats = True
            warnings.warn(
                "drop.loader: an id came twice in one iteration over loader, so its order is not a plain shuffle: loader "
                "is iterated over in each epoch, though all rows are there",
                RuntimeWarning,
                stacklevel=4,
            )
        return not self._source.whole

    def images(self) -> Iterator[tuple[Plan, Any]]:
        """Yield the batches of the loader."""
        for i, (ids, read) in enumerate(self._source.iterate()):
            self._follow_size()
            self._seen[ids] = True
            batch = to_device(read, self._rows.device)
            again = self._source.again
            if self._rows.stores and (i & (i + 1) == 0 or len(again)):  # 0, 1, 3, 7, ...
                self._compare(batch, ids, again)
            yield Plan(ids, True), batch

    def rows(self) -> Iterator[Plan]:
        """Yield the plans of an epoch of all known samples, shuffled."""
        for ids in self._source.order(torch.nonzero(self.seen).flatten(), self._rows.epoch):
            yield Plan(ids, False)

    def rest(self, plan: Plan, given: int) -> Iterator[tuple[Plan, Any]] | None:
        """Return the remaining number of batches from the loader, if rows have gone since the epoch began."""
        if self._rows.cache is not None and not self._needs_images(plan.ids):
            return None
        warnings.warn(
            "drop.loader: the rest of the epoch comes from loader, in its order: rows have been freed, and "
            "samples of a loader with ids= cannot be read by id",
            RuntimeWarning,
            stacklevel=5,
        )
        left = self._source.batches(int(self.seen.sum())) - given
        return itertools.islice(self.images(), left)

    def expected_rows(self) -> int:
        """Return the number of rows a drop will keep: of all samples that are known or expected."""
        return max(len(self._rows.slots), self._source.expected()) * self._rows.views

    def load(self, seen: torch.Tensor) -> None:
        """Mark the samples that an earlier process has seen, by the numbers it gave them."""
        self._seen = seen.clone()
        self._follow_size()

    def _has_rows(self) -> bool:
        """Whether every known sample has its row for the epoch."""
        return bool(self.seen.any()) and not self._needs_images(torch.nonzero(self.seen).flatten())

    def _follow_size(self) -> None:
        self._rows.follow_size(len(self._source))
        self._seen = lengthened(self._seen, len(self._rows.slots))


def batches_of(source: Source, rows: RowSet, needs_images: Callable[[torch.Tensor], bool], compare: Compare) -> Batches:
    """Return the batches of a source."""
    if isinstance(source, IdSource):
        return PassingBatches(source, rows, needs_images, compare)
    assert isinstance(source, DatasetSource)
    return PlannedBatches(source, rows, needs_images)
