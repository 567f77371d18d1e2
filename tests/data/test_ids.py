from __future__ import annotations

import itertools
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, IterableDataset

from learndrop_ext import Budget, CacheConfig, DropScheduler, Fixed
from learndrop_ext.data import id_source, source
from learndrop_ext.data.ids import IdTable, ids_of
from small_training import Net, data, parts, prefix_rows

Make = Callable[[torch.Tensor, torch.Tensor, torch.Tensor], Any]


def triple(x: torch.Tensor, y: torch.Tensor, ids: torch.Tensor) -> Any:
    return x, y, ids


class Stream:
    """Batches of the small data with their samples' ids, shuffled anew at each iteration. What it was asked for is noted."""

    def __init__(
        self,
        make: Make = triple,
        *,
        count: int = 24,
        size: int = 8,
        drop_last: bool = False,
        noise: float = 0.0,
        shuffle: bool = True,
    ) -> None:
        self.images, self.labels = data(count).tensors
        self.make = make
        self.size = size
        self.drop_last = drop_last
        self.noise = noise
        self.shuffle = shuffle
        self.iterations = 0
        self.batches = 0
        self.generator = torch.Generator().manual_seed(7)

    def order(self) -> torch.Tensor:
        count = len(self.images)
        return torch.randperm(count, generator=self.generator) if self.shuffle else torch.arange(count)

    def __iter__(self) -> Iterator[Any]:
        self.iterations += 1
        for ids in self.order().split(self.size):
            if len(ids) < self.size and self.drop_last:
                return
            self.batches += 1
            x = self.images[ids]
            yield self.make(x + self.noise * torch.rand(len(ids), 1, 1, 1), self.labels[ids], ids)


def begun(loader: Any, drops: dict[int, int] | None = None, **options: Any) -> tuple[DropScheduler, Any]:
    model, optimizer, _ = parts()
    settings = {"policy": Fixed({1: 2} if drops is None else drops), "cache": "fp32", "ids": 2} | options
    return DropScheduler(model, optimizer, loader, **settings), optimizer


def trained(drop: DropScheduler, optimizer: Any, *, autocast: bool = False) -> list[Any]:
    """The batches of one epoch of training."""
    batches = []
    drop.base_model.train()
    for batch in drop.loader:
        x, y = (batch["image"], batch["label"]) if isinstance(batch, dict) else batch[:2]
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            loss = nn.functional.cross_entropy(drop.model(x).float(), y % 5)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        batches.append(batch)
    return batches


def epochs(drop: DropScheduler, optimizer: Any, count: int, **options: Any) -> list[list[Any]]:
    found = []
    for _ in range(count):
        found.append(trained(drop, optimizer, **options))
        drop.step()
    return found


def ids_in(batches: list[Any]) -> list[int]:
    return [int(i) for batch in batches for i in batch[2]]


def assert_rows(batches: list[Any], drop: DropScheduler, k: int = 2) -> None:
    """Each batch holds the rows and the labels of its ids."""
    rows, labels = prefix_rows(drop, k), data().tensors[1]
    for x, y, ids in batches:
        assert torch.equal(x, rows[ids])
        assert torch.equal(y, labels[ids])


# Training


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
    for value, wanted in zip(with_ids.base_model.parameters(), model.parameters(), strict=True):
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
    assert [record.cut for record in drop.history] == [2] * 5
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


def test_the_input_is_checked_as_with_a_data_loader() -> None:
    drop, optimizer = begun(Stream())
    for x, y, _ in drop.loader:
        nn.functional.cross_entropy(drop.model(x * 2), y).backward()
        optimizer.step()
    with pytest.raises(RuntimeError, match="must get the batch's input as"):
        drop.step()


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
    assert stream.batches == 1 + 3  # what is there of 1 + 3 batches
    epochs(drop, optimizer, 1)
    before = stream.batches
    drop.forecast(9)
    assert stream.batches == before


