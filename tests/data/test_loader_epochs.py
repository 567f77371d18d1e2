"""Epochs that end early, overlap, or go on through drops, and datasets that grow between them."""

from __future__ import annotations

import multiprocessing
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from small_loading import assert_rows, data, drawn, given, labels, scheduler
from torch.utils.data import DataLoader, RandomSampler, TensorDataset

from learndrop_ext import CacheConfig, Fixed
from learndrop_ext.forward.images import Images


class Growing(TensorDataset):
    """Some samples first, more later."""

    size = 14

    def __len__(self) -> int:
        return self.size


@pytest.mark.parametrize("workers", [0, 1])
def test_a_dataset_that_grows_is_followed(workers: int) -> None:
    dataset = Growing(*data().tensors)
    drop = scheduler(DataLoader(dataset, batch_size=4, shuffle=True, num_workers=workers))
    for size in (14, 14, 18, 18, 22, 22):
        dataset.size = size
        found = drawn(drop.loader, drop)
        assert sorted(label for label, _ in found) == list(range(size))
        assert_rows(found, drop, drop.prefix)
        drop.step()
    assert drop.prefix == 1
    assert int(drop._rows.cache.filled.sum()) == 22


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
    assert int(drop._rows.cache.filled.sum()) == 22


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
    assert not bool(drop._rows.cache.filled[13:].any())
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
        given(drop, next(held)[0])
    assert drop._rows.older is not None
    drop.step()
    after = iter(drop.loader)
    next(after)
    assert drop._rows.older is None
    with pytest.raises(RuntimeError, match=r"drop.loader: wanted one iteration at a time"):
        next(held)


@pytest.mark.parametrize("workers", [0, 1])
def test_an_iteration_goes_on_through_drops_and_undrop(workers: int) -> None:
    drop = scheduler(DataLoader(data(), batch_size=4, num_workers=workers), policy=Fixed({1: 1, 2: 2, 3: 2}))
    labels = []
    prefixes = []
    for epoch in range(3):
        for i, (x, y) in enumerate(drop.loader):
            got = given(drop, x)
            assert_rows(list(zip(y.tolist(), got, strict=True)), drop, drop.prefix)
            prefixes.append(drop.prefix)
            labels += y.tolist()
            if (epoch, i) in ((0, 2), (1, 3)):
                drop.step()
            if (epoch, i) == (2, 1):
                drop.undrop()
    assert labels == 3 * list(range(22))
    assert prefixes == [0] * 3 + [1] * 7 + [2] * 4 + [0] * 4


@pytest.mark.parametrize("workers", [0, 1])
def test_undrop_in_an_epoch_of_rows_gives_images(workers: int) -> None:
    drop = scheduler(DataLoader(data(), batch_size=4, num_workers=workers))
    for _ in range(2):
        labels(drop.loader, drop)
        drop.step()
    images = data().tensors[0]
    loader = iter(drop.loader)
    x, y = next(loader)
    assert type(x) is Images
    drop.undrop()
    left = list(loader)
    assert torch.cat([y, *(y for _, y in left)]).tolist() == list(range(22))
    for x, y in left:
        assert type(x) is torch.Tensor
        assert torch.equal(x, images[y])
        given(drop, x)
    assert drop._base[0].weight.grad is not None


@pytest.mark.parametrize("workers", [0, 1])
def test_undrop_in_an_epoch_that_reads_some_batches_gives_whole_batches_of_images(workers: int) -> None:
    batches = [[0, 1, 2, 3], [4, 5, 6, 7]]

    class Chosen:
        def __iter__(self) -> Iterator[list[int]]:
            return iter(batches)

        def __len__(self) -> int:
            return len(batches)

    drop = scheduler(DataLoader(data(), batch_sampler=Chosen(), num_workers=workers))
    for _ in range(2):
        labels(drop.loader, drop)
        drop.step()
    # The first of these has its rows, of the second half has, the third has none.
    batches[:] = [[3, 6, 1, 4], [2, 12, 3, 13], [10, 11], [0, 1, 2, 3], [5, 7]]
    drop.loader.batches.seen[:] = True
    assert drop.loader.batches.reads_images()
    images = data().tensors[0]
    loader = iter(drop.loader)
    found = []
    for i, (x, y) in enumerate(loader):
        got = given(drop, x)
        assert_rows(list(zip(y.tolist(), got, strict=True)), drop, drop.prefix)
        found.append(y.tolist())
        if i == 0:  # the plans of the batches after this one are made
            drop.undrop()
        else:
            assert type(x) is torch.Tensor
            assert torch.equal(x, images[y])
    assert found == batches


@pytest.mark.parametrize("planned", [False, True])
def test_a_batch_of_which_some_samples_have_rows_is_read_in_part(planned: bool) -> None:
    batches = [[0, 1, 2, 3], [4, 5, 6, 7]]
    reads: list[int] = []

    class Noted(TensorDataset):
        def __getitem__(self, index: int) -> Any:
            reads.append(index)
            return super().__getitem__(index)

        __getitems__ = None

    class Chosen:
        def __iter__(self) -> Iterator[list[int]]:
            return iter(batches)

    drop = scheduler(DataLoader(Noted(*data().tensors), batch_sampler=Chosen()))
    for _ in range(2):
        labels(drop.loader, drop)
        drop.step()
    batches[:] = [[3, 6, 1, 4], [2, 12, 3, 13], [10, 11]]
    # An epoch that is known to need images reads them by the user's loader, else by number as they come.
    drop.loader.batches.seen[10:14] = planned
    assert drop.loader.batches.reads_images() is planned
    for wanted in ([12, 13, 10, 11], []):
        reads.clear()
        found = drawn(drop.loader, drop)
        assert [label for label, _ in found] == [i for batch in batches for i in batch]
        assert_rows(found, drop, 1)
        # Some samples are read again at first, to see whether they are as they were.
        assert len(reads) <= 4 + len(wanted)
        assert reads[len(reads) - len(wanted) :] == wanted


