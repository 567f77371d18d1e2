"""Rows that a run leaves to others: found, used, and never of another network or other images."""

from __future__ import annotations

import contextlib
import copy
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils.data import ConcatDataset, Dataset, Subset

from learndrop_ext import CacheConfig, DropScheduler, Fixed
from learndrop_ext.decide import costs
from learndrop_ext.guards import PROBES
from learndrop_ext.rows.store.file import read_tables
from learndrop_ext.rows.store.shared import list_rows
from small_training import Net, called, data, epoch, parts, prefix_rows


class Counted(Dataset[Any]):
    """The small data; how often a sample was read."""

    reads = 0

    def __len__(self) -> int:
        return 24

    def __repr__(self) -> str:
        return "the 24 samples of small_training"

    def __getitem__(self, index: int) -> Any:
        Counted.reads += 1
        return data()[index]


def begun(
    folder: Path,
    dataset: Dataset[Any],
    *,
    seed: int = 1,
    drops: dict[int, int] | None = None,
    change: Sequence[Callable[[Net], None]] = (),
    **options: Any,
) -> tuple[DropScheduler, torch.optim.Optimizer]:
    model, optimizer, loader = parts(dataset, generator=torch.Generator().manual_seed(seed))
    for make in change:
        make(model)
    config = CacheConfig(**{"codec": "fp32", "disk_dir": str(folder), "shared": True} | options)
    return DropScheduler(model, optimizer, loader, policy=Fixed(drops or {0: 2}), cache=config), optimizer


def run(
    folder: Path, *, epochs: int = 3, dataset: Dataset[Any] | None = None, **options: Any
) -> tuple[list[float], DropScheduler, list[int]]:
    """One trial of a sweep; the samples read in each of its epochs."""
    drop, optimizer = begun(folder, dataset or Counted(), **options)
    losses, reads = [], []
    for _ in range(epochs):
        Counted.reads = 0
        losses += epoch(drop, optimizer)
        reads.append(Counted.reads)
        drop.step()
    drop.close()
    return losses, drop, reads


def once(reads: list[int]) -> bool:
    """Whether all samples were read in the first epoch, and later only those that are compared with their rows."""
    return 24 <= reads[0] <= 24 + PROBES and max(reads[1:]) <= PROBES