def test_an_epoch_is_as_long_as_the_loader_says_until_one_was_seen() -> None:
    batches = list(Stream(count=27))
    drop, optimizer = begun(batches)
    assert drop.ledger.run_costs()[0].samples == 32
    epochs(drop, optimizer, 1)
    assert drop.ledger.run_costs()[0].samples == 27


def test_no_rows_are_kept_without_a_cache() -> None:
    stream = Stream(noise=0.1)
    drop, optimizer = begun(stream, cache=None)
    epochs(drop, optimizer, 3)
    assert (drop.prefix, drop.cut, stream.iterations) == (2, 0, 4)


# Loaders


class Shards(IterableDataset[Any]):
    """The small data as a stream of samples with string ids."""

    def __iter__(self) -> Iterator[Any]:
        x, y = data().tensors
        for i in range(24):
            yield {"image": x[i], "label": y[i], "__key__": f"shard/{i}"}


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
        assert drop.loader.user is one


class Itself:
    """A loader that is its own iterator, and begins anew after its end."""

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
    assert drop.rows.cache is not None
    drop.rows.cache.forget(torch.tensor([5]))
    stream.images = stream.images + 0.5
    with pytest.warns(RuntimeWarning, match="made anew") as told:
        trained(drop, optimizer)
    assert [Path(warning.filename).name for warning in told] == ["test_ids.py"]
    drop.step()
    epochs(drop, optimizer, 1)
    batches = iter(drop.loader)
    next(batches)
    drop.undrop()
    with pytest.warns(RuntimeWarning, match="the rest of the epoch") as told:
        next(batches)
    assert [Path(warning.filename).name for warning in told] == ["test_ids.py"]


class OneBuffer(Stream):
    """Every batch in the memory of the one before."""

    buffer = torch.zeros(8, 3, 8, 8)

    def __iter__(self) -> Iterator[Any]:
        for x, y, ids in super().__iter__():
            yield self.buffer.copy_(x), y, ids


def test_batches_may_use_the_memory_of_the_batch_before() -> None:
    drop, optimizer = begun(OneBuffer())
    for batches in epochs(drop, optimizer, 4)[2:]:
        assert_rows(batches, drop)


@pytest.mark.parametrize(
    ("make", "options"),
    [
        (lambda x, y, i: (x, y, [f"a{v}" for v in i.tolist()]), {}),
        (lambda x, y, i: (x, y, i.numpy()), {}),
        (lambda x, y, i: (x, y, np.array([f"b{v}" for v in i.tolist()])), {}),
        (lambda x, y, i: (x, y, i.int()[:, None]), {}),
        (lambda x, y, i: (x, y, tuple(i)), {}),
        (lambda x, y, i: (x, y, [np.int32(v) for v in i.tolist()]), {}),
        (lambda x, y, i: (x, y, i * 2**40 - 3), {}),
        (lambda x, y, i: (x, y, {"where": {"id": i}}), {"ids": (2, "where", "id")}),
        (lambda x, y, i: (x, y, i), {"ids": -1}),
        (lambda x, y, i: {"image": x, "label": y, "id": i}, {"ids": "id", "input": "image"}),
        (lambda x, y, i: {"image": x, "label": y, 0: i}, {"ids": (0,), "input": "image"}),
    ],
)
def test_ids_of_every_kind(make: Make, options: dict[str, Any]) -> None:
    stream = Stream(make)
    drop, optimizer = begun(stream, **options)
    rows_of = {}
    for batch in epochs(drop, optimizer, 4)[3]:
        x, y = (batch["image"], batch["label"]) if isinstance(batch, dict) else batch[:2]
        ids = ids_of(batch, options.get("ids", 2), len(x))
        rows_of |= {i: (row, int(label)) for i, row, label in zip(ids, x, y, strict=True)}
    assert stream.iterations == 3
    assert len(rows_of) == 24
    rows, labels = prefix_rows(drop, 2), data().tensors[1]
    for number, value in enumerate(drop.rows.source.state()["values"]):
        place = int(str(value).strip("ab")) if "b" in str(value) or "a" in str(value) else int(value)
        place = (place + 3) >> 40 if place < 0 or place > 24 else place
        assert torch.equal(rows_of[value][0], rows[place]), number
        assert rows_of[value][1] == int(labels[place])


