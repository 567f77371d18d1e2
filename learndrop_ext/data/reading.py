"""Read samples as the user's loader would, without advancing the run's random state; check what the loader gives."""

from __future__ import annotations

import contextlib
import copy
import operator
import time
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch.utils.data import DataLoader, IterableDataset, Subset

from learndrop_ext.data.extras import BatchExtras, InputKey, equal, input_of
from learndrop_ext.rng import fork_rng

#: Samples that are read a second time to find out whether they are random. An augmentation with p = 0.5 is missed if no
#: sample changes: once in 2^8 times. Each later epoch looks at other samples.
PROBED = 8


def check_loader(loader: DataLoader[Any]) -> None:
    """Raise TypeError or ValueError for a loader whose samples have no ids."""
    if not isinstance(loader, DataLoader):
        raise TypeError(
            f"DropScheduler: loader must be a torch DataLoader, got {type(loader).__name__}; where its batches carry their "
            "samples' ids, give their position in a batch as ids="
        )
    if type(loader).__iter__ is not DataLoader.__iter__:
        raise TypeError(
            f"DropScheduler: loader must iterate as a torch DataLoader does, got {type(loader).__name__} "
            "with an __iter__ of its own"
        )
    if isinstance(loader.dataset, IterableDataset):
        raise TypeError(
            "DropScheduler: loader must be over a dataset with ids (__getitem__ and __len__), got an IterableDataset, "
            f"{type(loader.dataset).__name__}, whose samples have none to keep rows by; where its batches carry ids, give "
            "their position in a batch as ids="
        )
    if not hasattr(loader.dataset, "__len__"):
        raise TypeError(
            f"DropScheduler: loader must be over a dataset with a length, got {type(loader.dataset).__name__} without"
        )
    if loader.batch_sampler is None:
        raise ValueError("DropScheduler: loader must batch: give it batch_size or batch_sampler, got batch_size=None")
    if len(loader.dataset) == 0:
        raise ValueError("DropScheduler: loader must have samples, got an empty dataset")


def read_batches(loader: DataLoader[Any], batches: Sequence[Sequence[int]], seed: int) -> list[tuple[Any, float]]:
    """Return batches of these samples as the loader makes them, and the seconds that each took to read.

    A loader with workers reads them in one worker of its own, so that a dataset which opens its files where it is first
    read does so there. The random state of the run and of the loader's generator stay.
    """
    timed = _Timed(loader)
    with left_alone(loader, seed):
        one = DataLoader(
            loader.dataset,
            batch_sampler=[list(ids) for ids in batches],
            collate_fn=timed.collate,
            num_workers=min(1, loader.num_workers),
            worker_init_fn=timed.begin,
            multiprocessing_context=loader.multiprocessing_context,
            timeout=loader.timeout,
            generator=torch.Generator().manual_seed(seed),
        )
        return list(one)


class _Timed:
    """Times the reading of each batch where it is read. A worker has its own copies of an object, but one class."""

    started = 0.0

    def __init__(self, loader: DataLoader[Any]) -> None:
        self._collate, self._init = loader.collate_fn, loader.worker_init_fn
        _Timed.started = time.perf_counter()

    def begin(self, worker: int) -> None:
        if self._init is not None:
            self._init(worker)
        _Timed.started = time.perf_counter()

    def collate(self, samples: Any) -> tuple[Any, float]:
        batch = self._collate(samples)
        begun, _Timed.started = _Timed.started, time.perf_counter()
        return batch, _Timed.started - begun


@contextlib.contextmanager
def left_alone(loader: Any, seed: int) -> Iterator[None]:
    """Seed the random state inside; restore the run's own and that of a DataLoader's generator on leaving."""
    generator = loader.generator if isinstance(loader, DataLoader) else None
    state = None if generator is None else generator.get_state()
    with fork_rng(seed):
        try:
            yield
        finally:
            if generator is not None and state is not None:
                generator.set_state(state)


def id_of(value: Any) -> int:
    """Return a sampler's index as an int. Raises TypeError for any other type."""
    try:
        return operator.index(value)
    except TypeError:
        raise TypeError(
            f"DropScheduler: loader must have a sampler that names samples by whole numbers, got {value!r}; where batches "
            "carry their samples' ids, give their position in a batch as ids="
        ) from None


