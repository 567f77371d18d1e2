from __future__ import annotations

from pathlib import Path

import torch
from torch import distributed, nn
from torch.multiprocessing import spawn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader, DistributedSampler, TensorDataset

from learndrop_ext import Decision, DropScheduler, Situation
from learndrop_ext.distributed import from_rank_zero, share_buffers


def test_alone_nothing_is_shared() -> None:
    buffer = torch.ones(2)
    assert from_rank_zero((1, "a")) == (1, "a")
    share_buffers([buffer])
    assert buffer.tolist() == [1, 1]


def train(rank: int, store: str, out: str) -> None:
    """One of two ranks; each has a policy of its own mind, and rank 0's counts."""
    torch.set_num_threads(1)
    distributed.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=2)
    torch.manual_seed(0)
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
    ids = drop.rows.slots.drawn()
    assert drop.rows.cache is not None
    rows = drop.rows.cache.gather(drop.rows.slots.places(ids, 0))
    with torch.no_grad():
        wanted = drop.chain.prefix(1).eval()(data.tensors[0][ids])
    torch.save(kept | {"right": torch.allclose(rows, wanted, atol=1e-6), "rows": len(ids)}, f"{out}/{rank}.pt")
    distributed.destroy_process_group()


def test_two_ranks_under_ddp_drop_alike(tmp_path: Path) -> None:
    spawn(train, (str(tmp_path / "store"), str(tmp_path)), nprocs=2)
    first, second = (torch.load(tmp_path / f"{rank}.pt", weights_only=True) for rank in range(2))
    assert first["prefix"] == second["prefix"] == 1
    assert first["reason"] == second["reason"]
    assert first["reason"].startswith("rank 0 said so")
    assert first["right"]
    assert second["right"]
    assert first["rows"] >= 12
    for name, value in first["model"].items():
        assert torch.equal(value, second["model"][name]), name