@pytest.mark.parametrize("ids", [None, [6, 14, 20]])
def test_rows_that_are_forgotten_in_an_epoch_are_not_given_to_its_later_batches(ids: list[int] | None) -> None:
    images, targets = (tensor.clone() for tensor in data().tensors)
    drop = scheduler(DataLoader(TensorDataset(images, targets), batch_size=4), policy=Fixed({0: 1}))
    for _ in range(2):
        labels(drop.loader, drop)
    found: list[tuple[int, torch.Tensor]] = []
    for i, (x, y) in enumerate(drop.loader):
        found += list(zip(y.tolist(), given(drop, x), strict=True))
        if i == 1:  # all batches of the epoch have been looked up
            changed = list(range(8, 22)) if ids is None else ids
            images[changed] += 1
            targets[changed] += 100
            drop.refresh(ids)
    assert [label for label, _ in found[:8]] == list(range(8))
    with torch.no_grad():
        rows = drop.chain.prefix(1).eval()(images)
    for i, (label, row) in enumerate(found[8:], 8):
        assert label == int(targets[i])
        torch.testing.assert_close(row, rows[i])


def test_only_samples_that_were_given_count_as_drawn() -> None:
    drop = scheduler(DataLoader(data(), batch_size=4), policy=Fixed({0: 1}))
    for stop in (2, 1, 3):
        for i, (x, _) in enumerate(drop.loader, 1):
            given(drop, x)
            if i == stop:
                break
        assert int(drop.loader.batches.seen.sum()) == 4 * max(2, stop)
        assert not drop.loader.batches.reads_images()


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
def test_a_worker_that_dies_as_it_reads_a_part_of_a_batch_ends_the_epoch(tmp_path: Path) -> None:
    dataset = Dies(*data().tensors)
    dataset.flag = tmp_path / "flag"
    drop = scheduler(DataLoader(dataset, batch_size=4, num_workers=1), policy=Fixed({0: 1}))
    drawn(drop.loader, drop)
    drop.refresh([5, 9, 13, 17])
    dataset.flag.touch()
    with pytest.raises((RuntimeError, OSError)):
        drawn(drop.loader, drop)
    dataset.flag.unlink()
    found = drawn(drop.loader, drop)
    assert [label for label, _ in found] == list(range(22))
    assert_rows(found, drop, 1)


def test_samples_that_a_dataset_has_just_got_may_be_refreshed() -> None:
    dataset = Growing(*data().tensors)
    drop = scheduler(DataLoader(dataset, batch_size=4), policy=Fixed({0: 1}))
    drawn(drop.loader, drop)
    dataset.size = 22
    drop.refresh(range(10, 22))
    found = drawn(drop.loader, drop)
    assert [label for label, _ in found] == list(range(22))
    assert_rows(found, drop, 1)


def test_workers_end_with_close() -> None:
    before = set(multiprocessing.active_children())
    drop = scheduler(DataLoader(data(), batch_size=4, num_workers=1, persistent_workers=True))
    labels(drop.loader, drop)
    assert set(multiprocessing.active_children()) > before
    drop.close()
    assert set(multiprocessing.active_children()) == before


def test_a_sampler_that_goes_on_to_new_samples_is_read_by_the_loaders_workers() -> None:
    begun = multiprocessing.Value("i", 0)

    def count(_: int) -> None:
        with begun.get_lock():
            begun.value += 1

    dataset = TensorDataset(torch.arange(400 * 12.0).view(400, 3, 2, 2) / 100, torch.arange(400))
    sampler = RandomSampler(dataset, num_samples=80)
    drop = scheduler(
        DataLoader(dataset, batch_size=8, sampler=sampler, num_workers=1, worker_init_fn=count), policy=Fixed({0: 1})
    )
    for _ in range(3):
        begun.value = 0
        assert len(drawn(drop.loader, drop)) == 80
        assert begun.value <= 1 + 1  # one more looks at a few samples
        drop.step()


class Noise(Growing):
    """Another image each time."""

    def __getitem__(self, index: int) -> Any:
        return torch.rand(()).expand(3, 2, 2).clone(), index

    __getitems__ = None


@pytest.mark.parametrize("ends", ["undrop", "refresh"])
def test_random_images_that_are_read_after_rows_have_gone_are_different_ones(ends: str) -> None:
    drop = scheduler(
        DataLoader(Noise(*data().tensors), batch_size=1), policy=Fixed({0: 1}), cache=CacheConfig("fp32", views=2)
    )
    for _ in range(2):
        drawn(drop.loader, drop)
    values = set()
    for i, (x, _) in enumerate(drop.loader):
        if i == 0:
            given(drop, x)
            getattr(drop, ends)()
        else:
            values.add(float((x.pixels if isinstance(x, Images) else x).flatten()[0]))
    assert len(values) == 13
