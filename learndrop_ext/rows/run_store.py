"""The store as one run uses it: what its rows are called there, which it takes from other runs and leaves to them.

N samples, V views of each, n rows in a call. The row of a view is at place slot * V + view.
"""

from __future__ import annotations

import contextlib
import functools
import secrets
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Concatenate, ParamSpec, TypeVar

import torch

from learndrop_ext.forward.proof import rows_agree
from learndrop_ext.rows.cache import ActivationCache, as_stored
from learndrop_ext.rows.config import CacheConfig
from learndrop_ext.rows.disk import DamagedRowError, DiskTier
from learndrop_ext.rows.plan import lengthened, lengthened_for
from learndrop_ext.rows.slots import SlotTable, filled_at, first_of_each
from learndrop_ext.rows.store.fingerprint import Fingerprint
from learndrop_ext.rows.store.store import FoundRows, RowKeys, RowStore, StoredRows, StoreError
from learndrop_ext.warn import warn

#: How far a codec's values may lie from each other for values that differ by rounding, as a share of the largest.
CODEC_ERROR = {"fp32": 0.0, "fp16": 1e-3, "bf16": 1e-2, "uint8": 1e-2}
#: Of the random views that a run keeps of a sample, a quarter is its own, until the store has four times as many.
OWN_SHARE, MOST_KEPT = 4, 4

P = ParamSpec("P")
T = TypeVar("T")


def _spared(do: Callable[Concatenate[RunStore, P], T]) -> Callable[Concatenate[RunStore, P], T | None]:
    """A method without which the run can do: a RuntimeWarning, and None, if it fails. None without a store, and in a forked
    process."""

    @functools.wraps(do)
    def spared(self: RunStore, /, *args: P.args, **kwargs: P.kwargs) -> T | None:
        if self._store is None or self._store.is_forked:
            return None
        try:
            return do(self, *args, **kwargs)
        except (OSError, StoreError) as error:
            if do.__name__ not in self._said:
                self._said.add(do.__name__)
                warn(f"drop.loader: the run goes on without what the store has: {error}")
            return None

    return spared