def first_batch_ids(loader: DataLoader[Any]) -> list[int]:
    """Return the ids of the first batch that a copy of the loader's sampler draws, so the run's own order is not changed. A
    sampler that cannot be copied is assumed to draw every id."""
    size = len(loader.dataset)  # type: ignore[arg-type]
    try:
        # Do not copy a dataset that the sampler holds.
        sampler: Any = copy.deepcopy(loader.batch_sampler, {id(loader.dataset): loader.dataset})
        with fork_rng(0):
            drawn = list(next(iter(sampler), []))
    except (TypeError, ValueError, RuntimeError, AttributeError, NotImplementedError):
        drawn = []
    found = [i for i in map(id_of, drawn) if 0 <= i < size]
    return found or list(range(min(loader.batch_size or 32, size)))


def is_function_of_id(loader: DataLoader[Any], key: InputKey, ids: Sequence[int], batch: Any, seed: int) -> bool:
    """Return whether the batches of these samples depend on the samples' ids alone.

    Some samples of `batch`, which was read with `seed`, are read again, with another random seed and in two smaller
    batches, because a `collate_fn` may make a sample depend on the others in its batch. All must be equal to the bit.
    """
    kept = Kept(batch, key)
    parts = _halves(ids[:PROBED])
    again = read_batches(loader, parts, seed + 1)
    count = sum(map(len, parts)) if len(kept) == len(ids) else None  # a collate_fn may have left samples out
    return kept.begins_with([other for other, _ in again], count)


def is_random_by_sample(loader: DataLoader[Any], key: InputKey, ids: Sequence[int]) -> bool:
    """Return whether each sample is drawn independently of the others: read once, and collated with two random seeds and in
    two halves, they are equal. False for a dataset with `__getitems__`, which may draw a batch's samples together."""
    inner = loader.dataset
    while isinstance(inner, Subset):
        inner = inner.dataset
    if callable(getattr(inner, "__getitems__", None)):
        return False
    like = copy.copy(loader)
    like.collate_fn = list
    ((samples, _),) = read_batches(like, [ids[:PROBED]], 0)

    def collated(part: Sequence[int], seed: int) -> Any:
        with fork_rng(seed):  # a collate_fn may change what it is given
            return loader.collate_fn([copy.deepcopy(samples[i]) for i in part])

    every = range(len(samples))
    kept = Kept(collated(every, 0), key)
    other, halves = [collated(every, 1)], [collated(part, 0) for part in _halves(every)]
    return kept.begins_with(other, len(kept)) and kept.begins_with(halves, len(kept))


def _halves(ids: Sequence[int]) -> list[Sequence[int]]:
    """Samples in two batches, or one if there is one sample."""
    half = -(-len(ids) // 2)
    return [part for part in (ids[:half], ids[half:]) if part]


def rebuilt(loader: DataLoader[Any], batch_sampler: Any) -> DataLoader[Any]:
    """Return a loader like the user's, with another batch sampler. It gives the class `NoBatch` in the place of a batch for
    which `collate_fn` has raised an error."""
    like = copy.copy(loader)
    # Not by assignment, which a DataLoader refuses. `_iterator` holds the user's persistent workers. Plans wait in order.
    collate_fn = _Collating(loader.collate_fn)
    vars(like).update(batch_sampler=batch_sampler, collate_fn=collate_fn, _iterator=None, in_order=True)
    return like


class NoBatch:
    """Stands, itself, for a batch that could not be made. A worker sends a class by its name."""


class _Collating:
    def __init__(self, collate_fn: Any) -> None:
        self._collate = collate_fn

    def __call__(self, samples: Any) -> Any:
        try:
            return self._collate(samples)
        except Exception:
            return NoBatch


class Kept:
    """A batch as it was, with which other readings of its samples are compared, to the bit. key: position of the images."""

    def __init__(self, batch: Any, key: InputKey) -> None:
        self._key, self._images = key, input_of(batch, key).clone()
        self.extras = BatchExtras(key=key, device=self._images.device, like=batch)
        self.extras.put(batch, torch.arange(len(self)))

    def __len__(self) -> int:
        return len(self._images)

    def holds(self, batch: Any, at: torch.Tensor) -> bool:
        """Return whether the samples of a batch are those at positions `at` [n]."""
        return equal(input_of(batch, self._key), self._images[at]) and self.extras.first_difference(batch, at) is None

    def begins_with(self, batches: Sequence[Any], count: int | None) -> bool:
        """Return whether batches hold, one behind the other, the first `count` samples; any number with None."""
        begin = 0
        for batch in batches:
            end = begin + len(input_of(batch, self._key))
            if end > len(self) or not self.holds(batch, torch.arange(begin, end)):
                return False
            begin = end
        return count is None or begin == count
