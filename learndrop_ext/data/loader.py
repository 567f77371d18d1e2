"""The loader of the training loop: the user's batches and, after a drop, the same batches without their images."""

from __future__ import annotations

import inspect
import time
import weakref
from collections.abc import Callable, Generator, Iterator
from functools import partial
from itertools import starmap
from typing import Any

import torch

from learndrop_ext.data.batches import PassingBatches, PlannedBatches
from learndrop_ext.data.extras import BatchExtras, InputKey, input_of, to_device, with_input
from learndrop_ext.data.id_source import END, IdSource, length_of
from learndrop_ext.data.places import Places, Plan
from learndrop_ext.data.reading import rebuilt
from learndrop_ext.data.source import Source
from learndrop_ext.forward.bypass import Bypass
from learndrop_ext.forward.images import Form, Images, Standing, form_of, samples_at
from learndrop_ext.forward.statistics import TrainingCalls
from learndrop_ext.preserve import normal_tensors
from learndrop_ext.rows.rowset import RowSet
from learndrop_ext.rows.store.store import StoreError
from learndrop_ext.warn import warn

#: Attributes of the user's loader that loops and trainers ask for.
FORWARDED = (
    *("dataset", "batch_size", "sampler", "batch_sampler", "num_workers", "drop_last", "collate_fn", "generator"),
    *("pin_memory", "persistent_workers", "prefetch_factor", "timeout", "worker_init_fn", "multiprocessing_context"),
)


