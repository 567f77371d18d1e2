"""The rows of a drop in a file: written with a checkpoint, found by the run that resumes from it."""

from __future__ import annotations

import contextlib
import dataclasses
import uuid
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from learndrop_ext.distributed import several_processes
from learndrop_ext.rows.cache import ActivationCache
from learndrop_ext.rows.config import CacheConfig
from learndrop_ext.rows.plan import budgets_of
from learndrop_ext.rows.store.file import CacheFileError, Sidecar, remove_abandoned
from learndrop_ext.rows.store.fingerprint import Fingerprint
from learndrop_ext.rows.store.shared import PATTERN, FillLock, find_or_lock
from learndrop_ext.warn import warn

#: What is kept of the batches beside their rows: plain values and tensors.
Extras = tuple[Any, list[torch.Tensor]]


@dataclass(frozen=True)
class FoundRows:
    """The contents of a file of rows. slots: [N] int64, -1 for samples without rows; extras: None for shared rows."""

    cache: ActivationCache
    slots: torch.Tensor
    extras: Extras | None


class RowFileKeeper:
    """Writes rows to files in the configured folder, and finds them there.

    Args:
        config: its `disk_dir` is the folder; without one there are no files.
    """

    def __init__(self, config: CacheConfig) -> None:
        self._config = config
        self._name: str | None = None  # name of the file last written or found
        self._lock: FillLock | None = None  # held while this run computes rows to share
        self._wanted: Fingerprint | None = None  # theirs

    def new_path(self, cut: int) -> Path | None:
        """Return a path that no other run uses. Deletes unfinished files of killed runs from the folder."""
        if self._config.disk_dir is None:
            return None
        if self._lock is not None:
            return self._lock.path
        folder = Path(self._config.disk_dir)
        remove_abandoned(folder.glob("rows-*-*.bin.part"))
        return folder / f"rows-{uuid.uuid4().hex[:12]}-{cut}.bin"

    @property
    def shares(self) -> bool:
        """Whether rows are shared with other runs."""
        return self._config.shared and self._config.disk_dir is not None and not several_processes()

    def find_shared(
        self,
        made_of: Callable[[], Fingerprint],
        cut: int,
        *,
        device: torch.device,
        fits: Callable[[FoundRows], bool],
    ) -> FoundRows | None:
        """Return the rows that another run left in the shared folder.

        If there are none, this run leaves its own there once they are complete, unless another run is computing the same. A
        folder or a file that cannot be used is a RuntimeWarning.

        Args:
            made_of: returns what the rows must depend on.
            cut: number of layers before them.
            device: device of the rows.
            fits: whether they are the rows of this run's images.
        """
        self.release()
        if not self.shares:
            return None
        folder = Path(str(self._config.disk_dir))
        try:
            wanted = made_of()
            found = find_or_lock(folder, wanted)
            if isinstance(found, FillLock):
                self._lock, self._wanted = found, wanted
            if not isinstance(found, Path):
                return None
            aside, budgets = self.new_path(cut), budgets_of(self._config, device)
            cache = ActivationCache.open(found, wanted, device=device, budgets=budgets, aside=aside)
        except (OSError, CacheFileError) as error:
            _say_not_used(str(error))
            return None
        rows = _found(cache)
        try:
            if fits(rows):
                return rows
            reason = f"{found.name} was made of other images"
        except CacheFileError as error:
            reason = str(error)
        cache.close()
        _say_not_used(reason)
        return None

    def share(self, cache: ActivationCache, slots: torch.Tensor) -> None:
        """Leave complete rows to other runs, if this run holds the lock. A full disk is a RuntimeWarning.

        Labels and all else in a batch stay with this run: another may have its own for the same images.
        """
        if self._lock is None or self._wanted is None:
            return
        try:
            cache.save(self._wanted, Sidecar(None, (slots,)))
            path = self._lock.path
            self.release()
            aside = self.new_path(0)
            assert aside is not None
            cache.share(aside)
            self._name = path.name
        except OSError as error:
            warn(f"drop: the rows are not shared with other runs ({error})")
        finally:
            self.release()

    def release(self) -> None:
        """Let other runs compute the rows."""
        if self._lock is not None:
            self._lock.release()
        self._lock = None

    def save(
        self,
        cache: ActivationCache | None,
        slots: torch.Tensor,
        extras: Callable[[], Extras],
        made_of: Callable[[], Fingerprint],
    ) -> str | None:
        """Write the rows of all tiers and the extras of their batches to a file, if they have changed.

        The file they replace is deleted.

        Returns:
            The file's name. None without rows, with several processes, if the disk budget does not hold all rows, for rows
            to share until they are complete, and, with a RuntimeWarning, if the file cannot be written.
        """
        if self._config.disk_dir is None or several_processes():
            return None
        name = None if cache is None else self._written(cache, slots, extras, made_of)
        if self._name not in (None, name) and (name is not None or cache is None):
            self.delete()
        self._name = name or self._name
        return name

    def find(self, name: str | None, made_of: Callable[[], Fingerprint], *, device: torch.device) -> FoundRows | None:
        """Return the rows that `save` wrote, or None, with a RuntimeWarning, if they are missing or do not fit this run."""
        if self._config.disk_dir is None or name is None or several_processes():
            return None
        path = Path(self._config.disk_dir) / name
        budgets = budgets_of(self._config, device)
        try:
            # An existing file may stay as large as it is.
            budgets = dataclasses.replace(budgets, disk=max(budgets.disk, path.stat().st_size))
            aside = self.new_path(0) if path.match(PATTERN) else None
            cache = ActivationCache.open(path, made_of(), device=device, budgets=budgets, aside=aside)
        except (OSError, CacheFileError) as error:
            warn(f"DropScheduler.load_state_dict: the rows are computed again ({error})")
            return None
        self._name = name
        return _found(cache)

    def exists(self, name: str | None) -> bool:
        """Return whether there is a file that `find` would open."""
        folder = self._config.disk_dir
        return folder is not None and name is not None and not several_processes() and (Path(folder) / name).exists()

    def delete(self) -> None:
        """Delete the file last written or found."""
        if self._name is not None and self._config.disk_dir is not None and not Path(self._name).match(PATTERN):
            with contextlib.suppress(OSError):
                (Path(self._config.disk_dir) / self._name).unlink()
        self._name = None

    def _written(
        self,
        cache: ActivationCache,
        slots: torch.Tensor,
        extras: Callable[[], Extras],
        made_of: Callable[[], Fingerprint],
    ) -> str | None:
        if cache.path is None or not cache.fits_file or not bool(cache.filled.any()):
            return None
        if not cache.saved:
            if cache.path.match(PATTERN):  # `share` writes it, without the extras
                return None
            try:
                values, tensors = extras()
                cache.save(made_of(), Sidecar(values, (slots, *tensors)))
            except (OSError, TypeError) as error:
                warn(f"DropScheduler.state_dict: a run that resumes from here will compute its rows again ({error})")
                return None
        return cache.path.name


def _say_not_used(reason: str) -> None:
    warn(f"drop.loader: the shared rows are not used: {reason}")


def _found(cache: ActivationCache) -> FoundRows:
    slots, *tensors = cache.sidecar.tensors
    values, cache.sidecar = cache.sidecar.values, Sidecar()
    return FoundRows(cache, slots, None if values is None else (values, tensors))
