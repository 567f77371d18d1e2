"""The loader of the training loop: the user's batches, and after a drop the same batches as cached rows."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch.utils.data import DataLoader, IterableDataset

from learndrop_ext.cache.cache import ActivationCache
from learndrop_ext.cache.config import CacheConfig
from learndrop_ext.data.extras import BatchExtras, InputKey, input_of, to_device
from learndrop_ext.data.fill import rebuilt


@dataclass
class Rows:
    """The cached rows of a drop: slot of each sample id (-1: none), rows and rest by slot x views + view."""

    slots: torch.Tensor  # [N] int64
    cache: ActivationCache
    rest: BatchExtras


class _NotingBatches:
    """The user's batch sampler; it checks each id and notes which were drawn."""

    def __init__(self, batch_sampler: Any, size: int) -> None:
        self.batch_sampler = batch_sampler
        self.size = size
        self.seen = torch.zeros(size, dtype=torch.bool)

    def __iter__(self) -> Iterator[list[int]]:
        for ids in self.batch_sampler:
            index = torch.as_tensor(ids, dtype=torch.int64)
            outside = index[(index < 0) | (index >= self.size)]
            if len(outside):
                raise IndexError(
                    "drop.loader: the sampler must name samples of the dataset, "
                    f"within 0..{self.size - 1}, got {int(outside[0])}"
                )
            self.seen[index] = True
            yield ids

    def __len__(self) -> int:
        return len(self.batch_sampler)


class DropLoader:
    """Iterates over the user's batches, on the model's device; after a drop the input of each is cached rows.

    Batch size, sampler, order, drop_last, collate_fn and the rest of the batch are the user's; the random numbers that
    the order draws are the same before and after a drop. Made by DropScheduler.
    """

    def __init__(
        self, loader: DataLoader[Any], *, key: InputKey, device: torch.device, config: CacheConfig, seed: int
    ) -> None:
        check_loader(loader)
        self.user = loader
        self.key = key
        self.device = device
        self.config = config
        self.size = len(loader.dataset)  # type: ignore[arg-type]
        self.batches = _NotingBatches(loader.batch_sampler, self.size)
        self.images: DataLoader[Any] = rebuilt(loader, self.batches)
        self.rows: Rows | None = None
        self.fetch_missing: Callable[[torch.Tensor], None] | None = None
        self.on_first: Callable[[torch.Tensor], None] | None = None
        self.generator = torch.Generator().manual_seed(seed)
        self.view_offset = torch.randint(1 << 30, (self.size,), generator=self.generator)
        self.epochs = 0
        self.position: int | None = None  # batches given in the epoch that runs; None: none was begun
        self.finished = False
        self.samples = 0
        self.seconds = 0.0

    def __len__(self) -> int:
        return len(self.batches)

    def __iter__(self) -> Iterator[Any]:
        self.check_size()
        self.position, self.finished, self.samples = 0, False, 0
        begin = time.perf_counter()
        for batch in self._images() if self.rows is None else self._cached(self.rows):
            if self.position == 0 and self.on_first is not None:
                self.on_first(input_of(batch, self.key))
            self.position += 1
            self.samples += len(input_of(batch, self.key))
            yield batch
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        self.seconds = time.perf_counter() - begin
        self.epochs += 1
        self.finished = True

    @property
    def batch_size(self) -> int:
        """The user's batch size; 128 where a batch sampler names none."""
        size = getattr(self.user.batch_sampler, "batch_size", None)
        return size if isinstance(size, int) else 128

    def check_size(self) -> None:
        """Raise RuntimeError when the dataset's length is no longer what it was."""
        size = len(self.user.dataset)  # type: ignore[arg-type]
        if size != self.size:
            raise RuntimeError(f"drop.loader: the dataset must keep its {self.size} samples, got {size}")

    def check_epoch_done(self) -> None:
        """Raise RuntimeError unless an epoch has ended since the last call, and forget it."""
        if self.position is None:
            raise RuntimeError("drop.step: wanted a finished epoch of drop.loader, got none since the last step")
        if not self.finished:
            raise RuntimeError(
                f"drop.step: wanted a finished epoch of drop.loader ({len(self)} batches), got {self.position} batches"
            )
        self.position = None

    def _images(self) -> Iterator[Any]:
        for batch in self.images:
            yield to_device(batch, self.device)

    def _cached(self, rows: Rows) -> Iterator[Any]:
        # A DataLoader draws its workers' seed before the sampler draws the order: draw it too, so that the order is
        # the one that training on images would have had.
        torch.empty((), dtype=torch.int64).random_(generator=self.user.generator)
        drawn = (self._draw(rows, torch.as_tensor(ids, dtype=torch.int64)) for ids in self.batches)
        if not rows.cache.plan.staging:
            for at, flip, shift in drawn:
                yield rows.rest.get(at, rows.cache.gather(at, flip=flip, shift=shift))
            return
        # Rows of the slower tiers are read while the batch before them trains.
        ahead = next(drawn, None)
        while ahead is not None:
            at, flip, shift = ahead
            x = rows.cache.gather(at, flip=flip, shift=shift)
            ahead = next(drawn, None)
            if ahead is not None:
                rows.cache.prefetch(ahead[0])
            yield rows.rest.get(at, x)

    def _draw(self, rows: Rows, index: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor | None, torch.Tensor | None]:
        """Slots, flips and shifts of the samples of one batch."""
        missing = index[rows.slots[index] < 0]
        if len(missing):
            assert self.fetch_missing is not None
            self.fetch_missing(missing.unique())
        at = rows.slots[index] * self.config.views
        if self.config.views > 1:
            at += (self.view_offset[index] + self.epochs) % self.config.views
        flip, shift = self._moves(len(index))
        return at, flip, shift

    def _moves(self, count: int) -> tuple[torch.Tensor | None, torch.Tensor | None]:
        flip = shift = None
        if self.config.flip:
            flip = torch.rand(count, generator=self.generator) < 0.5
        if self.config.shift:
            most = self.config.shift
            shift = torch.randint(-most, most + 1, (count, 2), generator=self.generator)
        return flip, shift


def check_loader(loader: DataLoader[Any]) -> None:
    """Raise TypeError or ValueError for a loader whose samples cannot be told apart by id."""
    if not isinstance(loader, DataLoader):
        raise TypeError(f"DropScheduler: loader must be a torch DataLoader, got {type(loader).__name__}")
    if type(loader).__iter__ is not DataLoader.__iter__:
        raise TypeError(
            f"DropScheduler: loader must iterate as a torch DataLoader does, got {type(loader).__name__} "
            "with an __iter__ of its own"
        )
    if isinstance(loader.dataset, IterableDataset):
        raise TypeError(
            "DropScheduler: loader must be over a dataset with ids (__getitem__ and __len__), got an IterableDataset, "
            f"{type(loader.dataset).__name__}, whose samples have none to keep rows by"
        )
    if not hasattr(loader.dataset, "__len__"):
        raise TypeError(
            f"DropScheduler: loader must be over a dataset with a length, got {type(loader.dataset).__name__} without"
        )
    if loader.batch_sampler is None:
        raise ValueError("DropScheduler: loader must batch: give it batch_size or batch_sampler, got batch_size=None")
    if len(loader.dataset) == 0:
        raise ValueError("DropScheduler: loader must have samples, got an empty dataset")