# Rows that are not there


def test_forgotten_rows_are_made_of_another_iteration() -> None:
    stream = Stream()
    drop, optimizer = begun(stream)
    epochs(drop, optimizer, 3)
    assert stream.iterations == 3
    drop.rows.forget()
    fill, later = epochs(drop, optimizer, 2)
    assert stream.iterations == 4
    assert_rows(fill + later, drop)


def test_one_missing_row_is_made_of_another_iteration() -> None:
    stream = Stream()
    drop, optimizer = begun(stream)
    epochs(drop, optimizer, 3)
    cache = drop.rows.cache
    assert cache is not None
    cache.forget(torch.tensor([5]))
    fill, later = epochs(drop, optimizer, 2)
    assert stream.iterations == 4
    assert_rows(fill + later, drop)


def test_rows_that_do_not_fit_are_made_in_each_epoch() -> None:
    row = 6 * 4 * 4 * 4
    stream = Stream()
    drop, optimizer = begun(stream, {0: 2}, cache=CacheConfig(codec="fp32", budget_bytes=20 * row))
    assert drop.cut == 2
    with pytest.warns(RuntimeWarning, match="draws more samples than the budgets hold rows of"):
        first = trained(drop, optimizer)
    drop.step()
    later = epochs(drop, optimizer, 3)
    for batches in (first, *later):
        assert sorted(ids_in(batches)) == list(range(24))
        assert_rows(batches, drop)
    assert stream.iterations == 5


def test_an_epoch_goes_on_with_the_loader_where_its_rows_have_gone() -> None:
    stream = Stream()
    drop, optimizer = begun(stream)
    epochs(drop, optimizer, 3)
    # Another autocast is known after the first batch.
    with pytest.warns(RuntimeWarning, match="drop.loader: the rest of the epoch comes from loader, in its order"):
        batches = trained(drop, optimizer, autocast=True)
    assert stream.iterations == 4
    assert [len(batch[0]) for batch in batches] == [8, 8, 8]
    rows = prefix_rows(drop, 2)
    for x, _, ids in batches:
        assert torch.allclose(x.float(), rows[ids], atol=0.05)
    drop.step()
    epochs(drop, optimizer, 3, autocast=True)
    assert stream.iterations == 5


def test_undrop_in_an_epoch_of_rows() -> None:
    stream = Stream()
    drop, optimizer = begun(stream)
    epochs(drop, optimizer, 3)
    batches = iter(drop.loader)
    next(batches)
    drop.undrop()
    with pytest.warns(RuntimeWarning, match="the rest of the epoch comes from loader"):
        left = list(batches)
    assert [x.shape[1:] for x, _, _ in left] == [(3, 8, 8)] * 2
    images = data().tensors[0]
    assert all(torch.equal(x, images[ids]) for x, _, ids in left)
    assert sorted(ids_in(trained(drop, optimizer))) == list(range(24))


def test_close_gives_the_model_back() -> None:
    with begun(Stream())[0] as drop:
        optimizer = drop.optimizer
        epochs(drop, optimizer, 4)
    assert all(p.requires_grad for p in drop.base_model.parameters())
    with pytest.raises(RuntimeError, match="it was closed"):
        next(iter(drop.loader))


def test_samples_cannot_be_read_by_number() -> None:
    drop, _ = begun(Stream())
    with pytest.raises(RuntimeError, match="can be read only as they come by, got 2 asked for by id"):
        drop.rows.read(torch.tensor([1, 2]), 0)


# Iterations that are broken off, repeat or grow


