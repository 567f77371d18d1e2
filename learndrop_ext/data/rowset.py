"""The one owner of the cached rows: which samples have rows, where they are, and how missing ones are computed.

B samples in a batch, N in the dataset, V views of each. A sample has a slot, and the row of a view is at place
slot * V + view.
"""

from __future__ import annotations

import dataclasses
import warnings
from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
from torch import nn

from learndrop_ext.cache.cache import ActivationCache
from learndrop_ext.cache.config import CacheConfig
from learndrop_ext.cache.fingerprint import Fingerprint
from learndrop_ext.cache.plan import budgets_of
from learndrop_ext.data import rowfile
from learndrop_ext.data.extras import BatchExtras, InputKey, input_of, to_device, with_input
from learndrop_ext.data.fill import Stages, check_purity
from learndrop_ext.data.slots import SlotTable, filled_at, first_of_each
from learndrop_ext.data.source import Source
from learndrop_ext.data.stopwatch import Stopwatch
from learndrop_ext.graph.chain import Chain
from learndrop_ext.graph.freeze import FrozenPrefix


class RowSet:
    """The rows of a chain's layers, computed when their samples are first drawn.

    In the epoch after a drop each batch comes from its source (images, or the rows of an earlier drop), goes through the
    newly frozen layers and is stored; the training step gets it as decoded from there. Later epochs gather the rows.

    Args:
        chain: the model's layers.
        model: the user's model; errors name its modules.
        source: the source of the images.
        config: codec, views, budgets and folder.
        key: position of the model's input in a batch.
        ids, batch: some samples and their batch, on the model's device, read with the random seed `seed`.
        seed: random seed of the views, and of reading samples again.
    """

    def __init__(
        self,
        chain: Chain,
        model: nn.Module,
        source: Source,
        *,
        config: CacheConfig,
        key: InputKey,
        ids: Sequence[int],
        batch: Any,
        seed: int,
    ) -> None:
        self.chain = chain
        self.model = model
        self.source = source
        self.config = config
        self.key = key
        self.example = input_of(batch, key)
        self.example_ids, self._digest = list(ids), rowfile.digest(self.example)
        self.device = self.example.device
        self.seed = seed
        self.generator = torch.Generator().manual_seed(seed)
        self.slots = SlotTable(len(source), self.views, self.generator)
        self.cuts: list[int] = []  # the cut of every drop that keeps rows, oldest first
        self.file = rowfile.RowFileKeeper(config)
        self.frozen: FrozenPrefix | None = None  # the layers that compute the rows
        self.like = batch  # all batches have its structure
        self.extras = self._no_extras()
        self._stages = Stages(config, self.device)
        self._watch = Stopwatch(self.device)
        self._made = [0, 0]  # rows computed from images and from older rows since `forget_ledger`
        self.relabelled = 0  # samples with shared rows that were read for the rest of their batch since then
        self._stores = True  # whether rows are stored at all
        self._full = self.said_saturated = False  # whether the budgets are exhausted, and whether a warning was given
        self.cache: ActivationCache | None = None  # the rows by place; None while the model trains on images
        self._older: ActivationCache | None = None  # the rows of the drop before, while some are still needed

    @property
    def cut(self) -> int:
        """The number of layers after which rows are kept; 0 while the model trains on images."""
        return self.cuts[-1] if self.cuts else 0

    @property
    def views(self) -> int:
        """V, the number of rows of each sample."""
        return self.config.rows_per_sample

    def advance(self, cut: int, *, rows: int, stores: bool) -> None:
        """Keep rows after `cut` layers from now on. They are computed later, in `batch`.

        Args:
            cut: a later cut than the current one.
            rows: number of rows to make room for.
            stores: whether to store rows; there is no need to if none would be read again.

        Raises:
            ValueError: a row depends on more than its sample (the module is named), or what ActivationCache raises.
                Nothing is changed then.
        """
        segment = self.chain.segment(self.cut, cut)
        check_purity(segment, self._probe(), self.model, self._stages.autocast)
        made_of = partial(self._fingerprint, [*self.cuts, cut])
        found = self.file.find_shared(made_of, cut, device=self.device, key=self.key) if stores else None
        room = max(rows, self.slots.used * self.views) if stores else 0
        new = self._new_cache(cut, room) if found is None else found.cache
        self._drop_older()
        self._older, self.cache = self.cache, new
        self.cuts.append(cut)
        self._stages.segments.append(segment)
        if found is not None:
            self._drop_older()
            if not torch.equal(found.slots, self.slots.table):
                self.slots.load(found.slots)
                self.extras = self._no_extras()
        self._stores, self._full = stores, False

    def missing(self, ids: torch.Tensor, epoch: int) -> torch.Tensor:
        """Return those of the samples `ids` [B] that have to be read, for their rows or the rest of the batch, each once."""
        if self.cache is None:
            return ids
        at = self.slots.places(ids, epoch)
        rows = filled_at(self.cache, at) | filled_at(self._older, at)
        missing = ids[~(rows & filled_at(self.extras, at))]
        each: torch.Tensor = missing.unique() if len(missing) else missing
        return ids if len(each) == len(ids) else each

    def complete(self, seen: torch.Tensor, epoch: int) -> bool:
        """Return whether every sample in `seen` ([N] bool) has its row for an epoch, so that no image is needed."""
        return self.cache is not None and len(self.missing(torch.nonzero(seen).flatten(), epoch)) == 0

    def batch(self, ids: torch.Tensor, epoch: int, read: Any = None, read_ids: torch.Tensor | None = None) -> Any:
        """Return the batch of samples `ids` [B] with their rows in place of the model's input.

        Args:
            ids: [B] int64 (CPU).
            epoch: number of epochs begun; it decides which view of a sample is drawn.
            read: the batch of images of the samples `read_ids` [n], on the device. Samples of `missing` that are not among
                them are read here.

        Raises:
            ValueError: what BatchExtras and ActivationCache raise for a batch unlike the first.
        """
        assert self.cache is not None
        at = self.slots.assign(ids, epoch)
        have = filled_at(self.cache, at)
        if bool((have & filled_at(self.extras, at)).all()):
            return self.extras.get(at, self.cache.gather(at))
        begin = self._watch.now()
        missing = self.missing(ids, epoch)
        if len(missing):
            if read is None or read_ids is None or not bool(torch.isin(missing, read_ids).all()):
                read, read_ids = self.read(missing, epoch), missing
            self.extras.put(read, *first_of_each(self.slots.assign(read_ids, epoch)))
        if bool(have.all()):
            self.relabelled += len(missing)
            return self.extras.get(at, self._moves.gather(self.cache, at))
        wanted, inverse = at[~have].unique(return_inverse=True)
        made = self._make(wanted, epoch, read, read_ids)
        stored = self._stores and self._store(wanted, made)
        self._watch.add(begin)
        if stored:
            return self.extras.get(at, self.cache.gather(at))
        x = made = _taken(made, inverse)
        if bool(have.any()):
            x = made.new_empty((len(at), *made.shape[1:]))
            x[have] = self.cache.gather(at[have]).to(made.dtype)
            x[~have] = made
        return self.extras.get(at, x)

    def prefetch(self, ids: torch.Tensor, epoch: int) -> None:
        """Start reading the rows of samples `ids` [B], which the next `batch` will ask for, from the slower tiers."""
        rows = self.cache
        if rows is None or not rows.plan.staging or not len(ids):
            return
        at = self.slots.places(ids, epoch)
        if bool(filled_at(rows, at).all()):
            rows.prefetch(at)

    def images(self, batch: Any, ids: torch.Tensor, epoch: int) -> Any:
        """Return a batch of images as the model trains on it: with `mirror`, every second view of a sample is flipped."""
        if not self.config.mirror:
            return batch
        return with_input(batch, self.key, _mirrored(input_of(batch, self.key), self.slots.view(ids, epoch).bool()))

    def follow_size(self) -> int:
        """Make room for new samples of the source, and return their number.

        Raises:
            RuntimeError: the dataset has become smaller.
        """
        size = len(self.source)
        more = size - len(self.slots)
        if more < 0:
            raise RuntimeError(
                f"drop.loader: the dataset must keep its {len(self.slots)} samples, or get more, got {size}"
            )
        self.slots.extend(more)
        return more

    def renumber(self, offsets: torch.Tensor, views: int | str) -> None:
        """Before there are rows: follow the size of the source, set `views`, and the first view of n samples ([n])."""
        if len(self.source) != len(self.slots) or views != self.config.views:
            self.config = dataclasses.replace(self.config, views=views)
            self.slots = SlotTable(len(self.source), self.views, self.generator)
        self.slots.view_offset[: len(offsets)] = offsets

    @property
    def stores(self) -> bool:
        """Whether rows are stored and read again in a later epoch."""
        return self.cache is not None and self._stores

    @property
    def autocast(self) -> torch.dtype | None:
        """The autocast dtype under which rows are computed."""
        return self._stages.autocast

    def made_of(self, batch: Any, ids: torch.Tensor, epoch: int) -> torch.Tensor:
        """Return the rows that the dropped layers compute from a batch of images now."""
        return self._stages.run(input_of(self.images(batch, ids, epoch), self.key), 0)

    def read(self, ids: torch.Tensor, epoch: int) -> Any:
        """Return the batch of images of samples `ids` [B], read in this process with a random seed of its own."""
        return to_device(self.source.read(ids.tolist(), self.seed + epoch), self.device)

    def forget(self) -> None:
        """Discard all rows. They are computed again from images when their samples are drawn."""
        if self.cache is None:
            return
        count, cut = len(self.cache.filled), self.cut
        self.file.release()
        self._reset()
        self.cache = self._new_cache(cut, count)

    def set_autocast(self, autocast: torch.dtype | None) -> bool:
        """Compute rows under this autocast dtype from now on. Discard those computed under another, and return whether
        there were any."""
        if autocast == self._stages.autocast:
            return False
        self._stages.autocast = autocast
        made = self.cache is not None and bool(self.cache.filled.any() or self._older is not None)
        if made:
            self.forget()
        return made

    def end_epoch(self) -> None:
        """Free the rows of the drop before once none of them is needed, and share complete rows with other runs."""
        if self._older is not None and self.cache is not None:
            needed = self._older.filled.clone()
            both = min(len(needed), len(self.cache.filled))
            needed[:both] &= ~self.cache.filled[:both]
            if not bool(needed.any()):
                self._drop_older()
        cache = self.cache
        if cache is not None and not cache.saved and self._stores and bool(cache.filled.all()):
            self.file.share(cache, self.slots.table, partial(self._fingerprint, self.cuts))

    @property
    def ledger(self) -> tuple[int, int, float]:
        """Rows computed from images and from older rows since `forget_ledger`, and the seconds spent on it."""
        return self._made[0], self._made[1], self._watch.seconds()

    def forget_ledger(self) -> None:
        """Reset the counters."""
        self._made, self.relabelled = [0, 0], 0
        self._watch.reset()

    @property
    def older_cut(self) -> int:
        """The cut of the rows that the current ones are computed from; 0 for images."""
        return self.cuts[-2] if len(self.cuts) > 1 else 0

    def save(self) -> str | None:
        """Write the rows of all tiers to their file if they have changed; return its name. See `RowFileKeeper.save`."""
        return self.file.save(self.cache, self.slots.table, self.extras, partial(self._fingerprint, self.cuts))

    def find(self, name: str | None, cuts: Sequence[int], ids: Sequence[int] | None = None) -> None:
        """Replace the rows by those after the last of `cuts` in the file that `save` wrote; ids: `example_ids` of that run.

        Without a file, or one that does not fit (RuntimeWarning), the rows are computed again.
        """
        if name is not None and ids is not None and self.source.readable and list(ids) != self.example_ids:
            self.example_ids = list(ids)
            self._digest = rowfile.digest(input_of(self.read(torch.as_tensor(self.example_ids), 0), self.key))
        self._reset()
        self.cuts = list(cuts)
        self._stages.segments = [self.chain.segment(a, b) for a, b in zip([0, *cuts], cuts, strict=False)]
        found = self.file.find(name, partial(self._fingerprint, cuts), device=self.device, key=self.key)
        if found is None:
            self.cache = self._new_cache(self.cut, len(self.slots) * self.views)
            return
        self.cache = found.cache
        self.slots.load(found.slots)
        self.extras = found.extras or self.extras

    def clear(self) -> None:
        """Free the rows; the model trains on images again."""
        self.cuts, self._stages.segments = [], []
        self.file.release()
        self._reset()

    def _reset(self) -> None:
        self._drop_older()
        if self.cache is not None:
            self.cache.close()
        self.cache, self._full = None, False
        self.slots.clear()
        self.extras = self._no_extras()

    def _no_extras(self) -> BatchExtras:
        return BatchExtras(key=self.key, device=self.device, like=self.like)

    def _drop_older(self) -> None:
        if self._older is not None:
            self._older.close()
            self._older = None

    def _new_cache(self, cut: int, rows: int) -> ActivationCache:
        shape = self.chain.layer(cut - 1).shape
        assert shape is not None
        return ActivationCache(
            rows,
            shape,
            codec=self.config.codec,
            device=self.device,
            budgets=budgets_of(self.config, self.device),
            path=self.file.new_path(cut),
        )

    def _probe(self) -> torch.Tensor:
        """Some inputs of the next layers."""
        x = self.example[:8]
        return self._stages.run(x, 0) if self.cuts else x

    def _make(self, at: torch.Tensor, epoch: int, read: Any, read_ids: torch.Tensor | None) -> torch.Tensor:
        """The rows [n, ...] at distinct places `at` [n]. Those that are not made of older rows are made of `read`."""
        from_older = filled_at(self._older, at)
        if bool(from_older.all()):
            return self._of_older(at)
        assert read_ids is not None
        made, places = self._of_images(read, read_ids, epoch)
        order = torch.searchsorted(places, at[~from_older])
        if not bool(from_older.any()):
            return _taken(made, order)
        rows = made.new_empty((len(at), *made.shape[1:]))
        rows[from_older] = self._of_older(at[from_older])
        rows[~from_older] = made[order.to(made.device)]
        return rows

    def _of_older(self, at: torch.Tensor) -> torch.Tensor:
        assert self._older is not None
        self._made[1] += len(at)
        return self._stages.run(self._older.gather(at), len(self._stages.segments) - 1)

    def _of_images(self, read: Any, read_ids: torch.Tensor, epoch: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Rows of a batch of images in ascending order of place, and their places."""
        places, order = first_of_each(self.slots.places(read_ids, epoch))
        # Run the batch in its own order, so that rows are the same to the bit wherever they are stored.
        made = self._stages.run(input_of(self.images(read, read_ids, epoch), self.key), 0)
        self._made[0] += len(order)
        return _taken(made, order), places

    def _store(self, at: torch.Tensor, rows: torch.Tensor) -> bool:
        """Store rows at distinct places; return False if the budgets do not hold them."""
        cache = self.cache
        assert cache is not None
        wanted = int(at.max()) + 1
        if wanted > len(cache.filled):
            if self._full:
                return False
            try:
                cache.grow(-(-wanted // self.views) * self.views)
            except ValueError as error:
                self._full = True
                warnings.warn(
                    "drop.loader: the sampler draws more samples than the budgets hold rows of; those that do not fit "
                    f"are read and run through the dropped layers each time ({error})",
                    RuntimeWarning,
                    stacklevel=4,
                )
                return False
        cache.append(at, rows)
        return True

    def _fingerprint(self, cuts: Sequence[int]) -> Fingerprint:
        return rowfile.fingerprint(
            self.chain,
            cuts,
            self.config,
            source=self.source,
            images="" if self.config.shared or not self.source.readable else self._digest,
            autocast=self._stages.autocast,
            seed=self.seed,
        )


def _taken(rows: torch.Tensor, index: torch.Tensor) -> torch.Tensor:
    """Return rows[index] of rows [n, ...] and index [B] (CPU); `rows` itself if that is all of them in their order."""
    in_order = torch.equal(index, torch.arange(len(rows)))
    return rows if in_order else rows[index.to(rows.device)]


def _mirrored(x: torch.Tensor, flip: torch.Tensor) -> torch.Tensor:
    """Return images [B, C, H, W], those in `flip` [B] bool (CPU) flipped horizontally."""
    where = flip.to(x.device).view(-1, *[1] * (x.dim() - 1))
    return torch.where(where, x.flip(-1), x)