class DropLoader:
    """Iterates over the user's batches on the model's device. After a drop, the images of a batch are `Images`.

    Batch size, sampler, order, drop_last, collate_fn and the rest of the batch are the user's, and the order draws the same
    random numbers before and after a drop. With `ids`, the order is the loader's own as long as images are read; see
    `PassingBatches`. DropScheduler makes this object.
    """

    def __init__(
        self,
        source: Source,
        rows: RowSet,
        extras: BatchExtras,
        *,
        key: InputKey,
        like: Any,
        bypass: Bypass,
        guards: Any,  # the run's `Guards`
        calls: TrainingCalls,
    ) -> None:
        self._source, self._rows, self._extras, self._key = source, rows, extras, key
        self._bypass, self._guards, self._calls = bypass, guards, calls
        self._form = form_of(input_of(like, key))
        self._places = places = Places(rows, extras, source.labels(extras), by_sample=source.readable)
        self.batches: PassingBatches | PlannedBatches
        if isinstance(source, IdSource):
            self.batches, self._images = PassingBatches(source, rows, places, guards.compare), source.loader
        else:
            self.batches = PlannedBatches(source, rows, places)
            # Nothing refers to this loader: without a reference cycle its workers end with the scheduler.
            self._images = rebuilt(source.loader, self.batches)
        self._reader = partial(_read_images, source, rows, key) if source.readable else None
        self._epochs = 0
        self._shown = self._others = 0  # samples of the last epoch, and those of them whose images had another shape
        self._other_shape: list[int] = []  # the last one
        self._closed = False
        self._iteration = object()  # identifies the latest iteration
        self._open: Callable[[], Generator[Any, None, None] | None] = lambda: None  # the epoch that is iterated over
        self._beginning = 0.0  # seconds that the last epoch took to begin
        self.forget_counts()

    def forget_counts(self) -> None:
        """Reset the counters, and forget the training calls."""
        if self._is_under_way:
            self._calls.listen(self._bypass.frozen)
        else:
            self._calls.forget()
        self._given, self._seconds = 0, 0.0  # samples and seconds
        self._steps, self._first_step, self._in_steps = 0, 0.0, 0.0  # steps of the loop, and their seconds
        self._relabelled = 0

    @property
    def epochs(self) -> int:
        """The number of epochs begun."""
        return self._epochs

    @property
    def closed(self) -> bool:
        """Whether `close` was called."""
        return self._closed

    @property
    def relabelled(self) -> int:
        """Samples read since `forget_counts` although their rows were there, for the rest of their batches."""
        return self._relabelled

    @property
    def shapes(self) -> tuple[list[int], list[int]] | None:
        """The shape of images in the first batch and another one, if most of those in the last epoch had others; or None."""
        return (list(self._form.shape[1:]), self._other_shape) if 2 * self._others > self._shown else None

    def __len__(self) -> int:
        return len(self.batches)

    def __getattr__(self, name: str) -> Any:
        if name in FORWARDED:
            return getattr(self._source.loader, name)
        raise AttributeError(f"{type(self).__name__!r} object has no attribute {name!r}")

    def __iter__(self) -> Iterator[Any]:
        epoch = self._epoch()
        self._open = weakref.ref(epoch)
        return epoch

    def end(self) -> None:
        """End the epoch, for a trainer that stops at the last batch and does not exhaust the iterator."""
        epoch = self._open()
        if epoch is not None:
            epoch.close()

    def _epoch(self) -> Generator[Any, None, None]:
        if self._closed:
            raise RuntimeError("drop.loader: the DropScheduler must be open, and it was closed")
        begin = time.perf_counter()
        with normal_tensors():
            self._begin_epoch()
            reads = self.batches.reads_images()
            batches = starmap(self._batch, self.batches.images(self._images)) if reads else self._from_rows()
            self._calls.listen(self._bypass.frozen)
        self._beginning = time.perf_counter() - begin
        this = self._iteration = object()
        try:
            while True:
                with normal_tensors():
                    batch = next(batches, END)
                if batch is END:
                    return
                given = time.perf_counter()
                yield batch
                in_step = time.perf_counter() - given
                self._first_step = self._first_step if self._steps else in_step
                self._in_steps += in_step
                self._steps += 1
                if self._iteration is not this:
                    raise RuntimeError(
                        "drop.loader: wanted one iteration at a time, got a second one before this one ended"
                    )
                now = time.perf_counter()
                self._seconds += now - begin
                begin = now
        finally:
            # An epoch that is broken off ends here too, after the step of its last batch.
            if self._iteration is this:
                if self._rows.device.type == "cuda":
                    torch.cuda.synchronize(self._rows.device)
                self._seconds += time.perf_counter() - begin
                self._calls.end()
                with normal_tensors():
                    self._rows.end_epoch()

    @property
    def counts(self) -> tuple[int, float, float]:
        """Samples given and seconds spent in the loop since `forget_counts`, and those the last epoch took to begin."""
        return self._given, self._seconds, self._beginning

    @property
    def first_step_excess(self) -> float:
        """Seconds that the loop's first step since `forget_counts` took longer than the mean of those after it."""
        if self._steps < 2:
            return 0.0
        return max(0.0, self._first_step - (self._in_steps - self._first_step) / (self._steps - 1))

    def exclude(self, seconds: float) -> None:
        """Take seconds that were not spent on training out of the time of the epoch, if one is under way."""
        if self._is_under_way:
            self._seconds -= seconds

    def resume(self, epochs: int, seen: torch.Tensor) -> None:
        """Go on after `epochs` epochs of another process, which has drawn the samples `seen` [N] bool."""
        self._epochs = epochs
        self.batches.load(seen)

    def close(self) -> bool:
        """Give no batches any more; return whether the loader was open."""
        was, self._closed = self._closed, True
        self._images = self._source.loader  # ends persistent workers
        self._calls.forget()
        return not was

    @property
    def _is_under_way(self) -> bool:
        epoch = self._open()
        return epoch is not None and inspect.getgeneratorstate(epoch) != inspect.GEN_CLOSED

    def _begin_epoch(self) -> None:
        self._rows.end_epoch()  # the epoch before may have been broken off
        self._rows.epoch = self._epochs
        self._shown = self._others = 0
        self.batches.begin()
        self._places.relabel()
        self._guards.begin_epoch(self._epochs)
        if self._bypass.cuts:
            last = self._bypass.cuts[-1]
            self._bypass.put([*(cut for cut in self._rows.stops if cut < last), last])
        self._epochs += 1

    def _from_rows(self) -> Iterator[Any]:
        """Batches of stored rows. Rows of slower tiers are read while the batch before them trains."""
        plans, given, count = self.batches.rows(), 0, length_of(self.batches)
        plan = next(plans, None)
        while plan is not None:
            plan = self._places.current(plan)
            if plan.reads.numel() and isinstance(self.batches, PassingBatches):
                yield from starmap(self._batch, self.batches.rest(self._images, given))
                return
            batch = self._batch(plan)
            given += 1
            # The last one waits for its turn: a RandomSampler draws one permutation more there.
            ahead = next(plans, None) if plan.slow and given + 1 != count else None
            if ahead is not None:
                self._rows.prefetch(ahead.ids)
            yield batch
            plan = ahead or next(plans, None)

    def _batch(self, planned: Plan, read: Any = None) -> Any:
        """The batch of a plan, with what was read of it, if anything was."""
        plan, row = self._located(planned)
        if read is None and not plan.reads.numel():
            self._count(plan.ids.numel())
            return self._extras.get(plan.at, self._stand_in(plan, row, self._form), plan.where)
        is_whole = len(planned.reads) == len(planned.ids)
        if read is None or not (is_whole or bool(torch.isin(plan.reads, planned.reads).all())):
            # undrop(), refresh() or a guard has freed rows during this epoch, or rows cannot be read any more
            planned, read = plan, self._read(plan.ids[plan.reads])
        return self._with_read(plan, row, planned.reads, to_device(read, self._rows.device))

    def _read(self, ids: torch.Tensor) -> Any:
        """Samples read by number, random ones in another way in each batch."""
        return self._source.read(ids.tolist(), self._rows.epoch + (self._shown << 20))

    def _count(self, samples: int) -> None:
        self._given += samples
        self._shown += samples

    def _located(self, plan: Plan) -> tuple[Plan, torch.Tensor | None]:
        """The plan as it is now, and the rows of the samples that have some. Rows that cannot be read are forgotten."""
        plan = self._places.current(plan)
        if not plan.level:
            return plan, None
        at = plan.at if plan.some is None else plan.at[~plan.some]
        try:
            return plan, self._rows.gather(at, plan.level)
        except (StoreError, OSError) as error:
            if not self._source.readable:
                raise
            self._rows.forget(plan.ids, everywhere=True)
            warn(f"drop.loader: {len(at)} rows are computed again, because they cannot be read: {error}")
        return self._located(plan)

    def _with_read(self, plan: Plan, row: torch.Tensor | None, reads: torch.Tensor, read: Any) -> Any:
        """The batch of a plan of which the samples at positions `reads` [m] were read. row: the rows of the others."""
        rows, ids = self._rows, plan.ids[reads]
        if rows.cache is not None:
            rows.begin_batch()
        if rows.cache is None or not self._guards.may_keep(read, ids):
            if len(ids) < len(plan.ids):
                read = to_device(self._read(plan.ids), rows.device)
            count, *shape = input_of(read, self._key).shape
            self._count(count)
            if shape != list(self._form.shape[1:]):
                self._others += count
                self._other_shape = shape
            return self._mirrored(read, plan.ids)
        makes = torch.full((len(reads),), not plan.level) if plan.some is None else plan.some[reads]
        if self._source.readable and not bool(makes.all()) and not self._guards.are_same(read, ids):
            return self._batch(Plan.whole(plan.ids))
        self._count(len(plan.ids))
        self._relabelled += int((~makes).sum())
        places, order = rows.first_places(ids)
        self._extras.put(read, places, order)
        self._guards.note(read, ids, makes)
        x = input_of(self._mirrored(read, ids), self._key)
        pixels = x if makes.all() else samples_at(x, torch.nonzero(makes).flatten()) if makes.any() else None
        images = self._stand_in(plan, row, form_of(x), pixels)
        if len(reads) == len(plan.ids):
            return with_input(read, self._key, images)
        return self._extras.get(rows.places(plan.ids), images)

    def _stand_in(self, plan: Plan, row: torch.Tensor | None, like: Form, pixels: torch.Tensor | None = None) -> Images:
        """Images of which `pixels` were read, and the others have their rows. like: the form of such images."""
        count = plan.ids.numel()
        form = like if like.shape[0] == count else Form((count, *like.shape[1:]), like.stride, like.dtype)
        standing = Standing(self._bypass, plan.ids, row, plan.level, self._reader, plan.some)
        device = self._rows.device if row is None else row.device
        return Images(form, device, standing, pixels)

    def _mirrored(self, batch: Any, ids: torch.Tensor) -> Any:
        """A batch of images as the model trains on it: with `mirror`, every second view of a sample is flipped."""
        if not self._rows.config.mirror:
            return batch
        x = input_of(batch, self._key)
        if len(x) != len(ids):
            raise ValueError(
                "drop.loader: collate_fn must give every sample of a batch, because mirror flips them by sample, wanted "
                f"{len(ids)}, got {len(x)}; leave out samples that cannot be read with a Subset or a sampler"
            )
        flip = self._rows.view(ids).bool().to(x.device).view(-1, *[1] * (x.dim() - 1))
        return with_input(batch, self._key, torch.where(flip, x.flip(-1), x))


def _read_images(source: Source, rows: RowSet, key: InputKey, ids: torch.Tensor) -> torch.Tensor:
    """The images of samples `ids` [B], on the device; with several of each, those that go by these ids."""
    batch = to_device(source.read((ids // rows.images).tolist(), rows.epoch), rows.device)
    images = input_of(batch, key)
    return images[torch.arange(len(ids)), ids % rows.images] if isinstance(key, tuple) else images
