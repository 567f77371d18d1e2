"""Read samples as the user's loader would, without advancing the run's random state; check what the loader gives."""

from __future__ import annotations

import copy
import operator
import statistics
import time
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch.utils.data import DataLoader, IterableDataset, Subset

from learndrop_ext.data.extras import BatchExtras, InputKey, input_of
from learndrop_ext.rng import fork_rng

#: Random seeds with which samples are read to find out whether they are random. An augmentation with p = 0.5 is missed if
#: all eight readings of a sample are alike: once in 2^7 times.
SEEDS = 8


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


def read_batch(loader: DataLoader[Any], ids: Sequence[int]) -> Any:
    """Return the batch of these samples as the loader makes it, read in this process."""
    dataset: Any = loader.dataset
    many = getattr(dataset, "__getitems__", None)
    samples = many(list(ids)) if callable(many) else [dataset[i] for i in ids]
    return loader.collate_fn(samples)


def id_of(value: Any) -> int:
    """Return a sampler's index as an int. Raises TypeError for any other type."""
    try:
        return operator.index(value)
    except TypeError:
        raise TypeError(
            f"DropScheduler: loader must have a sampler that names samples by whole numbers, got {value!r}; where batches "
            "carry their samples' ids, give their position in a batch as ids="
        ) from None


def first_ids(loader: DataLoader[Any], count: int) -> list[int]:
    """Return up to `count` different ids that the loader's sampler draws.

    They are drawn from a copy of the sampler, so the run's own order is not changed. A sampler that cannot be copied is
    assumed to draw every id.
    """
    size = len(loader.dataset)  # type: ignore[arg-type]
    every = list(range(min(count, size)))
    try:
        # Do not copy a dataset that the sampler holds.
        sampler: Any = copy.deepcopy(loader.batch_sampler, {id(loader.dataset): loader.dataset})
    except (TypeError, ValueError, RuntimeError, AttributeError, NotImplementedError):
        return every
    found: dict[int, None] = {}
    with fork_rng(0):
        # A sampler with replacement repeats ids, so more batches may be needed.
        for ids, _ in zip(sampler, range(4 * count), strict=False):
            found |= dict.fromkeys(i for i in map(id_of, ids) if 0 <= i < size)
            if len(found) >= count:
                break
    return list(found)[:count] or every


def is_function_of_id(loader: DataLoader[Any], key: InputKey, ids: Sequence[int]) -> bool:
    """Return whether the batches of these samples depend on the samples' ids alone.

    The samples are read with SEEDS random seeds, and once in two halves, because a `collate_fn` may make a sample depend
    on the others in its batch. Model inputs and all other entries must be equal to the bit.
    """
    return _is_function(lambda part, seed: _read(loader, [ids[i] for i in part], seed), key, len(ids))


def is_random_by_sample(loader: DataLoader[Any], key: InputKey, ids: Sequence[int]) -> bool:
    """Return whether each sample is drawn independently of the others, so that `collate_fn` adds no randomness.

    The samples are read once, and collated with SEEDS random seeds and in two halves, compared as in `is_function_of_id`.
    False for a dataset with `__getitems__`, which may draw the samples of a batch together.
    """
    inner = loader.dataset
    while isinstance(inner, Subset):
        inner = inner.dataset
    if callable(getattr(inner, "__getitems__", None)):
        return False
    with fork_rng(0):
        samples = [loader.dataset[i] for i in ids]

    def collated(part: Sequence[int], seed: int) -> Any:
        with fork_rng(seed):  # a collate_fn may change what it is given
            return loader.collate_fn([copy.deepcopy(samples[i]) for i in part])

    return _is_function(collated, key, len(samples))


def seconds_to_read(loader: DataLoader[Any], ids: Sequence[int], *, repeats: int = 3) -> float:
    """Return the median seconds it takes to read a batch of these samples in this process."""
    times = []
    for _ in range(repeats):
        begin = time.perf_counter()
        _read(loader, ids, 0)
        times.append(time.perf_counter() - begin)
    return statistics.median(times)


def rebuilt(loader: DataLoader[Any], batch_sampler: Any) -> DataLoader[Any]:
    """Return a loader like the user's, with another batch sampler."""
    options: dict[str, Any] = {}
    if loader.num_workers > 0:
        options = {
            "num_workers": loader.num_workers,
            "prefetch_factor": loader.prefetch_factor,
            "persistent_workers": loader.persistent_workers,
            "multiprocessing_context": loader.multiprocessing_context,
            "timeout": loader.timeout,
        }
    return DataLoader(
        loader.dataset,
        batch_sampler=batch_sampler,
        collate_fn=loader.collate_fn,
        pin_memory=loader.pin_memory,
        worker_init_fn=loader.worker_init_fn,
        generator=loader.generator,
        **options,
    )


def _is_function(batch_of: Callable[[Sequence[int], int], Any], key: InputKey, count: int) -> bool:
    """Whether `batch_of(positions, seed)` gives the same `count` samples with every seed and in smaller batches."""
    extras = BatchExtras(key=key, device=torch.device("cpu"))
    first = batch_of(range(count), 0)
    images = input_of(first, key).clone()
    extras.put(first, torch.arange(len(images)))
    half = count // 2
    again = [(range(count), seed) for seed in range(1, SEEDS)]
    for part, seed in [*again, (range(half), 0), (range(half, count), 0)]:
        if not len(part):
            continue
        batch, at = batch_of(part, seed), torch.as_tensor(part)
        if not _same(input_of(batch, key), images[at]) or extras.first_difference(batch, at) is not None:
            return False
    return True


def _read(loader: DataLoader[Any], ids: Sequence[int], seed: int) -> Any:
    with fork_rng(seed):
        return read_batch(loader, ids)


def _same(one: torch.Tensor, other: torch.Tensor) -> bool:
    return one.shape == other.shape and bool(((one == other) | ((one != one) & (other != other))).all())
