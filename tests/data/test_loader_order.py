"""The order of the samples is the user's, with and without drops."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from small_loading import data, labels, scheduler
from torch.utils.data import BatchSampler, DataLoader, RandomSampler, Subset, WeightedRandomSampler

from learndrop_ext import CacheConfig, Fixed

LOADERS = {
    "sequential": lambda d: DataLoader(d, batch_size=5),
    "drop_last": lambda d: DataLoader(d, batch_size=5, drop_last=True),
    "shuffle": lambda d: DataLoader(d, batch_size=5, shuffle=True),
    "generator": lambda d: DataLoader(d, batch_size=5, shuffle=True, generator=torch.Generator().manual_seed(3)),
    "weighted": lambda d: DataLoader(d, batch_size=5, sampler=WeightedRandomSampler(torch.arange(22.0), 17)),
    "replacement": lambda d: DataLoader(d, batch_size=5, sampler=RandomSampler(d, replacement=True, num_samples=30)),
    "batch_sampler": lambda d: DataLoader(d, batch_sampler=BatchSampler(RandomSampler(d), 7, drop_last=True)),
    "subset": lambda d: DataLoader(Subset(d, [4, 8, 12, 3, 1]), batch_size=2),
    "workers": lambda d: DataLoader(d, batch_size=5, shuffle=True, num_workers=1),
}


@pytest.mark.parametrize("kind", LOADERS)
def test_the_order_and_the_random_state_are_the_users_before_and_after_a_drop(kind: str) -> None:
    torch.manual_seed(4)
    plain = LOADERS[kind](data())
    wanted = [labels(plain) for _ in range(4)]
    state = torch.get_rng_state()
    user = LOADERS[kind](data())
    drop = scheduler(user)
    assert len(drop.loader) == len(plain)
    torch.manual_seed(4)
    if user.generator is not None:
        user.generator.manual_seed(3)
    got = [labels(drop.loader, drop)]
    drop.step()
    assert drop.prefix == 1
    got += [labels(drop.loader, drop) for _ in range(3)]
    assert got == wanted
    assert torch.equal(torch.get_rng_state(), state)
    if user.generator is not None:
        assert torch.equal(user.generator.get_state(), plain.generator.get_state())


@pytest.mark.parametrize("workers", [0, 1])
def test_persistent_workers_give_the_order_of_a_run_without_drops(workers: int) -> None:
    def loader() -> DataLoader[Any]:
        return DataLoader(
            data(),
            batch_size=5,
            shuffle=True,
            generator=torch.Generator().manual_seed(3),
            num_workers=workers,
            persistent_workers=workers > 0,
        )

    plain = loader()
    wanted = [labels(plain) for _ in range(5)]
    drop = scheduler(loader(), policy=Fixed({2: 1, 4: 2}))
    got = []
    for _ in range(5):
        got.append(labels(drop.loader, drop))
        drop.step()
    assert got == wanted
    assert drop.prefix == 2


def test_a_resumed_run_with_persistent_workers_has_the_order_of_a_resumed_plain_run(tmp_path: Path) -> None:
    def loader() -> DataLoader[Any]:
        generator = torch.Generator().manual_seed(3)
        return DataLoader(
            data(), batch_size=5, shuffle=True, generator=generator, num_workers=1, persistent_workers=True
        )

    plain = loader()
    wanted = [labels(plain) for _ in range(3)]
    cache = CacheConfig(codec="fp32", disk_bytes=1 << 20, disk_dir=str(tmp_path))
    first = scheduler(DataLoader(data(), batch_size=5), cache=cache)
    for _ in range(2):
        labels(first.loader, first)
        first.step()
    second = scheduler(loader(), cache=cache)
    second.load_state_dict(first.state_dict())
    # All rows are there: no worker is ever started.
    assert [labels(second.loader, second) for _ in range(3)] == wanted
