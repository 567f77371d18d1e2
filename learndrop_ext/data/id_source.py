"""Samples from the batches of any loader, identified by the ids that the batches carry. B samples in a
batch."""

from __future__ import annotations

import copy
import operator
import statistics
import time
from collections import deque
from collections.abc import Iterator, Sequence
from itertools import chain
from typing import Any

import numpy as np
import torch
from torch.utils import _pytree as pytree
from torch.utils.data import DataLoader

from learndrop_ext.data.extras import BatchExtras, InputKey, entry_of, input_of, names_of, register, some_of
from learndrop_ext.data.reading import Kept, left_alone
from learndrop_ext.rows.plan import lengthened

#: The time to read a batch is the median over this many.
TIMED_BATCHES = 32
#: What comes after the last batch.
END: Any = object()

#: Where ids are in a batch.
IdKey = int | str | tuple[int | str, ...]


class IdSource:
    """The samples of a loader whose batches carry ids. A sample is available only while its batch is.

    `first` draws one batch from the loader. If the loader is its own iterator, that batch is used as the first one of the
    first epoch. The methods are those of `DatasetSource`.
    """

    readable = False

    def __init__(self, loader: Any, ids: IdKey, *, key: InputKey, seed: int) -> None:
        steps = ids if isinstance(ids, tuple) else (ids,)
        if not steps or not all(isinstance(step, int | str) and not isinstance(step, bool) for step in steps):
            raise TypeError(
                "DropScheduler: ids must be the position of the samples' ids in a batch, a key, an index or a tuple of "
                f"these, got {ids!r}"
            )
        if not (hasattr(loader, "__iter__") or hasattr(loader, "__getitem__")):
            raise TypeError(f"DropScheduler: loader must be iterated over for batches, got {type(loader).__name__}")
        if isinstance(loader, Iterator) and type(loader).__module__ in ("builtins", "itertools"):
            raise TypeError(
                "DropScheduler: loader must give batches each time it is iterated over, got a "
                f"{type(loader).__name__}, which can be iterated over only once; give an object whose __iter__ starts again"
            )
        self.loader = loader
        self.whole = False  # whether the last iteration had every id of the first batch, and no id twice
        self.repeats = False  # whether the last iteration had an id twice
        self.unchecked = False  # whether the rows of a checkpoint are still to be compared with the first batch
        self.batch_size = 0  # samples in the first batch
        self.first_batch: Any = None  # as the loader gave it
        self._place, self._key, self._seed = ids, key, seed
        self._numbers: dict[int | str, int] = {}  # of all ids, from 0 in the order in which they were first seen
        self._first_ids: Sequence[int | str] = []
        self._begun: list[Any] = []  # the first batch of a loader that is its own iterator, until its first iteration
        self._kept: Kept | None = None  # the first batch, with which later ones are compared
        self._unmatched: dict[int | str, int] = {}  # id -> position of its samples that were not compared yet
        self._waits: deque[float] = deque(maxlen=TIMED_BATCHES)
        self._first_wait = 0.0
        self._keeps_last = True  # whether a batch may be smaller than the others
        self._samples = 0  # samples of the last whole iteration
        self._length: int | None = None  # len(loader) at that time

    def __len__(self) -> int:
        return len(self._numbers)

    def expected(self) -> int:
        """Return the number of samples of a whole iteration; before the first one, as many as `len(loader)` implies."""
        return self._samples if self.whole else max(len(self), (length_of(self.loader) or 0) * self.batch_size)

    def numbers(self, ids: Sequence[int | str]) -> torch.Tensor:
        """Return the numbers [B] int64 of ids; new ids get the next ones. Raises TypeError if they change their type."""
        kinds = [type(next(iter(some))).__name__ for some in (ids, self._numbers) if some]
        if len(set(kinds)) > 1:
            raise TypeError(f"DropScheduler: ids must be all int or all str, got {' after '.join(kinds)}")
        return torch.tensor([self._numbers.setdefault(one, len(self._numbers)) for one in ids], dtype=torch.int64)

    #: Samples have no names that other runs know.
    keys = None

    def labels(self, extras: BatchExtras) -> None:
        """Return None: labels come with the batches."""

    def first(self) -> Any:
        """Draw the first batch. Raises ValueError if there is none, or no input or no ids where `input` and `ids` say."""
        loader = self.loader
        if isinstance(loader, DataLoader):  # whose persistent workers begin with its first epoch
            loader = copy.copy(loader)
            vars(loader)["_iterator"] = None
        with left_alone(self.loader, self._seed):
            begin = time.perf_counter()
            iterator = iter(loader)
            batch = next(iterator, END)
            self._first_wait = time.perf_counter() - begin
        if batch is END:
            raise ValueError("DropScheduler: loader must give batches, got none")
        count = len(input_of(batch, self._key))
        if not count:
            raise ValueError("DropScheduler: loader must give batches of one sample or more, got an empty one")
        self._first_ids = ids_of(batch, self._place, count)
        if iterator is self.loader:
            self._begun = [batch]
        register(batch)
        # A loader may write its next batch to the same memory.
        copied = pytree.tree_map_only(torch.Tensor, torch.clone, batch)
        self.first_batch = pytree.tree_map_only(np.ndarray, np.copy, copied)
        self.batch_size = count
        self.numbers(self._first_ids)
        return self.first_batch

    def begin(self) -> torch.Tensor:
        """Begin an epoch: iterate over the loader again if its length has changed. Return the numbers of the first batch's
        samples."""
        self.whole = self.whole and length_of(self.loader) == self._length
        return self.numbers(self._first_ids)

    def check_repeats(self, *, accept_random: bool = False) -> bool:
        """Have the first batch compared with later readings of its samples, and within itself: ValueError where one differs.
        `accept_random` is ignored, since it is not known yet whether samples are random."""
        self._kept = Kept(self.first_batch, self._key)
        self._unmatched = {value: i for i, value in enumerate(self._first_ids)}
        again = [i for i, value in enumerate(self._first_ids) if self._unmatched[value] != i]
        self._check_same(self.first_batch, self._first_ids, again)
        return True

    def read(self, ids: Sequence[int], seed: int) -> Any:
        """Raise RuntimeError: samples are available only while their batch is."""
        raise RuntimeError(
            f"drop.loader: samples of a loader with ids= can be read only as they come by, got {len(ids)} asked for by id"
        )

    def iterate(self, loader: Any) -> Iterator[tuple[torch.Tensor, Any, torch.Tensor]]:
        """Yield the batches of one iteration over `loader`, each after the numbers [B] of its samples, and before the
        positions [n] of those that the iteration has had before."""
        # Ids of the first batch that did not come; None for the iteration that this batch belongs to.
        unmet = None if self._begun else set(self._first_ids)
        batches, length = chain(self._begun, iter(loader)), length_of(loader)
        self._begun = []
        samples = given = 0
        met = torch.empty(0, dtype=torch.bool)
        repeats = False
        begin = time.perf_counter()
        for batch in batches:
            if given:  # the first batch also waits for the workers to start
                self._waits.append(time.perf_counter() - begin)
            count = len(input_of(batch, self._key))
            ids = ids_of(batch, self._place, count)
            numbers = self.numbers(ids)
            if not self._unmatched.keys().isdisjoint(ids):
                self._check_same(batch, ids, [i for i, value in enumerate(ids) if value in self._unmatched])
            met = lengthened(met, len(self))
            again = torch.nonzero(met[numbers]).flatten()
            repeats = repeats or len(again) > 0 or len(set(ids)) < len(ids)
            met[numbers] = True
            if unmet is not None:
                unmet.difference_update(ids)
            given, samples = given + 1, samples + count
            if given == length:  # the caller may stop here
                self._end(length, samples, given, unmet, repeats=repeats)
            yield numbers, batch, again
            begin = time.perf_counter()
        if not given:
            raise RuntimeError(
                f"drop.loader: loader must give batches each time it is iterated over, got none from a "
                f"{type(loader).__name__}"
            )
        self._end(length, samples, given, unmet, repeats=repeats)

    @property
    def batches(self) -> int:
        """How many batches all samples make."""
        return -(-len(self) // self.batch_size) if self._keeps_last else len(self) // self.batch_size

    def order(self, epoch: int) -> torch.Tensor:
        """Return all samples [n] of an epoch's batches, shuffled by seed and epoch."""
        generator = torch.Generator().manual_seed(self._seed + epoch)
        return torch.randperm(len(self), generator=generator)[: self.batches * self.batch_size]

    def reading(self) -> tuple[float, int]:
        """Return the seconds that training waits for a sample, and 0; before the first epoch, those that the first batch
        took, and the number of workers."""
        if self._waits:
            return statistics.median(self._waits) / self.batch_size, 0
        workers = self.loader.num_workers if isinstance(self.loader, DataLoader) else 0
        return self._first_wait / self.batch_size, workers

    def state(self) -> dict[str, Any] | None:
        """Return the ids in the order of their numbers, and what the last iteration has shown."""
        shown = {"whole": self.whole, "repeats": self.repeats, "keeps_last": self._keeps_last}
        return {"values": list(self._numbers), **shown, "samples": self._samples, "length": self._length}

    def check_state(self, state: dict[str, Any] | None) -> None:
        """Raise ValueError for the state of a run without ids, or with ids of another type."""
        if state is None:
            raise ValueError("DropScheduler.load_state_dict: state must be of a run with ids=, got one without")
        wanted, got = type(self._first_ids[0]).__name__, {type(value).__name__ for value in state["values"]}
        if got != {wanted}:
            raise ValueError(
                f"DropScheduler.load_state_dict: state must be of a run whose ids are {wanted}, got {', '.join(got)}"
            )

    def load(self, state: dict[str, Any] | None) -> None:
        """Number samples as another run did; `begin` then adds new ids of the first batch."""
        assert state is not None
        self._numbers = {}
        self.numbers(state["values"])
        self.whole, self.repeats, self._keeps_last = state["whole"], state["repeats"], state["keeps_last"]
        self._samples, self._length = state["samples"], state["length"]
        self.unchecked = True

    def _end(
        self, length: int | None, samples: int, given: int, unmet: set[int | str] | None, *, repeats: bool
    ) -> None:
        """Note what an iteration has shown."""
        self.whole, self.repeats = unmet is not None and not unmet and not repeats, repeats
        self._keeps_last = samples < given * self.batch_size
        self._samples, self._length = samples, length
        if unmet is not None:
            self._unmatched = {value: i for value, i in self._unmatched.items() if value in unmet}
            self._kept = self._kept if self._unmatched else None

    def _check_same(self, batch: Any, ids: Sequence[int | str], take: list[int]) -> None:
        """Raise ValueError unless the samples at positions `take` of a batch equal those of the first batch."""
        if self._kept is None or not take:
            return
        part = some_of(batch, torch.tensor(take), key=self._key, like=self.first_batch)
        if not self._kept.holds(part, torch.tensor([self._unmatched[ids[i]] for i in take])):
            raise ValueError(
                "DropScheduler: loader with ids must give the same sample for the same id each time, got a different one "
                f"for one of {', '.join(repr(ids[i]) for i in take[:4])}, and a cached row would freeze it; give each "
                "sample an id of its own, and views=V to keep V random views of each sample, or a loader without randomness"
            )


def length_of(loader: Any) -> int | None:
    """Return the length of a loader in batches, or None if it has none."""
    try:
        return len(loader)
    except (TypeError, AttributeError, NotImplementedError):
        return None


def ids_of(batch: Any, place: IdKey, count: int) -> list[int] | list[str]:
    """Return the ids at a position of a batch of `count` samples: a list or tuple of int or str, a numpy array or an integer
    tensor, [B] or [B, 1]. Raises ValueError if there is not one per sample, TypeError for ids of other types or of both."""
    found = batch
    for step in place if isinstance(place, tuple) else (place,):
        try:
            if not (names_of(found) or isinstance(found, list | tuple)):
                raise TypeError
            found = entry_of(found, step)
        except (KeyError, IndexError, TypeError):
            has = names_of(found) or (f"{len(found)} entries" if isinstance(found, list | tuple) else "no entries")
            raise ValueError(
                f"DropScheduler: ids must be the position of the samples' ids in a batch, got {place!r}; there is a "
                f"{type(found).__name__} with {has}"
            ) from None
    shape = list(getattr(found, "shape", [len(found)] if isinstance(found, list | tuple) else []))
    if shape not in ([count], [count, 1]):
        raise ValueError(
            f"DropScheduler: ids must be one per sample, wanted {count} at {place!r}, got a {type(found).__name__} {shape}"
        )
    values = found.reshape(-1).tolist() if isinstance(found, torch.Tensor | np.ndarray) else list(found)
    plain = [_plain(value) for value in values]
    kinds = {type(value) for value in plain}
    if len(kinds) > 1:
        raise TypeError(f"DropScheduler: ids must be all int or all str, got both at {place!r}")
    return plain  # type: ignore[return-value]


def _plain(value: Any) -> int | str:
    """An id as int or str."""
    if isinstance(value, str):
        return str(value)
    is_flag = isinstance(value, bool | np.bool_) or (isinstance(value, torch.Tensor) and value.dtype == torch.bool)
    try:
        if is_flag:
            raise TypeError
        return operator.index(value)
    except (TypeError, ValueError, RuntimeError):
        raise TypeError(f"DropScheduler: ids must be int or str, got {type(value).__name__} {value!r}") from None
