"""Batches of fewer samples than the sampler named, and batches of several shapes: both train until rows are kept."""

from __future__ import annotations

import warnings
from typing import Any

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, Dataset, Subset, default_collate

from learndrop_ext import CacheConfig, DropScheduler, Fixed, guards


class Photos(Dataset[Any]):
    """40 photos, of which some cannot be read."""

    def __init__(self, *unreadable: int) -> None:
        self.unreadable = unreadable

    def __len__(self) -> int:
        return 40

    def __getitem__(self, i: int) -> Any:
        return None if i in self.unreadable else (torch.full((3, 16, 16), i / 40), i)


def that_can_be_read(samples: list[Any]) -> Any:
    return default_collate([sample for sample in samples if sample is not None])


def scheduler(loader: DataLoader[Any], drops: dict[int, int], **options: Any) -> DropScheduler:
    torch.manual_seed(0)
    model = nn.Sequential(
        *(nn.Conv2d(3, 8, 3, 4), nn.ReLU(), nn.Conv2d(8, 4, 3), nn.AdaptiveAvgPool2d(1), nn.Flatten())
    )
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    return DropScheduler(model, optimizer, loader, policy=Fixed(drops), **options)


def trained(drop: DropScheduler) -> list[int]:
    """An epoch; the labels that came."""
    found = []
    for x, y in drop.loader:
        assert len(x) == len(y)
        nn.functional.cross_entropy(drop.model(x), y % 4).backward()
        drop.optimizer.step()
        found += y.tolist()
    return found


LOADER = {"batch_size": 8, "collate_fn": that_can_be_read}


@pytest.mark.parametrize("unreadable", [37, 3, 0, 7])
@pytest.mark.parametrize(
    ("drops", "options"), [({}, {}), ({0: 1}, {"cache": None}), ({1: 1}, {"cache": None})], ids=str
)
def test_samples_that_collate_fn_leaves_out_are_missing_where_no_rows_are_kept(
    unreadable: int, drops: dict[int, int], options: dict[str, Any]
) -> None:
    drop = scheduler(DataLoader(Photos(unreadable), **LOADER), drops, **options)
    wanted = [i for i in range(40) if i != unreadable]
    for _ in range(3):
        assert trained(drop) == wanted
        assert drop.step().samples == 39
    assert drop.prefix == bool(drops)


SHORT = r"keep no rows, .* collate_fn must give every sample of a batch, wanted 8, got 7; .*Subset"


@pytest.mark.parametrize("workers", [0, 1])
@pytest.mark.parametrize("epoch", [0, 1])
def test_a_batch_with_fewer_samples_trains_and_keeps_no_rows(epoch: int, workers: int) -> None:
    drop = scheduler(DataLoader(Photos(29), **LOADER, num_workers=workers), {epoch: 1})
    wanted = [i for i in range(40) if i != 29]
    if epoch:
        assert trained(drop) == wanted
        drop.step()
    with pytest.warns(RuntimeWarning, match=SHORT):
        assert trained(drop) == wanted
    for _ in range(2):
        assert drop.step().samples == 39
        # The other batches have their rows, and nothing of this one is stored.
        assert drop._rows.filled(torch.arange(40)).tolist() == [True] * 24 + [False] * 8 + [True] * 8
        assert int(drop._extras.filled.sum()) == 32
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            assert trained(drop) == wanted


@pytest.mark.filterwarnings("ignore:drop.loader. some batches keep no rows")
@pytest.mark.parametrize("workers", [0, 1])
def test_the_others_of_a_batch_with_fewer_samples_get_rows_in_other_batches(workers: int) -> None:
    generator = torch.Generator().manual_seed(0)
    loader = DataLoader(Photos(29), **LOADER, shuffle=True, generator=generator, num_workers=workers)
    drop = scheduler(loader, {0: 1})
    kept = []
    for _ in range(6):
        assert sorted(trained(drop)) == [i for i in range(40) if i != 29]
        kept.append(int(drop._rows.filled(torch.arange(40)).sum()))
        drop.step()
    assert kept[0] == 32
    assert kept[-3:] == [39] * 3  # the one that is missing would then be read alone, which default_collate refuses


def test_an_error_of_the_dataset_is_raised_as_it_is() -> None:
    drop = scheduler(DataLoader(Photos(), batch_size=8), {0: 1})
    trained(drop)
    drop.step()
    drop.refresh([29])
    drop.loader.dataset.unreadable = (29,)
    with pytest.raises(TypeError, match="NoneType"):
        trained(drop)