def test_epochs_that_are_broken_off_go_on_reading() -> None:
    stream = Stream()
    drop, optimizer = begun(stream, {0: 2})
    for _ in range(6):
        for x, y, ids in itertools.islice(drop.loader, 2):
            nn.functional.cross_entropy(drop.model(x), y).backward()
            assert torch.equal(x, prefix_rows(drop, 2)[ids])
        optimizer.step()
        drop.step()
    assert stream.iterations == 7


def test_a_loop_that_stops_after_the_last_batch_has_seen_the_whole_loader() -> None:
    batches = list(Stream())
    drop, optimizer = begun(batches, {0: 2})
    for x, y, _ in itertools.islice(drop.loader, 3):
        nn.functional.cross_entropy(drop.model(x), y).backward()
    optimizer.step()
    drop.step()
    assert not drop.loader.batches.reads_images()


def test_an_id_that_comes_twice_keeps_the_loader_in_use() -> None:
    class Twice(Stream):
        def order(self) -> torch.Tensor:
            return torch.cat([super().order(), torch.tensor([3, 3, 4])])

    stream = Twice()
    drop, optimizer = begun(stream)
    first, second = epochs(drop, optimizer, 2)
    with pytest.warns(RuntimeWarning, match="drop.loader: an id came twice in one iteration over loader"):
        third = trained(drop, optimizer)
    drop.step()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        fourth = trained(drop, optimizer)
    for batches in (first, second, third, fourth):
        assert sorted(ids_in(batches)) == sorted([*range(24), 3, 3, 4])
    assert_rows(second + third + fourth, drop)
    assert stream.iterations == 5


def test_new_ids_get_their_rows_as_they_are_met() -> None:
    stream = Stream(count=16)
    drop, optimizer = begun(stream)
    epochs(drop, optimizer, 1)
    stream.images, stream.labels = data().tensors  # the second iteration brings eight more
    stream.images[:16] = data(16).tensors[0]
    stream.labels[:16] = data(16).tensors[1]
    fill, later = epochs(drop, optimizer, 2)
    assert sorted(ids_in(fill)) == sorted(ids_in(later)) == list(range(24))
    with torch.no_grad():
        rows = drop.chain.prefix(2).eval()(stream.images)
    assert all(torch.equal(x, rows[ids]) for x, _, ids in fill + later)
    assert stream.iterations == 3


def test_a_loader_that_says_it_has_grown_is_iterated_over_again() -> None:
    batches = list(Stream())
    short = batches[:2]
    drop, optimizer = begun(short)
    found = epochs(drop, optimizer, 3)
    assert not drop.loader.batches.reads_images()
    short.append(batches[2])
    found += epochs(drop, optimizer, 2)
    assert [len(ids_in(one)) for one in found] == [16, 16, 16, 24, 24]
    assert_rows(found[3] + found[4], drop)
    assert not drop.loader.batches.reads_images()


def test_a_loader_that_gives_other_samples_each_time_stays_in_use() -> None:
    class Resampled(Stream):
        def order(self) -> torch.Tensor:
            return super().order()[:12]

    stream = Resampled(size=4)
    drop, optimizer = begun(stream, {0: 2})
    orders = [set(ids_in(batches)) for batches in epochs(drop, optimizer, 4)]
    assert stream.iterations > 2
    assert len(set().union(*orders)) > 12


def test_many_new_ids_do_not_copy_the_tables_each_time(monkeypatch: pytest.MonkeyPatch) -> None:
    stream = Stream(count=400, size=4)
    drop, _ = begun(stream, {})
    copies = []
    first = drop.rows.slots.table.data_ptr()
    for _ in drop.loader:
        if drop.rows.slots.table.data_ptr() != first:
            first = drop.rows.slots.table.data_ptr()
            copies.append(len(drop.rows.slots))
    assert len(drop.rows.slots) == 400
    assert len(copies) < 25


# Samples that change


