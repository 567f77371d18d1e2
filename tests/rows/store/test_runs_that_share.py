"""Runs that share rows through a store: folds, trials, growing and corrected data; never another sample's row or label."""

from __future__ import annotations

import os
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.utils.data import ConcatDataset, DataLoader, Dataset, Subset, TensorDataset, random_split

from learndrop_ext import CacheConfig, DropScheduler, Fixed
from learndrop_ext.guards import PROBES
from learndrop_ext.rows.store.keeping import StoredSet, list_rows
from learndrop_ext.rows.store.store import RowStore
from small_training import Net, called, data, epoch, parts

IMAGES = data(40).tensors[0]


class Photos(Dataset[Any]):
    """Images with labels; which samples were read."""

    def __init__(
        self, count: int = 24, *, labels: Any = None, images: torch.Tensor = IMAGES, named: bool = True
    ) -> None:
        self.count, self.images, self.named = count, images, named
        self.corrected = {} if labels is None else labels
        self.reads: list[int] = []

    def __len__(self) -> int:
        return self.count

    def __repr__(self) -> str:
        return "photos of the test" if self.named else object.__repr__(self)

    def __getitem__(self, index: int) -> Any:
        self.reads.append(index)
        return self.images[index], self.corrected.get(index, index % 5)


class Listed(Photos):
    """The labels can be had without reading."""

    @property
    def targets(self) -> list[int]:
        return [self.corrected.get(i, i % 5) for i in range(self.count)]


def begun(
    folder: Path,
    dataset: Dataset[Any],
    *,
    drops: dict[int, int] | None = None,
    seed: int = 1,
    batch: int = 8,
    **options: Any,
) -> tuple[DropScheduler, torch.optim.Optimizer, Net]:
    model, optimizer, loader = parts(dataset, batch_size=batch, generator=torch.Generator().manual_seed(seed))
    config = CacheConfig(**{"codec": "fp32", "store": folder} | options)
    return DropScheduler(model, optimizer, loader, policy=Fixed(drops or {0: 2}), cache=config), optimizer, model


def run(folder: Path, dataset: Any, *, epochs: int = 3, **options: Any) -> tuple[list[float], list[int], list[int]]:
    """One run: its losses, and for each epoch how many samples were read and how many rows were computed from images."""
    drop, optimizer, model = begun(folder, dataset, **options)
    base = dataset
    while isinstance(base, Subset):
        base = base.dataset
    losses, reads, made = [], [], []
    run_prefix = [0]
    model.conv1.register_forward_hook(lambda _, args, __: run_prefix.__setitem__(0, run_prefix[0] + len(args[0])))
    for _ in range(epochs):
        base.reads.clear()
        run_prefix[0] = 0
        losses += epoch(drop, optimizer)
        reads.append(len(base.reads))
        made.append(drop._rows.counts[0])
        drop.step()
    drop.close()
    return losses, reads, made


def stored(folder: Path) -> list[StoredSet]:
    store = RowStore(folder)
    try:
        return list_rows(store)
    finally:
        store.close()


def test_trials_take_the_rows_of_the_first_and_train_the_same(tmp_path: Path) -> None:
    first, reads, made = run(tmp_path, Listed())
    assert reads[0] == 24
    assert max(reads[1:]) <= PROBES
    assert made == [24, 0, 0]
    for seed in (1, 2, 3):
        again, reads, made = run(tmp_path, Listed(), seed=seed)
        assert (again == first) == (seed == 1)
        # The first batch is compared with the rows that are there.
        assert reads[0] == 8
        assert max(reads[1:]) <= PROBES
        assert made == [8, 0, 0]
    (one,) = stored(tmp_path)
    assert (one.samples, one.rows, one.cut, one.codec, one.in_use) == (24, 24, 2, "fp32", False)