def test_the_second_run_reads_each_sample_once_makes_one_batch_of_rows_and_trains_the_same(tmp_path: Path) -> None:
    first, drop, reads = run(tmp_path)
    assert once(reads)
    fill_flops = drop.history[1].fill_flops
    assert fill_flops > 0
    (file,) = list_rows(tmp_path)
    assert (file.cut, file.samples, file.codec) == (2, 24, "fp32")
    for seed in (1, 2):
        again, drop, reads = run(tmp_path, seed=seed)
        assert (again == first) == (seed == 1)
        assert once(reads)
        # The first of three batches is compared with the rows of the other run.
        assert [record.fill_flops for record in drop.history] == [0, fill_flops // 3, 0, 0]
    assert list_rows(tmp_path)[0].name == file.name
    assert len(list(tmp_path.iterdir())) == 1


def test_a_file_of_shared_rows_holds_no_labels(tmp_path: Path) -> None:
    run(tmp_path)
    (path,) = tmp_path.iterdir()
    descriptor = os.open(path, os.O_RDONLY)
    sidecar = read_tables(path, descriptor).sidecar
    os.close(descriptor)
    assert sidecar.values is None
    (slots,) = sidecar.tensors
    assert slots.sort().values.tolist() == list(range(24))


class Weighted(Counted):
    """The images of Counted with other labels, and more beside them."""

    def __getitem__(self, index: int) -> Any:
        return super().__getitem__(index)[0], index % 5, 0.5 * index, f"sample {index}"


# A run cannot know that the dataset of this name has other labels now.
Weighted.__qualname__, Weighted.__module__ = Counted.__qualname__, Counted.__module__


@pytest.mark.parametrize("kinds", [(Counted, Weighted), (Weighted, Counted)])
def test_a_run_takes_labels_and_all_else_from_its_own_dataset(tmp_path: Path, kinds: tuple[type[Counted], ...]) -> None:
    for kind in kinds:
        dataset = kind()
        drop, _ = begun(tmp_path, dataset)
        made_of = prefix_rows(drop, 2)
        for _ in range(3):
            for x, *rest in drop.loader:
                _, rows = called(drop, x)
                ids = (rows[:, None] - made_of).abs().flatten(2).amax(2).argmin(1).tolist()
                wanted = torch.utils.data.default_collate([dataset[i][1:] for i in ids])
                assert str(rest) == str(wanted)
            drop.step()
        drop.close()
    assert len(list_rows(tmp_path)) == 1


class Fold(Subset[Any]):
    """A part of the small data that says which."""

    def __repr__(self) -> str:
        return f"samples {self.indices} of {self.dataset}"


def test_a_fold_is_not_trained_on_the_samples_of_another(tmp_path: Path) -> None:
    for _ in range(2):
        for fold in range(3):
            train = [i for i in range(24) if i % 3 != fold]
            drop, _ = begun(tmp_path, Fold(Counted(), train))
            wanted = prefix_rows(drop, 2)[train]
            for _ in range(2):
                for x, _ in drop.loader:
                    _, rows = called(drop, x)
                    assert (rows[:, None] - wanted).abs().flatten(2).amax(2).amin(1).max() < 1e-5
                drop.step()
            drop.close()
    assert len(list_rows(tmp_path)) == 3


class Wrapped(Counted):
    """Described by what it is given."""

    def __init__(self, *described: Any, transform: Any = None) -> None:
        self.described, self.transform = described, transform

    def __repr__(self) -> str:
        return f"Wrapped{self.described}"


@pytest.mark.parametrize(
    "dataset",
    [
        data(),
        Subset(Counted(), [1, 2]),
        Subset(Fold(Counted(), [1, 2]), [1]),
        ConcatDataset([Counted(), Counted()]),
        Wrapped(),
        Wrapped(Subset(Counted(), [1, 2])),
        Wrapped("photos", transform=lambda x: x),
        Wrapped("photos", transform=object()),
        Wrapped(torch.zeros(2000)),
    ],
)
def test_a_dataset_that_is_not_told_from_others_is_refused(tmp_path: Path, dataset: Dataset[Any]) -> None:
    Counted.reads = 0
    message = (
        r"^DropScheduler: loader must be over a dataset that its repr tells from others .*, got .*; give it a __repr__"
    )
    with pytest.raises(ValueError, match=message):
        begun(tmp_path, dataset)
    assert Counted.reads == 0
    assert list(tmp_path.iterdir()) == []
    begun(tmp_path, dataset, shared=False)[0].close()


def test_a_dataset_that_says_what_it_holds_is_taken(tmp_path: Path) -> None:
    for dataset in (Wrapped("photos"), Wrapped(Fold(Counted(), [1, 2])), Wrapped("photos", transform=prefix_rows)):
        begun(tmp_path, dataset)[0].close()


def test_random_views_are_shared_only_where_nothing_else_is_random(tmp_path: Path) -> None:
    class Random(Counted):
        def __getitem__(self, index: int) -> Any:
            x, y = super().__getitem__(index)
            noise = torch.rand(())
            return (x + noise, y, noise) if self.masks else (x + noise, y)

    for masks in (1, 0):
        Random.masks = masks  # type: ignore[attr-defined]
        for shared in (True, False):
            refused = masks and shared
            message = r"where runs share random views, got a different one at batch\[2\]"
            with pytest.raises(ValueError, match=message) if refused else contextlib.nullcontext():
                begun(tmp_path, Random(), shared=shared, views=2)[0].close()
    first, _, _ = run(tmp_path, dataset=Random(), views=2, epochs=4)
    again, _, reads = run(tmp_path, dataset=Random(), views=2, epochs=4)
    assert again == first
    # A view in each of two epochs, then the readings that are compared with rows.
    assert [read >= 24 for read in reads] == [True, True, False, False]


def test_rows_of_runs_that_drew_in_other_orders_keep_the_labels_of_their_samples(tmp_path: Path) -> None:
    wanted, _, _ = run(tmp_path, drops={0: 1, 2: 2}, epochs=4)
    (first,) = (file.name for file in list_rows(tmp_path) if file.cut == 1)
    (tmp_path / first).unlink()
    run(tmp_path, seed=2, drops={0: 1})
    assert (tmp_path / first).exists()
    got, drop, reads = run(tmp_path, drops={0: 1, 2: 2}, epochs=4)
    assert got == wanted
    first, second = (costs.forward_flops(drop.chain[k : k + 1]) for k in (0, 1))
    # One batch from images, one from the older rows.
    assert [record.fill_flops for record in drop.history] == [0, 8 * first, 0, 8 * second, 0]
    assert once(reads)


def test_a_run_that_resumes_takes_shared_rows_and_reads_its_labels(tmp_path: Path) -> None:
    wanted, _, _ = run(tmp_path, epochs=4)
    drop, optimizer = begun(tmp_path, Counted())
    losses = epoch(drop, optimizer)
    drop.step()
    (path,) = tmp_path.iterdir()
    before = path.read_bytes()
    state = copy.deepcopy([drop.state_dict(), drop.model.state_dict(), optimizer.state_dict()])
    order = drop.loader.generator.get_state()
    drop.close()
    assert state[0]["rows_file"] == path.name
    resumed, optimizer = begun(tmp_path, Counted())
    resumed.model.load_state_dict(state[1])
    optimizer.load_state_dict(state[2])
    resumed.loader.generator.set_state(order)
    resumed.load_state_dict(state[0])
    for _ in range(3):
        Counted.reads = 0
        losses += epoch(resumed, optimizer)
        resumed.step()
    assert losses == wanted
    assert Counted.reads <= PROBES
    assert resumed._rows.cache is not None
    # A change is made in a copy.
    resumed._rows.cache.append(torch.tensor([0]), resumed._rows.cache.gather(torch.tensor([1])))
    assert resumed.state_dict()["rows_file"].startswith("rows-")
    resumed.close()
    assert path.read_bytes() == before
    assert list(tmp_path.iterdir()) == [path]


def test_reading_labels_for_shared_rows_is_not_taken_for_a_slower_machine(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run(tmp_path)
    drop, optimizer = begun(tmp_path, Counted())
    epoch(drop, optimizer)
    assert (drop._rows.counts[:2], drop.loader.relabelled) == ((8, 0), 16)
    modelled: list[float] = []
    monkeypatch.setattr(drop._ledger._costs, "observe", lambda seconds, _: modelled.append(seconds))
    drop._ledger._costs.measured = True
    drop._ledger._costs.image_seconds = 5.0
    for read in (0, 24):
        drop._ledger.observe(2, samples=24, made=0, read=read, seconds=1.0)
    assert modelled[1] - modelled[0] == pytest.approx(24 * 5.0)
    drop.step()
    assert drop.loader.relabelled == 0
    drop.close()


def test_a_checkpoint_within_the_epoch_that_fills_leaves_no_file_to_others(tmp_path: Path) -> None:
    drop, _ = begun(tmp_path, Counted())
    x, _ = next(iter(drop.loader))
    assert drop.state_dict()["rows_file"] is None
    drop.model(x)
    assert drop.state_dict()["rows_file"] is None
    assert list_rows(tmp_path) == []
    drop.close()


def test_every_drop_of_a_growing_schedule_is_shared(tmp_path: Path) -> None:
    drops = {0: 1, 1: 2, 2: 3}
    first, _, _ = run(tmp_path, drops=drops, epochs=5)
    assert sorted(file.cut for file in list_rows(tmp_path)) == [1, 2, 3]
    again, _, reads = run(tmp_path, drops=drops, epochs=5)
    assert again == first
    assert once(reads)


def test_rows_of_other_weights_are_not_found(tmp_path: Path) -> None:
    def other(model: Net) -> None:
        with torch.no_grad():
            model.conv1.weight.add_(0.1)

    run(tmp_path)
    _, drop, _ = run(tmp_path, change=[other])
    assert drop.history[1].fill_flops > 0
    assert len(list_rows(tmp_path)) == 2


def test_rows_of_other_images_are_seen_and_made_anew(tmp_path: Path) -> None:
    class Other(Counted):
        def __getitem__(self, index: int) -> Any:
            x, y = super().__getitem__(index)
            return x + 1, y

    Other.__qualname__, Other.__module__ = Counted.__qualname__, Counted.__module__
    run(tmp_path)
    wanted, _, _ = run(tmp_path / "..", dataset=Other())
    (path,) = tmp_path.iterdir()
    before = path.read_bytes()
    with pytest.warns(RuntimeWarning, match=r"the shared rows are not used: shared-.*\.rows was made of other images"):
        got, drop, reads = run(tmp_path, dataset=Other())
    assert got == wanted
    assert once(reads)
    assert drop.history[1].fill_flops > 0
    assert path.read_bytes() == before
    assert list(tmp_path.iterdir()) == [path]


def test_a_run_beside_one_that_still_fills_makes_its_own_rows(tmp_path: Path) -> None:
    filling, _ = begun(tmp_path, Counted())
    x, _ = next(iter(filling.loader))
    filling.model(x)
    other, other_optimizer = begun(tmp_path, Counted())
    with pytest.warns(RuntimeWarning, match="another run has been filling the shared rows"):
        assert len(epoch(other, other_optimizer)) == 3
    name = other.state_dict()["rows_file"]
    assert (tmp_path / name).exists()
    other.close()
    assert not (tmp_path / name).exists()
    # The run that was filling ends before its rows are complete: the next one fills them.
    filling.close()
    assert list_rows(tmp_path) == []
    run(tmp_path)
    assert len(list_rows(tmp_path)) == 1


def looped(folder: Path, divisor: float, autocast: bool = False) -> tuple[list[float], DropScheduler]:
    """A run whose loop divides the images, and trains on halves of batches."""
    drop, optimizer = begun(folder, Counted())
    losses = []
    for _ in range(3):
        for x, y in drop.loader:
            for images, labels in zip((x / divisor).split(4), y.split(4), strict=True):
                with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
                    loss = torch.nn.functional.cross_entropy(drop.model(images).float(), labels)
                loss.backward()
                losses.append(loss.item())
            optimizer.step()
            optimizer.zero_grad()
        drop.step()
    assert drop._rows.cache is not None
    assert drop._rows.cache.saved
    drop.close()
    return losses, drop


def test_each_loop_and_autocast_has_rows_of_its_own(tmp_path: Path) -> None:
    loops = [(2.0, False), (4.0, False), (4.0, True)]
    first = [looped(tmp_path, *loop) for loop in loops]
    assert len(list_rows(tmp_path)) == 3
    files = {path: path.read_bytes() for path in tmp_path.iterdir()}
    for loop, (losses, drop) in zip(loops, first, strict=True):
        again, found = looped(tmp_path, *loop)
        assert again == losses
        assert 0 < found.history[1].fill_flops < drop.history[1].fill_flops
    assert {path: path.read_bytes() for path in tmp_path.iterdir()} == files


def test_rows_come_in_the_memory_format_of_the_run_that_takes_them(tmp_path: Path) -> None:
    run(tmp_path)
    drop, optimizer = begun(tmp_path, Counted(), change=[lambda model: model.to(memory_format=torch.channels_last)])
    epoch(drop, optimizer)
    drop.step()
    assert drop.history[1].fill_flops > 0
    assert drop._rows.cache is not None
    assert drop._rows.cache.saved
    for x, _ in drop.loader:
        _, rows = called(drop, x)
        assert rows.is_contiguous(memory_format=torch.channels_last)
        assert not rows.is_contiguous()
    drop.close()


class Photos(Dataset[Any]):
    """Images with their numbers and, since a later version, more beside them."""

    def __init__(self, ids: list[int], *more: float) -> None:
        self.ids, self.more = ids, more

    def __len__(self) -> int:
        return len(self.ids)

    def __repr__(self) -> str:
        return f"Photos({self.ids})"

    def __getitem__(self, index: int) -> Any:
        image = torch.randn(3, 8, 8, generator=torch.Generator().manual_seed(self.ids[index]))
        return image, self.ids[index] % 5, self.ids[index], *self.more


def test_cross_validation_trains_on_no_sample_of_its_own_fold(tmp_path: Path) -> None:
    for fold in range(3):
        held_out = set(range(8 * fold, 8 * fold + 8))
        drop, optimizer = begun(tmp_path, Photos([i for i in range(24) if i not in held_out]))
        for _ in range(3):
            seen: set[int] = set()
            for x, y, i in drop.loader:
                output, rows = called(drop, x)
                torch.nn.functional.cross_entropy(output, y).backward()
                optimizer.step()
                images = torch.stack([Photos([int(number)])[0][0] for number in i])
                with torch.no_grad():
                    torch.testing.assert_close(rows, drop.chain.prefix(2)(images))
                seen |= set(i.tolist())
            drop.step()
            assert seen == set(range(24)) - held_out
        drop.close()


def test_a_dataset_that_gives_more_than_it_did_gives_all_of_it(tmp_path: Path) -> None:
    for more in ((), (1.0,)):
        drop, _ = begun(tmp_path, Photos(list(range(24)), *more))
        for _ in range(3):
            for batch in drop.loader:
                drop.model(batch[0])
                assert len(batch) == 3 + len(more)
                assert [entry.tolist() for entry in batch[3:]] == [[1.0] * 8 for _ in more]
            drop.step()
        drop.close()
    assert len(list_rows(tmp_path)) == 1
