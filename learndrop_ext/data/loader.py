"""The loader of the training loop: the user's batches, and after a drop the same batches as cached rows."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch.utils.data import DataLoader

from learndrop_ext.data.drift import follow_data, follow_model
from learndrop_ext.data.extras import InputKey, input_of, to_device
from learndrop_ext.data.reading import check_loader, rebuilt
from learndrop_ext.data.rowset import RowSet
from learndrop_ext.data.share import Share
from learndrop_ext.distributed import process_rank, several_processes
from learndrop_ext.graph.live import LiveModel


@dataclass(frozen=True)
class _Plan:
    """A batch of samples `ids` [B], of which `read` [n] are read as images."""

    ids: torch.Tensor
    read: torch.Tensor


class _PlannedBatches:
    """The user's batch sampler as the image loader sees it: only the samples of each batch that have no row yet.

    It checks each id and notes which were drawn. The whole batches wait in `plans`, in order.
    """

    def __init__(self, batch_sampler: Any, rows: RowSet) -> None:
        self.batch_sampler = batch_sampler
        self.rows = rows
        self.seen = torch.zeros(len(rows.slots), dtype=torch.bool)
        self.plans: deque[_Plan] = deque()
        self.epoch = 0
        self.share: Share | None = None  # of one of several processes
        if several_processes() and rows.config.partition == "share":
            self.share = Share(seed=rows.seed, rank=process_rank())

    def __iter__(self) -> Iterator[list[int]]:
        for plan in self.draw(self.order()):
            self.plans.append(plan)
            if len(plan.read):
                yield plan.read.tolist()

    def draw(self, batches: Iterator[Any]) -> Iterator[_Plan]:
        """Plan batches as they come."""
        size = len(self.seen)
        for batch in batches:
            ids = [int(i) for i in batch]
            if ids and (min(ids) < 0 or max(ids) >= size):
                outside = next(i for i in ids if not 0 <= i < size)
                raise IndexError(
                    f"drop.loader: the sampler must name samples of the dataset, within 0..{size - 1}, got {outside}"
                )
            index = torch.tensor(ids, dtype=torch.int64)
            self.seen[index] = True
            yield _Plan(index, self.rows.missing(index, self.epoch))

    def needed(self) -> torch.Tensor:
        """Return the samples that the epochs to come draw from, as far as is known: [N] bool."""
        if self.share is None or self.share.ids is None:
            return self.seen
        return torch.zeros_like(self.seen).index_fill_(0, self.share.ids, True)

    def __len__(self) -> int:
        return len(self.batch_sampler)

    def order(self) -> Iterator[Any]:
        """Return the batches of an epoch: the user's, or of a rank's share."""
        if self.share is None or not self.rows.cut:
            return iter(self.batch_sampler)
        if self.share.ids is not None:
            return self.share.batches(self.epoch)
        return self.share.note(self.batch_sampler, len(self) if hasattr(self.batch_sampler, "__len__") else None)


class DropLoader:
    """Iterates over the user's batches, on the model's device; after a drop the input of each is cached rows.

    Batch size, sampler, order, drop_last, collate_fn and the rest of the batch are the user's; the random numbers that
    the order draws are the same before and after a drop. Made by DropScheduler.
    """

    def __init__(self, loader: DataLoader[Any], rows: RowSet, live: LiveModel, *, key: InputKey) -> None:
        check_loader(loader)
        self.user = loader
        self.rows = rows
        self.key = key
        self.batches = _PlannedBatches(loader.batch_sampler, rows)
        self.images: DataLoader[Any] = rebuilt(loader, self.batches)
        self.epochs = 0  # begun
        self.closed = False
        self._live = live
        self._position = 0  # batches given in this epoch
        self._iteration = object()  # stands for the iteration that was begun last
        self._persistent = False  # whether workers that outlive an epoch have been given their seed
        self._given = [0, 0.0]  # samples and seconds since `forget_ledger`

    def __len__(self) -> int:
        return len(self.batches)

    def __iter__(self) -> Iterator[Any]:
        if self.closed:
            raise RuntimeError("drop.loader: the DropScheduler must be open, and it was closed")
        begin = time.perf_counter()
        self._begin_epoch()
        this = self._iteration = object()
        try:
            for batch in self._from_images() if self._reads_images() else self._from_rows():
                x = input_of(batch, self.key)
                self._live.expect(x)
                self._given[0] += len(x)
                self._position += 1
                yield batch
                if self._iteration is not this:
                    raise RuntimeError(
                        "drop.loader: wanted one iteration at a time, and another one was begun before this one went on"
                    )
                self._given[1] += time.perf_counter() - begin
                begin = time.perf_counter()
        finally:
            # An epoch that is broken off ends here too, with the step of its last batch.
            if self._iteration is this:
                if self.rows.device.type == "cuda":
                    torch.cuda.synchronize(self.rows.device)
                self._given[1] += time.perf_counter() - begin
                self.rows.end_epoch()

    @property
    def batch_size(self) -> int:
        """The user's batch size; 32 where a batch sampler names none."""
        size = getattr(self.user.batch_sampler, "batch_size", None)
        return size if isinstance(size, int) else 32

    @property
    def ledger(self) -> tuple[int, float]:
        """The samples given and the seconds of the loop since `forget_ledger`."""
        return int(self._given[0]), float(self._given[1])

    def forget_ledger(self) -> None:
        """Reset the counters."""
        self._given = [0, 0.0]

    def expected_rows(self) -> int:
        """Return how many rows a drop will keep: of the samples drawn, or of one rank's share of them."""
        share, size = self.batches.share, len(self.batches.seen)
        if share is None:
            return self.rows.expected_rows(self.batches.seen)
        kept = min(size, len(self) * self.batch_size) if share.ids is None else len(share.ids)
        return kept * self.rows.views

    def exclude(self, seconds: float) -> None:
        """Do not count seconds of the epoch that is running, in which something else than training was done."""
        self._given[1] -= seconds

    def _begin_epoch(self) -> None:
        self.rows.end_epoch()  # the epoch before may have been broken off
        more = self.rows.follow_size()
        if more:
            self.batches.seen = torch.cat([self.batches.seen, torch.zeros(more, dtype=torch.bool)])
        if self.batches.share is not None and (more or not self.rows.cut):
            self.batches.share.forget()
        self.rows.set_autocast(self._live.autocast)
        follow_model(self.rows)
        follow_data(self.rows, self.epochs)
        self.batches.epoch = self.epochs
        self.batches.plans.clear()
        self.epochs += 1
        self._position = 0

    def _reads_images(self) -> bool:
        """Whether the epoch that begins reads images: where one was drawn that has no row, or nothing was drawn yet."""
        needed = self.batches.needed()
        return not (bool(needed.any()) and self.rows.complete(needed, self.batches.epoch))

    def _start_workers(self) -> None:
        self._persistent = self.images.num_workers > 0 and self.images.persistent_workers

    def _from_images(self) -> Iterator[Any]:
        """Batches as the user's loader reads them, of images or, once there are rows, of rows made of them."""
        self._start_workers()
        read = iter(self.images)
        plans = self.batches.plans
        ended = False
        while plans or not ended:
            # The reading loader asks for batches some steps ahead; each asked adds its plans.
            if not plans or len(plans[0].read):
                batch = next(read, None)
                ended = batch is None
                if ended and not plans:
                    return
            else:
                batch = None
            while plans and not len(plans[0].read):
                yield self._batch(plans.popleft(), None)
            if batch is not None:
                yield self._batch(plans.popleft(), batch)

    def _from_rows(self) -> Iterator[Any]:
        """Batches of rows that are there; rows of slower tiers are read while the batch before them trains."""
        if not self._persistent:
            # A DataLoader draws its workers' seed before the sampler draws the order: draw it too, so that the order is
            # the one that training on images would have had. Persistent workers drew their seed in the first epoch.
            torch.empty((), dtype=torch.int64).random_(generator=self.user.generator)
        self._start_workers()
        plans = self.batches.draw(self.batches.order())
        ahead = next(plans, None)
        while ahead is not None:
            batch = self._batch(ahead, None)
            ahead = next(plans, None) if (self.rows.cache is not None and self.rows.cache.plan.staging > 0) else None
            if ahead is not None:
                self.rows.prefetch(ahead.ids, self.batches.epoch)
            yield batch
            if ahead is None:
                ahead = next(plans, None)

    def _batch(self, plan: _Plan, read: Any) -> Any:
        epoch = self.batches.epoch
        if read is not None:
            read = to_device(read, self.rows.device)
        if self.rows.cache is None:
            if read is None or plan.read is not plan.ids:  # begun while there were rows, which undrop() has freed since
                read = self.rows.read(plan.ids, epoch)
            return self.rows.images(read, plan.ids, epoch)
        if self._position == 1:
            # The autocast of the step is known only after the first call.
            self.rows.set_autocast(self._live.autocast)
        if self.rows.frozen is not None:
            self.rows.frozen.hold_eval()
        return self.rows.batch(plan.ids, epoch, read, plan.read)