def test_runs_of_one_epoch_leave_rows_and_take_them(tmp_path: Path) -> None:
    """As those of the first round of successive halving: they would not read a row again themselves."""
    reads = []
    for _ in range(3):
        dataset = Listed()
        model, optimizer, loader = parts(dataset, batch_size=8)
        cache = CacheConfig(codec="fp32", store=tmp_path)
        with DropScheduler(model, optimizer, loader, policy=Fixed({0: 2}), epochs=1, cache=cache) as drop:
            dataset.reads.clear()
            epoch(drop, optimizer)
            drop.step()
        reads.append(len(dataset.reads))
    assert reads == [24, 8, 8]


def test_where_labels_cannot_be_had_each_sample_is_read_once_for_them(tmp_path: Path) -> None:
    run(tmp_path, Photos())
    _, reads, made = run(tmp_path, Photos())
    assert reads[0] == 24
    assert max(reads[1:]) <= PROBES
    assert made == [8, 0, 0]


def test_folds_compute_each_row_once_and_never_get_another_samples(tmp_path: Path) -> None:
    computed = 0
    for fold in range(5):
        train = [i for i in range(40) if i % 5 != fold]
        dataset = Photos(40)
        drop, _, _ = begun(tmp_path, Subset(dataset, train))
        wanted = drop.chain.prefix(2).eval()(IMAGES).detach()
        for _ in range(2):
            for x, y in drop.loader:
                ids = x.standing.ids.clone()
                _, rows = called(drop, x)
                assert torch.allclose(rows, wanted[torch.tensor(train)[ids]], atol=1e-5)
                assert y.tolist() == [train[i] % 5 for i in ids.tolist()]
            computed += drop._rows.counts[0]
            drop.step()
        drop.close()
    (one,) = stored(tmp_path)
    assert (one.samples, one.rows) == (40, 40)
    # All of the first fold, the part that it left out, and the batches by which later folds look.
    assert computed <= 32 + 8 + 4 * 8


@pytest.mark.parametrize(
    "split",
    [
        lambda photos: random_split(photos, [20, 20], torch.Generator().manual_seed(3))[0],
        lambda photos: Subset(Subset(photos, list(range(5, 35))), list(range(3, 23))),
        lambda photos: ConcatDataset([Subset(photos, list(range(30, 40))), Subset(photos, list(range(10)))]),
    ],
)
def test_parts_of_a_dataset_find_the_rows_of_the_whole(tmp_path: Path, split: Any) -> None:
    run(tmp_path, Listed(40))
    part = split(Listed(40))
    drop, optimizer, _ = begun(tmp_path, part)
    epoch(drop, optimizer)
    assert drop._rows.counts[0] == 8
    drop.close()
    assert stored(tmp_path)[0].rows == 40


def test_labels_are_those_of_the_runs_own_dataset(tmp_path: Path) -> None:
    run(tmp_path, Listed())
    for kind in (Listed, Photos):
        drop, _, _ = begun(tmp_path, kind(labels={i: 4 for i in range(0, 24, 3)}))
        for _ in range(2):
            for x, y in drop.loader:
                ids = x.standing.ids.tolist()
                drop.model(x)
                assert y.tolist() == [4 if i % 3 == 0 else i % 5 for i in ids]
            drop.step()
        drop.close()


def test_labels_corrected_within_a_run_are_seen_in_the_next_epoch(tmp_path: Path) -> None:
    for store in (None, tmp_path, tmp_path):
        dataset = Listed()
        drop, optimizer, _ = begun(tmp_path, dataset, store=store)
        for _ in range(2):
            epoch(drop, optimizer)
            drop.step()
        dataset.corrected = {i: 3 for i in range(24)}
        dataset.reads.clear()
        assert all(y.tolist() == [3] * len(y) for _, y in drop.loader)
        assert len(dataset.reads) <= PROBES
        drop.close()


