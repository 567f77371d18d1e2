"""The loader of the training loop: the user's batches and, after a drop, the same batches as cached rows."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from typing import Any

import torch

from learndrop_ext.data.batches import Plan, batches_of
from learndrop_ext.data.drift import follow_data, follow_model
from learndrop_ext.data.extras import InputKey, input_of, to_device
from learndrop_ext.data.rowset import RowSet
from learndrop_ext.graph.live import LiveModel


class DropLoader:
    """Iterates over the user's batches on the model's device. After a drop, the input of each batch is cached rows.

    Batch size, sampler, order, drop_last, collate_fn and the rest of the batch are the user's, and the order draws the same
    random numbers before and after a drop. With `ids`, the order is the loader's own as long as images are read; see
    `PassingBatches`. DropScheduler makes this object.
    """

    def __init__(
        self, rows: RowSet, live: LiveModel, *, key: InputKey, follow_code: Callable[[], Any] | None = None
    ) -> None:
        self.user: Any = rows.source.loader
        self.rows = rows
        self.key = key
        self.batches = batches_of(rows)
        self.epochs = 0  # begun
        self.closed = False
        self._live = live
        self._follow_code = follow_code  # returns the function to call when an epoch begins
        self._position = 0  # batches given in this epoch
        self._iteration = object()  # identifies the latest iteration
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
            for batch in self._given_batches():
                x = input_of(batch, self.key)
                self._live.expect(x)
                self._given[0] += len(x)
                self._position += 1
                yield batch
                if self._iteration is not this:
                    raise RuntimeError(
                        "drop.loader: wanted one iteration at a time, got a second one before this one ended"
                    )
                self._given[1] += time.perf_counter() - begin
                begin = time.perf_counter()
        finally:
            # An epoch that is broken off ends here too, after the step of its last batch.
            if self._iteration is this:
                if self.rows.device.type == "cuda":
                    torch.cuda.synchronize(self.rows.device)
                self._given[1] += time.perf_counter() - begin
                self.rows.end_epoch()

    @property
    def ledger(self) -> tuple[int, float]:
        """Samples given and seconds spent in the loop since `forget_ledger`."""
        return int(self._given[0]), float(self._given[1])

    def forget_ledger(self) -> None:
        """Reset the counters."""
        self._given = [0, 0.0]

    def exclude(self, seconds: float) -> None:
        """Take seconds that were not spent on training out of the current epoch's time."""
        self._given[1] -= seconds

    def _begin_epoch(self) -> None:
        self.rows.end_epoch()  # the epoch before may have been broken off
        self.rows.set_autocast(self._live.autocast)
        follow_model(self.rows)
        follow_code = self._follow_code() if self._follow_code is not None else None
        if follow_code is not None:
            follow_code()
        self.batches.begin(self.epochs)
        follow_data(self.rows, self.epochs)
        self.epochs += 1
        self._position = 0

    def _given_batches(self) -> Iterator[Any]:
        return self._from_images(self.batches.images()) if self.batches.reads_images() else self._from_rows()

    def _from_images(self, pairs: Iterator[tuple[Plan, Any]]) -> Iterator[Any]:
        """Batches as the user's loader reads them: images or, after a drop, the rows computed from them."""
        for plan, read in pairs:
            yield self._batch(plan, read)

    def _from_rows(self) -> Iterator[Any]:
        """Batches of stored rows. Rows of slower tiers are read while the batch before them trains."""
        plans = self.batches.rows()
        ahead = next(plans, None)
        while ahead is not None:
            self._follow_autocast()
            rest = self.batches.rest(ahead, self._position)
            if rest is not None:
                yield from self._from_images(rest)
                return
            batch = self._batch(ahead, None)
            ahead = next(plans, None) if (self.rows.cache is not None and self.rows.cache.plan.staging > 0) else None
            if ahead is not None:
                self.rows.prefetch(ahead.ids, self.batches.epoch)
            yield batch
            if ahead is None:
                ahead = next(plans, None)

    def _follow_autocast(self) -> None:
        """Adopt the autocast dtype of the training step, which is known after its first call."""
        if self._position == 1 and self.rows.cache is not None:
            self.rows.set_autocast(self._live.autocast)

    def _batch(self, plan: Plan, read: Any) -> Any:
        epoch = self.batches.epoch
        if read is not None:
            read = to_device(read, self.rows.device)
        if self.rows.cache is None:
            if read is None or plan.read is not plan.ids:  # undrop() has freed rows during this epoch
                read = self.rows.read(plan.ids, epoch)
            return self.rows.images(read, plan.ids, epoch)
        self._follow_autocast()
        if self.rows.frozen is not None:
            self.rows.frozen.hold_eval()
        return self.rows.batch(plan.ids, epoch, read, plan.read)
