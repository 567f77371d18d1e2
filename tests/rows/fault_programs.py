"""What test_cache_faults.py calls in processes of their own."""

from __future__ import annotations

import gc
import os
import resource
import signal
import sys
import threading
from pathlib import Path

import pytest
import torch
from tiered_cache import CPU, disk_in

from learndrop_ext.rows.cache import ActivationCache
from learndrop_ext.rows.plan import Budgets, TierPlan
from learndrop_ext.rows.tiers import TierStorage

ON_DISK = Budgets(0, 0, 1 << 30)
# Each row takes two pages, and 6,016 bytes of memory.
SHAPE = (1500,)
# 2 rows on the device, beside two areas of 2 rows; the rest on disk.
MOSTLY_ON_DISK = Budgets((2 + 4) * 6016, 0, 1 << 30, 2)


def rows(count: int) -> torch.Tensor:
    return torch.randn(12, *SHAPE, generator=torch.Generator().manual_seed(0))[:count]


def limited_fill(folder: str, limit: str) -> None:
    """Fill a cache where no file may be larger than `limit` bytes; print the slots that are filled and the error."""
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    cache = ActivationCache(9, SHAPE, codec="fp32", device=CPU, budgets=MOSTLY_ON_DISK, disk=disk_in(Path(folder)))
    cache.append(torch.arange(2), rows(2))
    resource.setrlimit(resource.RLIMIT_FSIZE, (int(limit), resource.RLIM_INFINITY))
    for part in torch.arange(2, 9).split(3):
        try:
            cache.append(part, rows(9)[part])
        except OSError as error:
            print(torch.nonzero(cache.filled).flatten().tolist(), error)
            break
    there = torch.nonzero(cache.filled).flatten()
    assert torch.equal(cache.gather(there), rows(9)[there])
    resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
    cache.append(torch.arange(2, 9), rows(9)[2:])
    assert torch.equal(cache.gather(torch.arange(9)), rows(9))
    cache.close()


def forked_owner(folder: str) -> None:
    """A forked child closes the cache and ends; the rows stay the parent's."""
    disk = disk_in(Path(folder))
    cache = ActivationCache(9, SHAPE, codec="fp32", device=CPU, budgets=ON_DISK, disk=disk)
    cache.append(torch.arange(9), rows(9))
    process = os.fork()
    if process == 0:
        cache.close()
        disk.close()
        del cache, disk
        gc.collect()
        sys.exit(0)
    assert os.waitpid(process, 0)[1] == 0
    assert torch.equal(cache.gather(torch.arange(9)), rows(9))
    cache.append(torch.tensor([3]), -rows(1))
    assert torch.equal(cache.gather(torch.tensor([3])), -rows(1))
    disk.stored.keep()


def forked_reader(folder: str, moment: str) -> None:
    """A child forked while rows are read ahead ("ahead"), or after that ("after"), reads; what it may not is refused."""
    cache = ActivationCache(9, SHAPE, codec="fp32", device=CPU, budgets=MOSTLY_ON_DISK, disk=disk_in(Path(folder)))
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
        for change in (lambda: cache.append(torch.tensor([0, 8]), rows(2)), cache.save):
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
