from __future__ import annotations

import contextlib
import datetime
import gc
import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from processes import FORKS
from torch import distributed, nn
from torch.multiprocessing import start_processes
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader, DistributedSampler, TensorDataset

from learndrop_ext import CacheConfig, Decision, DropScheduler, Fixed, Situation
from learndrop_ext.data.share import Share
from learndrop_ext.distributed import from_rank_zero, share_buffers, smallest_of_ranks
from learndrop_ext.guards import PROBES


def test_alone_nothing_is_shared() -> None:
    buffer = torch.ones(2)
    assert from_rank_zero((1, "a")) == (1, "a")
    assert smallest_of_ranks((3, 0, 2)) == (3, 0, 2)
    share_buffers([buffer])
    assert buffer.tolist() == [1, 1]


def begin(rank: int, store: str, *, seconds: float = 60.0) -> None:
    torch.set_num_threads(1)
    timeout = datetime.timedelta(seconds=seconds)
    distributed.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=2, timeout=timeout)
    torch.manual_seed(0)


def run_on_two(function: Callable[..., None], arguments: tuple[object, ...]) -> None:
    start_processes(function, arguments, nprocs=2, start_method=FORKS.get_start_method())


def in_group(rank: int, work: Callable[..., None], store: str, *arguments: str) -> None:
    """Run `work` on one of two ranks, and end the group's threads before the interpreter ends.

    Threads of gloo that are still there then may abort the process, and DistributedDataParallel holds its group.
    """
    begin(rank, store)
    work(rank, *arguments)
    gc.collect()
    distributed.destroy_process_group()


def train(rank: int, out: str) -> None:
    """One of two ranks; each has a policy of its own mind, and rank 0's counts."""
    model = nn.Sequential(
        *(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Conv2d(4, 4, 3), nn.ReLU()),
        *(nn.Flatten(), nn.Linear(64, 5)),
    )
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
    data = TensorDataset(torch.randn(24, 3, 8, 8), torch.randint(0, 5, (24,)))
    sampler = DistributedSampler(data, 2, rank)
    loader = DataLoader(data, batch_size=4, sampler=sampler)

    def policy(situation: Situation) -> Decision:
        return Decision(1 if rank == 0 else 2, f"rank {rank} said so")

    drop = DropScheduler(model, optimizer, loader, policy=policy, wrap=DistributedDataParallel, cache="fp32")
    for epoch in range(3):
        sampler.set_epoch(epoch)
        for x, y in drop.loader:
            optimizer.zero_grad()
            nn.functional.cross_entropy(drop.model(x), y).backward()
            optimizer.step()
        drop.step()
    kept = {"model": model.state_dict(), "reason": drop.history[0].reason, "prefix": drop.prefix}
    ids = drop._rows.slots.drawn()
    assert drop._rows.cache is not None
    rows = drop._rows.cache.gather(drop._rows.slots.places(ids, 0))
    with torch.no_grad():
        wanted = drop.chain.prefix(1).eval()(data.tensors[0][ids])
    torch.save(kept | {"right": torch.allclose(rows, wanted, atol=1e-6), "rows": len(ids)}, f"{out}/{rank}.pt")


def test_two_ranks_under_ddp_drop_alike(tmp_path: Path) -> None:
    run_on_two(in_group, (train, str(tmp_path / "store"), str(tmp_path)))
    first, second = (torch.load(tmp_path / f"{rank}.pt", weights_only=True) for rank in range(2))
    assert first["prefix"] == second["prefix"] == 1
    assert first["reason"] == second["reason"]
    assert first["reason"].startswith("rank 0 said so")
    assert first["right"]
    assert second["right"]
    assert first["rows"] >= 12
    for name, value in first["model"].items():
        assert torch.equal(value, second["model"][name]), name


