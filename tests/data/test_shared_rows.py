"""Rows that a run leaves to others: found, used, and never of another network or other images."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils.data import Dataset

from learndrop_ext import CacheConfig, DropScheduler, Fixed
from learndrop_ext.cache.shared import list_rows
from small_training import Net, data, epoch, parts


class Counted(Dataset[Any]):
    """The small data; how often a sample was read."""

    reads = 0

    def __len__(self) -> int:
        return 24

    def __getitem__(self, index: int) -> Any:
        type(self).reads += 1
        return data()[index]


def run(
    folder: Path, *, seed: int = 1, drops: dict[int, int] | None = None, epochs: int = 3, **options: Any
) -> tuple[list[float], DropScheduler, int]:
    """One trial of a sweep; the samples read while it trained."""
    model, optimizer, loader = parts(options.pop("dataset", Counted()), generator=torch.Generator().manual_seed(seed))
    for change in options.pop("change", ()):
        change(model)
    config = CacheConfig(codec="fp32", disk_dir=str(folder), shared=True, **options)
    drop = DropScheduler(model, optimizer, loader, policy=Fixed(drops or {0: 2}), cache=config)
    Counted.reads = 0
    losses = []
    for _ in range(epochs):
        losses += epoch(drop, optimizer)
        drop.step()
    read = Counted.reads
    drop.close()
    return losses, drop, read


def test_the_second_run_reads_no_image_and_trains_the_same(tmp_path: Path) -> None:
    first, _, reads = run(tmp_path)
    assert reads >= 24
    (file,) = list_rows(tmp_path)
    assert (file.cut, file.samples, file.codec) == (2, 24, "fp32")
    again, _, reads = run(tmp_path)
    assert again == first
    # Those that are compared with their rows at each epoch.
    assert reads <= 3 * 4
    other, _, reads = run(tmp_path, seed=2)
    assert other != first
    assert reads <= 3 * 4
    assert list_rows(tmp_path)[0].name == file.name
    assert len(list(tmp_path.iterdir())) == 1


def test_every_drop_of_a_growing_schedule_is_shared(tmp_path: Path) -> None:
    drops = {0: 1, 1: 2, 2: 3}
    first, _, _ = run(tmp_path, drops=drops, epochs=5)
    assert sorted(file.cut for file in list_rows(tmp_path)) == [1, 2, 3]
    again, _, reads = run(tmp_path, drops=drops, epochs=5)
    assert again == first
    assert reads <= 5 * 4


def test_rows_of_other_weights_are_not_found(tmp_path: Path) -> None:
    def other(model: Net) -> None:
        with torch.no_grad():
            model.conv1.weight.add_(0.1)

    run(tmp_path)
    _, _, reads = run(tmp_path, change=[other])
    assert reads >= 24
    assert len(list_rows(tmp_path)) == 2


def test_rows_of_other_images_are_seen_and_made_anew(tmp_path: Path) -> None:
    class Other(Counted):
        def __getitem__(self, index: int) -> Any:
            x, y = super().__getitem__(index)
            return x + 1, y

    Other.__qualname__, Other.__module__ = Counted.__qualname__, Counted.__module__
    run(tmp_path)
    wanted, _, _ = run(tmp_path / "..", dataset=Other())
    with pytest.warns(RuntimeWarning, match="the rows are computed again: the images of some samples"):
        got, _, _ = run(tmp_path, dataset=Other())
    assert got == wanted


def test_a_run_beside_one_that_still_fills_makes_its_own_rows(tmp_path: Path) -> None:
    model, optimizer, loader = parts()
    config = CacheConfig(codec="fp32", disk_dir=str(tmp_path), shared=True)
    filling = DropScheduler(model, optimizer, loader, policy=Fixed({0: 2}), cache=config)
    next(iter(filling.loader))
    other_model, other_optimizer, other_loader = parts()
    with pytest.warns(RuntimeWarning, match="another run has been filling the shared rows"):
        other = DropScheduler(other_model, other_optimizer, other_loader, policy=Fixed({0: 2}), cache=config)
    assert len(epoch(other, other_optimizer)) == 3
    other.close()
    # The run that was filling ends before its rows are complete: the next one fills them.
    filling.close()
    assert list_rows(tmp_path) == []
    run(tmp_path, dataset=data())
    assert len(list_rows(tmp_path)) == 1
