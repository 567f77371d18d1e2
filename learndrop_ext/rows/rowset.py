"""The one owner of the cached rows: which samples have rows, where they are, and what stands beside them in a batch.

B samples in a batch, N in the dataset, V views of each. A sample has a slot, and the row of a view is at place
slot * V + view.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import torch

from learndrop_ext.forward.images import format_of
from learndrop_ext.rows.cache import ActivationCache, as_stored
from learndrop_ext.rows.config import CacheConfig
from learndrop_ext.rows.plan import Budgets, budgets_of
from learndrop_ext.rows.run_store import ImageDigests, RunStore
from learndrop_ext.rows.slots import SlotTable, filled_at, first_of_each
from learndrop_ext.rows.stopwatch import Stopwatch
from learndrop_ext.rows.store.fingerprint import Fingerprint
from learndrop_ext.rows.store.store import StoreError
from learndrop_ext.warn import warn


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
        images: n, images of each sample. With several, image j of sample i goes by the id n i + j in `keep`, and a row is
            the rows of all of them, one behind the other in their first dimension.
        beside: bytes that are kept beside each row.
    """

    def __init__(
        self,
        size: int,
        *,
        images: int = 1,
        beside: int = 0,
        config: CacheConfig,
        device: torch.device,
        made_of: Callable[[Sequence[int], str], Fingerprint],
        sample_keys: Callable[[torch.Tensor], Sequence[bytes]] | None = None,
    ) -> None:
        self.path: tuple[int, ...] = ()  # all cuts that the rows went through, oldest first
        self.images, self._beside = images, beside
        # By cut and sample, the rows of its images that have arrived while others have not.
        self._arrived: dict[int, dict[int, dict[int, torch.Tensor]]] = {}
        self.config = config
        self.device = device
        self.generator = torch.Generator().manual_seed(config.seed)
        self.slots = SlotTable(size, config.rows_per_sample, self.generator)
        self.cuts: list[int] = []  # of the rows in `older` and in `cache`, as far as there are any
        self.stores = False  # whether rows are kept and read again in a later epoch
        self.epoch = 0  # number of epochs begun: decides which view of a sample is drawn
        self.digests = ImageDigests()
        self._outliving = RunStore(config, self.slots, self.digests, made_of=made_of, sample_keys=sample_keys)
        self.cache: ActivationCache | None = None  # the rows by place; None if none are kept
        self.older: ActivationCache | None = None  # the rows of the drop before, while some are still needed
        self._watch = Stopwatch(device)
        self._begun: Any = None  # when the forward whose rows are being computed began
        self._made = [0, 0]  # rows computed from images and from older rows since `forget_counts`
        self._full = False  # whether the budgets are exhausted
        self._looks = False  # whether to look into the store when the first rows arrive

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

        Makes room for a number of rows. They are private if this run has trained the layers before them, so that no other
        can use them. budgets: those that the cut was chosen by; if not given, those of now. Raises ValueError, OSError or
        torch.OutOfMemoryError as ActivationCache does; nothing is changed then.
        """
        rows = max(rows, self.slots.used * self.views)
        new = self._new_cache(shape, rows, budgets or self._budgets(rows), private=private)
        self._drop_older()
        self.older, self.cache = self.cache, new
        self.cuts = [*self.cuts[-1:], cut] if self.older is not None else [cut]
        self.path, self._looks = (*self.path, cut), self._shares
        self.stores, self._full = True, False

    def locate(self, ids: torch.Tensor) -> tuple[int, torch.Tensor]:
        """Return the number of layers that the samples `ids` [B] need not run in this epoch, the latest cut at which all of
        them have rows, or 0; and the places [B] of their rows."""
        at = self.slots.places(ids, self.epoch)
        for cut, cache in zip(reversed(self.cuts), (self.cache, self.older), strict=False):
            if len(at) and bool(filled_at(cache, at).all()):
                return cut, at
        return 0, at

    def places(self, ids: torch.Tensor) -> torch.Tensor:
        """Return the places [B] of the samples' rows in this epoch; samples without a slot get one."""
        return self.slots.assign(ids, self.epoch)

    def first_places(self, ids: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Return the distinct places [n] of samples `ids` [B] in this epoch, and the position [n] of the first of each."""
        return first_of_each(self.places(ids))

    def gather(self, at: torch.Tensor, level: int) -> torch.Tensor:
        """Return the rows [B, ...] at the places [B] and the cut that `locate` gave."""
        cache = self.cache if level == self.cuts[-1] else self.older
        assert cache is not None
        return cache.gather(at)

    def dtype(self, level: int) -> torch.dtype | None:
        """Return the dtype of the rows at a cut that `locate` gave; None if they have gone since."""
        cache = self.cache if self.cuts[-1:] == [level] else self.older
        return None if cache is None else cache.dtype

    def begin_making(self, from_rows: bool, count: int) -> None:
        """Note that a forward begins that computes `count` rows from older rows or from images."""
        self._begun = self._watch.now()
        self._made[from_rows] += count

    def begin_batch(self) -> None:
        """Begin a batch of images of which rows may be kept. Of several images of a sample, all must have arrived."""
        if any(self._arrived.values()):
            self._arrived = {}
            warn(
                "drop.loader: all images that input= names must go through the model in each step, for rows are kept of all "
                "or none, and some did not: they are computed again in each epoch"
            )

    def keep(self, cut: int, ids: torch.Tensor, row: torch.Tensor) -> torch.Tensor:
        """Store the rows [B, ...] of images `ids` [B] that have arrived at a cut, and return them as later epochs will get
        them."""
        if self.images == 1:
            return self._keep_whole(cut, ids, row)
        arrived, samples = self._arrived.setdefault(cut, {}), (ids // self.images).tolist()
        for sample, image, part in zip(samples, (ids % self.images).tolist(), row.unbind(), strict=True):
            arrived.setdefault(sample, {})[image] = part
        if whole := [sample for sample in dict.fromkeys(samples) if len(arrived[sample]) == self.images]:
            parts = [arrived.pop(sample) for sample in whole]
            rows = torch.stack([torch.cat([of[j] for j in range(self.images)]) for of in parts])
            self._keep_whole(cut, torch.tensor(whole), rows.contiguous(memory_format=format_of(row)))
        return as_stored(row, self.config.codec) if self.cache is not None and cut in self.path else row

    def _keep_whole(self, cut: int, ids: torch.Tensor, row: torch.Tensor) -> torch.Tensor:
        """`keep`, of rows of whole samples."""
        is_last = cut == self.cuts[-1]
        if not is_last and (self.older is None or cut != self.cuts[0]):
            return as_stored(row, self.config.codec) if cut in self.path else row
        cache = self.cache if is_last else self.older
        if cache is None:
            return row
        if row.shape[1:] != cache.shape:
            raise RuntimeError(
                f"drop.loader: the loop must call the model as call= does (default: model(images)), and rows behind {cut} "
                f"layers are {list(row.shape[1:])} in the loop, and {list(cache.shape)} so; give DropScheduler "
                "call=lambda model, batch: model(...) with what the loop does to images before"
            )
        if is_last:
            self._outliving.open(cache, self.path, row, ids if self._looks else None, self.epoch)
            self._looks = False
        at = self.places(ids)
        new = torch.nonzero(~filled_at(cache, at)).flatten()
        if not len(new) or self._keep(cache, at[new], row[new.to(row.device)] if len(new) < len(at) else row):
            row = cache.gather(at)
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
        """Make room for the new ones of `size` samples, and return their number. Raises RuntimeError if some have gone."""
        more = size - len(self.slots)
        if more < 0:
            raise RuntimeError(
                f"drop.loader: the dataset must keep its {len(self.slots)} samples, or get more, got {size}"
            )
        self.slots.extend(more)
        return more

    def renumber(self, size: int, offsets: torch.Tensor, views: int | str) -> None:
        """Before there are rows: follow the number of samples, set `views`, and the first view of n samples ([n])."""
        if size != len(self.slots) or views != self.config.views:
            self.config = dataclasses.replace(self.config, views=views)
            self.slots = SlotTable(size, self.views, self.generator)
            self._outliving.renumber(self.config, self.slots)
        self.slots.view_offset[: len(offsets)] = offsets

    def drawn(self) -> torch.Tensor:
        """Return the samples [n] that have rows for this epoch."""
        ids = self.slots.drawn()
        return ids[self.filled(ids)]

    def filled(self, ids: torch.Tensor) -> torch.Tensor:
        """Return which of the samples `ids` [B] have rows for this epoch, of the last drop or of the one before."""
        at = self.slots.places(ids, self.epoch)
        return filled_at(self.cache, at) | filled_at(self.older, at)

    def forget(self, ids: torch.Tensor | None = None, *, everywhere: bool = False) -> None:
        """Discard the rows of samples [n], or all. They are computed again from images when their samples are drawn.

        everywhere: in the store too, because their images have changed.
        """
        cache = self.cache
        if cache is None:
            return
        caches = [one for one in (cache, self.older) if one is not None]
        for one in caches if everywhere else ():
            self._outliving.forget(one, ids)
        if ids is not None:
            slots = self.slots.table[ids[ids < len(self.slots)]]  # the dataset may have grown since
            places = (slots[slots >= 0, None] * self.views + torch.arange(self.views)).flatten()
            self.digests.forget(ids)
            for one in caches:
                one.forget(places[places < len(one.filled)])
            return
        count, cut, shape, shares = len(cache.filled), self.cut, cache.shape, self._shares
        self._reset()
        # What has changed need not be part of what rows depend on, and random ones cannot be compared.
        self.cuts, self.path, self._looks = [cut], (cut,), shares and not self._outliving.is_random
        self.cache = self._cache_for(shape, count, private=not shares)

    def stop(self) -> None:
        """Free the rows and keep none: the dropped layers run at each step."""
        if self._shares:
            self._outliving.save(self.cache)
        self._reset()
        self.cuts, self.path, self.stores = [], (), False

    def close(self, *, keep: bool) -> None:
        """Close the store. keep: leave private rows there that a checkpoint names."""
        self.stop()
        self._outliving.close(keep=keep)

    def save(self) -> tuple[str, torch.Tensor | None] | None:
        """Add all rows to the store, if its budget holds them. Return what a checkpoint names them by, and their random
        views [N, V] if there are any; None without a store or rows."""
        return self._outliving.keep(self.cache)

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
        self.cuts, self.path, self.stores = list(path[-1:]), tuple(path), True
        count = len(self.slots) * self.views
        found = None if saved is None else self._outliving.find(saved[0], self.path, shape)
        if found is None or saved is None:
            self.cache = self._cache_for(shape, count, private=True)
            return
        self.cache = self._cache_for(shape, count, private=found.is_private, stored_bytes=found.nbytes)
        self._outliving.resume(self.cache, found, self.epoch, saved[1])

    @property
    def stops(self) -> tuple[int, ...]:
        """The cuts at which the rows of images are encoded on their way: the whole path, so that they equal rows computed
        from older rows; or, once every sample has its rows, the last one alone."""
        cache = self.cache
        done = cache is not None and self.slots.used == len(self.slots) and bool(cache.filled.all())
        return self.path[-1:] if done else self.path

    def end_epoch(self) -> None:
        """Free the rows of the drop before once none of them is needed; leave rows to other runs."""
        if self._shares and not self._looks:
            self._outliving.save(self.cache)
        if self.older is None or self.cache is None:
            return
        if bool(filled_at(self.cache, torch.nonzero(self.older.filled).flatten()).all()):
            self._drop_older()

    @property
    def counts(self) -> tuple[int, int, float]:
        """Rows computed from images and from older rows since `forget_counts`, and the seconds spent on it."""
        images, older = (count // self.images for count in self._made)
        return images, older, self._watch.seconds()

    def forget_counts(self) -> None:
        """Reset the counters."""
        self._made = [0, 0]
        self._watch.reset()

    def _reset(self) -> None:
        self._drop_older()
        if self.cache is not None:
            self.cache.close()
        self.cache, self._full, self._looks = None, False, False
        self.slots.clear()
        self.digests.forget()
        self._outliving.clear()

    def _drop_older(self) -> None:
        if self.older is not None:
            self.older.close()
            self.older = None
            self.cuts = self.cuts[-1:]

    @property
    def _shares(self) -> bool:
        """Whether the rows are left to other runs."""
        disk = None if self.cache is None else self.cache.disk
        return disk is not None and not disk.is_private

    def _cache_for(self, shape: Sequence[int], rows: int, *, private: bool, stored_bytes: int = 0) -> ActivationCache:
        """A cache with room for `rows`, or without any if the budgets of now do not hold them. stored_bytes: those that the
        store has already."""
        budgets = self._budgets(rows)
        budgets = dataclasses.replace(budgets, disk=max(budgets.disk, stored_bytes))
        try:
            return self._new_cache(shape, rows, budgets, private=private)
        except ValueError:
            return self._new_cache(shape, 0, budgets, private=private)

    def _budgets(self, rows: int) -> Budgets:
        """The bytes of now for a number of rows."""
        return budgets_of(self.config, self.device, beside=rows * self._beside)

    def _new_cache(self, shape: Sequence[int], rows: int, budgets: Budgets, *, private: bool) -> ActivationCache:
        tier = self._outliving.tier(private=private)
        return ActivationCache(rows, shape, codec=self.config.codec, device=self.device, budgets=budgets, disk=tier)

    def _keep(self, cache: ActivationCache, at: torch.Tensor, rows: torch.Tensor) -> bool:
        """Store rows [B, ...] at places [B], B > 0, of several at one place the first; return False if the budgets do not
        hold them, or the disk is full."""
        places, order = first_of_each(at)
        wanted = int(places[-1]) + 1
        if wanted > len(cache.filled):
            if self._full or cache is self.older:
                return False
            try:
                cache.grow(-(-wanted // self.views) * self.views)
            except (ValueError, OSError, torch.OutOfMemoryError) as error:
                return self._is_full(str(error))
        if len(places) < len(at):
            at, rows = places, rows[order.to(rows.device)]
        try:
            self._outliving.name(cache, at)
            cache.append(at, rows)
        except (OSError, StoreError) as error:
            return self._is_full(str(error))
        return True

    def _is_full(self, reason: str) -> bool:
        was, self._full = self._full, True
        if not was:
            warn(
                "drop.loader: the budgets or the disk do not hold the rows of all samples that are drawn; those that do not "
                f"fit are read and run through the dropped layers each time ({reason})"
            )
        return False