def test_labels_that_the_dataset_changes_as_it_reads_are_read(tmp_path: Path) -> None:
    class Changing(Listed):
        target_transform = staticmethod(lambda label: label)

    run(tmp_path, Changing())
    assert run(tmp_path, Changing())[1][0] == 24


def test_targets_given_by_the_user_are_taken_and_checked(tmp_path: Path) -> None:
    labels = [i % 5 for i in range(24)]
    run(tmp_path, Photos(), targets=labels)
    _, reads, _ = run(tmp_path, Photos(), targets=labels)
    assert reads[0] == 8
    with pytest.raises(ValueError, match=r"^CacheConfig: targets must be one label for each of the 24 samples, got 3"):
        begun(tmp_path, Photos(), targets=[1, 2, 3])
    with pytest.raises(ValueError, match=r"^CacheConfig: targets must be the labels of the samples.* holds others"):
        begun(tmp_path, Photos(), targets=[9] * 24)


def test_another_entry_in_the_batches_is_no_obstacle(tmp_path: Path) -> None:
    class Weighted(Photos):
        def __getitem__(self, index: int) -> Any:
            return (*super().__getitem__(index), 0.5 * index, f"sample {index}")

    Weighted.__qualname__ = Photos.__qualname__
    run(tmp_path, Photos())
    drop, _, _ = begun(tmp_path, Weighted())
    for x, y, weight, name in drop.loader:
        ids = x.standing.ids.tolist()
        drop.model(x)
        assert (y.tolist(), weight.tolist(), list(name)) == (
            [i % 5 for i in ids],
            [0.5 * i for i in ids],
            [f"sample {i}" for i in ids],
        )
    drop.close()
    assert stored(tmp_path)[0].rows == 24


def test_other_images_under_the_same_names_are_noticed_and_computed_again(tmp_path: Path) -> None:
    run(tmp_path, Listed())
    changed = IMAGES.flip(0)
    with pytest.warns(
        RuntimeWarning, match="are computed again: they are not what the dropped layers make of the images"
    ):
        losses, reads, made = run(tmp_path, Listed(images=changed))
    assert (reads[0], made) == (24, [24, 0, 0])
    assert losses == run(tmp_path, Listed(images=changed), store=None)[0]
    again, reads, made = run(tmp_path, Listed(images=changed))
    assert again == losses
    assert made == [8, 0, 0]
    (one,) = stored(tmp_path)
    assert one.rows == 24


def test_a_few_replaced_images_are_noticed_by_reading_some_again(tmp_path: Path) -> None:
    run(tmp_path, Listed())
    changed = IMAGES.clone()
    changed[::2] += 1
    with pytest.warns(RuntimeWarning, match="are computed again"):
        run(tmp_path, Listed(images=changed), epochs=4)
    assert run(tmp_path, Listed(images=changed))[2] == [8, 0, 0]


@pytest.mark.parametrize("replaced", [3, 20])
def test_one_replaced_image_is_noticed_where_it_is_read_for_its_label(tmp_path: Path, replaced: int) -> None:
    run(tmp_path, Photos())
    changed = IMAGES.clone()
    changed[replaced] += 1
    drop, _, _ = begun(tmp_path, Photos(images=changed))
    wanted = drop.chain.prefix(2).eval()(changed).detach()

    def rows_are_right() -> None:
        for x, _ in drop.loader:
            _, rows = called(drop, x)
            assert torch.allclose(rows, wanted[x.standing.ids], atol=1e-5)

    with pytest.warns(RuntimeWarning, match="are computed again"):
        rows_are_right()
    rows_are_right()
    drop.close()
    assert run(tmp_path, Photos(images=changed))[2] == [8, 0, 0]


