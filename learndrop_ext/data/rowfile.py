"""The rows of a drop in a file: kept with a checkpoint, found by the run that goes on from it."""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import re
import uuid
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch.utils.data import DataLoader

from learndrop_ext.cache.cache import ActivationCache
from learndrop_ext.cache.config import CacheConfig
from learndrop_ext.cache.file import CacheFileError, Sidecar, remove_abandoned
from learndrop_ext.cache.fingerprint import Fingerprint, describe, weights_digest
from learndrop_ext.cache.plan import budgets_of
from learndrop_ext.data.extras import BatchExtras, InputKey
from learndrop_ext.distributed import several_processes
from learndrop_ext.graph.chain import Chain


@dataclass(frozen=True)
class FoundRows:
    """What a file of rows holds. slots: [N] int64, -1 for samples without rows."""

    cache: ActivationCache
    slots: torch.Tensor
    extras: BatchExtras


def fingerprint(
    chain: Chain,
    cuts: Sequence[int],
    config: CacheConfig,
    *,
    loader: DataLoader[Any],
    images: str,
    autocast: torch.dtype | None,
    seed: int,
) -> Fingerprint:
    """Return all that the rows after the last of `cuts` depend on; those of earlier drops were stored between. images: the
    digest of some."""
    cut = cuts[-1]
    # Addresses are of this process; the code and the modules in the text are not.
    code = re.sub(r" at 0x[0-9a-fA-F]+", "", "".join(str(chain.layer(i).eval_graph) for i in range(cut)))
    return Fingerprint(
        weights=weights_digest(chain, cut),
        cut=cut,
        codec=config.codec,
        views=2 if config.mirror else config.views,
        samples=len(loader.dataset),  # type: ignore[arg-type]
        dataset=describe(loader.dataset),
        autocast="" if autocast is None else str(autocast).removeprefix("torch."),
        seed=seed,
        augmented=config.augmented,
        layers=hashlib.sha256(f"{list(cuts)}{config.mirror}{code}".encode()).hexdigest(),
        images=images,
    )


def digest(images: torch.Tensor) -> str:
    """Return the SHA-256 of some images."""
    pixels = images.cpu().contiguous().view(-1).view(torch.uint8).numpy()
    return hashlib.sha256(pixels.tobytes()).hexdigest()


class RowFileKeeper:
    """Writes rows to files in the configured folder and finds them there.

    Args:
        config: its `disk_dir` is the folder; without one no file is kept.
    """

    def __init__(self, config: CacheConfig) -> None:
        self._config = config
        self._name: str | None = None  # of the file last written or found

    def new_path(self, cut: int) -> Path | None:
        """Return a name that no other run has. What killed runs left unfinished in the folder is deleted."""
        if self._config.disk_dir is None:
            return None
        folder = Path(self._config.disk_dir)
        remove_abandoned(folder.glob("rows-*-*.bin.part"))
        return folder / f"rows-{uuid.uuid4().hex[:12]}-{cut}.bin"

    def save(
        self,
        cache: ActivationCache | None,
        slots: torch.Tensor,
        extras: BatchExtras,
        made_of: Callable[[], Fingerprint],
    ) -> str | None:
        """Return the name of the file that holds the rows of all tiers and the extras of their batches.

        It is written now where they changed, and a file that these rows stand in for is deleted. None while there are no
        rows, for one of several processes, where the budget for the disk does not hold all rows, and, with a
        RuntimeWarning, where the file cannot be written.
        """
        if self._config.disk_dir is None or several_processes():
            return None
        name = None if cache is None else self._written(cache, slots, extras, made_of)
        if self._name not in (None, name) and (name is not None or cache is None):
            self.delete()
        self._name = name or self._name
        return name

    def find(
        self, name: str | None, made_of: Callable[[], Fingerprint], *, device: torch.device, key: InputKey
    ) -> FoundRows | None:
        """Return the rows that `save` wrote; None, with a RuntimeWarning, where they are not there or not to be used."""
        if self._config.disk_dir is None or name is None or several_processes():
            return None
        path = Path(self._config.disk_dir) / name
        budgets = budgets_of(self._config, device)
        try:
            # A file that is there may stay as large as it is.
            budgets = dataclasses.replace(budgets, disk=max(budgets.disk, path.stat().st_size))
            cache = ActivationCache.open(path, made_of(), device=device, budgets=budgets)
        except (OSError, CacheFileError) as error:
            warnings.warn(
                f"DropScheduler.load_state_dict: the rows are made again ({error})", RuntimeWarning, stacklevel=4
            )
            return None
        self._name = name
        slots, *tensors = cache.sidecar.tensors
        extras = BatchExtras.from_state(cache.sidecar.values, tensors, key=key, device=device)
        cache.sidecar = Sidecar()
        return FoundRows(cache, slots, extras)

    def delete(self) -> None:
        """Delete the file last written or found."""
        if self._name is not None and self._config.disk_dir is not None:
            with contextlib.suppress(OSError):
                (Path(self._config.disk_dir) / self._name).unlink()
        self._name = None

    def _written(
        self, cache: ActivationCache, slots: torch.Tensor, extras: BatchExtras, made_of: Callable[[], Fingerprint]
    ) -> str | None:
        if cache.path is None or not cache.fits_file or not bool(cache.filled.any()):
            return None
        if not cache.saved:
            try:
                values, tensors = extras.state()
                cache.save(made_of(), Sidecar(values, (slots, *tensors)))
            except (OSError, TypeError) as error:
                warnings.warn(
                    f"DropScheduler.state_dict: a run that goes on from here will make its rows again ({error})",
                    RuntimeWarning,
                    stacklevel=5,
                )
                return None
        return cache.path.name
