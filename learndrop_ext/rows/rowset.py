"""The one owner of the cached rows: which samples have rows, where they are, and what stands beside them in a batch.

B samples in a batch, N in the dataset, V views of each. A sample has a slot, and the row of a view is at place
slot * V + view.
"""

from __future__ import annotations

import contextlib
import dataclasses
import secrets
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from learndrop_ext.forward.proof import rows_agree
from learndrop_ext.rows.cache import ActivationCache
from learndrop_ext.rows.config import CacheConfig
from learndrop_ext.rows.disk import DamagedRowError, DiskTier
from learndrop_ext.rows.layout import RowLayout
from learndrop_ext.rows.plan import Budgets, budgets_of, lengthened, plan_tiers
from learndrop_ext.rows.slots import SlotTable, filled_at, first_of_each
from learndrop_ext.rows.stopwatch import Stopwatch
from learndrop_ext.rows.store.fingerprint import Fingerprint
from learndrop_ext.rows.store.store import FoundRows, RowKeys, RowStore, StoredRows, StoreError
from learndrop_ext.warn import warn

#: How far a codec's values may lie from each other for values that differ by rounding, as a share of the largest.
CODEC_ERROR = {"fp32": 0.0, "fp16": 1e-3, "bf16": 1e-2, "uint8": 1e-2}
#: Of the random views that a run keeps of a sample, a quarter is its own, until the store has four times as many.
OWN_SHARE, MOST_KEPT = 4, 4