def test_a_resumed_run_looks_at_images_in_its_first_epoch(tmp_path: Path) -> None:
    drop, optimizer, model = begun(tmp_path, Photos())
    epoch(drop, optimizer)
    drop.step()
    state = drop.state_dict()
    again, again_optimizer, loader = parts(Photos(images=IMAGES + 1))
    again.load_state_dict(model.state_dict())
    config = CacheConfig(codec="fp32", store=tmp_path)
    resumed = DropScheduler(again, again_optimizer, loader, policy=Fixed({}), cache=config)
    resumed.load_state_dict(state)
    with pytest.warns(RuntimeWarning, match="the rows are computed again: the images of some samples"):
        iter(resumed.loader).__next__()
    resumed.close()
    drop.close()


def test_a_dataset_in_memory_is_known_by_its_values(tmp_path: Path) -> None:
    labels = torch.arange(40) % 5
    for images, computed in ((IMAGES[:30], 30), (IMAGES.flip(0)[:30], 30), (IMAGES[5:30], 8)):
        drop, optimizer, _ = begun(tmp_path, TensorDataset(images, labels[: len(images)]))
        epoch(drop, optimizer)
        assert drop._rows.counts[0] <= computed
        drop.close()
    assert stored(tmp_path)[0].samples == 40


class Files(Dataset[Any]):
    """Images in files, as torchvision's ImageFolder lists them."""

    def __init__(self, root: Path) -> None:
        self.root = str(root)
        self.samples = [(str(path), int(path.stem) % 5) for path in sorted(root.glob("*.pt"))]
        self.reads: list[int] = []

    def __len__(self) -> int:
        return len(self.samples)

    def __getitem__(self, index: int) -> Any:
        self.reads.append(index)
        path, label = self.samples[index]
        return torch.load(path), label


def test_files_are_known_by_path_size_and_time_wherever_the_folder_is(tmp_path: Path) -> None:
    store, photos = tmp_path / "store", tmp_path / "photos"
    store.mkdir()
    photos.mkdir()
    for i in range(24):
        torch.save(IMAGES[i].clone(), photos / f"{i:03}.pt")
    _, reads, made = run(store, Files(photos))
    assert (reads[0], made[0]) == (24, 24)
    photos = photos.rename(tmp_path / "moved")
    (photos / "002.pt").unlink()
    torch.save(IMAGES[30].clone(), photos / "005.pt")
    os.utime(photos / "005.pt", (1, 1))
    torch.save(IMAGES[31].clone(), photos / "100.pt")
    dataset = Files(photos)
    drop, _, _ = begun(store, dataset)
    wanted = drop.chain.prefix(2).eval()(torch.stack([dataset[i][0] for i in range(24)])).detach()
    for x, y in drop.loader:
        ids = x.standing.ids
        _, rows = called(drop, x)
        assert torch.allclose(rows, wanted[ids], atol=1e-5)
        assert y.tolist() == [dataset.samples[i][1] for i in ids.tolist()]
    drop.close()
    assert stored(store)[0].samples == 26


def test_a_dataset_that_has_grown_reads_and_computes_the_new_images(tmp_path: Path) -> None:
    run(tmp_path, Listed(30), batch=10)
    dataset = Listed(33)
    drop, optimizer, _ = begun(tmp_path, dataset, batch=11)
    dataset.reads.clear()
    epoch(drop, optimizer)
    new = set(dataset.reads[11:])
    assert new <= {30, 31, 32}
    assert {30, 31, 32} <= set(dataset.reads)
    assert drop._rows.counts[0] == len(dataset.reads)
    drop.close()
    assert stored(tmp_path)[0].rows == 33


@pytest.mark.parametrize("dataset", [Photos(named=False), Subset(Photos(named=False), [1, 2, 3])])
def test_a_dataset_without_names_for_its_samples_is_refused_and_may_be_given_them(tmp_path: Path, dataset: Any) -> None:
    message = r"^DropScheduler: loader must be over a dataset of files, in memory, or .*; give it a __repr__ .*key="
    with pytest.raises(ValueError, match=message):
        begun(tmp_path, dataset)
    for computed in (True, False):
        drop, optimizer, _ = begun(tmp_path, dataset, key=lambda i: f"photo {i}", batch=3)
        epoch(drop, optimizer)
        assert drop._rows.counts[0] == (len(dataset) if computed else 3)
        drop.close()


