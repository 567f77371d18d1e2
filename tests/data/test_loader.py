from __future__ import annotations

import gc
import multiprocessing
import os
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.utils.data import BatchSampler, DataLoader, RandomSampler, Subset, TensorDataset, WeightedRandomSampler

from learndrop_ext import CacheConfig, DropScheduler, Fixed


def data(count: int = 22) -> TensorDataset:
    return TensorDataset(torch.arange(count * 12, dtype=torch.float32).view(count, 3, 2, 2) / 100, torch.arange(count))


def scheduler(loader: DataLoader[Any], **options: Any) -> DropScheduler:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 4, 1), nn.ReLU(), nn.Conv2d(4, 4, 1), nn.Flatten(), nn.Linear(16, 30))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    return DropScheduler(model, optimizer, loader, **({"policy": Fixed({1: 1}), "cache": "fp32"} | options))


def labels(loader: Any, drop: DropScheduler | None = None) -> list[list[int]]:
    found = []
    for x, y in loader:
        if drop is not None:
            drop.model(x)
        found.append(y.tolist())
    return found


LOADERS = {
    "sequential": lambda d: DataLoader(d, batch_size=5),
    "drop_last": lambda d: DataLoader(d, batch_size=5, drop_last=True),
    "shuffle": lambda d: DataLoader(d, batch_size=5, shuffle=True),
    "generator": lambda d: DataLoader(d, batch_size=5, shuffle=True, generator=torch.Generator().manual_seed(3)),
    "weighted": lambda d: DataLoader(d, batch_size=5, sampler=WeightedRandomSampler(torch.arange(22.0), 17)),
    "batch_sampler": lambda d: DataLoader(d, batch_sampler=BatchSampler(RandomSampler(d), 7, drop_last=True)),
    "subset": lambda d: DataLoader(Subset(d, [4, 8, 12, 3, 1]), batch_size=2),
    "workers": lambda d: DataLoader(d, batch_size=5, shuffle=True, num_workers=1),
}


@pytest.mark.parametrize("kind", LOADERS)
def test_the_order_is_the_users_before_and_after_a_drop(kind: str) -> None:
    torch.manual_seed(4)
    plain = LOADERS[kind](data())
    wanted = [labels(plain) for _ in range(3)]
    drop = scheduler(LOADERS[kind](data()))
    assert len(drop.loader) == len(plain)
    torch.manual_seed(4)
    if drop.loader.user.generator is not None:
        drop.loader.user.generator.manual_seed(3)
    got = [labels(drop.loader, drop)]
    drop.step()
    assert drop.prefix == 1
    got += [labels(drop.loader, drop) for _ in range(2)]
    assert got == wanted


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


def test_rows_are_those_of_their_samples() -> None:
    drop = scheduler(DataLoader(data(), batch_size=5, shuffle=True))
    labels(drop.loader, drop)
    drop.step()
    images = data().tensors[0]
    for _ in range(2):
        for x, y in drop.loader:
            with torch.no_grad():
                assert torch.equal(x, drop.chain.prefix(1).eval()(images[y]))


def test_a_collate_fn_of_the_users_is_used() -> None:
    def collate(samples: list[Any]) -> tuple[torch.Tensor, dict[str, Any]]:
        return torch.stack([x for x, _ in samples]), {
            "y": torch.stack([y for _, y in samples]),
            "tag": ["a"] * len(samples),
        }

    drop = scheduler(DataLoader(data(), batch_size=4, collate_fn=collate))
    for _ in range(2):
        for x, rest in drop.loader:
            drop.model(x)
            assert rest["tag"] == ["a"] * len(x)
        if drop.prefix == 0:
            drop.step()


def test_flip_and_shift_move_rows_on_the_way_out() -> None:
    config = CacheConfig(codec="fp32", flip=True, shift=1)
    drop = scheduler(DataLoader(data(), batch_size=22), cache=config)
    labels(drop.loader, drop)
    drop.step()
    labels(drop.loader, drop)
    cache = drop.rows.cache
    assert cache is not None
    still = cache.gather(torch.arange(22))
    moved = next(iter(drop.loader))[0]
    kinds = set()
    for row, image in zip(moved, still, strict=True):
        for flip in (False, True):
            for dy in (-1, 0, 1):
                for dx in (-1, 0, 1):
                    base = image.flip(-1) if flip else image
                    wanted = torch.zeros_like(base)
                    for y in range(2):
                        for x in range(2):
                            if 0 <= y - dy < 2 and 0 <= x - dx < 2:
                                wanted[:, y, x] = base[:, y - dy, x - dx]
                    if torch.equal(row, wanted):
                        kinds.add((flip, dy, dx))
                        break
    assert len(kinds) > 6


def test_a_sampler_that_names_an_id_outside_the_dataset_is_refused() -> None:
    class Bad:
        def __iter__(self) -> Iterator[int]:
            return iter([0, 1, 22])

        def __len__(self) -> int:
            return 3

    drop = scheduler(DataLoader(data(), batch_size=3, sampler=Bad()))
    with pytest.raises(IndexError, match=r"samples of the dataset, within 0..21, got 22"):
        next(iter(drop.loader))


