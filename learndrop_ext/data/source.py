"""Where the images of a run come from: a dataset that is read by index, or a loader whose batches carry ids."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
from torch.utils.data import DataLoader

from learndrop_ext.data.extras import BatchExtras, InputKey, is_ambiguous, register
from learndrop_ext.data.id_source import IdKey, IdSource
from learndrop_ext.data.keys import LabelsOf, check_described, labels_of, sample_keys
from learndrop_ext.data.reading import (
    Kept,
    check_loader,
    first_batch_ids,
    is_function_of_id,
    is_random_by_sample,
    read_batches,
)
from learndrop_ext.distributed import from_rank_zero, several_processes
from learndrop_ext.rows.config import CacheConfig
from learndrop_ext.rows.plan import budgets_of


class DatasetSource:
    """The samples of a DataLoader's dataset, numbered 0..N-1. No method advances the run's random state."""

    readable = True  # whether any sample can be read by number at any time

    def __init__(self, loader: DataLoader[Any], *, key: InputKey, seed: int, config: CacheConfig) -> None:
        check_loader(loader)
        self.loader = loader
        self._key, self._seed = key, seed
        self._key_of, self._targets = config.key, config.targets

    def __len__(self) -> int:
        return len(self.loader.dataset)  # type: ignore[arg-type]

    def expected(self) -> int:
        """Return the length of the dataset."""
        return len(self)

    def keys(self, ids: torch.Tensor) -> Sequence[bytes]:
        """Return what samples `ids` [n] are called in every run; see `sample_keys`."""
        return sample_keys(self.loader, ids, key=self._key_of, input=self._key)

    def labels(self, extras: BatchExtras) -> LabelsOf | None:
        """Return what gives the labels that the dataset offers without reading images, see `labels_of`, if the first batch
        holds them and no more."""
        given = self._targets
        if given is not None and len(given) != len(self):
            raise ValueError(
                f"CacheConfig: targets must be one label for each of the {len(self)} samples, got {len(given)}"
            )
        labels = partial(labels_of, self.loader.dataset, given)
        offered = extras.is_labels(self._first, labels(torch.tensor(self._first_ids)))
        if given is not None and not offered:
            raise ValueError(
                "CacheConfig: targets must be the labels of the samples, and all that a batch holds beside its images, and "
                "the first batch holds others"
            )
        return labels if offered else None

    def first(self) -> Any:
        """Return the first batch that the sampler draws."""
        self._first_ids = first_batch_ids(self.loader)
        ((self._first, self._seconds),) = read_batches(self.loader, [self._first_ids], self._seed)
        register(self._first)
        others = (i for i in range(len(self)) if i not in self._first_ids)
        if is_ambiguous(self._first, self._key) and (other := next(others, None)) is not None:
            self._first_ids.append(other)
            self._first = self.read(self._first_ids, 0)
        return self._first

    def check_repeats(self, *, accept_random: bool = False) -> bool:
        """Return whether samples are the same each time they are read, with another seed and in other batches. ValueError if
        they are not, or, with `accept_random`, if they are not drawn independently of each other."""
        if is_function_of_id(self.loader, self._key, self._first_ids, self._first, self._seed):
            return True
        if accept_random and is_random_by_sample(self.loader, self._key, self._first_ids):
            return False
        raise ValueError(
            "DropScheduler: loader must give the same sample for the same id each time and in any batch, got a "
            "different one, and a cached row would freeze it; give CacheConfig(views=V) to keep V random views of each "
            "sample, or a dataset and a collate_fn without randomness"
        )

    def check_rest(self) -> None:
        """Raise ValueError if anything in a batch but the model's input is random, and may not fit another run's image."""
        kept = Kept(self._first, self._key)
        if name := kept.extras.first_difference(self.read(self._first_ids, 1), torch.arange(len(kept))):
            raise ValueError(
                "DropScheduler: loader must give the same labels for the same id each time where random views are kept in "
                f"a store, got a different one at {name}, which may not fit the view of another run; use "
                "CacheConfig(mirror=True) and a dataset without randomness, or no store"
            )

    def read(self, ids: Sequence[int], seed: int) -> Any:
        """Return the batch that the loader would make of some samples."""
        ((batch, _),) = read_batches(self.loader, [ids], self._seed + seed)
        return batch

    def reading(self) -> tuple[float, int]:
        """Return the seconds that a process took to read a sample of the first batch, and the number of workers."""
        return self._seconds / max(1, len(self._first_ids)), self.loader.num_workers

    def state(self) -> dict[str, Any] | None:
        """Return how samples are numbered, for a checkpoint: None, the dataset numbers them."""
        return None

    def check_state(self, state: dict[str, Any] | None) -> None:
        """Raise ValueError for the state of a run with ids."""
        if state is not None:
            raise ValueError(
                "DropScheduler.load_state_dict: state must be of a run over a DataLoader without ids=, got one with ids"
            )

    def load(self, state: dict[str, Any] | None) -> None:
        """Do nothing."""


Source = DatasetSource | IdSource


def views_within(epochs: int, speedup: float) -> int:
    """Return how many views of random samples to keep, at least 2, since one would freeze the augmentation.

    A run of E epochs is to take the time of E / speedup. V of them read images, which may take half: V = E / (2 speedup).
    """
    return max(2, int(epochs / (2 * speedup)))


def settle_views(
    config: CacheConfig,
    source: Source,
    *,
    epochs: int | None,
    speedup: float,
    row_bytes: int,
    device: torch.device,
) -> CacheConfig:
    """Return the configuration with a number for `views="auto"`: that of `views_within`, or fewer if the budgets do not hold
    as many rows of `row_bytes`, but at least 2. ValueError for random samples of which rows cannot be kept as configured."""
    if config.views in (1, "auto"):
        may_choose = config.views == "auto" and not config.mirror and epochs is not None
        views = 1
        if not source.check_repeats(accept_random=may_choose) and epochs is not None:
            budgets = budgets_of(config, device)
            held = (budgets.device or 0) + budgets.host + budgets.disk
            views = max(2, min(views_within(epochs, speedup), held // max(1, len(source) * row_bytes)))
        config = dataclasses.replace(config, views=from_rank_zero(views) if may_choose else views)
    if config.store is not None and config.views != 1 and isinstance(source, DatasetSource):
        source.check_rest()
    return config


def source_of(loader: Any, ids: IdKey | None, *, key: InputKey, seed: int, config: CacheConfig) -> Source:
    """Return the source of a DataLoader's samples or, with `ids`, of those of any iterable of batches.

    Raises:
        TypeError, ValueError: the loader or `ids` cannot be used, `ids` is given with several processes, each of which would
            number the ids in its own way, or samples have no names for a store.
    """
    if ids is None:
        source = DatasetSource(loader, key=key, seed=seed, config=config)
        if config.store is not None and config.key is None:
            check_described(loader.dataset)
        return source
    if several_processes():
        raise ValueError(
            f"DropScheduler: ids must be None where several processes train one model, got {ids!r}; give a DataLoader "
            "over a dataset with a DistributedSampler"
        )
    for name in ("key", "targets"):
        if getattr(config, name) is not None:
            raise ValueError(f"DropScheduler: ids must be None with CacheConfig({name}=...), got {ids!r}")
    return IdSource(loader, ids, key=key, seed=seed)
