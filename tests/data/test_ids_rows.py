"""Loaders with ids: which samples get rows, and when the loader is read again."""

from __future__ import annotations

import itertools
import warnings
from typing import Any

import numpy as np
import pytest
import torch
from ids_streams import (
    Make,
    Stream,
    assert_rows,
    begun,
    epochs,
    ids_in,
    trained,
)
from torch import nn

from learndrop_ext import CacheConfig
from learndrop_ext.data.id_source import ids_of
from small_training import called, data, prefix_rows


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
    for number, value in enumerate(drop._source.state()["values"]):
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
    drop._rows.forget()
    fill, later = epochs(drop, optimizer, 2)
    assert stream.iterations == 4
    assert_rows(fill + later, drop)


def test_one_missing_row_is_made_of_another_iteration() -> None:
    stream = Stream()
    drop, optimizer = begun(stream)
    epochs(drop, optimizer, 3)
    drop._rows.forget(torch.tensor([5]))
    fill, later = epochs(drop, optimizer, 2)
    assert stream.iterations == 4
    assert_rows(fill + later, drop)


def test_rows_that_do_not_fit_are_made_in_each_epoch() -> None:
    row = 6 * 4 * 4 * 4
    stream = Stream()
    drop, optimizer = begun(stream, {0: 2}, cache=CacheConfig(codec="fp32", budget_bytes=20 * row))
    assert drop._rows.cut == 2
    with pytest.warns(RuntimeWarning, match="do not hold the rows of all samples that are drawn"):
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
    with (
        pytest.warns(RuntimeWarning, match=r"computed under no autocast, and the loop now trains under .*bfloat16"),
        pytest.warns(RuntimeWarning, match="drop.loader: the rest of the epoch comes from loader, in its order"),
    ):
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
    assert all(p.requires_grad for p in drop._base.parameters())
    with pytest.raises(RuntimeError, match="it was closed"):
        next(iter(drop.loader))


def test_samples_cannot_be_read_by_number() -> None:
    drop, _ = begun(Stream())
    with pytest.raises(RuntimeError, match="can be read only as they come by, got 2 asked for by id"):
        drop._source.read([1, 2], 0)


def test_images_that_were_not_read_cannot_be_read() -> None:
    stream = Stream()
    drop, optimizer = begun(stream)
    epochs(drop, optimizer, 3)
    x, _, _ = next(iter(drop.loader))
    with pytest.raises(RuntimeError, match="images of a loader with ids= can be read only as they come by"):
        x.read()
    drop._rows.forget()
    x, _, ids = next(iter(drop.loader))
    assert torch.equal(x.read(), stream.images[ids])


# Iterations that are broken off, repeat or grow


def test_epochs_that_are_broken_off_go_on_reading() -> None:
    stream = Stream()
    drop, optimizer = begun(stream, {0: 2})
    for _ in range(6):
        for x, y, ids in itertools.islice(drop.loader, 2):
            output, rows = called(drop, x)
            nn.functional.cross_entropy(output, y).backward()
            assert torch.equal(rows, prefix_rows(drop, 2)[ids])
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
    first = drop._rows.slots.table.data_ptr()
    for _ in drop.loader:
        if drop._rows.slots.table.data_ptr() != first:
            first = drop._rows.slots.table.data_ptr()
            copies.append(len(drop._rows.slots))
    assert len(drop._rows.slots) == 400
    assert len(copies) < 25


# Samples that change