def test_rows_behind_trained_layers_stay_with_their_run(tmp_path: Path) -> None:
    _, _, made = run(tmp_path, Listed(), drops={1: 2})
    assert made == [0, 24, 0]
    assert stored(tmp_path) == []
    drop, optimizer, _ = begun(tmp_path, Listed(), drops={0: 1, 1: 3})
    for _ in range(3):
        epoch(drop, optimizer)
        drop.step()
    assert [one.cut for one in stored(tmp_path)] == [1]
    drop.close()
    assert [one.cut for one in stored(tmp_path)] == [1]


def test_other_weights_settings_loops_and_codecs_have_rows_of_their_own(tmp_path: Path) -> None:
    run(tmp_path, Listed())
    drop, _, model = begun(tmp_path, Listed())
    drop.close()
    kinds = 1
    for change in ("weight", "buffer", "setting", "loop", "codec"):
        model, optimizer, loader = parts(Listed())
        if change == "weight":
            model.conv1.weight.data[0] += 1
        if change == "buffer":
            model.bn1.running_mean[0] += 1
        if change == "setting":
            model.conv2.padding_mode = "circular"
        codec = "fp16" if change == "codec" else "fp32"
        drop = DropScheduler(
            model, optimizer, loader, policy=Fixed({0: 2}), cache=CacheConfig(codec=codec, store=tmp_path)
        )
        for x, _ in drop.loader:
            drop.model(2 * x if change == "loop" else x)
        assert drop._rows.counts[0] == 24, change
        drop.close()
        kinds += 1
        assert len(stored(tmp_path)) == kinds, change


class Jittered(Listed):
    """Another image each time, of which the first value tells the sample."""

    def __getitem__(self, index: int) -> Any:
        image, label = super().__getitem__(index)
        return image + torch.rand(()), label


@torch.library.custom_op("learndrop_tests::doubled", mutates_args=(), device_types="cpu")
def doubled(x: torch.Tensor) -> torch.Tensor:
    """Nobody can say without values what it returns."""
    return 2 * x


