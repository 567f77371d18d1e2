"""The order of the samples is the user's, with and without drops."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from small_loading import data, given, labels, scheduler
from torch.utils.data import (
    BatchSampler,
    ConcatDataset,
    DataLoader,
    RandomSampler,
    Subset,
    SubsetRandomSampler,
    WeightedRandomSampler,
)

from learndrop_ext import CacheConfig, Fixed
from learndrop_ext.rows.rowset import RowSet

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


@pytest.mark.parametrize("given", [1, 4, 5])
def test_an_epoch_that_is_broken_off_leaves_the_generator_as_without_a_drop(given: int, tmp_path: Path) -> None:
    def orders(drops: dict[int, int]) -> list[list[int]]:
        loader = LOADERS["generator"](data())
        config = CacheConfig(store=tmp_path, budget_bytes=0, key=str)  # rows of the slow tier are read ahead
        drop = scheduler(loader, policy=Fixed(drops), cache=config)
        found = []
        for epoch in range(5):
            taken: list[int] = []
            for i, (x, y) in enumerate(drop.loader, 1):
                drop.model(x).sum().backward()
                taken += y.tolist()
                if epoch == 3 and i == given:
                    break
            drop.step()
            found.append(taken)
        return found

    assert orders({1: 1}) == orders({})


def seeded() -> torch.Generator:
    return torch.Generator().manual_seed(3)


WITH_GENERATOR = {
    "shuffle": lambda d, g: DataLoader(d, batch_size=2, shuffle=True, generator=g),
    "more samples than there are": lambda d, g: DataLoader(d, batch_size=2, sampler=RandomSampler(d, False, 60, g)),
    "replacement": lambda d, g: DataLoader(d, batch_size=2, sampler=RandomSampler(d, True, 60, g)),
    "weighted": lambda d, g: DataLoader(d, 2, sampler=WeightedRandomSampler(torch.arange(22.0), 17, generator=g)),
    "subset": lambda d, g: DataLoader(d, batch_size=2, sampler=SubsetRandomSampler(list(range(22)), g)),
}


@pytest.mark.parametrize("kind", WITH_GENERATOR)
@pytest.mark.parametrize("stop", [1, 10, 11, 12])
def test_random_numbers_are_drawn_when_they_are_drawn_without_drops(kind: str, stop: int) -> None:
    """Rows are looked up for many batches at once, of 11 in an epoch or more: nobody can see it in the random state."""

    def states(loader: Any, generator: torch.Generator) -> list[torch.Tensor]:
        found = []
        for i, _ in enumerate(loader):
            found.append(torch.cat([generator.get_state(), torch.get_rng_state()]))
            if i == stop:
                break
        return [*found, generator.get_state(), torch.get_rng_state()]

    generator = seeded()
    torch.manual_seed(4)
    wanted = states(WITH_GENERATOR[kind](data(), generator), generator)
    generator = torch.Generator()
    drop = scheduler(WITH_GENERATOR[kind](data(), generator), policy=Fixed({0: 1}))
    for _ in range(9):
        labels(drop.loader, drop)
    assert not drop.loader.batches.reads_images()
    generator.manual_seed(3)
    torch.manual_seed(4)
    got = states(drop.loader, generator)
    assert len(got) == len(wanted)
    assert all(torch.equal(one, other) for one, other in zip(got, wanted, strict=True))


def test_rows_of_an_epoch_are_looked_up_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    drop = scheduler(DataLoader(ConcatDataset([data()] * 4), batch_size=1, shuffle=True), policy=Fixed({0: 1}))
    labels(drop.loader, drop)
    looked: list[int] = []
    locate = RowSet.locate
    monkeypatch.setattr(RowSet, "locate", lambda rows, ids: (looked.append(len(ids)), locate(rows, ids))[1])
    labels(drop.loader, drop)
    assert looked == [88, 87, 1]  # whether images are read; the batches but the last; the last


def test_a_sampler_of_the_users_own_is_asked_for_a_batch_when_it_is_its_turn() -> None:
    """It may choose the next batch by the loss of this one."""
    asked: list[int] = []

    class Counted:
        def __iter__(self) -> Iterator[list[int]]:
            asked.clear()
            for i in range(0, 22, 2):
                asked.append(i)
                yield [i, i + 1]

    drop = scheduler(DataLoader(data(), batch_sampler=Counted()), policy=Fixed({0: 1}))
    labels(drop.loader, drop)
    for i, (x, y) in enumerate(drop.loader):
        given(drop, x)
        assert y.tolist() == [2 * i, 2 * i + 1]
        assert len(asked) == i + 1


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
    cache = CacheConfig(codec="fp32", store_bytes=1 << 20, store=tmp_path)
    first = scheduler(DataLoader(data(), batch_size=5), cache=cache)
    for _ in range(2):
        labels(first.loader, first)
        first.step()
    second = scheduler(loader(), cache=cache)
    second.load_state_dict(first.state_dict())
    # All rows are there: no worker is ever started.
    assert [labels(second.loader, second) for _ in range(3)] == wanted