@pytest.mark.parametrize("shuffle", [True, False])
@pytest.mark.parametrize("at_once", [True, False])
def test_a_random_loader_is_refused(shuffle: bool, at_once: bool) -> None:
    drop, optimizer = begun(Stream(noise=0.1, shuffle=shuffle), {0: 2} if at_once else {1: 2})
    with pytest.raises(ValueError, match=r"must give the same sample for the same id each time.*views=V"):
        trained(drop, optimizer)
    with pytest.raises(ValueError, match="must give the same sample for the same id each time"):
        epochs(drop, optimizer, 2)


def test_labels_in_place_of_ids_are_refused() -> None:
    with pytest.raises(ValueError, match=r"another one for one of .*give each sample an id of its own"):
        begun(Stream(), ids=1)
    # In batches of one nothing is seen before an id comes again.
    drop, optimizer = begun(Stream(size=1), ids=1)
    with pytest.raises(ValueError, match="give each sample an id of its own"):
        trained(drop, optimizer)


def test_ids_that_count_within_a_shard_are_refused() -> None:
    drop, optimizer = begun(Stream(lambda x, y, i: (x, y, i % 12), shuffle=False, size=6), {0: 2})
    with pytest.raises(ValueError, match="give each sample an id of its own"):
        trained(drop, optimizer)


@pytest.mark.parametrize("at_once", [True, False])
def test_two_samples_with_one_id_outside_the_first_batch_are_refused(at_once: bool) -> None:
    def make(x: torch.Tensor, y: torch.Tensor, i: torch.Tensor) -> Any:
        return x, y, torch.where(i == 23, 14, i)

    drop, optimizer = begun(Stream(make, shuffle=False, size=6), {0: 2} if at_once else {1: 2})
    if not at_once:
        epochs(drop, optimizer, 1)
    with pytest.raises(ValueError, match="an id must stand for one sample, got two samples with the same"):
        trained(drop, optimizer)


def test_labels_that_change_are_refused_before_a_drop() -> None:
    stream = Stream()
    drop, optimizer = begun(stream)
    stream.labels = stream.labels + 1
    with pytest.raises(ValueError, match="must give the same sample for the same id each time"):
        trained(drop, optimizer)


@pytest.mark.parametrize("cache", [CacheConfig(codec="fp32", views=2), CacheConfig(codec="fp32", mirror=True)])
def test_views_are_filled_in_as_many_epochs(cache: CacheConfig) -> None:
    stream = Stream(noise=0.0 if cache.mirror else 0.1)
    drop, optimizer = begun(stream, {0: 2}, cache=cache)
    found = epochs(drop, optimizer, 6)
    assert stream.iterations == 3
    rows = [{int(i): row for x, _, ids in batches for i, row in zip(ids, x, strict=True)} for batches in found]
    for i in range(24):
        assert not torch.equal(rows[0][i], rows[1][i])
        for epoch in range(2, 6):
            assert torch.equal(rows[epoch][i], rows[epoch - 2][i])
    if cache.mirror:
        images = data().tensors[0]
        with torch.no_grad():
            both = [drop.chain.prefix(2).eval()(x) for x in (images, images.flip(-1))]
        for i in range(24):
            assert torch.equal(rows[0][i], both[0][i]) or torch.equal(rows[0][i], both[1][i])


def test_rows_are_made_anew_where_what_comes_by_has_changed() -> None:
    stream = Stream()
    drop, optimizer = begun(stream)
    epochs(drop, optimizer, 2)
    cache = drop.rows.cache
    assert cache is not None
    # Images are read once more, and all but one have rows.
    cache.forget(torch.tensor([5]))
    stream.images = stream.images + 0.5
    with pytest.warns(RuntimeWarning, match="drop.loader: the rows are made anew: the images of some samples"):
        batches = trained(drop, optimizer)
    with torch.no_grad():
        rows = drop.chain.prefix(2).eval()(stream.images)
    assert all(torch.equal(x, rows[ids]) for x, _, ids in batches)