class Growing(TensorDataset):
    """Some samples first, more later."""

    size = 14

    def __len__(self) -> int:
        return self.size


@pytest.mark.parametrize("workers", [0, 1])
def test_a_dataset_that_grows_is_followed(workers: int) -> None:
    images = data().tensors[0]
    dataset = Growing(*data().tensors)
    drop = scheduler(DataLoader(dataset, batch_size=4, shuffle=True, num_workers=workers))
    for size in (14, 14, 18, 18, 22, 22):
        dataset.size = size
        drawn = []
        for x, y in drop.loader:
            drop.model(x)
            drawn += y.tolist()
            with torch.no_grad():
                torch.testing.assert_close(x, drop.chain.prefix(drop.prefix).eval()(images[y]))
        assert sorted(drawn) == list(range(size))
        drop.step()
    assert drop.prefix == 1
    assert int(drop.rows.cache.filled.sum()) == 22


def test_a_dataset_that_shrinks_is_refused() -> None:
    dataset = Growing(*data().tensors)
    drop = scheduler(DataLoader(dataset, batch_size=5))
    labels(drop.loader, drop)
    dataset.size = 13
    with pytest.raises(RuntimeError, match=r"dataset must keep its 14 samples, or get more, got 13"):
        next(iter(drop.loader))


def test_loaders_without_ids_are_refused() -> None:
    class Own(DataLoader[Any]):
        def __iter__(self) -> Any:
            return iter([])

    class NoLength(TensorDataset):
        __len__ = None  # type: ignore[assignment]

    with pytest.raises(TypeError, match=r"got Own with an __iter__ of its own"):
        scheduler(Own(data(), batch_size=2))
    with pytest.raises(ValueError, match=r"must have samples, got an empty dataset"):
        scheduler(DataLoader(TensorDataset(torch.zeros(0, 3, 2, 2), torch.zeros(0)), batch_size=2))


def test_an_entry_that_is_not_per_sample_is_refused() -> None:
    def collate(samples: list[Any]) -> tuple[torch.Tensor, torch.Tensor]:
        return torch.stack([x for x, _ in samples]), torch.zeros(3)

    loader = DataLoader(data(), batch_size=4, collate_fn=collate)
    with pytest.raises(ValueError, match=r"a tensor of 22 rows .* got a tensor \[3\] at batch\[1\]"):
        scheduler(loader)


def drawn(loader: Any, drop: DropScheduler, stop: int | None = None) -> list[tuple[int, torch.Tensor]]:
    """The samples of an epoch that is broken off after `stop` batches, with what the loader gave."""
    found = []
    for i, (x, y) in enumerate(loader):
        if i == stop:
            break
        drop.model(x)
        found += list(zip(y.tolist(), x, strict=True))
    return found


def assert_rows(found: list[tuple[int, torch.Tensor]], drop: DropScheduler, k: int) -> None:
    images = data().tensors[0]
    with torch.no_grad():
        wanted = drop.chain.prefix(k).eval()(images)
    for label, row in found:
        torch.testing.assert_close(row, wanted[label])


@pytest.mark.parametrize("workers", [0, 1])
@pytest.mark.parametrize("persistent", [False, True])
def test_epochs_that_are_broken_off_lose_nothing(workers: int, persistent: bool) -> None:
    if persistent and not workers:
        pytest.skip("persistent_workers wants workers")
    loader = DataLoader(
        data(), batch_size=4, shuffle=True, num_workers=workers, persistent_workers=persistent, prefetch_factor=None
    )
    drop = scheduler(loader, policy=Fixed({1: 1, 3: 2}))
    for stop in (2, 3, 1, 2, 4, None, None):
        k = drop.prefix
        found = drawn(drop.loader, drop, stop)
        assert len(found) == min(22, 4 * (stop or 9))
        assert len({label for label, _ in found}) == len(found)
        assert_rows(found, drop, k)
        drop.step()
    assert drop.prefix == 2
    assert int(drop.rows.cache.filled.sum()) == 22


class Dies(TensorDataset):
    """A worker that reads sample 13 while the flag is there is gone."""

    flag: Path

    def __getitem__(self, index: int) -> Any:
        if index == 13 and torch.utils.data.get_worker_info() is not None and self.flag.exists():
            os._exit(1)
        return super().__getitem__(index)

    __getitems__ = None


# The loader of a dead worker complains when it is deleted.
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
def test_an_epoch_that_a_dead_worker_ends_can_be_begun_again(tmp_path: Path) -> None:
    dataset = Dies(*data().tensors)
    dataset.flag = tmp_path / "flag"
    drop = scheduler(DataLoader(dataset, batch_size=4, num_workers=1))
    labels(drop.loader, drop)
    drop.step()
    dataset.flag.touch()
    # What torch says of it depends on what the worker was doing.
    with pytest.raises((RuntimeError, OSError)):
        labels(drop.loader, drop)
    assert not bool(drop.rows.cache.filled[13:].any())
    dataset.flag.unlink()
    for _ in range(2):
        found = drawn(drop.loader, drop)
        assert [label for label, _ in found] == list(range(22))
        assert_rows(found, drop, 1)


