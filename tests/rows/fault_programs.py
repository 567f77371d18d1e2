"""Programs that test_cache_faults.py runs in processes of their own: python fault_programs.py NAME FOLDER ..."""

from __future__ import annotations

import os
import resource
import signal
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from learndrop_ext.ops import transfer
from learndrop_ext.rows.cache import ActivationCache
from learndrop_ext.rows.plan import Budgets, TierPlan
from learndrop_ext.rows.store.fingerprint import Fingerprint
from learndrop_ext.rows.store.shared import FillLock, find_or_lock
from learndrop_ext.rows.tiers import TierStorage

CPU = torch.device("cpu")
ON_DISK = Budgets(0, 0, 1 << 30)
PRINT = Fingerprint(weights="w", cut=1, codec="fp32", views=1, samples=9, dataset="d")
# Each row takes two pages, and 6,016 bytes of memory.
SHAPE = (1500,)
# 2 rows on the device, beside two areas of 2 rows; the rest on disk.
MOSTLY_ON_DISK = Budgets((2 + 4) * 6016, 0, 1 << 30, 2)


def rows(count: int) -> torch.Tensor:
    return torch.randn(12, *SHAPE, generator=torch.Generator().manual_seed(0))[:count]


class KillSwitch:
    """Kills this process at the n-th call that changes a file, before it (half=False) or half-way through it."""

    def __init__(self) -> None:
        self.calls = 0
        self.kill_at = 0
        self.half = False
        transfer.write_rows = self.counted(transfer.write_rows, self.half_of_rows)
        os.pwrite = self.counted(os.pwrite, self.half_of_bytes)
        for name in ("posix_fallocate", "ftruncate", "fsync", "rename"):
            # There is no half of these: they are done, and then the process ends.
            setattr(os, name, self.counted(getattr(os, name), lambda real, *arguments: real(*arguments)))

    def counted(self, real: Callable[..., Any], half: Callable[..., Any]) -> Callable[..., Any]:
        def call(*arguments: Any, **options: Any) -> Any:
            self.calls += 1
            if self.calls == self.kill_at:
                if self.half:
                    half(real, *arguments, **options)
                os.kill(os.getpid(), signal.SIGKILL)
            return real(*arguments, **options)

        return call

    @staticmethod
    def half_of_bytes(real: Callable[..., Any], descriptor: int, data: Any, offset: int) -> None:
        real(descriptor, bytes(data)[: len(data) // 2], offset)

    @staticmethod
    def half_of_rows(
        real: Callable[..., Any], file: Any, slots: Any, stored: Any, checksums: Any, **options: Any
    ) -> None:
        real(file, slots[: len(slots) // 2], stored, checksums, **options)


def fill_save_and_change(path: Path) -> None:
    """A fill, a save, a reopening, a change of rows 3 and 7, and a second save."""
    cache = ActivationCache(9, SHAPE, codec="fp32", device=CPU, budgets=MOSTLY_ON_DISK, path=path)
    assert cache.plan == TierPlan(2, 0, 7, 2)
    for at in torch.arange(9).split(4):
        cache.append(at, rows(9)[at])
    cache.save(PRINT)
    cache.close()
    cache = ActivationCache.open(path, PRINT, device=CPU, budgets=ON_DISK)
    cache.append(torch.tensor([3, 7]), -rows(9)[[3, 7]])
    cache.save(PRINT)
    cache.close()


def killed_fill(folder: str) -> None:
    """Kill a child at each point of `fill_save_and_change`, and look at what it left. Print how often and what."""
    torch.set_num_threads(1)
    path = Path(folder) / "rows"
    switch = KillSwitch()
    changed = rows(9)
    changed[[3, 7]] *= -1
    points = refusals = 0
    while True:
        for half in (False, True):
            for name in os.listdir(folder):
                (path.parent / name).unlink()
            process = os.fork()
            if process == 0:
                switch.calls, switch.kill_at, switch.half = 0, points // 2 + 1, half
                fill_save_and_change(path)
                os._exit(0)
            status = os.waitpid(process, 0)[1]
            if status == 0:
                print(points, refusals, sorted(os.listdir(folder)))
                return
            assert os.WTERMSIG(status) == signal.SIGKILL, (points, status)
            points += 1
            try:
                cache = ActivationCache.open(path, PRINT, device=CPU, budgets=ON_DISK)
            except FileNotFoundError:
                refusals += 1
            else:
                got = cache.gather(torch.arange(9))
                assert torch.equal(got, rows(9)) or torch.equal(got, changed), points
                cache.close()
            # What is left does not stand in the way of the next fill.
            fill_save_and_change(path)
            cache = ActivationCache.open(path, PRINT, device=CPU)
            assert torch.equal(cache.gather(torch.arange(9)), changed)
            cache.close()


def limited_fill(folder: str, limit: str, tier: str) -> None:
    """Fill a cache where no file may be larger than `limit` bytes; print the files and the error."""
    path = Path(folder) / "rows"
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (int(limit), resource.RLIM_INFINITY))
    budgets = ON_DISK if tier == "disk" else None
    try:
        cache = ActivationCache(9, SHAPE, codec="fp32", device=CPU, budgets=budgets, path=path)
        cache.append(torch.arange(9), rows(9))
        cache.save(PRINT)
    except OSError as error:
        print(os.listdir(folder), error)
        if budgets is None:
            assert torch.equal(cache.gather(torch.arange(9)), rows(9))


def forked_owner(folder: str) -> None:
    """A forked child closes the cache and ends; the file stays the parent's."""
    torch.set_num_threads(1)
    path = Path(folder) / "rows"
    cache = ActivationCache(9, SHAPE, codec="fp32", device=CPU, budgets=ON_DISK, path=path)
    cache.append(torch.arange(9), rows(9))
    process = os.fork()
    if process == 0:
        cache.close()
        del cache
        sys.exit(0)
    assert os.waitpid(process, 0)[1] == 0
    assert os.listdir(folder) == ["rows.part"]
    assert torch.equal(cache.gather(torch.arange(9)), rows(9))
    cache.save(PRINT)


def forked_reader(folder: str, moment: str) -> None:
    """A child forked while rows are read ahead ("ahead"), or after that ("after"), reads; what it may not is refused."""
    path = Path(folder) / "rows"
    cache = ActivationCache(9, SHAPE, codec="fp32", device=CPU, budgets=MOSTLY_ON_DISK, path=path)
    cache.append(torch.arange(9), rows(9))
    batch, other = torch.tensor([8, 0, 3]), torch.tensor([7, 1, 2])
    cache.prefetch(batch)
    if moment == "after":
        cache.gather(batch)
    process = os.fork()
    if process == 0:
        signal.alarm(60)
        for _ in range(2):
            assert torch.equal(cache.gather(batch), rows(9)[batch])
            cache.prefetch(other)
            assert torch.equal(cache.gather(other), rows(9)[other])
            cache.prefetch(batch)
        for change in (
            lambda: cache.append(torch.tensor([0, 8]), rows(2)),
            lambda: cache.grow(12),
            lambda: cache.save(PRINT),
        ):
            with pytest.raises(RuntimeError, match="must be written by the process that opened it"):
                change()
        assert cache.filled.tolist() == [True] * 9
        assert torch.equal(cache.gather(torch.arange(9)), rows(9))
        cache.close()
        sys.exit(0)
    assert os.waitpid(process, 0)[1] == 0
    assert torch.equal(cache.gather(batch), rows(9)[batch])
    cache.append(torch.tensor([8]), rows(1))
    assert torch.equal(cache.gather(torch.tensor([8])), rows(1))
    cache.close()


def forked_writer(folder: str, first: str) -> None:
    """A child forked in the middle of a read ahead first appends rows of the host tier, or first reads ahead."""
    budgets = Budgets((2 + 4) * 6016, 1 << 20, 0, 2)
    cache = ActivationCache(9, SHAPE, codec="fp32", device=CPU, budgets=budgets)
    assert cache.plan == TierPlan(2, 7, 0, 2)
    cache.append(torch.arange(9), rows(9))
    batch = torch.tensor([8, 0, 3])
    forked = threading.Event()
    read = TierStorage.read

    def waiting(self: TierStorage, slots: torch.Tensor, into: torch.Tensor) -> None:
        forked.wait()
        read(self, slots, into)

    TierStorage.read = waiting
    cache.prefetch(batch)
    process = os.fork()
    if process == 0:
        signal.alarm(60)
        forked = threading.Event()  # the old one's lock may be held by the thread that was not copied
        forked.set()
        if first == "append":
            cache.append(torch.tensor([8]), rows(1))
        else:
            cache.prefetch(torch.tensor([8, 3]))
        assert torch.equal(cache.gather(torch.tensor([8, 3])), rows(9)[[0 if first == "append" else 8, 3]])
        cache.close()
        sys.exit(0)
    ended = os.waitpid(process, 0)[1]
    forked.set()  # first, so that a failure does not leave the thread waiting
    assert ended == 0
    assert torch.equal(cache.gather(batch), rows(9)[batch])
    cache.close()


def fill_shared_rows(folder: str) -> None:
    """Fill rows that are shared, and wait in the middle to be killed."""
    lock = find_or_lock(Path(folder), PRINT)
    assert isinstance(lock, FillLock)
    cache = ActivationCache(9, SHAPE, codec="fp32", device=CPU, path=lock.path, budgets=ON_DISK)
    cache.append(torch.arange(5), rows(5))
    print("filling", flush=True)
    signal.pause()


if __name__ == "__main__":
    globals()[sys.argv[1]](*sys.argv[2:])