def test_labels_are_compared_too() -> None:
    stream = Stream()
    drop, optimizer = begun(stream)
    epochs(drop, optimizer, 2)
    assert drop.rows.cache is not None
    drop.rows.cache.forget(torch.tensor([5]))
    stream.labels = (stream.labels + 1) % 5
    with pytest.warns(RuntimeWarning, match=r"the rows are made anew: batch\[1\] of some samples"):
        batches = trained(drop, optimizer)
    assert all(torch.equal(y, stream.labels[ids]) for _, y, ids in batches)


def test_images_of_another_size_are_refused_while_there_are_rows() -> None:
    stream = Stream()
    drop, optimizer = begun(stream)
    epochs(drop, optimizer, 2)
    drop.rows.forget()
    stream.images = stream.images[..., :6, :6]
    with pytest.raises(RuntimeError, match=r"images must keep their shape \[3, 8, 8\] while layers are dropped"):
        trained(drop, optimizer)


def test_changed_weights_have_the_rows_made_anew() -> None:
    stream = Stream()
    drop, optimizer = begun(stream)
    epochs(drop, optimizer, 3)
    with torch.no_grad():
        drop.base_model.get_submodule("conv1").weight.mul_(2)
    with pytest.warns(RuntimeWarning, match="the weights or buffers of the dropped layer conv1 have changed"):
        batches = trained(drop, optimizer)
    assert stream.iterations == 4
    assert_rows(batches, drop)


# Checkpoints


def saved(drop: DropScheduler, optimizer: Any) -> dict[str, Any]:
    return {"model": drop.base_model.state_dict(), "optimizer": optimizer.state_dict(), "drop": drop.state_dict()}


def resumed(loader: Any, state: dict[str, Any], **options: Any) -> tuple[DropScheduler, Any]:
    drop, optimizer = begun(loader, **options)
    drop.base_model.load_state_dict(state["model"])
    optimizer.load_state_dict(state["optimizer"])
    drop.load_state_dict(state["drop"])
    return drop, optimizer


@pytest.mark.parametrize("after", [1, 2, 3])
@pytest.mark.parametrize("strings", [False, True])
def test_a_resumed_run_goes_on_to_the_bit(tmp_path: Path, after: int, strings: bool) -> None:
    def make(x: torch.Tensor, y: torch.Tensor, i: torch.Tensor) -> Any:
        return x, y, [f"{v}" for v in i.tolist()] if strings else i

    cache = CacheConfig(codec="fp32", disk_bytes=1 << 20, disk_dir=str(tmp_path))
    whole, optimizer = begun(Stream(make), cache=cache)
    epochs(whole, optimizer, after)
    torch.save(saved(whole, optimizer), tmp_path / "state.pt")
    order = whole.loader.user.generator.get_state()
    wanted = epochs(whole, optimizer, 5 - after)

    state = torch.load(tmp_path / "state.pt", weights_only=True)
    stream = Stream(make)
    stream.generator.manual_seed(99)  # the first batch holds other samples
    second, other = resumed(stream, state, cache=cache)
    stream.generator.set_state(order)
    got = epochs(second, other, 5 - after)
    for one, two in zip(wanted, got, strict=True):
        assert [list(batch[2]) for batch in one] == [list(batch[2]) for batch in two]
        assert all(torch.equal(a[0], b[0]) and torch.equal(a[1], b[1]) for a, b in zip(one, two, strict=True))
    for value, before in zip(second.base_model.parameters(), whole.base_model.parameters(), strict=True):
        assert torch.equal(value, before)
    assert stream.iterations == 1 + max(0, 2 - after)


def test_a_resumed_run_without_a_file_makes_its_rows_again() -> None:
    first, optimizer = begun(Stream())
    epochs(first, optimizer, 3)
    stream = Stream()
    stream.generator.manual_seed(99)
    second, other = resumed(stream, saved(first, optimizer))
    fill, later = epochs(second, other, 2)
    assert_rows(fill + later, second)
    assert stream.iterations == 2