class ImageDigests:
    """The digests of the images of samples whose rows are kept."""

    def __init__(self) -> None:
        self._digests, self._known = torch.empty(0, dtype=torch.int64), torch.empty(0, dtype=torch.bool)  # [N]

    def note(self, ids: torch.Tensor, digests: torch.Tensor) -> None:
        """Note the digests [n] of the images of samples `ids` [n]."""
        self._known = lengthened_for(self._known, ids)
        self._digests = lengthened(self._digests.to(digests.device), len(self._known))
        self._digests[ids.to(digests.device, non_blocking=True)] = digests
        self._known[ids] = True

    def of(self, ids: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Return which of the samples `ids` [n] have a noted image, and the digests of these."""
        self._known = lengthened_for(self._known, ids)
        known = self._known[ids]
        return known, self._digests[ids[known].to(self._digests.device)]

    def forget(self, ids: torch.Tensor | None = None) -> None:
        """Forget the images of samples [n], or all."""
        self._known[slice(None) if ids is None else ids[ids < len(self._known)]] = False


class RunStore:
    """What a run has in its store, if it has one; see `RowSet` for the arguments."""

    def __init__(
        self,
        config: CacheConfig,
        slots: SlotTable,
        digests: ImageDigests,
        *,
        made_of: Callable[[Sequence[int], str], Fingerprint],
        sample_keys: Callable[[torch.Tensor], Sequence[bytes]] | None,
    ) -> None:
        self._digests, self._made_of, self._sample_keys = digests, made_of, sample_keys
        self._store = None if config.store is None else RowStore(Path(config.store))
        self._kept: set[str] = set()  # the digests of private rows that a checkpoint names
        self._said: set[str] = set()  # methods that have failed
        self.renumber(config, slots)

    @property
    def is_random(self) -> bool:
        """Whether the rows of a sample are of random views."""
        return self._views > 1 and not self._config.mirror

    def renumber(self, config: CacheConfig, slots: SlotTable) -> None:
        """Before there are rows: follow the number of views, and the slots of the samples."""
        self._config, self._slots, self._views = config, slots, config.rows_per_sample
        self.clear()

    def clear(self) -> None:
        """Forget what the rows are called: new ones are others."""
        random = [1 + secrets.randbits(62) for _ in range(self._views)]  # no other run has these
        self._tried: tuple[DiskTier, int] | None = None  # what `open` has tried to open last, and in which epoch
        self._own = torch.tensor(random) if self.is_random else torch.arange(self._views)  # [V]: this run's views
        self._names_at = torch.empty(0, dtype=torch.int64)  # of random views, by place

    def tier(self, *, private: bool) -> DiskTier | None:
        """Return a tier for a cache's rows. private: whether no other run can use them."""
        return None if self._store is None else DiskTier(private=private or self._sample_keys is None)

    @_spared
    def open(
        self, cache: ActivationCache, path: Sequence[int], row: torch.Tensor, ids: torch.Tensor | None, epoch: int
    ) -> None:
        """Open the rows that are made like rows [B, ...], the first that have arrived, through the cuts `path`.

        ids: [B], their samples, to take the rows that other runs have left, or to delete them if they disagree.
        """
        disk = cache.disk
        if disk is None or disk.is_open or self._tried == (disk, epoch):
            return
        assert self._store is not None
        self._tried = disk, epoch
        made_of = self._made_of(path, f"{row.dtype} {list(row.shape[1:])}")
        disk.open(StoredRows(self._store, made_of, private=disk.is_private))
        if ids is not None:
            self._take(cache, epoch, first=(ids, row))

    def name(self, cache: ActivationCache, at: torch.Tensor) -> None:
        """Tell the cache's tier in the store, if there is one, what the rows at places [n] are called."""
        if cache.disk is None:
            return
        ids, views = self._slots.ids(at // self._views), self._own[at % self._views]
        if self.is_random:
            self._names_at = lengthened_for(self._names_at, at)
            views = torch.where(self._names_at[at] > 0, self._names_at[at], views)
            self._names_at[at] = views
        known, digests = self._digests.of(ids)
        values = iter(digests.tolist())
        images = [next(values) if one and not self.is_random else None for one in known.tolist()]
        cache.disk.name(at, RowKeys(self._names(ids, cache.disk.is_private), views.tolist(), images))

    @_spared
    def save(self, cache: ActivationCache | None) -> bool:
        """Add all rows of a cache; return whether they are there."""
        if cache is None or cache.disk is None or not cache.disk.is_open or not cache.fits_store:
            return False
        cache.save()
        return True

    def keep(self, cache: ActivationCache | None) -> tuple[str, torch.Tensor | None] | None:
        """Add all rows for a run that resumes. Return what a checkpoint names them by, and their random views [N, V] if
        there are any; None if they are not there."""
        if cache is None or cache.disk is None or not self.save(cache):
            return None
        stored = cache.disk.stored
        if stored.is_private:
            self._kept.add(stored.digest)
        self._keep_only(stored)
        return stored.digest, self._views_of_samples()

    @_spared
    def find(self, digest: str, path: Sequence[int], shape: Sequence[int]) -> StoredRows | None:
        """Return the rows of a shape that `keep` has left; None, with a RuntimeWarning, if this run's layers make others."""
        assert self._store is not None
        entry = self._store.entry(digest)
        reason: str | None = "they are no longer there"
        if entry is not None:
            made_of = self._made_of(path, f"torch.{entry.dtype} {list(shape)}")
            reason = made_of.difference(entry.fingerprint)
        if entry is None or reason:
            warn(
                f"DropScheduler.load_state_dict: the rows are computed again: in the store {self._config.store}, {reason}"
            )
            return None
        found = StoredRows(self._store, made_of, digest=digest)
        if found.is_private:
            self._kept.add(digest)
        return found

    @_spared
    def resume(self, cache: ActivationCache, stored: StoredRows, epoch: int, views: torch.Tensor | None) -> None:
        """Take the rows that `find` has returned. views: [N, V], see `keep`."""
        assert cache.disk is not None
        cache.disk.open(stored)
        self._take(cache, epoch, views=views)

    @_spared
    def forget(self, cache: ActivationCache, ids: torch.Tensor | None) -> None:
        """Delete the rows of samples [n], or of all, for other runs too."""
        if cache.disk is None or not cache.disk.is_open:
            return
        stored, ids = cache.disk.stored, torch.arange(len(self._slots)) if ids is None else ids
        names = dict(zip(ids.tolist(), self._names(ids, stored.is_private), strict=True))
        found = stored.find(names)
        stored.forget([names[i] for i in found.sample.tolist()], found.view.tolist())

    def close(self, *, keep: bool) -> None:
        """Close the store. keep: leave private rows there that a checkpoint names."""
        if self._store is not None and not self._store.is_forked:
            if not keep:
                self._remove_kept()
            self._store.close()

    def _take(
        self,
        cache: ActivationCache,
        epoch: int,
        *,
        first: tuple[torch.Tensor, torch.Tensor] | None = None,
        views: torch.Tensor | None = None,
    ) -> None:
        """Take the rows of the store: if `first`, samples and their rows, agree; or the random `views` [N, V]."""
        assert cache.disk is not None
        stored = cache.disk.stored
        names = self._names(torch.arange(len(self._slots)), stored.is_private)
        found = stored.find(dict(enumerate(names)))
        if not len(found.place):
            return
        self._slots.assign(found.sample.unique(), epoch)
        wanted = self._slots.used * self._views
        if wanted > len(cache.filled):
            with contextlib.suppress(ValueError, torch.OutOfMemoryError):  # what does not fit is read each time
                cache.grow(wanted)
        at, taken = self._places_of(found, views)
        free = (at < len(cache.filled)) & ~filled_at(cache, at)
        order = at[free].argsort()
        at, taken = at[free][order], taken[free][order]
        places = found.place[taken]
        if self.is_random:
            self._names_at = lengthened(self._names_at, wanted)
            self._names_at[at] = found.view[taken]
        self.name(cache, at)
        if first is not None and not self.is_random and not self._agree(cache, found, at, places, epoch, *first):
            stored.forget([names[i] for i in found.sample.tolist()], found.view.tolist())
            warn(
                f"drop.loader: the rows in the store {self._config.store} are computed again: they are not what the dropped "
                "layers make of the images of this run"
            )
            return
        self._digests.note(found.sample[found.has_image], found.image[found.has_image])
        like = None if first is None else first[1]
        try:
            cache.load(at, places, like)
        except DamagedRowError as error:
            good = ~stored.damaged(places)
            cache.disk.forget(at[~good], in_store=True)
            cache.load(at[good], places[good], like)
            warn(f"drop.loader: rows are computed again: {error}")

    def _places_of(self, found: FoundRows, views: torch.Tensor | None) -> tuple[torch.Tensor, torch.Tensor]:
        """The places [n] of rows found in the store, and which [n] of those found they are. views: see `_take`."""
        slots, every = self._slots.table[found.sample], torch.arange(len(found.place))
        if not self.is_random:
            return slots * self._views + found.view, every
        if views is not None:
            # The dataset may have got more samples.
            named = torch.zeros(len(self._slots), self._views, dtype=torch.int64)
            named[: len(views), : views.shape[1]] = views[:, : self._views]
            is_it = named[found.sample] == found.view[:, None]
            mine = is_it.any(1)
            return (slots * self._views + is_it.int().argmax(1))[mine], every[mine]
        mixed = torch.randperm(len(every), generator=self._slots.generator)
        mixed = mixed[found.sample[mixed].argsort(stable=True)]
        _, counts = found.sample[mixed].unique_consecutive(return_counts=True)
        rank = torch.arange(len(mixed)) - (counts.cumsum(0) - counts).repeat_interleave(counts)
        own = -(-self._views // OWN_SHARE)
        most = torch.where(counts < MOST_KEPT * self._views, self._views - own, self._views).repeat_interleave(counts)
        mixed, rank = mixed[rank < most], rank[rank < most]
        return slots[mixed] * self._views + rank, mixed

    def _agree(
        self,
        cache: ActivationCache,
        found: FoundRows,
        at: torch.Tensor,
        places: torch.Tensor,
        epoch: int,
        ids: torch.Tensor,
        row: torch.Tensor,
    ) -> bool:
        """Whether rows [B, ...] of samples `ids` [B], and the images that were noted, agree within rounding with those
        found, which are at `places` [n] of the store for places `at` [n]."""
        known, digests = self._digests.of(found.sample)
        if not torch.equal(found.image[known & found.has_image], digests.cpu()[found.has_image[known]]):
            return False
        assert cache.disk is not None
        wanted, order = first_of_each(self._slots.assign(ids, epoch))
        some = torch.nonzero(torch.isin(at, wanted)).flatten()
        some = some[~cache.disk.stored.damaged(places[some])]
        if not len(some):
            return True
        cache.load(at[some], places[some], row)
        there = filled_at(cache, wanted)
        made = as_stored(row[order[there].to(row.device)], self._config.codec)
        agrees = rows_agree(made, cache.gather(wanted[there]), error=CODEC_ERROR[self._config.codec])
        cache.forget(at[some])
        return agrees

    def _names(self, ids: torch.Tensor, private: bool) -> Sequence[bytes]:
        """What samples [n] are called among private rows, or those of all runs."""
        if private or self._sample_keys is None:
            return [b"%d" % i for i in ids.tolist()]
        return self._sample_keys(ids)

    def _views_of_samples(self) -> torch.Tensor | None:
        """What the random views of each sample are called in the store: [N, V], 0 for none."""
        if not self.is_random:
            return None
        every = torch.zeros(len(self._slots), self._views, dtype=torch.int64)
        drawn = self._slots.drawn()
        self._names_at = lengthened(self._names_at, self._slots.used * self._views)
        every[drawn] = self._names_at[: self._slots.used * self._views].view(-1, self._views)[self._slots.table[drawn]]
        return every

    @_spared
    def _keep_only(self, stored: StoredRows) -> None:
        """Leave private rows to the run that resumes, in the place of those that an earlier checkpoint named."""
        stored.keep()
        self._remove_kept(but=stored.digest)

    def _remove_kept(self, but: str = "") -> None:
        """Delete private rows that an earlier checkpoint named."""
        assert self._store is not None
        for digest in self._kept - {but}:
            entry = self._store.entry(digest)
            if entry is None or self._store.remove(entry):
                self._kept.discard(digest)
