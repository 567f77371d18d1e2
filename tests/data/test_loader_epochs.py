"""Epochs that end early, overlap, or go on through drops, and datasets that grow between them."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from small_loading import assert_rows, data, drawn, labels, scheduler
from torch.utils.data import DataLoader, TensorDataset

from learndrop_ext import Fixed


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


def test_older_rows_are_freed_though_the_iteration_that_computed_the_new_ones_never_ended() -> None:
    drop = scheduler(DataLoader(data(), batch_size=4), policy=Fixed({1: 1, 2: 2}))
    for _ in range(2):
        labels(drop.loader, drop)
        drop.step()
    held = iter(drop.loader)
    for _ in range(len(drop.loader)):
        drop.model(next(held)[0])
    assert drop.rows._older is not None
    drop.step()
    after = iter(drop.loader)
    next(after)
    assert drop.rows._older is None
    with pytest.raises(RuntimeError, match=r"drop.loader: wanted one iteration at a time"):
        next(held)


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
