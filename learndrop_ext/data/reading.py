"""Reading samples as the user's loader would, without moving the run's random state, and what is asked of a loader."""

from __future__ import annotations

import copy
import operator
import statistics
import time
from collections.abc import Sequence
from typing import Any

import torch
from torch.utils.data import DataLoader, IterableDataset

from learndrop_ext.data.extras import BatchExtras, InputKey, input_of
from learndrop_ext.rng import fork_rng

#: Random states in which samples are read to see whether they are random. An augmentation with p = 0.5 is missed where
#: all eight readings are alike, once in 2^7 times.
SEEDS = 8


def check_loader(loader: DataLoader[Any]) -> None:
    """Raise TypeError or ValueError for a loader whose samples cannot be told apart by id."""
    if not isinstance(loader, DataLoader):
        raise TypeError(
            f"DropScheduler: loader must be a torch DataLoader, got {type(loader).__name__}; where its batches carry their "
            "samples' ids, give their place in a batch as ids="
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
            "their place in a batch as ids="
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
    """Return the batch that the loader would make of these samples, read in this process."""
    dataset: Any = loader.dataset
    many = getattr(dataset, "__getitems__", None)
    samples = many(list(ids)) if callable(many) else [dataset[i] for i in ids]
    return loader.collate_fn(samples)


def id_of(value: Any) -> int:
    """Return a sampler's index as an int. Raises TypeError for anything but a whole number."""
    try:
        return operator.index(value)
    except TypeError:
        raise TypeError(
            f"DropScheduler: loader must have a sampler that names samples by whole numbers, got {value!r}; where batches "
            "carry their samples' ids, give their place in a batch as ids="
        ) from None


def first_ids(loader: DataLoader[Any], count: int) -> list[int]:
    """Return up to `count` different ids of the dataset that the loader's sampler draws.

    They are drawn from a copy of the sampler, so that the run's own order stays. A sampler that cannot be copied is
    taken to draw every id.
    """
    size = len(loader.dataset)  # type: ignore[arg-type]
    every = list(range(min(count, size)))
    try:
        # The dataset that samplers hold is not copied with them.
        sampler: Any = copy.deepcopy(loader.batch_sampler, {id(loader.dataset): loader.dataset})
    except (TypeError, ValueError, RuntimeError, AttributeError, NotImplementedError):
        return every
    found: dict[int, None] = {}
    with fork_rng(0):
        # Some batches more than needed: a sampler with replacement repeats itself.
        for ids, _ in zip(sampler, range(4 * count), strict=False):
            found |= dict.fromkeys(i for i in map(id_of, ids) if 0 <= i < size)
            if len(found) >= count:
                break
    return list(found)[:count] or every


def is_function_of_id(loader: DataLoader[Any], key: InputKey, ids: Sequence[int]) -> bool:
    """Return whether the batches of these samples are functions of the samples' ids.

    They are read in SEEDS random states, and once in two halves: what a `collate_fn` makes of a sample must not depend
    on the other samples. Model inputs and all other entries are compared to the bit.
    """
    extras = BatchExtras(key=key, device=torch.device("cpu"))
    first = _read(loader, ids, 0)
    images = input_of(first, key).clone()
    places = torch.arange(len(images))
    extras.put(first, places)
    for seed in range(1, SEEDS):
        again = _read(loader, ids, seed)
        if not _same(input_of(again, key), images) or extras.first_difference(again, places) is not None:
            return False
    half = len(ids) // 2
    for part in (range(half), range(half, len(ids))):
        if not len(part):
            continue
        batch = _read(loader, [ids[i] for i in part], 0)
        at = torch.as_tensor(part)
        if not _same(input_of(batch, key), images[at]) or extras.first_difference(batch, at) is not None:
            return False
    return True


def seconds_to_read(loader: DataLoader[Any], ids: Sequence[int], *, repeats: int = 3) -> float:
    """Return the median seconds in which a batch of these samples is read in this process."""
    times = []
    for _ in range(repeats):
        begin = time.perf_counter()
        _read(loader, ids, 0)
        times.append(time.perf_counter() - begin)
    return statistics.median(times)


def rebuilt(loader: DataLoader[Any], batch_sampler: Any) -> DataLoader[Any]:
    """Return the user's loader with another batch sampler and everything else as it was."""
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


def _read(loader: DataLoader[Any], ids: Sequence[int], seed: int) -> Any:
    with fork_rng(seed):
        return read_batch(loader, ids)


def _same(one: torch.Tensor, other: torch.Tensor) -> bool:
    return one.shape == other.shape and bool(((one == other) | ((one != one) & (other != other))).all())