def test_rows_of_images_that_have_changed_since_the_checkpoint_are_made_anew(tmp_path: Path) -> None:
    cache = CacheConfig(codec="fp32", disk_bytes=1 << 20, disk_dir=str(tmp_path))
    first, optimizer = begun(Stream(), cache=cache)
    epochs(first, optimizer, 3)
    stream = Stream()
    stream.images = stream.images + 0.5
    second, other = resumed(stream, saved(first, optimizer), cache=cache)
    with pytest.warns(RuntimeWarning, match="the rows are made anew: the images of some samples"):
        batches = trained(second, other)
    with torch.no_grad():
        rows = second.chain.prefix(2).eval()(stream.images)
    assert all(torch.equal(x, rows[ids]) for x, _, ids in batches)


def test_rows_that_cannot_be_compared_after_a_checkpoint_are_compared_as_images_come_by(tmp_path: Path) -> None:
    cache = CacheConfig(codec="fp32", disk_bytes=1 << 20, disk_dir=str(tmp_path))
    first, optimizer = begun(Stream(), cache=cache)
    epochs(first, optimizer, 3)
    stream = Stream(lambda x, y, i: (x, y, i + 1000), shuffle=False)
    second, other = resumed(stream, saved(first, optimizer), cache=cache)
    batches = trained(second, other)
    assert stream.iterations == 2
    rows = prefix_rows(second, 2)
    assert all(torch.equal(x, rows[ids - 1000]) for x, _, ids in batches)


@pytest.mark.parametrize("resumes_ids", [True, False])
def test_a_state_with_ids_and_one_without_are_told_apart(resumes_ids: bool) -> None:
    model, optimizer, loader = parts()
    plain = DropScheduler(model, optimizer, loader, cache="fp32")
    with_ids, _ = begun(Stream())
    one, other = (with_ids, plain) if resumes_ids else (plain, with_ids)
    wanted = "a run with ids=, got one without" if resumes_ids else "without ids=, got one with ids"
    with pytest.raises(ValueError, match=wanted):
        one.load_state_dict(other.state_dict())


def test_a_state_with_ids_of_another_type_is_refused() -> None:
    one, _ = begun(Stream())
    other, _ = begun(Stream(lambda x, y, i: (x, y, [str(v) for v in i])))
    with pytest.raises(ValueError, match="state must be of a run whose ids are str, got int"):
        other.load_state_dict(one.state_dict())


# What is refused


def no_ids(x: torch.Tensor, y: torch.Tensor, i: torch.Tensor) -> Any:
    return {"image": x, "label": y}