class Doubled(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        result: torch.Tensor = doubled(x)
        return result


class Varied(nn.Module):
    """Two layers to drop, and what their forward reads beside weights."""

    def __init__(self, **settings: Any) -> None:
        super().__init__()
        self.register_buffer("mean", torch.full((3, 1, 1), settings.get("buffer", 0.0)))
        self.scale = torch.full((), settings.get("tensor", 1.0))
        self.std, self.act = settings.get("tuple", (1.0,)), settings.get("function", torch.relu)
        dilation = settings.get("dilation", (1, 1))
        self.conv1 = nn.Conv2d(3, 4, 3, padding=dilation, dilation=dilation)
        self.module = settings.get("module", nn.Identity())
        self.conv2, self.fc = nn.Conv2d(4, 4, 3), nn.Linear(4, 5)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.act(self.conv1((x - self.mean) / self.std[0] * self.scale))
        x = self.module(x)
        return self.fc(self.conv2(x).mean((2, 3)))


@pytest.mark.parametrize(
    ("setting", "value"),
    [
        ("buffer", 1.0),
        ("tensor", 2.0),
        ("tuple", (2.0,)),
        ("function", torch.sigmoid),
        ("dilation", (2, 2)),
        ("module", Doubled()),
    ],
)
def test_whatever_the_dropped_layers_compute_otherwise_has_rows_of_its_own(
    setting: str, value: Any, tmp_path: Path
) -> None:
    """Random views cannot be compared with what is in the store."""
    sets = []
    for settings in ({}, {}, {setting: value}, {setting: value}):
        torch.manual_seed(0)
        model = Varied(**settings)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        cache = CacheConfig(codec="fp32", views=4, store=tmp_path)
        loader = DataLoader(Jittered(), batch_size=8)
        with DropScheduler(model, optimizer, loader, policy=Fixed({0: 2}), cache=cache) as drop:
            epoch(drop, optimizer)
            drop.step()
        sets.append(len(stored(tmp_path)))
    assert sets == ([1, 1, 2, 3] if setting == "module" else [1, 1, 2, 2])


def test_a_store_whose_folder_has_gone_costs_the_run_nothing_else(tmp_path: Path) -> None:
    folder = tmp_path / "store"
    drop, optimizer, _ = begun(folder, Listed(), drops={0: 1, 1: 2})
    epoch(drop, optimizer)
    shutil.rmtree(folder)
    drop.step()
    losses = epoch(drop, optimizer)
    drop.step()
    assert (drop.prefix, len(losses)) == (2, 3)
    drop.close()


def test_random_views_get_richer_with_each_run(tmp_path: Path) -> None:
    rows, reads = [], []
    for seed in range(8):
        dataset = Jittered()
        torch.manual_seed(seed)
        _, read, _ = run(tmp_path, dataset, views=4, epochs=4, seed=seed)
        rows.append(stored(tmp_path)[0].rows)
        reads.append(sum(read))
    assert rows[0] == 4 * 24
    assert rows == sorted(rows)
    assert rows[1] > rows[0]
    assert rows[-1] <= 4 * 4 * 24 + 24
    assert reads[-1] < reads[0]


def test_a_resumed_run_is_bit_equal_to_the_uninterrupted_one(tmp_path: Path) -> None:
    for drops, options in (({0: 2}, {}), ({1: 2}, {}), ({0: 2}, {"views": 2})):
        dataset = (Jittered if options else Listed)()
        folder = tmp_path / str(len(list(tmp_path.iterdir())))
        folder.mkdir()
        drop, optimizer, model = begun(folder, dataset, drops=drops, **options)
        states, losses = [], []
        for _ in range(4):
            torch.manual_seed(5)
            losses.append(epoch(drop, optimizer))
            drop.step()
            states.append(
                (drop.state_dict(), {k: v.clone() for k, v in model.state_dict().items()}, optimizer.state_dict())
            )
            if len(states) == 3:
                saved = states[-1]
                saved_optimizer = {
                    "state": {k: {n: t.clone() for n, t in v.items()} for k, v in saved[2]["state"].items()},
                    "param_groups": saved[2]["param_groups"],
                }
                order = drop._source.loader.generator.get_state()
        again_model, again_optimizer, loader = parts(dataset, batch_size=8)
        loader.generator.set_state(order)
        config = CacheConfig(codec="fp32", store=folder, **options)
        again_model.load_state_dict(saved[1])
        again_optimizer.load_state_dict(saved_optimizer)
        again = DropScheduler(again_model, again_optimizer, loader, policy=Fixed({}), cache=config)
        again.load_state_dict(saved[0])
        torch.manual_seed(5)
        dataset.reads.clear()
        assert epoch(again, again_optimizer) == losses[3]
        if not options:
            assert len(dataset.reads) <= PROBES
        again.close()
        drop.close()
        assert [one.cut for one in stored(folder)] == ([2] if 0 in drops else [])


def test_damaged_rows_are_computed_again(tmp_path: Path) -> None:
    first, *_ = run(tmp_path, Listed())
    (path,) = tmp_path.glob("rows-*.bin")
    content = bytearray(path.read_bytes())
    for i in range(4096, len(content), 4096 * 3):
        content[i] ^= 255
    path.write_bytes(content)
    with pytest.warns(RuntimeWarning, match="rows are computed again: a row in the store must have the checksum"):
        again, *_ = run(tmp_path, Listed())
    assert again == first
    assert run(tmp_path, Listed())[2] == [8, 0, 0]
