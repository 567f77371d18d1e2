"""Loaders with ids: how they are iterated over, before and after a drop."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from ids_streams import (
    OneBuffer,
    Shards,
    Stream,
    assert_rows,
    begun,
    epochs,
    ids_in,
    trained,
)
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from learndrop_ext import Budget, DropScheduler, Fixed
from small_training import called, data, parts, prefix_rows


def test_a_list_of_batches_trains_as_a_data_loader_does_until_all_rows_are_there() -> None:
    x, y = data().tensors
    batches = [(x[a : a + 8], y[a : a + 8], list(range(a, a + 8))) for a in range(0, 24, 8)]
    model, optimizer, loader = parts(shuffle=False)
    plain = DropScheduler(model, optimizer, loader, policy=Fixed({1: 2}), cache="fp32")
    with_ids, other = begun(batches)
    for _ in range(2):  # of images, and the epoch in which rows are made
        one, two = trained(plain, optimizer), trained(with_ids, other)
        assert all(torch.equal(a[0], b[0]) and torch.equal(a[1], b[1]) for a, b in zip(one, two, strict=True))
        plain.step()
        with_ids.step()
        assert plain.prefix == with_ids.prefix == 2
    for value, wanted in zip(with_ids._base.parameters(), model.parameters(), strict=True):
        assert torch.equal(value, wanted)
    assert with_ids.history[0].changes == plain.history[0].changes


def test_the_loader_is_left_alone_once_every_sample_has_its_row() -> None:
    stream = Stream()
    drop, optimizer = begun(stream)
    assert stream.batches == 1  # drawn when the scheduler was made
    first, fill, *later = epochs(drop, optimizer, 5)
    assert stream.iterations == 3
    assert sorted(ids_in(first)) == list(range(24))
    assert_rows(fill, drop)
    for batches in later:
        assert_rows(batches, drop)
        assert sorted(ids_in(batches)) == list(range(24))
        assert [len(batch[0]) for batch in batches] == [8, 8, 8]
    assert len({tuple(ids_in(batches)) for batches in later}) == 3  # another order each time
    assert [record.samples for record in drop.history] == [24] * 5
    assert [record.tier for record in drop.history] == ["device"] * 5
    assert drop._rows.cut == 2
    assert drop.history[1].fill_flops > 0
    assert drop.history[2].fill_flops == 0


def test_batches_before_a_drop_come_as_they_are() -> None:
    stream = Stream(shuffle=False)
    drop, _ = begun(list(stream), {})
    wanted = list(stream)
    for got, one in zip(drop.loader, wanted, strict=True):
        assert all(torch.equal(a, b) for a, b in zip(got, one, strict=True))
    assert len(drop.loader) == 3
    with pytest.raises(TypeError, match="object of type 'Stream' has no len"):
        len(begun(stream)[0].loader)


def test_what_the_loop_does_to_images_is_watched_as_with_a_data_loader() -> None:
    stream = Stream()
    drop, optimizer = begun(stream, {0: 2})
    rows = []
    for _ in range(3):
        for x, y, ids in drop.loader:
            output, row = called(drop, x * 2)
            nn.functional.cross_entropy(output, y).backward()
            rows.append((row, ids))
        optimizer.step()
        drop.step()
    assert stream.iterations == 2
    with torch.no_grad():
        wanted = drop.chain.prefix(2).eval()(2 * data().tensors[0])
    assert len(rows) == 9
    assert all(torch.equal(row, wanted[ids]) for row, ids in rows)
    for change, message in ((lambda x: x, "the loop must do the same to"), (torch.flip, "may only do to images what")):
        x, _, _ = next(iter(drop.loader))
        with pytest.raises(RuntimeError, match=message):
            drop.model(change(x, (0,)) if change is torch.flip else change(x))


@pytest.mark.parametrize("drop_last", [False, True])
def test_the_last_batch_is_kept_or_dropped_as_the_loader_does(drop_last: bool) -> None:
    stream = Stream(count=27, drop_last=drop_last)
    drop, optimizer = begun(stream)
    found = epochs(drop, optimizer, 12)
    wanted = [8, 8, 8] if drop_last else [8, 8, 8, 3]
    for batches in found:
        assert [len(batch[0]) for batch in batches] == wanted
        assert len(set(ids_in(batches))) == sum(wanted)
    assert stream.iterations < 13  # drawing from the ids began
    assert len(drop.loader) == len(wanted)


def test_dropping_more_layers_makes_rows_of_rows() -> None:
    stream = Stream()
    drop, optimizer = begun(stream, {1: 1, 4: 3})
    *_, fill, later = epochs(drop, optimizer, 6)
    assert stream.iterations == 3
    assert_rows(later, drop, 3)
    for x, _, ids in fill:
        assert torch.allclose(x, prefix_rows(drop, 3)[ids], atol=1e-6)
    assert drop.history[3].fill_flops == 0
    assert drop.history[4].fill_flops == 24 * (drop.chain[1].flops + drop.chain[2].flops)  # conv1 does not run again


@pytest.mark.parametrize("policy", [Fixed({0: 2}), Budget(speedup=1.05)])
def test_layers_dropped_before_the_first_step(policy: Any) -> None:
    stream = Stream()
    drop, optimizer = begun(stream, policy=policy, epochs=6)
    fill, *later = epochs(drop, optimizer, 6)
    assert drop.prefix
    if isinstance(policy, Fixed):
        assert [record.epoch for record in drop.history] == list(range(7))
        assert_rows(fill, drop)
        assert stream.iterations == 2
    for batches in later:
        assert sorted(ids_in(batches)) == list(range(24))
    assert drop.forecast().epochs == 6


def test_a_forecast_times_the_loader() -> None:
    stream = Stream()
    drop, optimizer = begun(stream)
    assert drop.forecast(9).epochs == 9
    assert stream.batches == 1  # the first one, by which training steps are timed
    epochs(drop, optimizer, 1)
    assert stream.batches == 1 + 3
    drop.forecast(9)
    assert stream.batches == 1 + 3


def test_an_epoch_is_as_long_as_the_loader_says_until_one_was_seen() -> None:
    batches = list(Stream(count=27))
    drop, optimizer = begun(batches)
    assert drop.forecast(4) is not None
    assert drop._ledger.run_costs()[0].samples == 32
    epochs(drop, optimizer, 1)
    assert drop._ledger.run_costs()[0].samples == 27


def test_no_rows_are_kept_without_a_cache() -> None:
    stream = Stream(noise=0.1)
    drop, optimizer = begun(stream, cache=None)
    epochs(drop, optimizer, 3)
    assert (drop.prefix, drop._rows.cut, stream.iterations) == (2, 0, 4)


# Loaders


@pytest.mark.parametrize("workers", [0, 1])
def test_a_data_loader_over_a_stream(workers: int) -> None:
    loader = DataLoader(Shards(), batch_size=8, num_workers=workers)
    drop, optimizer = begun(loader, ids="__key__", input="image")
    for batches in epochs(drop, optimizer, 4)[1:]:
        keys = [key for batch in batches for key in batch["__key__"]]
        assert sorted(keys) == sorted(f"shard/{i}" for i in range(24))
        rows = prefix_rows(drop, 2)
        for batch in batches:
            at = [int(key.split("/")[1]) for key in batch["__key__"]]
            assert torch.equal(batch["image"], rows[at])
            assert torch.equal(batch["label"], data().tensors[1][at])
    assert not drop.loader.batches.reads_images()


def test_a_data_loaders_order_is_that_of_a_run_without_drops() -> None:
    model, optimizer, _ = parts()
    images, labels = data().tensors

    class Numbered:
        def __len__(self) -> int:
            return 24

        def __getitem__(self, i: int) -> Any:
            return images[i], labels[i], i

    def shuffled(seed: int | None) -> DataLoader[Any]:
        generator = None if seed is None else torch.Generator().manual_seed(seed)
        return DataLoader(Numbered(), batch_size=8, shuffle=True, generator=generator)  # type: ignore[arg-type]

    for seed in (None, 5):
        torch.manual_seed(3)
        wanted = [ids_in(list(one)) for one in [shuffled(seed)] for _ in range(2)]
        drop = DropScheduler(model, optimizer, one := shuffled(seed), ids=2, cache="fp32", policy=Fixed({}))
        torch.manual_seed(3)
        assert [ids_in(list(drop.loader)) for _ in range(2)] == wanted
        assert drop.loader.dataset is one.dataset


class Itself:
    """A loader that is its own iterator, and starts again after its end."""

    def __init__(self, stream: Stream) -> None:
        self.stream = stream
        self.left: Iterator[Any] | None = None

    def __iter__(self) -> Itself:
        return self

    def __next__(self) -> Any:
        self.left = iter(self.stream) if self.left is None else self.left
        try:
            return next(self.left)
        except StopIteration:
            self.left = None
            raise


def test_a_loader_that_is_its_own_iterator_loses_no_batch() -> None:
    stream = Stream()
    drop, optimizer = begun(Itself(stream), {0: 2})
    drop.forecast(4)
    found = epochs(drop, optimizer, 4)
    assert all(sorted(ids_in(batches)) == list(range(24)) for batches in found)
    for batches in found:
        assert_rows(batches, drop)
    # The first batch was not drawn twice in the first iteration, so that one more is needed.
    assert stream.iterations == 2


def test_a_loader_of_one_batch_that_is_its_own_iterator_is_timed_by_it() -> None:
    stream = Stream(size=24)
    drop, optimizer = begun(Itself(stream))
    epochs(drop, optimizer, 1)
    drop.forecast(4)
    assert len(trained(drop, optimizer)) == 1
    assert stream.iterations == 2


def test_warnings_name_the_loop() -> None:
    stream = Stream()
    drop, optimizer = begun(stream)
    epochs(drop, optimizer, 2)
    drop._rows.forget(torch.tensor([5]))
    stream.images = stream.images + 0.5
    with pytest.warns(RuntimeWarning, match="computed again") as told:
        trained(drop, optimizer)
    assert [Path(warning.filename).name for warning in told] == ["ids_streams.py"]
    drop.step()
    epochs(drop, optimizer, 1)
    batches = iter(drop.loader)
    next(batches)
    drop.undrop()
    with pytest.warns(RuntimeWarning, match="the rest of the epoch") as told:
        next(batches)
    assert [Path(warning.filename).name for warning in told] == ["test_ids.py"]


def test_batches_may_use_the_memory_of_the_batch_before() -> None:
    drop, optimizer = begun(OneBuffer())
    for batches in epochs(drop, optimizer, 4)[2:]:
        assert_rows(batches, drop)


def test_batches_of_uneven_shards_lose_no_sample_on_rows() -> None:
    class Uneven(Stream):
        def __iter__(self) -> Iterator[Any]:
            for ids in torch.arange(22).split([8, 2, 4, 8]):
                yield self.images[ids], self.labels[ids], ids
            self.iterations += 1

    stream = Uneven()
    drop, optimizer = begun(stream, {0: 2})
    assert [sum(len(batch[2]) for batch in one) for one in epochs(drop, optimizer, 4)] == [22] * 4
    assert stream.iterations == 1


class Numbered(TensorDataset):
    def __getitem__(self, index: Any) -> Any:
        return *super().__getitem__(index), index

    __getitems__ = None


def test_persistent_workers_draw_the_order_that_they_draw_without_ids() -> None:
    def loader() -> DataLoader[Any]:
        return DataLoader(Numbered(*data().tensors), 8, shuffle=True, num_workers=1, persistent_workers=True)

    user = loader()
    drop, _ = begun(loader(), {})
    orders = []
    for batches in (user, drop.loader):
        torch.manual_seed(3)
        orders.append([batch[2].tolist() for _ in range(2) for batch in batches])
    assert orders[0] == orders[1]