@pytest.mark.parametrize(
    ("loader", "options", "error", "message"),
    [
        (3, {}, TypeError, "loader must be iterated over for batches, got int"),
        ((b for b in [1]), {}, TypeError, "each time it is iterated over, got a generator, which ends for good"),
        (iter([1]), {}, TypeError, "got a list_iterator"),
        (itertools.cycle([1]), {}, TypeError, "got a cycle"),
        ([], {}, ValueError, "loader must give batches, got none"),
        ([(torch.zeros(0, 3, 8, 8), torch.zeros(0), [])], {}, ValueError, "one sample or more, got an empty one"),
        (list(Stream()), {"ids": 5}, ValueError, "ids must be the place .*, got 5; there is a tuple with 3 entries"),
        (list(Stream()), {"ids": (2, 1)}, ValueError, r"got \(2, 1\); there is a Tensor with no entries"),
        (list(Stream(no_ids)), {"ids": "id", "input": "image"}, ValueError, r"got 'id'; .* with \['image', 'label'\]"),
        ([torch.zeros(2, 3, 8, 8)], {}, ValueError, "got 2; there is a Tensor with no entries"),
        (
            list(Stream()),
            {"ids": 0},
            ValueError,
            r"ids must be one a sample, wanted 8 at 0, got a Tensor \[8, 3, 8, 8\]",
        ),
        (list(Stream(lambda x, y, i: (x, y, i[:3]))), {}, ValueError, r"wanted 8 at 2, got a Tensor \[3\]"),
        (list(Stream(lambda x, y, i: (x, y, 7))), {}, ValueError, r"wanted 8 at 2, got a int \[\]"),
        (list(Stream(lambda x, y, i: (x, y, i / 2))), {}, TypeError, "ids must be int or str, got float"),
        (list(Stream(lambda x, y, i: (x, y, i > 2))), {}, TypeError, "ids must be int or str, got bool"),
        (list(Stream(lambda x, y, i: (x, y, [[v] for v in i]))), {}, TypeError, "ids must be int or str, got list"),
        (list(Stream(lambda x, y, i: (x, y, [b"a"] * 8))), {}, TypeError, "ids must be int or str, got bytes"),
        (list(Stream(lambda x, y, i: (x, y, [1, "a"] * 4))), {}, TypeError, "all int or all str, got both at 2"),
        (list(Stream()), {"ids": 2.0}, TypeError, r"a key, an index or a tuple of these, got 2\.0"),
        (list(Stream()), {"ids": ()}, TypeError, r"a key, an index or a tuple of these, got \(\)"),
        (list(Stream()), {"ids": True}, TypeError, "a key, an index or a tuple of these, got True"),
        (list(Stream()), {"input": 7}, ValueError, "input must be the place of the model's input in a batch, got 7"),
    ],
)
def test_what_is_refused_at_once(loader: Any, options: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=f"DropScheduler: .*{message}"):
        begun(loader, **options)


def test_rows_are_not_shared(tmp_path: Path) -> None:
    cache = CacheConfig(shared=True, disk_dir=str(tmp_path))
    with pytest.raises(ValueError, match="ids must be None where several runs share their rows, got 2 with"):
        begun(Stream(), cache=cache)


def test_several_processes_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(source, "several_processes", lambda: True)
    with pytest.raises(ValueError, match="ids must be None where several processes train one model, got 2"):
        begun(Stream())


def test_ids_that_change_their_type() -> None:
    batches = list(Stream(shuffle=False))
    x, y, ids = batches[1]
    batches[1] = (x, y, [str(i) for i in ids.tolist()])
    drop, optimizer = begun(batches)
    with pytest.raises(TypeError, match="ids must be all int or all str, got str after int"):
        trained(drop, optimizer)
    assert len(drop.rows.source) == 8


def test_an_iteration_without_batches() -> None:
    class Once:
        left = 1

        def __iter__(self) -> Iterator[Any]:
            if self.left:
                self.left -= 1
                yield from Stream()

    drop, optimizer = begun(Once())
    with pytest.raises(
        RuntimeError, match="loader must give batches each time it is iterated over, got none from a Once"
    ):
        trained(drop, optimizer)


def test_a_loader_without_ids_is_told_of_them() -> None:
    for loader in (list(Stream()), DataLoader(Shards(), batch_size=8)):
        with pytest.raises(TypeError, match="place in a batch as ids="):
            begun(loader, ids=None)


# The parts


def test_the_table_numbers_ids_in_the_order_of_the_first_meeting() -> None:
    table = IdTable()
    assert table.numbers(["b", "a", "b"]).tolist() == [0, 1, 0]
    assert table.numbers(["c", "a"]).tolist() == [2, 1]
    assert table.ids == ["b", "a", "c"]
    assert IdTable(table.ids).numbers(["c"]).tolist() == [2]


def test_the_length_of_a_loader_that_does_not_say() -> None:
    assert id_source.length_of(Stream()) is None
    assert id_source.length_of(DataLoader(Shards(), batch_size=8)) is None
    assert id_source.length_of([1, 2]) == 2


def test_the_model_of_these_tests_has_four_layers() -> None:
    assert len(begun(Stream())[0].chain) == 4
    assert isinstance(begun(Stream())[0].base_model, Net)