def train_accumulating(rank: int, out: str, cache: str) -> None:
    """One of two ranks, which draw different samples, and step after each second batch."""
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(144, 5))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    data = TensorDataset(torch.randn(24, 3, 8, 8), torch.randint(0, 5, (24,)))
    loader = DataLoader(data, batch_size=4, sampler=DistributedSampler(data, 2, rank))
    with DropScheduler(
        model,
        optimizer,
        loader,
        policy=Fixed({1: 1}),
        wrap=DistributedDataParallel,
        cache=None if cache == "none" else cache,
    ) as drop:
        gradients = []
        for _ in range(3):
            for i, (x, y) in enumerate(drop.loader):
                with contextlib.nullcontext() if i % 2 else drop.model.no_sync():
                    nn.functional.cross_entropy(drop.model(x), y).backward()
                gradients.append(model[3].weight.grad.clone())
                if i % 2:
                    optimizer.step()
                    optimizer.zero_grad()
            drop.step()
    torch.save({"model": model.state_dict(), "gradients": gradients}, f"{out}/{rank}.pt")


@pytest.mark.parametrize("cache", ["none", "fp32"])
def test_ranks_train_the_same_weights_with_and_without_rows_and_accumulate_gradients(
    tmp_path: Path, cache: str
) -> None:
    run_on_two(in_group, (train_accumulating, str(tmp_path / "store"), str(tmp_path), cache))
    first, second = (torch.load(tmp_path / f"{rank}.pt", weights_only=True) for rank in range(2))
    for name, value in first["model"].items():
        assert torch.equal(value, second["model"][name]), name
    agree = [torch.equal(*pair) for pair in zip(first["gradients"], second["gradients"], strict=True)]
    assert agree == [bool(i % 2) for epoch in range(3) for i in range(len(agree) // 3)]


def keep_within(rank: int, out: str) -> None:
    """One of two ranks, whose budgets hold all rows, or those of a single image."""
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(144, 5))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    data = TensorDataset(torch.randn(24, 3, 8, 8), torch.randint(0, 5, (24,)))
    loader = DataLoader(data, batch_size=4, sampler=DistributedSampler(data, 2, rank))
    cache = CacheConfig(codec="fp32", budget_bytes=(10**6, 640)[rank])
    drop = DropScheduler(model, optimizer, loader, policy=Fixed({1: 1}), cache=cache)
    for x, y in drop.loader:
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(x), y).backward()
        optimizer.step()
    reason = drop.step().reason
    torch.save({"reason": reason, "prefix": drop.prefix, "cut": drop._rows.cut}, f"{out}/{rank}.pt")


def test_rows_are_kept_where_they_fit_on_every_rank(tmp_path: Path) -> None:
    run_on_two(in_group, (keep_within, str(tmp_path / "store"), str(tmp_path)))
    for rank in range(2):
        seen = torch.load(tmp_path / f"{rank}.pt", weights_only=True)
        assert (seen["prefix"], seen["cut"]) == (1, 0)
        assert seen["reason"] == "set by hand; no rows: they take 7.68 kB and the budget is 640 bytes"


