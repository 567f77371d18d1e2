"""Where a run's images come from: a dataset that is read by number, or a loader whose batches carry ids."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol

from torch.utils.data import DataLoader

from learndrop_ext.cache.config import CacheConfig
from learndrop_ext.cache.fingerprint import describe
from learndrop_ext.data.extras import InputKey
from learndrop_ext.data.id_source import IdSource
from learndrop_ext.data.ids import IdKey
from learndrop_ext.data.reading import check_loader, first_ids, is_function_of_id, read_batch, seconds_to_read
from learndrop_ext.distributed import several_processes
from learndrop_ext.rng import fork_rng

#: Samples that a run looks at when it is made.
FIRST = 32


class Source(Protocol):
    """The samples of a run, numbered 0..N-1. No method moves the run's random state."""

    @property
    def loader(self) -> Any:
        """The user's loader."""

    @property
    def readable(self) -> bool:
        """Whether samples can be read by number at any time."""

    def __len__(self) -> int:
        """N, as far as is known."""

    def expected(self) -> int:
        """Return how many samples an epoch has, as far as is known."""

    def describe(self) -> str:
        """Return what the samples are of, in words that are the same in the next run."""

    def first(self) -> tuple[list[int], Any]:
        """Return some samples and what the loader makes of them, as it comes."""

    def check_repeats(self) -> None:
        """Raise ValueError, now or when it is seen, where a sample is another one at each reading."""

    def read(self, ids: Sequence[int], seed: int) -> Any:
        """Return the batch of some samples, read in this process from the random state `seed`."""

    def timed(self, size: int) -> tuple[Any, float, int]:
        """Return a batch of up to `size` samples, the seconds in which it is read and by how many workers at once."""

    def state(self) -> dict[str, Any] | None:
        """Return what a checkpoint has to know of the samples' numbers, None for nothing."""

    def check_state(self, state: dict[str, Any] | None) -> None:
        """Raise ValueError for what `load` cannot take."""

    def load(self, state: dict[str, Any] | None) -> None:
        """Number the samples as in a checkpoint."""


class DatasetSource:
    """The samples of a DataLoader's dataset.

    Args:
        loader: the user's.
        key: place of the model's input in a batch.
        seed: of the random state in which samples are read.
    """

    readable = True

    def __init__(self, loader: DataLoader[Any], *, key: InputKey, seed: int) -> None:
        check_loader(loader)
        self.loader = loader
        self._key = key
        self._seed = seed

    def __len__(self) -> int:
        return len(self.loader.dataset)  # type: ignore[arg-type]

    def expected(self) -> int:
        """Return the length of the dataset."""
        return len(self)

    def describe(self) -> str:
        """Return the dataset and its transforms in words."""
        return describe(self.loader.dataset)

    def first(self) -> tuple[list[int], Any]:
        """Return samples that the sampler draws and their batch."""
        ids = first_ids(self.loader, FIRST)
        return ids, self.read(ids, self._seed)

    def check_repeats(self) -> None:
        """Raise ValueError where samples read again are others."""
        if not is_function_of_id(self.loader, self._key, first_ids(self.loader, FIRST)[:16]):
            raise ValueError(
                "DropScheduler: loader must give the same sample for the same id at each reading and beside any "
                "others, got another one, and a cached row would freeze it; give views=V to keep V random views of "
                "each sample, or a dataset and a collate_fn without randomness"
            )

    def read(self, ids: Sequence[int], seed: int) -> Any:
        """Return the batch that the loader would make of some samples."""
        with fork_rng(seed):
            return read_batch(self.loader, ids)

    def timed(self, size: int) -> tuple[Any, float, int]:
        """Return a batch, the seconds in which this process reads it, and the loader's workers."""
        ids = first_ids(self.loader, size)
        return self.read(ids, self._seed), seconds_to_read(self.loader, ids), self.loader.num_workers

    def state(self) -> None:
        """Samples have the numbers that the dataset gives them."""

    def check_state(self, state: dict[str, Any] | None) -> None:
        """Raise ValueError for the state of a run with ids."""
        if state is not None:
            raise ValueError(
                "DropScheduler.load_state_dict: state must be of a run over a DataLoader without ids=, got one with ids"
            )

    def load(self, state: dict[str, Any] | None) -> None:
        """Nothing is to be done."""


def source_of(
    loader: Any, ids: IdKey | None, *, key: InputKey, seed: int, config: CacheConfig
) -> DatasetSource | IdSource:
    """Return where the images of a loader come from.

    Args:
        loader: a DataLoader, or with `ids` anything that iterates over batches.
        ids: place of the samples' ids in a batch, None where the loader's dataset numbers them.
        key: place of the model's input in a batch.
        seed: of the random state in which samples are read.
        config: of the rows.

    Raises:
        TypeError, ValueError: a loader or a place that cannot be followed, or rows that are kept by several processes or
            shared by several runs, which number ids in different ways.
    """
    if ids is None:
        return DatasetSource(loader, key=key, seed=seed)
    if several_processes():
        raise ValueError(
            f"DropScheduler: ids must be None where several processes train one model, got {ids!r}; give a DataLoader "
            "over a dataset with a DistributedSampler"
        )
    if config.shared:
        raise ValueError(
            f"DropScheduler: ids must be None where several runs share their rows, got {ids!r} with "
            "CacheConfig(shared=True)"
        )
    return IdSource(loader, ids, key=key, seed=seed)
