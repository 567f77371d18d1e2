"""Loaders with ids: samples, labels and weights that change are refused, or have the rows computed again."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from ids_streams import (
    Stream,
    assert_rows,
    begun,
    epochs,
    trained,
)

from learndrop_ext import CacheConfig
from small_training import data


@pytest.mark.parametrize("shuffle", [True, False])
@pytest.mark.parametrize("at_once", [True, False])
def test_a_random_loader_is_refused(shuffle: bool, at_once: bool) -> None:
    drop, optimizer = begun(Stream(noise=0.1, shuffle=shuffle), {0: 2} if at_once else {1: 2})
    with pytest.raises(ValueError, match=r"must give the same sample for the same id each time.*views=V"):
        trained(drop, optimizer)
    with pytest.raises(ValueError, match="must give the same sample for the same id each time"):
        epochs(drop, optimizer, 2)


def test_labels_in_place_of_ids_are_refused() -> None:
    with pytest.raises(ValueError, match=r"a different one for one of .*give each sample an id of its own"):
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
    # Images are read once more, and all but one have rows.
    drop._rows.forget(torch.tensor([5]))
    stream.images = stream.images + 0.5
    with pytest.warns(RuntimeWarning, match="drop.loader: the rows are computed again: the images of some samples"):
        batches = trained(drop, optimizer)
    with torch.no_grad():
        rows = drop.chain.prefix(2).eval()(stream.images)
    assert all(torch.equal(x, rows[ids]) for x, _, ids in batches)


def test_labels_are_compared_too() -> None:
    stream = Stream()
    drop, optimizer = begun(stream)
    epochs(drop, optimizer, 2)
    drop._rows.forget(torch.tensor([5]))
    stream.labels = (stream.labels + 1) % 5
    with pytest.warns(RuntimeWarning, match=r"the rows are computed again: batch\[1\] of some samples"):
        batches = trained(drop, optimizer)
    assert all(torch.equal(y, stream.labels[ids]) for _, y, ids in batches)


@pytest.mark.parametrize("views", [1, 2])
def test_images_of_another_size_train_with_frozen_layers(views: int) -> None:
    stream = Stream()
    drop, optimizer = begun(stream, cache=CacheConfig(codec="fp32", views=views))
    epochs(drop, optimizer, 2)
    drop._rows.forget()
    stream.images = stream.images[..., :6, :6]
    with pytest.warns(RuntimeWarning, match=r"no rows, .* one shape, wanted \[3, 8, 8\] .* got \[3, 6, 6\]"):
        batches = trained(drop, optimizer)
    assert drop.prefix == 2
    with torch.no_grad():
        wanted = drop.chain.prefix(2).eval()(stream.images)
    assert all(torch.equal(x, wanted[ids]) for x, _, ids in batches)


def test_changed_weights_have_the_rows_made_anew() -> None:
    stream = Stream()
    drop, optimizer = begun(stream)
    epochs(drop, optimizer, 3)
    with torch.no_grad():
        drop._base.get_submodule("conv1").weight.mul_(2)
    with pytest.warns(RuntimeWarning, match="the weights or buffers of the dropped layer conv1 have changed"):
        batches = trained(drop, optimizer)
    assert stream.iterations == 4
    assert_rows(batches, drop)


# Checkpoints