class SyncedNorm(nn.BatchNorm2d):
    """A batch norm over the samples of all ranks, as torch.nn.SyncBatchNorm, which wants a GPU."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if self.training and not torch.is_grad_enabled():
            parts = [torch.empty_like(x) for _ in range(2)]
            distributed.all_gather(parts, x)
            return super().forward(torch.cat(parts))[: len(x)]
        return super().forward(x)


def recalibrate(rank: int, out: str) -> None:
    """One of two ranks, which can repeat four and three of their calls."""
    model = nn.Sequential(nn.Conv2d(3, 4, 3), SyncedNorm(4), nn.ReLU(), nn.Flatten(), nn.Linear(144, 5))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    data = TensorDataset(torch.randn(32, 3, 8, 8), torch.arange(32) % 5)
    loader = DataLoader(data, batch_size=4, sampler=DistributedSampler(data, 2, rank))
    drop = DropScheduler(model, optimizer, loader, policy=Fixed({1: 1}, recalibrate=True), wrap=DistributedDataParallel)
    for x, y in drop.loader:
        nn.functional.cross_entropy(drop.model(x), y).backward()
        optimizer.step()
    if rank:
        x.zero_()
    before = model[1].running_mean.clone()
    reason = drop.step().reason
    torch.save({"reason": reason, "before": before, "now": model[1].running_mean}, f"{out}/{rank}.pt")


def test_ranks_recalibrate_batch_norms_together(tmp_path: Path) -> None:
    run_on_two(in_group, (recalibrate, str(tmp_path / "store"), str(tmp_path)))
    first, second = (torch.load(tmp_path / f"{rank}.pt", weights_only=True) for rank in range(2))
    assert first["reason"] == second["reason"]
    assert first["reason"].endswith("; batch norms recalibrated")
    assert torch.equal(first["now"], second["now"])
    assert not torch.equal(first["now"], first["before"])


class Counted(TensorDataset):
    """Images with the ids that were read, one at a time."""

    __getitems__ = None

    def __init__(self, count: int = 24) -> None:
        generator = torch.Generator().manual_seed(0)
        super().__init__(torch.randn(count, 3, 8, 8, generator=generator), torch.arange(count) % 5, torch.arange(count))
        self.read: list[int] = []

    def __getitem__(self, index: int) -> Any:
        self.read.append(index)
        return super().__getitem__(index)


def share(rank: int, out: str, partition: str) -> None:
    """One of two ranks: what it draws and reads in each epoch, with a drop after the first and after the third."""
    model = nn.Sequential(
        *(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Conv2d(4, 4, 3), nn.ReLU(), nn.Conv2d(4, 4, 1), nn.ReLU()),
        *(nn.Flatten(), nn.Linear(64, 5)),
    )
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    data = Counted(22)
    sampler = DistributedSampler(data, 2, rank)
    loader = DataLoader(data, batch_size=4, sampler=sampler)
    cache = CacheConfig(codec="fp32", partition=partition, seed=5)
    drop = DropScheduler(
        model, optimizer, loader, policy=Fixed({1: 1, 3: 2}), wrap=DistributedDataParallel, cache=cache
    )
    drawn, read, made = [], [], []
    for epoch in range(6):
        sampler.set_epoch(epoch)
        data.read.clear()
        batches = []
        for x, y, ids in drop.loader:
            optimizer.zero_grad()
            nn.functional.cross_entropy(drop.model(x), y).backward()
            optimizer.step()
            batches.append(ids.tolist())
        drawn.append(batches)
        read.append(list(data.read))
        made.append(drop._rows.counts[:2])
        drop.step()
        if epoch == 4:
            drop.undrop()
    kept = {
        "drawn": drawn,
        "read": read,
        "made": made,
        "cache": drop.history[1].cache_bytes // drop.history[1].row_bytes,
    }
    torch.save(kept | {"model": model.state_dict()}, f"{out}/{rank}.pt")


def users_order(rank: int, epoch: int) -> list[list[int]]:
    sampler = DistributedSampler(range(22), 2, rank)  # type: ignore[arg-type]
    sampler.set_epoch(epoch)
    ids = list(sampler)
    return [ids[i : i + 4] for i in range(0, len(ids), 4)]


def test_each_rank_keeps_a_share_and_draws_from_it(tmp_path: Path) -> None:
    run_on_two(in_group, (share, str(tmp_path / "store"), str(tmp_path), "share"))
    ranks = [torch.load(tmp_path / f"{rank}.pt", weights_only=True) for rank in range(2)]
    shares = []
    for rank, seen in enumerate(ranks):
        # The user's order up to the first whole epoch after the drop, and again once nothing is dropped.
        for epoch in (0, 1, 5):
            assert seen["drawn"][epoch] == users_order(rank, epoch)
        mine = sorted(i for batch in seen["drawn"][1] for i in batch)
        shares.append(mine)
        assert len(mine) == len(set(mine)) == 11
        assert seen["cache"] == 12  # three batches of four were expected
        orders = seen["drawn"][2:5]
        for order in orders:
            assert [len(batch) for batch in order] == [4, 4, 3]
            assert sorted(i for batch in order for i in batch) == mine
        assert len({str(order) for order in [seen["drawn"][1], *orders]}) == 4
        # Its own images are read once; from then on a few are read again at each epoch, after the second drop too.
        assert sorted(seen["read"][1]) == mine
        assert all(len(read) <= PROBES and set(read) <= set(mine) for read in seen["read"][2:5])
        assert seen["made"][1:5] == [(11, 0), (0, 0), (0, 11), (0, 0)]
    assert sorted(shares[0] + shares[1]) == list(range(22))
    for name, value in ranks[0]["model"].items():
        assert torch.equal(value, ranks[1]["model"][name]), name


def test_by_choice_each_rank_keeps_the_users_order_and_all_rows(tmp_path: Path) -> None:
    run_on_two(in_group, (share, str(tmp_path / "store"), str(tmp_path), "all"))
    for rank in range(2):
        seen = torch.load(tmp_path / f"{rank}.pt", weights_only=True)
        assert seen["drawn"] == [users_order(rank, epoch) for epoch in range(6)]
        before = {i for batch in seen["drawn"][1] for i in batch}
        new = {i for batch in seen["drawn"][2] for i in batch} - before
        assert new
        assert new <= set(seen["read"][2])
        assert len(seen["read"][2]) <= len(new) + PROBES
        assert seen["made"][2] == (len(new), 0)


def wait(rank: int, store: str, out: str, dies: bool) -> None:
    """Rank 1 dies, or stays away, before the decision that rank 0 waits for."""
    begin(rank, store, seconds=5.0)
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(144, 5))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    drop = DropScheduler(model, optimizer, DataLoader(Counted(8), batch_size=4), policy=Fixed({1: 1}))
    for x, y, _ in drop.loader:
        nn.functional.cross_entropy(model(x), y).backward()
        optimizer.step()
    told = Path(out) / "error"
    if rank == 1:
        while not dies and not told.exists():
            time.sleep(0.1)
        os._exit(0)
    before = time.monotonic()
    try:
        drop.step()
    except RuntimeError as error:
        told.write_text(f"{time.monotonic() - before:.0f} {drop.prefix} {error}")
    os._exit(0)


@pytest.mark.parametrize("dies", [True, False])
def test_a_rank_that_dies_or_stays_away_ends_the_others(tmp_path: Path, dies: bool) -> None:
    run_on_two(wait, (str(tmp_path / "store"), str(tmp_path), dies))
    seconds, prefix, error = (tmp_path / "error").read_text().split(" ", 2)
    assert error.startswith("drop.step: all 2 processes must decide together, and rank 0 waited in vain")
    assert int(seconds) < 30
    assert prefix == "0"


def test_a_share_is_the_first_whole_epoch_and_its_permutations() -> None:
    one = Share(seed=0, rank=0)
    broken_off = one.note([[0, 1], [2, 3], [4]], 3)
    assert [next(broken_off), next(broken_off)] == [[0, 1], [2, 3]]
    broken_off.close()
    assert one.ids is None
    # Drawn with repeats, by a sampler without a length.
    assert list(one.note([[7, 5], [5, 9], [7]], None)) == [[7, 5], [5, 9], [7]]
    assert one.ids is not None
    assert one.ids.tolist() == [7, 5, 9]
    assert list(one.note([[1]], 1)) == [[1]]
    assert one.ids.tolist() == [7, 5, 9]
    epoch = list(one.batches(1))
    assert [len(batch) for batch in epoch] == [2, 2, 1]
    flat = [i for batch in epoch for i in batch]
    assert sorted(flat[:3]) == [5, 7, 9]
    assert len(set(flat[3:])) == 2
    other = Share(seed=0, rank=1)
    list(other.note([list(range(30))], 1))
    orders = [list(other.batches(e)) for e in (1, 1, 2)]
    assert orders[0] == orders[1] != orders[2]
    one.forget()
    assert one.ids is None