def test_a_first_batch_with_fewer_samples_keeps_no_rows() -> None:
    drop = scheduler(DataLoader(Photos(3, 5), **LOADER), {0: 1})
    with pytest.warns(RuntimeWarning, match=SHORT.replace("7", "6")):
        assert len(trained(drop)) == 38
    assert int(drop._rows.cache.filled.sum()) == 32


def test_mirror_images_want_every_sample_from_the_first_epoch_on() -> None:
    drop = scheduler(DataLoader(Photos(29), **LOADER), {}, cache=CacheConfig(mirror=True))
    with pytest.raises(ValueError, match="collate_fn must give every sample of a batch"):
        trained(drop)


def test_samples_that_cannot_be_read_any_more_do_not_end_the_run(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(guards, "PROBES", 40)  # of fewer, all may be unreadable: collate_fn then gets nothing
    dataset = Photos()
    drop = scheduler(DataLoader(dataset, **LOADER), {0: 1})
    for _ in range(2):
        trained(drop)
        drop.step()
    dataset.unreadable = tuple(range(0, 40, 2))
    assert trained(drop) == list(range(40))  # on their rows


def test_the_way_out_works() -> None:
    readable = Subset(Photos(29), [i for i in range(40) if i != 29])
    drop = scheduler(DataLoader(readable, **LOADER), {0: 1})
    for _ in range(3):
        assert trained(drop) == readable.indices
        drop.step()
    assert int(drop._rows.cache.filled.sum()) == 39


class TwoShapes(Dataset[Any]):
    def __len__(self) -> int:
        return 40

    def __getitem__(self, i: int) -> Any:
        shape = (3, 24, 16) if i < 20 else (3, 16, 24)
        return torch.randn(shape, generator=torch.Generator().manual_seed(i)), i


SHAPED = [list(range(i, i + 4)) for i in range(0, 40, 4)]
LOADERS: dict[str, dict[str, Any]] = {
    "grouped by shape": {"batch_sampler": SHAPED},
    "the other first": {"batch_sampler": SHAPED[::-1]},
    "one by one": {"batch_size": 1, "shuffle": True},
}


@pytest.mark.parametrize("kind", LOADERS)
@pytest.mark.parametrize(
    ("drops", "options"), [({}, {}), ({0: 1}, {"cache": None}), ({1: 1}, {"cache": None})], ids=str
)
def test_batches_of_several_shapes_train_where_no_rows_are_kept(
    kind: str, drops: dict[int, int], options: dict[str, Any]
) -> None:
    drop = scheduler(DataLoader(TwoShapes(), **LOADERS[kind]), drops, **options)
    for _ in range(3):
        assert sorted(trained(drop)) == list(range(40))
        drop.step()
    assert drop.prefix == bool(drops)


@pytest.mark.parametrize("first", [12, 4])
def test_no_rows_are_kept_where_most_images_had_another_shape_than_the_first_ones(first: int) -> None:
    """first: samples of the shape of the first batch; the others are 20."""
    drop = scheduler(DataLoader(TwoShapes(), batch_sampler=[list(range(first)), *SHAPED[5:]]), {1: 1})
    for _ in range(3):
        assert len(trained(drop)) == first + 20
        record = drop.step()
        assert (record.prefix, drop._rows.cut) == (1, 0)
    reason = "no rows: images must have one shape, and had [3, 24, 16] and [3, 16, 24]"
    assert drop.history[0].reason == f"set by hand; {reason}"


@pytest.mark.parametrize("kind", LOADERS)
@pytest.mark.parametrize("workers", [0, 1])
def test_batches_of_another_shape_keep_no_rows(kind: str, workers: int) -> None:
    drop = scheduler(DataLoader(TwoShapes(), **LOADERS[kind], num_workers=workers), {0: 1})
    with pytest.warns(
        RuntimeWarning,
        match=r"no rows, .* one shape, wanted \[3, (24, 16|16, 24)\] .* got \[3, (24, 16|16, 24)\]",
    ):
        assert sorted(trained(drop)) == list(range(40))
    assert drop.step().prefix == 1
    # Rows are of one shape, that of the first batch of the run.
    kept = torch.nonzero(drop._rows.filled(torch.arange(40))).flatten()
    assert len({int(i) // 20 for i in kept}) == 1
    assert int(drop._extras.filled.sum()) == len(kept) == 20
    assert sorted(trained(drop)) == list(range(40))
