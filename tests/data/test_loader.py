from __future__ import annotations

import gc
import multiprocessing
import re
import time
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from small_loading import assert_rows, data, drawn, given, labels, scheduler
from torch.utils.data import DataLoader, TensorDataset

from learndrop_ext import Fixed


def test_rows_are_those_of_their_samples() -> None:
    drop = scheduler(DataLoader(data(), batch_size=5, shuffle=True))
    labels(drop.loader, drop)
    drop.step()
    images = data().tensors[0]
    for _ in range(2):
        for x, y in drop.loader:
            assert (x.shape, x.dtype, x.device) == (images[y].shape, torch.float32, images.device)
            assert torch.equal(x.read(), images[y])
            rows = given(drop, x)
            with torch.no_grad():
                assert torch.equal(rows, drop.chain.prefix(1).eval()(images[y]))


#: What loops and trainers ask of their loader.
ASKED = ("dataset", "batch_size", "sampler", "batch_sampler", "num_workers", "drop_last", "collate_fn", "pin_memory")


@pytest.mark.parametrize("prefix", [0, 1])
def test_the_loader_has_the_attributes_of_the_users(prefix: int) -> None:
    user = DataLoader(data(), batch_size=5, drop_last=True)
    drop = scheduler(user, policy=Fixed({0: prefix}))
    assert drop.prefix == prefix
    assert {name: getattr(drop.loader, name) for name in ASKED} == {name: getattr(user, name) for name in ASKED}
    assert len(drop.loader) == len(user) == 4
    assert not hasattr(drop.loader, "something_else")


def test_a_collate_fn_of_the_users_is_used() -> None:
    def collate(samples: list[Any]) -> tuple[torch.Tensor, dict[str, Any]]:
        return torch.stack([x for x, _ in samples]), {
            "y": torch.stack([y for _, y in samples]),
            "tag": ["a"] * len(samples),
        }

    drop = scheduler(DataLoader(data(), batch_size=4, collate_fn=collate))
    for _ in range(3):
        for x, rest in drop.loader:
            got = given(drop, x)
            assert rest["tag"] == ["a"] * len(x)
            assert_rows(list(zip(rest["y"].tolist(), got, strict=True)), drop, drop.prefix)
        drop.step()
    assert drop.prefix == 1


@pytest.mark.parametrize("outside", [22, -1])
def test_a_sampler_that_names_an_id_outside_the_dataset_is_refused(outside: int) -> None:
    class Bad:
        def __iter__(self) -> Iterator[int]:
            return iter([0, 1, outside])

        def __len__(self) -> int:
            return 3

    drop = scheduler(DataLoader(data(), batch_size=3, sampler=Bad()))
    with pytest.raises(IndexError, match=rf"samples of the dataset, within 0..21, got {outside}"):
        next(iter(drop.loader))


@pytest.mark.parametrize("name", ["photo 1", (1, 224), 1.5, None])
def test_a_sampler_that_names_samples_by_anything_but_whole_numbers_is_refused(name: Any) -> None:
    loader = DataLoader(data(), batch_sampler=[[name]])
    with pytest.raises(TypeError, match=rf"sampler that names samples by whole numbers, got {re.escape(repr(name))}"):
        scheduler(loader)


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
    with pytest.raises(ValueError, match=r"a tensor of 4 rows .* got a tensor \[3\] at batch\[1\]"):
        scheduler(loader)


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
    assert drop.loader.counts[:2] == (0, 0.0)
    begin = time.perf_counter()
    # Ends after the second batch, before the loader is asked for a third.
    for _, (x, _) in zip(range(2), drop.loader, strict=False):
        given(drop, x)
        time.sleep(0.05)
    samples, seconds, beginning = drop.loader.counts
    assert samples == 22
    assert 0.1 <= seconds <= time.perf_counter() - begin
    assert 0 < beginning < seconds
    drop.loader.forget_counts()
    assert drop.loader.counts[:2] == (0, 0.0)


def test_excluded_seconds_of_an_epoch_are_not_counted() -> None:
    drop = scheduler(DataLoader(data(), batch_size=11))
    epoch = iter(drop.loader)
    next(epoch)
    drop.loader.exclude(10.0)
    drop.loader.end()
    samples, seconds, _ = drop.loader.counts
    assert samples == 11
    assert seconds < -9.0
    drop.loader.exclude(0.25)  # no epoch is under way
    drop.loader.end()
    assert drop.loader.counts[:2] == (11, seconds)
    with pytest.raises(StopIteration):
        next(epoch)


@pytest.mark.parametrize("epoch", [0, 1])
def test_rows_are_made_under_the_autocast_of_training(epoch: int) -> None:
    drop = scheduler(DataLoader(data(), batch_size=4), policy=Fixed({epoch: 1}))
    images = data().tensors[0]
    with torch.autocast("cpu", torch.bfloat16):
        if epoch:
            labels(drop.loader, drop)
            drop.step()
        for _ in range(2):
            for x, y in drop.loader:
                rows = given(drop, x)
                with torch.no_grad():
                    wanted = drop.chain.prefix(1).eval()(images[y])
                assert wanted.dtype == torch.bfloat16
                assert torch.equal(rows.float(), wanted.float())
    assert drop.prefix == 1


def test_workers_end_with_the_scheduler() -> None:
    gc.collect()
    gc.disable()
    try:
        others = set(multiprocessing.active_children())
        drop = scheduler(DataLoader(data(), batch_size=5, num_workers=1, persistent_workers=True), policy=Fixed({}))
        labels(drop.loader)
        workers = set(multiprocessing.active_children()) - others
        assert workers
        del drop
        assert not any(worker.is_alive() for worker in workers)
    finally:
        gc.enable()