class RowSet:
    """The rows of the dropped layers.

    Rows are kept as the training step passes the cut (`keep`), and read for a whole batch at once (`gather`). After a
    further drop the rows of the drop before stay until all of their samples have new ones. In a store, rows outlive the run:
    those of layers that it has not trained are left to other runs, and taken from them.

    Args:
        size: N, the number of samples known.
        config: codec, views, budgets and folder.
        device: device of the rows.
        made_of: the cuts that rows went through, and a description of a row -> everything that they depend on. It is known
            once rows have arrived.
        sample_keys: samples [n] -> what they are called in the store, the same in all runs; None if only this run knows.
    """

    def __init__(
        self,
        size: int,
        *,
        config: CacheConfig,
        device: torch.device,
        made_of: Callable[[list[int], str], Fingerprint],
        sample_keys: Callable[[torch.Tensor], Sequence[bytes]] | None = None,
    ) -> None:
        self._made_of, self._sample_keys = made_of, sample_keys
        self._path: list[int] = []  # all cuts that the rows went through
        self.config = config
        self.device = device
        self.generator = torch.Generator().manual_seed(config.seed)
        self.slots = SlotTable(size, config.rows_per_sample, self.generator)
        self._own_views = self._new_views()  # [V], what this run's views are called in the store
        self.cuts: list[int] = []  # of the rows in `older` and in `cache`, as far as there are any
        self.stores = False  # whether rows are kept and read again in a later epoch
        self.epoch = 0  # number of epochs begun: decides which view of a sample is drawn
        self._store = None if config.store is None else RowStore(Path(config.store))
        self._kept: set[str] = set()  # the digests of private rows that a checkpoint names
        # By sample: the digest of its image, and whether it is known.
        self._digests, self._has_digest = torch.empty(0, dtype=torch.int64), torch.empty(0, dtype=torch.bool)
        self._view_names = torch.empty(
            0, dtype=torch.int64
        )  # of random views, by place: what they are called in the store
        self.cache: ActivationCache | None = None  # the rows by place; None if none are kept
        self.older: ActivationCache | None = None  # the rows of the drop before, while some are still needed
        self._watch = Stopwatch(device)
        self._begun: Any = None  # when the forward whose rows are being computed began
        self._made = [0, 0]  # rows computed from images and from older rows since `forget_counts`
        self._full = False  # whether the budgets are exhausted
        self._looks = False  # whether to look into the store when the first rows arrive
        self._said: set[str] = set()  # what has failed in the store
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

    def advance(
        self, cut: int, shape: Sequence[int], *, rows: int, private: bool, budgets: Budgets | None = None
    ) -> None:
        """Keep rows of a shape after `cut` layers from now on.

        Args:
            cut: a later cut than the current one.
            shape: shape of a row.
            rows: number of rows to make room for.
            private: whether this run has trained the layers before them, so that no other can use them.
            budgets: the bytes that the cut was chosen by. Default: those of now

        Raises:
            ValueError, OSError, torch.OutOfMemoryError: what ActivationCache raises. Nothing is changed then.
        """
        private = private or self._sample_keys is None
        new = self._new_cache(shape, max(rows, self.slots.used * self.views), budgets, private=private)
        self._drop_older()
        self.older, self.cache = self.cache, new
        self.cuts = [*self.cuts[-1:], cut] if self.older is not None else [cut]
        self._path, self._looks = [*self._path, cut], not private
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
        cache = self.cache if is_last else self.older
        if cache is None:
            return row
        if cache.disk is not None and not cache.disk.is_open:
            self._try("open", self._open, cache, row, looks=ids if is_last and self._looks else None)
        at = self.places(ids)
        new = torch.nonzero(~filled_at(cache, at)).flatten()
        if not len(new) or self._keep(cache, at[new], row[new.to(row.device)] if len(new) < len(at) else row):
            row = cache.gather_known(at)
        if is_last and self._begun is not None:
            self._watch.add(self._begun)
            self._begun = None
        return row

    def note_images(self, ids: torch.Tensor, digests: torch.Tensor) -> None:
        """Note the digests [B] of the images of samples `ids` [B], whose rows are about to be kept."""
        if not len(ids):
            return
        self._has_digest = lengthened(self._has_digest, int(ids.max()) + 1)
        self._digests = lengthened(self._digests.to(digests.device), len(self._has_digest))
        self._digests[ids.to(digests.device, non_blocking=True)] = digests
        self._has_digest[ids] = True

    def images(self, ids: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Return which of the samples `ids` [B] have a noted image, and the digests of these [n]."""
        self._has_digest = lengthened(self._has_digest, int(ids.max()) + 1 if len(ids) else 0)
        known = self._has_digest[ids]
        return known, self._digests[ids[known].to(self._digests.device)]

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
            self._own_views = self._new_views()
        self.slots.view_offset[: len(offsets)] = offsets
        self._places_epoch = -1

    def drawn(self) -> torch.Tensor:
        """Return the samples [n] that have rows for this epoch."""
        ids = self.slots.drawn()
        return ids[self.filled(ids)]

    def filled(self, ids: torch.Tensor) -> torch.Tensor:
        """Return which of the samples `ids` [B] have rows for this epoch."""
        return filled_at(self.cache, self.slots.places(ids, self.epoch))

    def forget(self, ids: torch.Tensor | None = None, *, everywhere: bool = False) -> None:
        """Discard the rows of samples [n], or all. They are computed again from images when their samples are drawn.

        everywhere: in the store too, because their images have changed.
        """
        cache = self.cache
        if cache is None:
            return
        for one in (cache, self.older):
            if everywhere and one is not None and one.disk is not None and one.disk.is_open:
                self._try("forget", self._forget_stored, one.disk.stored, ids)
        if ids is not None:
            slots = self.slots.table[ids]
            places = self._all_views(slots[slots >= 0])
            self._places_epoch = -1
            self._has_digest[ids[ids < len(self._has_digest)]] = False
            for one in (cache, self.older):
                if one is not None:
                    one.forget(places)
            return
        count, path, shape, shares = len(cache.filled), [self.cut], cache.shape, self._shares
        self._reset()
        # What has changed need not be part of what rows depend on, and random ones cannot be compared.
        self.cuts, self._path, self._looks = list(path), path, shares and not self._is_random
        self._own_views = self._new_views()
        self.cache = self._cache_for(shape, count, private=not shares)

    def stop(self) -> None:
        """Free the rows and keep none: the dropped layers run at each step."""
        if self._shares:
            self._save_all()
        self._reset()
        self.cuts, self._path, self.stores = [], [], False

    def close(self, *, keep: bool) -> None:
        """Close the store. keep: leave private rows there that a checkpoint names."""
        self.stop()
        if self._store is not None and not self._store.is_forked:
            if not keep:
                self._remove_kept()
            self._store.close()

    def save(self) -> tuple[str, torch.Tensor | None] | None:
        """Add all rows to the store, if its budget holds them. Return what a checkpoint names them by, and their random
        views [N, V] if there are any; None without a store or rows."""
        cache = self.cache
        if cache is None or cache.disk is None or not self._save_all():
            return None
        stored = cache.disk.stored
        if stored.is_private:
            self._try("keep", stored.keep)
            self._kept.add(stored.digest)
        self._try("remove", self._remove_kept, but=stored.digest)
        return stored.digest, self._views_of_samples()

    def check_room(self, saved: tuple[str, Any] | None, shape: Sequence[int], rows: int) -> None:
        """Raise ValueError if `resume` would find neither rows nor room for rows of a shape."""
        if self._store is None or saved is None or self._store.entry(saved[0]) is None:
            plan_tiers(rows, RowLayout.of(shape, self.config.codec), budgets_of(self.config, self.device))

    def resume(
        self,
        saved: tuple[str, torch.Tensor | None] | None,
        path: Sequence[int],
        shape: Sequence[int],
        *,
        order: torch.Tensor | None = None,
    ) -> None:
        """Replace the rows by those after the last of the cuts `path` that `save` has left in the store.

        If they are not there (RuntimeWarning), the rows are computed again. order: samples [n] that get the first n slots.
        """
        self._reset()
        if order is not None:
            self.slots.assign(order, self.epoch)
        self.cuts, self._path, self.stores = list(path[-1:]), list(path), True
        count = len(self.slots) * self.views
        found = None if self._store is None or saved is None else self._try("resume", self._found, saved[0], shape)
        if found is None or saved is None:
            self.cache = self._cache_for(shape, count, private=True)
            return
        self.cache = self._cache_for(shape, count, private=found.is_private, stored_bytes=found.nbytes)
        assert self.cache.disk is not None
        self.cache.disk.open(found)
        if found.is_private:
            self._kept.add(found.digest)
        self._try("resume", self._take, self.cache, found, views=saved[1])

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
        """Free the rows of the drop before once none of them is needed; leave rows to other runs."""
        if self._shares and not self._looks:
            self._save_all()
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
        self._has_digest.zero_()
        self._view_names.zero_()

    def _drop_older(self) -> None:
        if self.older is not None:
            self.older.close()
            self.older = None
            self.cuts = self.cuts[-1:]

    @property
    def _is_random(self) -> bool:
        """Whether the rows of a sample are of random views."""
        return self.views > 1 and not self.config.mirror

    @property
    def _shares(self) -> bool:
        """Whether the rows are left to other runs."""
        disk = None if self.cache is None else self.cache.disk
        return disk is not None and not disk.is_private

    def _open(self, cache: ActivationCache, row: torch.Tensor, looks: torch.Tensor | None) -> None:
        """Open the rows in the store that are made like rows [B, ...], the first that have arrived, of samples `looks` [B];
        take those that other runs have left there, or delete them if they disagree."""
        assert cache.disk is not None
        assert self._store is not None
        path = self._path if cache is self.cache else self._path[:-1]
        made_of = self._made_of(path, f"{row.dtype} {list(row.shape[1:])}")
        stored = StoredRows(self._store, made_of, private=cache.disk.is_private)
        cache.disk.open(stored)
        self._looks = False
        if looks is not None:
            self._take(cache, stored, first=(looks, row))

    def _take(
        self,
        cache: ActivationCache,
        stored: StoredRows,
        *,
        first: tuple[torch.Tensor, torch.Tensor] | None = None,
        views: torch.Tensor | None = None,
    ) -> None:
        """Take the rows of the store: if `first`, samples and their rows, agree; or the random `views` [N, V]."""
        names = self._names(torch.arange(len(self.slots)), stored.is_private)
        found = _find(stored, dict(enumerate(names)))
        if not len(found.place):
            return
        self.slots.assign(found.sample.unique(), self.epoch)
        wanted = self.slots.used * self.views
        if wanted > len(cache.filled):
            with contextlib.suppress(ValueError):  # what does not fit is read each time
                cache.grow(wanted)
        at, taken = self._places_of(found, views)
        free = (at < len(cache.filled)) & ~filled_at(cache, at)
        order = at[free].argsort()
        at, taken = at[free][order], taken[free][order]
        if self._is_random:
            self._view_names = lengthened(self._view_names, wanted)
            self._view_names[at] = found.view[taken]
        self._name(cache, at)
        if first is not None and not self._is_random and not self._agree(cache, found, at, found.place[taken], *first):
            warn(
                f"drop.loader: the rows in the store {self.config.store} are computed again: they are not what the dropped "
                "layers make of the images of this run"
            )
            stored.forget([names[i] for i in found.sample.tolist()], found.view.tolist())
            return
        self.note_images(found.sample[found.has_image], found.image[found.has_image])
        self._load(cache, at, found.place[taken], None if first is None else first[1])
        self._places_epoch = -1

    def _load(self, cache: ActivationCache, at: torch.Tensor, places: torch.Tensor, like: torch.Tensor | None) -> None:
        """Load rows at places `at` [n] that lie at `places` [n] of the store, but for those that are damaged."""
        assert cache.disk is not None
        try:
            cache.load(at, places, like)
        except DamagedRowError as error:
            warn(f"drop.loader: rows are computed again: {error}")
            good = ~cache.disk.stored.damaged(places)
            cache.disk.forget(at[~good], in_store=True)
            cache.load(at[good], places[good], like)

    def _places_of(self, found: FoundRows, views: torch.Tensor | None) -> tuple[torch.Tensor, torch.Tensor]:
        """The places [n] of rows found in the store, and which [n] of those found they are. views: see `_take`."""
        slots, every = self.slots.table[found.sample], torch.arange(len(found.place))
        if not self._is_random:
            return slots * self.views + found.view, every
        if views is not None:
            named = torch.zeros(len(self.slots), self.views, dtype=torch.int64)  # the dataset may have got more samples
            named[: len(views)] = views[:, : self.views]
            is_it = named[found.sample] == found.view[:, None]
            mine = is_it.any(1)
            return (slots * self.views + is_it.int().argmax(1))[mine], every[mine]
        mixed = torch.randperm(len(every), generator=self.generator)
        mixed = mixed[found.sample[mixed].argsort(stable=True)]
        _, counts = found.sample[mixed].unique_consecutive(return_counts=True)
        rank = torch.arange(len(mixed)) - (counts.cumsum(0) - counts).repeat_interleave(counts)
        own = -(-self.views // OWN_SHARE)
        most = torch.where(counts < MOST_KEPT * self.views, self.views - own, self.views).repeat_interleave(counts)
        mixed, rank = mixed[rank < most], rank[rank < most]
        return slots[mixed] * self.views + rank, mixed

    def _agree(
        self,
        cache: ActivationCache,
        found: FoundRows,
        at: torch.Tensor,
        places: torch.Tensor,
        ids: torch.Tensor,
        row: torch.Tensor,
    ) -> bool:
        """Whether rows [B, ...] of samples `ids` [B], and the images that were noted, agree within rounding with those
        found, which are at `places` [n] of the store for places `at` [n]."""
        known, digests = self.images(found.sample)
        if not torch.equal(found.image[known & found.has_image], digests.cpu()[found.has_image[known]]):
            return False
        assert cache.disk is not None
        wanted, order = first_of_each(self.places(ids))
        some = torch.nonzero(torch.isin(at, wanted)).flatten()
        some = some[~cache.disk.stored.damaged(places[some])]
        if not len(some):
            return True
        cache.load(at[some], places[some], row)
        there = filled_at(cache, wanted)
        made = self._as_stored(row[order[there].to(row.device)])
        agrees = rows_agree(made, cache.gather_known(wanted[there]), error=CODEC_ERROR[self.config.codec])
        cache.forget(at[some])
        return agrees

    def _names(self, ids: torch.Tensor, private: bool) -> Sequence[bytes]:
        """What samples [n] are called among private rows, or those of all runs."""
        if private or self._sample_keys is None:
            return [b"%d" % i for i in ids.tolist()]
        return self._sample_keys(ids)

    def _name(self, cache: ActivationCache, at: torch.Tensor) -> None:
        """Tell the store's tier what the rows at places [n] are called."""
        ids, views = self.slots.ids(at // self.views), self._own_views[at % self.views]
        if self._is_random:
            self._view_names = lengthened(self._view_names, int(at.max()) + 1)
            views = torch.where(self._view_names[at] > 0, self._view_names[at], views)
            self._view_names[at] = views
        known, digests = self.images(ids)
        values = iter(digests.tolist())
        images = [next(values) if one and not self._is_random else None for one in known.tolist()]
        assert cache.disk is not None
        cache.disk.name(at, RowKeys(self._names(ids, cache.disk.is_private), views.tolist(), images))

    def _new_views(self) -> torch.Tensor:
        """What this run's views [V] of a sample are called in the store. Random ones have names that no other run has."""
        if not self._is_random:
            return torch.arange(self.views)
        return torch.tensor([1 + secrets.randbits(62) for _ in range(self.views)])

    def _views_of_samples(self) -> torch.Tensor | None:
        """What the random views of each sample are called in the store: [N, V], 0 for none."""
        if not self._is_random:
            return None
        every = torch.zeros(len(self.slots), self.views, dtype=torch.int64)
        drawn = self.slots.drawn()
        self._view_names = lengthened(self._view_names, self.slots.used * self.views)
        every[drawn] = self._view_names[: self.slots.used * self.views].view(-1, self.views)[self.slots.table[drawn]]
        return every

    def _found(self, digest: str, shape: Sequence[int]) -> StoredRows | None:
        """The rows of this digest in the store, if they are what this run's dropped layers make."""
        assert self._store is not None
        entry = self._store.entry(digest)
        reason: str | None = "they are no longer there"
        if entry is not None:
            made_of = self._made_of(self._path, f"torch.{entry.dtype} {list(shape)}")
            reason = made_of.difference(entry.fingerprint)
        if entry is None or reason:
            warn(
                f"DropScheduler.load_state_dict: the rows are computed again: in the store {self.config.store}, {reason}"
            )
            return None
        return StoredRows(self._store, made_of, digest=digest)

    def _save_all(self) -> bool:
        """Add all rows to the store; return whether it has them."""
        cache = self.cache
        if cache is None or cache.disk is None or not cache.disk.is_open or not cache.fits_store:
            return False
        return self._try("save", cache.save) is True

    def _forget_stored(self, stored: StoredRows, ids: torch.Tensor | None) -> None:
        """Delete all rows of samples [n], or of all, from the store."""
        ids = torch.arange(len(self.slots)) if ids is None else ids
        names = dict(zip(ids.tolist(), self._names(ids, stored.is_private), strict=True))
        found = _find(stored, names)
        stored.forget([names[i] for i in found.sample.tolist()], found.view.tolist())

    def _remove_kept(self, but: str = "") -> None:
        """Delete private rows that an earlier checkpoint named."""
        assert self._store is not None
        for digest in self._kept - {but}:
            entry = self._store.entry(digest)
            if entry is None or self._store.remove(entry):
                self._kept.discard(digest)

    def _try(self, what: str, do: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """Do something with the store, which the run can do without: a RuntimeWarning, and None, if it fails. A forked
        process does nothing."""
        assert self._store is not None
        if self._store.is_forked:
            return None
        try:
            return do(*args, **kwargs)
        except (OSError, StoreError) as error:
            if what not in self._said:
                warn(f"drop.loader: the run goes on without what the store has: {error}")
            self._said.add(what)
            return None

    def _all_views(self, slots: torch.Tensor) -> torch.Tensor:
        """The places [n * V] of all views at slots [n]."""
        return (slots[:, None] * self.views + torch.arange(self.views)).flatten()

    def _as_stored(self, row: torch.Tensor) -> torch.Tensor:
        """Rows [B, ...] as a cache gives them back."""
        scratch = ActivationCache(len(row), row.shape[1:], codec=self.config.codec, device=self.device)
        every = torch.arange(len(row))
        scratch.append(every, row)
        return scratch.gather_known(every)

    def _cache_for(self, shape: Sequence[int], rows: int, *, private: bool, stored_bytes: int = 0) -> ActivationCache:
        """A cache with room for `rows`, or without any if the budgets of now do not hold them. stored_bytes: those that the
        store has already."""
        budgets = budgets_of(self.config, self.device)
        budgets = dataclasses.replace(budgets, disk=max(budgets.disk, stored_bytes))
        try:
            return self._new_cache(shape, rows, budgets, private=private)
        except ValueError:
            return self._new_cache(shape, 0, budgets, private=private)

    def _new_cache(
        self, shape: Sequence[int], rows: int, budgets: Budgets | None = None, *, private: bool
    ) -> ActivationCache:
        return ActivationCache(
            rows,
            shape,
            codec=self.config.codec,
            device=self.device,
            budgets=budgets or budgets_of(self.config, self.device),
            disk=None if self._store is None else DiskTier(private=private),
        )

    def _keep(self, cache: ActivationCache, at: torch.Tensor, rows: torch.Tensor) -> bool:
        """Store rows [B, ...] at places [B], of several at one place the first; return False if the budgets do not hold
        them, or the disk is full."""
        places, order = first_of_each(at)
        wanted = int(places[-1]) + 1 if len(places) else 0
        if wanted > len(cache.filled):
            if self._full or cache is self.older:
                return False
            try:
                cache.grow(-(-wanted // self.views) * self.views)
            except ValueError as error:
                return self._is_full(str(error))
        self._places_epoch = -1
        if len(places) < len(at):
            at, rows = places, rows[order.to(rows.device)]
        try:
            if cache.disk is not None:
                self._name(cache, at)
            cache.append(at, rows)
        except (OSError, StoreError) as error:
            return self._is_full(str(error))
        return True

    def _is_full(self, reason: str) -> bool:
        if not self._full:
            warn(
                "drop.loader: the budgets or the disk do not hold the rows of all samples that are drawn; those that do not "
                f"fit are read and run through the dropped layers each time ({reason})"
            )
        self._full = True
        return False


def _find(stored: StoredRows, names: Mapping[int, bytes]) -> FoundRows:
    """The rows of samples, given by number with their names. Several may have one name."""
    numbers: dict[bytes, list[int]] = {}
    for number, name in names.items():
        numbers.setdefault(name, []).append(number)
    found = stored.find({name: one[0] for name, one in numbers.items()})
    if len(numbers) == len(names):
        return found
    pairs = [(k, i) for k, first in enumerate(found.sample.tolist()) for i in numbers[names[first]]]
    row, sample = torch.tensor(pairs, dtype=torch.int64).view(-1, 2).unbind(1)
    return FoundRows(sample, *(column[row] for column in found[1:]))
