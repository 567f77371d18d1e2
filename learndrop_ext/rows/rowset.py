"""The one owner of the cached rows: which samples have rows, where they are, and what stands beside them in a batch.

B samples in a batch, N in the dataset, V views of each. A sample has a slot, and the row of a view is at place
slot * V + view.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import torch

from learndrop_ext.forward.proof import rows_agree
from learndrop_ext.rows.cache import ActivationCache
from learndrop_ext.rows.config import CacheConfig
from learndrop_ext.rows.layout import RowLayout
from learndrop_ext.rows.plan import Budgets, budgets_of, plan_tiers
from learndrop_ext.rows.slots import SlotTable, filled_at, first_of_each
from learndrop_ext.rows.stopwatch import Stopwatch
from learndrop_ext.rows.store.fingerprint import Fingerprint
from learndrop_ext.rows.store.rowfile import FoundRows, RowFileKeeper
from learndrop_ext.warn import warn

#: How far a codec's values may lie from each other for values that differ by rounding, as a share of the largest.
CODEC_ERROR = {"fp32": 0.0, "fp16": 1e-3, "bf16": 1e-2, "uint8": 1e-2}


class RowSet:
    """The rows of the dropped layers.

    Rows are kept as the training step passes the cut (`keep`), and read for a whole batch at once (`gather`). After a
    further drop the rows of the drop before stay until all of their samples have new ones.

    Args:
        size: N, the number of samples known.
        config: codec, views, budgets and folder.
        device: device of the rows.
        made_of: the cuts that rows went through -> everything that they depend on. It is known once rows have arrived.
        moved: is told that what was at n places is now at n others; everything else by place is of no use any more.
    """

    def __init__(
        self,
        size: int,
        *,
        config: CacheConfig,
        device: torch.device,
        made_of: Callable[[list[int]], Fingerprint],
        moved: Callable[[torch.Tensor, torch.Tensor], None] = lambda before, after: None,
    ) -> None:
        self._made_of, self._moved = made_of, moved
        self._path: list[int] = []  # all cuts that the rows went through
        self.config = config
        self.device = device
        self.generator = torch.Generator().manual_seed(config.seed)
        self.slots = SlotTable(size, config.rows_per_sample, self.generator)
        self.cuts: list[int] = []  # of the rows in `older` and in `cache`, as far as there are any
        self.stores = False  # whether rows are kept and read again in a later epoch
        self.epoch = 0  # number of epochs begun: decides which view of a sample is drawn
        self.file = RowFileKeeper(config)
        self.cache: ActivationCache | None = None  # the rows by place; None if none are kept
        self.older: ActivationCache | None = None  # the rows of the drop before, while some are still needed
        self._watch = Stopwatch(device)
        self._begun: Any = None  # when the forward whose rows are being computed began
        self._made = [0, 0]  # rows computed from images and from older rows since `forget_counts`
        self._full = False  # whether the budgets are exhausted
        self._looks = False  # whether to look for rows of other runs when the first rows arrive
        # The place [N] of each sample's row in an epoch (-1: not drawn yet), if all that are drawn have all of their rows.
        self._places: torch.Tensor | None = None
        self._places_epoch = -1  # the epoch for which they were looked up; -1 after rows have come or gone

    @property
    def cut(self) -> int:
        """The number of layers behind which rows are kept; 0 if none are."""
        return self.cuts[-1] if self.cache is not None else 0

    @property
    def tier(self) -> str:
        """The slowest tier that holds rows: "device", "host" or "disk"; "none" if there are no rows."""
        if self.cache is None:
            return "none"
        plan = self.cache.plan
        return "disk" if plan.disk else "host" if plan.host else "device"

    @property
    def views(self) -> int:
        """V, the number of rows of each sample."""
        return self.config.rows_per_sample

    def advance(self, cut: int, shape: Sequence[int], *, rows: int, budgets: Budgets | None = None) -> None:
        """Keep rows of a shape after `cut` layers from now on: those of another run, if it has left the first that arrive.

        Args:
            cut: a later cut than the current one.
            shape: shape of a row.
            rows: number of rows to make room for.
            budgets: the bytes that the cut was chosen by. Default: those of now

        Raises:
            ValueError, OSError, torch.OutOfMemoryError: what ActivationCache raises. Nothing is changed then.
        """
        self.file.release()
        new = self._new_cache(cut, shape, max(rows, self.slots.used * self.views), budgets)
        self._drop_older()
        self.older, self.cache = self.cache, new
        self.cuts = [*self.cuts[-1:], cut] if self.older is not None else [cut]
        self._path, self._looks = [*self._path, cut], True
        self.stores, self._full, self._places_epoch = True, False, -1

    def locate(self, ids: torch.Tensor) -> tuple[int, torch.Tensor]:
        """Return the number of layers that the samples `ids` [B] need not run in this epoch, the latest cut at which all of
        them have rows, or 0; and the places [B] of their rows."""
        if self._places_epoch != self.epoch:
            self._look_up_places()
        # In most epochs every sample drawn so far has its row.
        if self._places is not None and len(ids):
            at = self._places.index_select(0, ids)
            if self.slots.used == len(self.slots) or int(at.min()) >= 0:
                return self.cuts[-1], at
        at = self.slots.places(ids, self.epoch)
        if self.cache is None or not len(at):
            return 0, at
        if bool(filled_at(self.cache, at).all()):
            return self.cuts[-1], at
        return (self.cuts[-2] if self.older is not None and bool(filled_at(self.older, at).all()) else 0), at

    def _look_up_places(self) -> None:
        self._places, self._places_epoch = None, self.epoch
        rows = self.slots.used * self.views
        if self.cache is not None and rows <= len(self.cache.filled) and bool(self.cache.filled[:rows].all()):
            self._places = self.slots.all_places(self.epoch)

    def places(self, ids: torch.Tensor) -> torch.Tensor:
        """Return the places [B] of the samples' rows in this epoch; samples without a slot get one."""
        used = self.slots.used
        at = self.slots.assign(ids, self.epoch)
        if self.slots.used > used:
            self._places_epoch = -1
        return at

    def first_places(self, ids: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Return the distinct places [n] of samples `ids` [B] in this epoch, and the position [n] of the first of each."""
        return first_of_each(self.places(ids))

    def gather(self, at: torch.Tensor, level: int) -> torch.Tensor:
        """Return the rows [B, ...] at the places [B] and the cut that `locate` gave."""
        cache = self.cache if level == self.cuts[-1] else self.older
        assert cache is not None
        return cache.gather_known(at)

    def dtype(self, level: int) -> torch.dtype | None:
        """Return the dtype of the rows at a cut that `locate` gave; None if they have gone since."""
        cache = self.cache if self.cuts[-1:] == [level] else self.older
        return None if cache is None else cache.dtype

    def begin_making(self, from_rows: bool, count: int) -> None:
        """Note that a forward begins that computes `count` rows from older rows or from images."""
        self._begun = self._watch.now()
        self._made[from_rows] += count

    def keep(self, cut: int, ids: torch.Tensor, row: torch.Tensor) -> torch.Tensor:
        """Store the rows [B, ...] of samples `ids` [B] that have arrived at a cut, and return them as later epochs will
        get them."""
        is_last = cut == self.cuts[-1]
        if not is_last and (self.older is None or cut != self.cuts[0]):
            return self._as_stored(row) if cut in self._path else row
        if is_last and self._looks:
            self._look_for_shared(ids, row)
        cache = self.cache if is_last else self.older
        if cache is None:
            return row
        at = self.places(ids)
        # To write rows that are saved would copy the file of another run.
        if (cache.saved and bool(filled_at(cache, at).all())) or self._store(cache, at, row):
            row = cache.gather_known(at)
        if is_last and self._begun is not None:
            self._watch.add(self._begun)
            self._begun = None
        return row

    def prefetch(self, ids: torch.Tensor) -> None:
        """Start reading the rows of samples `ids` [B], which the next `gather` will ask for, from the slower tiers."""
        rows = self.cache
        if rows is None or not rows.plan.staging or not len(ids):
            return
        level, at = self.locate(ids)
        if level == self.cuts[-1]:
            rows.prefetch(at)

    def view(self, ids: torch.Tensor) -> torch.Tensor:
        """Return the view [B] of each sample in this epoch."""
        return self.slots.view(ids, self.epoch)

    def follow_size(self, size: int) -> int:
        """Make room for the new ones of `size` samples, and return their number.

        Raises:
            RuntimeError: the dataset has become smaller.
        """
        more = size - len(self.slots)
        if more < 0:
            raise RuntimeError(
                f"drop.loader: the dataset must keep its {len(self.slots)} samples, or get more, got {size}"
            )
        self.slots.extend(more)
        self._places_epoch = -1
        return more

    def renumber(self, size: int, offsets: torch.Tensor, views: int | str) -> None:
        """Before there are rows: follow the number of samples, set `views`, and the first view of n samples ([n])."""
        if size != len(self.slots) or views != self.config.views:
            self.config = dataclasses.replace(self.config, views=views)
            self.slots = SlotTable(size, self.views, self.generator)
        self.slots.view_offset[: len(offsets)] = offsets
        self._places_epoch = -1

    def drawn(self) -> torch.Tensor:
        """Return the samples [n] that have rows for this epoch."""
        ids = self.slots.drawn()
        return ids[self.filled(ids)]

    def filled(self, ids: torch.Tensor) -> torch.Tensor:
        """Return which of the samples `ids` [B] have rows for this epoch."""
        return filled_at(self.cache, self.slots.places(ids, self.epoch))

    def forget(self, ids: torch.Tensor | None = None) -> None:
        """Discard the rows of samples [n], or all. They are computed again from images when their samples are drawn."""
        if self.cache is None:
            return
        if ids is not None:
            slots = self.slots.table[ids]
            places = self._all_views(slots[slots >= 0])
            self._places_epoch = -1
            self.cache.forget(places)
            if self.older is not None:
                self.older.forget(places)
            return
        count, cut, shape = len(self.cache.filled), self.cut, self.cache.shape
        self.file.release()
        self._reset()
        self.cuts, self._path = [cut], [cut]
        self.cache = self._new_cache(cut, shape, count)

    def stop(self) -> None:
        """Free the rows and keep none: the dropped layers run at each step."""
        self.file.release()
        self._reset()
        self.cuts, self._path, self.stores = [], [], False

    def save(self, extras: Callable[[], tuple[Any, list[torch.Tensor]]]) -> str | None:
        """Write the rows of all tiers and the extras of their batches to their file if they have changed; return its name.
        See `RowFileKeeper.save`."""
        return self.file.save(self.cache, self.slots.table, extras, lambda: self._made_of(self._path))

    def check_room(self, name: str | None, shape: Sequence[int], rows: int) -> None:
        """Raise ValueError if `find` would find neither the file nor room for rows of a shape."""
        if not self.file.exists(name):
            plan_tiers(rows, RowLayout.of(shape, self.config.codec), budgets_of(self.config, self.device))

    def find(self, name: str | None, path: Sequence[int], shape: Sequence[int]) -> FoundRows | None:
        """Replace the rows by those after the last of the cuts `path` in the file that `save` wrote.

        Without a file, or one that does not fit (RuntimeWarning), the rows are computed again.
        """
        self._reset()
        self.cuts, self._path, self.stores = list(path[-1:]), list(path), True
        found = self.file.find(name, lambda: self._made_of(self._path), device=self.device)
        if found is None:
            self.cache = self._new_cache(self.cuts[-1], shape, len(self.slots) * self.views)
        else:
            self.cache = found.cache
            self.slots.load(found.slots)
        return found

    @property
    def path(self) -> tuple[int, ...]:
        """All cuts that the rows went through, oldest first."""
        return tuple(self._path)

    @property
    def stops(self) -> tuple[int, ...]:
        """The cuts at which the rows of images are encoded on their way: the whole path, so that they equal rows computed
        from older rows; or, once every sample has its rows, the last one alone."""
        cache = self.cache
        done = cache is not None and self.slots.used == len(self.slots) and bool(cache.filled.all())
        return tuple(self._path[-1:] if done else self._path)

    def end_epoch(self) -> None:
        """Free the rows of the drop before once none of them is needed; share complete rows with other runs."""
        cache = self.cache
        if cache is not None and not cache.saved and bool(cache.filled.all()):
            self.file.share(cache, self.slots.table)
        if self.older is None or self.cache is None:
            return
        needed = self.older.filled.clone()
        both = min(len(needed), len(self.cache.filled))
        needed[:both] &= ~self.cache.filled[:both]
        if not bool(needed.any()):
            self._drop_older()

    @property
    def counts(self) -> tuple[int, int, float]:
        """Rows computed from images and from older rows since `forget_counts`, and the seconds spent on it."""
        return self._made[0], self._made[1], self._watch.seconds()

    def forget_counts(self) -> None:
        """Reset the counters."""
        self._made = [0, 0]
        self._watch.reset()

    def _reset(self) -> None:
        self._drop_older()
        if self.cache is not None:
            self.cache.close()
        self.cache, self._full, self._looks, self._places_epoch = None, False, False, -1
        self.slots.clear()

    def _drop_older(self) -> None:
        if self.older is not None:
            self.older.close()
            self.older = None
            self.cuts = self.cuts[-1:]

    def _look_for_shared(self, ids: torch.Tensor, row: torch.Tensor) -> None:
        """Replace the rows by those that another run has left if `row` [B, ...] of samples `ids` [B], the first that have
        arrived, are as they are there. Otherwise the rows are left to other runs, if none is making the same."""
        own, cut = self.cache, self.cuts[-1]
        self._looks = False
        if own is None or not self.file.shares or bool(own.filled.any()):
            return
        shape, count, found = own.shape, len(own.filled), None
        own.close()
        try:
            found = self.file.find_shared(
                lambda: self._made_of(self._path), cut, device=self.device, fits=lambda rows: self._fit(rows, ids, row)
            )
        finally:
            self.cache = self._new_cache(cut, shape, count) if found is None else found.cache
        if found is None:
            return
        self._drop_older()
        self._places_epoch = -1
        drawn = self.slots.drawn()
        before = self.slots.table[drawn]
        self.slots.load(found.slots)
        self.slots.assign(drawn, self.epoch)
        self._moved(self._all_views(before), self._all_views(self.slots.table[drawn]))

    def _fit(self, found: FoundRows, ids: torch.Tensor, row: torch.Tensor) -> bool:
        """Whether rows [B, ...] of samples `ids` [B] agree, within rounding, with those that another run has left."""
        cache, slots = found.cache, found.slots[ids]
        if (cache.shape, cache.dtype) != (tuple(row.shape[1:]), row.dtype):
            return False
        cache.return_as(row)
        at = torch.where(slots < 0, -1, slots * self.views + self.view(ids))
        there = filled_at(cache, at)
        is_random = self.views > 1 and not self.config.mirror
        if is_random or not bool(there.any()):
            return True
        made = self._as_stored(row[there.to(row.device)])
        return rows_agree(made, cache.gather(at[there]), error=CODEC_ERROR[self.config.codec])

    def _all_views(self, slots: torch.Tensor) -> torch.Tensor:
        """The places [n * V] of all views at slots [n]."""
        return (slots[:, None] * self.views + torch.arange(self.views)).flatten()

    def _as_stored(self, row: torch.Tensor) -> torch.Tensor:
        """Rows [B, ...] as a cache gives them back."""
        scratch = ActivationCache(len(row), row.shape[1:], codec=self.config.codec, device=self.device)
        every = torch.arange(len(row))
        scratch.append(every, row)
        return scratch.gather_known(every)

    def _new_cache(self, cut: int, shape: Sequence[int], rows: int, budgets: Budgets | None = None) -> ActivationCache:
        return ActivationCache(
            rows,
            shape,
            codec=self.config.codec,
            device=self.device,
            budgets=budgets or budgets_of(self.config, self.device),
            path=self.file.new_path(cut),
        )

    def _store(self, cache: ActivationCache, at: torch.Tensor, rows: torch.Tensor) -> bool:
        """Store rows [B, ...] at places [B], of several at one place the first; return False if the budgets do not hold
        them."""
        places, order = first_of_each(at)
        wanted = int(places[-1]) + 1 if len(places) else 0
        if wanted > len(cache.filled):
            if self._full or cache is self.older:
                return False
            try:
                cache.grow(-(-wanted // self.views) * self.views)
            except ValueError as error:
                self._full = True
                warn(
                    "drop.loader: the sampler draws more samples than the budgets hold rows of; those that do not fit "
                    f"are read and run through the dropped layers each time ({error})"
                )
                return False
        self._places_epoch = -1
        if len(places) < len(at):
            at, rows = places, rows[order.to(rows.device)]
        cache.append(at, rows)
        return True