def test_one_iteration_at_a_time() -> None:
    drop = scheduler(DataLoader(data(), batch_size=4))
    labels(drop.loader, drop)
    drop.step()
    first = iter(drop.loader)
    next(first)
    # A look at one batch, as in a test of the loop, ends the iteration before it.
    assert next(iter(drop.loader))[1].tolist() == [0, 1, 2, 3]
    with pytest.raises(RuntimeError, match=r"drop.loader: wanted one iteration at a time"):
        next(first)
    found = drawn(drop.loader, drop)
    assert [label for label, _ in found] == list(range(22))
    assert_rows(found, drop, 1)


@pytest.mark.parametrize("workers", [0, 1])
def test_an_iteration_goes_on_through_drops_and_undrop(workers: int) -> None:
    drop = scheduler(
        DataLoader(data(), batch_size=4, num_workers=workers), policy=Fixed({1: 1, 2: 2, 3: 2}), views=None
    )
    found: list[tuple[int, torch.Tensor]] = []
    prefixes = []
    for epoch in range(3):
        for i, (x, y) in enumerate(drop.loader):
            drop.model(x)
            assert_rows(list(zip(y.tolist(), x, strict=True)), drop, drop.prefix)
            prefixes.append(drop.prefix)
            found += list(zip(y.tolist(), x, strict=True))
            if (epoch, i) in ((0, 2), (1, 3)):
                drop.step()
            if (epoch, i) == (2, 1):
                drop.undrop()
    assert [label for label, _ in found] == 3 * list(range(22))
    assert prefixes == [0] * 3 + [1] * 7 + [2] * 4 + [0] * 4


def test_undrop_in_an_epoch_that_reads_some_samples_gives_whole_batches_of_images() -> None:
    order = [0, 1, 2, 3]

    class Chosen:
        def __iter__(self) -> Iterator[int]:
            return iter(order)

        def __len__(self) -> int:
            return len(order)

    drop = scheduler(DataLoader(data(), batch_size=4, sampler=Chosen()))
    labels(drop.loader, drop)
    drop.step()
    labels(drop.loader, drop)
    # Of each batch two samples have rows and two have not, and the second is planned before undrop().
    order[:] = [0, 10, 1, 11, 2, 12, 3, 13]
    planner = drop.loader.batches.planner
    drop.loader.batches.seen[:] = True
    images = data().tensors[0]
    loader = iter(drop.loader)
    next(loader)
    plan = next(planner.draw(iter([[2, 12, 3, 13]])))
    assert plan.read.tolist() == [12, 13]
    drop.undrop()
    read = drop.rows.read(plan.read, 0)
    x, y = drop.loader._batch(plan, read)
    assert y.tolist() == [2, 12, 3, 13]
    assert torch.equal(x, images[y])


def test_ids_that_repeat_in_a_batch() -> None:
    class Repeats:
        def __iter__(self) -> Iterator[list[int]]:
            yield from [[3, 3, 1, 3], [1, 5, 5, 5], [7, 1, 7, 2]]

        def __len__(self) -> int:
            return 3

    drop = scheduler(DataLoader(data(), batch_sampler=Repeats()), policy=Fixed({1: 1, 3: 2}))
    for k in (0, 1, 1, 2, 2):
        found = drawn(drop.loader, drop)
        assert [label for label, _ in found] == [3, 3, 1, 3, 1, 5, 5, 5, 7, 1, 7, 2]
        assert_rows(found, drop, k)
        drop.step()


@pytest.mark.parametrize("drop_last", [True, False])
def test_a_last_batch_of_one_sample(drop_last: bool) -> None:
    drop = scheduler(DataLoader(data(), batch_size=7, drop_last=drop_last, shuffle=True), policy=Fixed({1: 1, 3: 2}))
    for k in (0, 1, 1, 2, 2):
        found = drawn(drop.loader, drop)
        assert len(found) == (21 if drop_last else 22)
        assert_rows(found, drop, k)
        drop.step()


def test_time_spent_on_a_batch_is_counted() -> None:
    drop = scheduler(DataLoader(data(), batch_size=11))
    for _, (x, _) in zip(range(2), drop.loader, strict=False):
        drop.model(x)
        time.sleep(0.05)
    samples, seconds = drop.loader.ledger
    assert samples == 22
    assert seconds >= 0.05


def test_workers_end_with_the_scheduler() -> None:
    gc.collect()
    gc.disable()
    try:
        drop = scheduler(DataLoader(data(), batch_size=5, num_workers=1, persistent_workers=True), policy=Fixed({}))
        labels(drop.loader)
        workers = multiprocessing.active_children()
        assert workers
        del drop.loader, drop
        assert not any(worker.is_alive() for worker in workers)
    finally:
        gc.enable()
