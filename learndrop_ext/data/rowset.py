"""The rows of a drop: made of images or of the rows before them, kept in a file, and found there by a resumed run."""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import re
import uuid
import warnings
from pathlib import Path

import torch
from torch import nn

from learndrop_ext.cache.cache import ActivationCache
from learndrop_ext.cache.config import CacheConfig
from learndrop_ext.cache.file import CacheFileError, Sidecar, remove_abandoned
from learndrop_ext.cache.fingerprint import Fingerprint, describe, weights_digest
from learndrop_ext.cache.plan import budgets_of
from learndrop_ext.data import fill
from learndrop_ext.data.extras import BatchExtras
from learndrop_ext.data.loader import DropLoader, Rows
from learndrop_ext.distributed import several_processes
from learndrop_ext.graph.chain import Chain, Segment


class RowSet:
    """Makes, keeps and finds the rows of the layers of `chain`, for the samples of `loader`.

    model: whose parts are named where a layer's rows are no function of the sample. example: the first model inputs
    of the dataset. seed: of the random state in which samples are read.
    """

    def __init__(
        self,
        chain: Chain,
        model: nn.Module,
        loader: DropLoader,
        config: CacheConfig,
        *,
        example: torch.Tensor,
        seed: int,
    ) -> None:
        self.chain = chain
        self.model = model
        self.loader = loader
        self.config = config
        self.example = example
        self.seed = seed
        self.device = example.device
        self.file: str | None = None  # the name of the file last written or found

    def ids(self) -> torch.Tensor:
        """The samples to keep rows of: all, or those drawn so far where they are less than half."""
        seen = self.loader.batches.seen
        return torch.nonzero(seen).flatten() if 2 * int(seen.sum()) < len(seen) else torch.arange(len(seen))

    def count(self) -> int:
        """Rows that a fill from images makes."""
        return len(self.ids()) * self.config.views

    def filled(self, before: int, cut: int, autocast: torch.dtype | None) -> Rows:
        """Rows after `cut` layers, of the rows after `before` layers that there are or, where that is 0, of images.

        Raises ValueError, naming the module, where a row is no function of its sample, and what ActivationCache raises.
        """
        segment = self.chain.segment(before, cut)
        shape = self.chain.layer(cut - 1).shape
        assert shape is not None
        old = self.loader.rows
        ids = self.ids()
        probe = self.example[:8] if old is None else old.cache.gather(torch.nonzero(old.cache.filled).flatten()[:8])
        fill.check_purity(segment, probe, self.model, autocast)
        self.loader.check_size()
        slots = self.count() if old is None else len(old.cache.filled)
        cache = ActivationCache(
            slots,
            shape,
            codec=self.config.codec,
            device=self.device,
            augmented=self.config.augmented,
            budgets=budgets_of(self.config, self.device),
            path=self._new_path(cut),
        )
        if old is not None:
            fill.fill_from_rows(old.cache, segment, cache, batch_size=self.loader.batch_size, autocast=autocast)
            return Rows(old.slots, cache, old.rest)
        made = Rows(
            torch.full((self.loader.size,), -1, dtype=torch.int64),
            cache,
            BatchExtras(slots, key=self.loader.key, device=self.device),
        )
        self._read(ids, torch.arange(len(ids)), made, segment, autocast)
        return made

    def fetch_missing(self, ids: torch.Tensor, cut: int, autocast: torch.dtype | None) -> None:
        """Give samples that were never drawn before a drop their rows, and only them."""
        rows = self.loader.rows
        assert rows is not None
        used = len(rows.cache.filled) // self.config.views
        rows.cache.grow((used + len(ids)) * self.config.views)
        rows.rest.grow((used + len(ids)) * self.config.views)
        self._read(ids, torch.arange(used, used + len(ids)), rows, self.chain.prefix(cut), autocast)

    def free(self) -> None:
        """Close the rows; images are read from then on."""
        if self.loader.rows is not None:
            self.loader.rows.cache.close()
            self.loader.rows = None

    def keep(self, cut: int, autocast: torch.dtype | None) -> str | None:
        """The name of the file that holds the rows of all tiers and the rest of their batches, written now where they
        changed; a file that these rows stand in for is deleted.

        None without rows, for one of several processes, where the budget for the disk does not hold all rows, and, with
        a RuntimeWarning, where the file cannot be written.
        """
        if self.config.disk_dir is None or several_processes():
            return None
        rows = self.loader.rows
        name = None if rows is None else self._written(rows, cut, autocast)
        if self.file not in (None, name) and (name is not None or rows is None):
            with contextlib.suppress(OSError):
                (Path(self.config.disk_dir) / str(self.file)).unlink()
        self.file = name or self.file
        return name

    def find(self, name: str | None, cut: int, autocast: torch.dtype | None) -> Rows | None:
        """The rows that `keep` wrote; None, with a RuntimeWarning, where they are not there or are not to be used."""
        if self.config.disk_dir is None or name is None or several_processes():
            return None
        path = Path(self.config.disk_dir) / name
        budgets = budgets_of(self.config, self.device)
        try:
            # A file that is there may stay as large as it is.
            budgets = dataclasses.replace(budgets, disk=max(budgets.disk, path.stat().st_size))
            cache = ActivationCache.open(path, self._made_of(cut, autocast), device=self.device, budgets=budgets)
        except (OSError, CacheFileError) as error:
            warnings.warn(
                f"DropScheduler.load_state_dict: the rows are filled again ({error})", RuntimeWarning, stacklevel=3
            )
            return None
        self.file = name
        slots, *tensors = cache.sidecar.tensors
        rest = BatchExtras.of_state(cache.sidecar.values, tensors, key=self.loader.key, device=self.device)
        cache.sidecar = Sidecar()
        return Rows(slots, cache, rest)

    def _read(
        self, ids: torch.Tensor, at: torch.Tensor, rows: Rows, segment: Segment, autocast: torch.dtype | None
    ) -> None:
        fill.fill_from_images(
            self.loader.user,
            ids,
            at,
            segment,
            rows.cache,
            rows.rest,
            views=self.config.views,
            batch_size=self.loader.batch_size,
            seed=self.seed,
            autocast=autocast,
            # To start workers takes longer than to read a few samples here.
            workers=rows is not self.loader.rows or len(ids) > 4 * self.loader.batch_size,
        )
        rows.slots[ids] = at

    def _written(self, rows: Rows, cut: int, autocast: torch.dtype | None) -> str | None:
        cache = rows.cache
        if cache.path is None or not cache.fits_file:
            return None
        if not cache.saved:
            try:
                values, tensors = rows.rest.state()
                cache.save(self._made_of(cut, autocast), Sidecar(values, (rows.slots, *tensors)))
            except (OSError, TypeError) as error:
                warnings.warn(
                    f"DropScheduler.state_dict: a run that goes on from here will fill its rows again ({error})",
                    RuntimeWarning,
                    stacklevel=4,
                )
                return None
        return cache.path.name

    def _new_path(self, cut: int) -> Path | None:
        """A name that no other run has. What runs that were killed left unfinished in the folder is deleted."""
        if self.config.disk_dir is None:
            return None
        folder = Path(self.config.disk_dir)
        remove_abandoned(folder.glob("rows-*-*.bin.part"))
        return folder / f"rows-{uuid.uuid4().hex[:12]}-{cut}.bin"

    def _made_of(self, cut: int, autocast: torch.dtype | None) -> Fingerprint:
        # Addresses are of this process; the code and the modules in the text are not.
        code = re.sub(r" at 0x[0-9a-fA-F]+", "", "".join(str(self.chain.layer(i).eval_graph) for i in range(cut)))
        pixels = self.example.cpu().contiguous().view(-1).view(torch.uint8).numpy()
        return Fingerprint(
            weights=weights_digest(self.chain, cut),
            cut=cut,
            codec=self.config.codec,
            views=self.config.views,
            samples=self.loader.size,
            dataset=describe(self.loader.user.dataset),
            autocast="" if autocast is None else str(autocast).removeprefix("torch."),
            seed=self.seed,
            augmented=self.config.augmented,
            layers=hashlib.sha256(code.encode()).hexdigest(),
            images=hashlib.sha256(pixels.tobytes()).hexdigest(),
        )
