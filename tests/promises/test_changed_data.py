"""Data that changes between epochs or runs, and data that cannot be read."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from four_quarters import COUNT, Run, accuracy, quarters, rows_of
from torch import nn
from torch.utils.data import DataLoader, Dataset

from learndrop_ext import CacheConfig


class Epochs(Dataset[Any]):
    """Another shift of the images in each epoch, as `set_epoch` asks for."""

    def __init__(self) -> None:
        self.data = quarters()
        self.epoch = 0
        self.labels = self.data.tensors[1].clone()
        self.size = 8
        self.count = COUNT

    def __len__(self) -> int:
        return self.count

    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch

    def __getitem__(self, index: int) -> Any:
        x = self.data.tensors[0][index] + 0.1 * self.epoch
        if self.size != 8:
            x = nn.functional.interpolate(x[None], size=self.size)[0]
        return x, self.labels[index]


def test_augmentation_by_set_epoch_is_seen_and_rows_are_made_anew() -> None:
    dataset = Epochs()
    run = Run(dataset)
    for epoch in range(5):
        dataset.set_epoch(epoch)
        if epoch > 2:  # the first rows are made in the third epoch
            with pytest.warns(RuntimeWarning, match="computed again: the images of some samples"):
                run.epochs(1)
        else:
            run.epochs(1)
    images = torch.stack([dataset[i][0] for i in range(COUNT)])
    with torch.no_grad():
        rows = run.drop.chain.prefix(2).eval()(images)
    got = torch.cat([rows_of(x) for x, _ in run.drop.loader]).float()
    assert float(torch.cdist(got.flatten(1), rows.flatten(1)).min(1).values.max()) < 0.05


def test_pseudo_labels_are_followed() -> None:
    dataset = Epochs()
    right = dataset.labels.clone()
    dataset.labels = before = torch.randint(0, 4, (COUNT,), generator=torch.Generator().manual_seed(0))
    run = Run(dataset, drops={0: 1}).epochs(2)
    dataset.labels = right
    got = torch.cat([y for _, y in run.drop.loader])
    assert got.bincount(minlength=4).tolist() == right.bincount().tolist() != before.bincount().tolist()
    assert run.drop._rows.drawn().tolist() == list(range(COUNT))  # the images are the same, and so are their rows
    assert accuracy(run.epochs(9).model) > 0.9


class Unnamed(Dataset[Any]):
    """A dataset that does not offer its labels."""

    def __init__(self, inner: Epochs) -> None:
        self._inner = inner

    def __len__(self) -> int:
        return len(self._inner)

    def __getitem__(self, index: int) -> Any:
        return self._inner[index]


@pytest.mark.filterwarnings("ignore:drop.loader. the rows are computed again")
@pytest.mark.parametrize("offers", [False, True])
def test_labels_that_change_while_a_further_drop_has_no_rows_yet_are_followed(offers: bool) -> None:
    dataset = Epochs()
    run = Run(dataset if offers else Unnamed(dataset), drops={1: 1, 3: 2}).epochs(3)
    dataset.labels = (dataset.labels * 3 + 1) % 5
    got = torch.cat([y for _, y in run.drop.loader])
    assert got.bincount(minlength=5).tolist() == dataset.labels.bincount(minlength=5).tolist()
    assert run.drop.prefix == 2


def test_labels_that_changed_between_two_runs_are_seen_at_resume(tmp_path: Path) -> None:
    config = CacheConfig(store=tmp_path, key=str)
    run = Run(Epochs(), cache=config).epochs(4)
    state = run.drop.state_dict()
    dataset = Epochs()
    dataset.labels = (dataset.labels + 1) % 4
    again = Run(dataset, cache=config)
    again.model.load_state_dict(run.model.state_dict())
    again.drop.load_state_dict(state)
    assert bool(again.drop._rows.cache.filled.all())
    pairs = [(x.standing.ids, y) for x, y in again.drop.loader]
    ids, labels = (torch.cat(part) for part in zip(*pairs, strict=True))
    assert torch.equal(labels, dataset.labels[ids])


def test_progressive_resizing_trains_on_with_frozen_layers_and_a_new_scheduler_keeps_rows_again() -> None:
    dataset = Epochs()
    run = Run(dataset).epochs(3)
    dataset.size = 12
    shapes = r"keep no rows, .* one shape, wanted \[1, 8, 8\] .* got \[1, 12, 12\]"
    with pytest.warns(RuntimeWarning, match=shapes), pytest.warns(match="computed again: the images of some samples"):
        run.epochs(1)
    assert run.drop.prefix == 2
    assert accuracy(run.epochs(2).model) > 0.95
    run.drop.close()
    dataset.size = 8
    run.drop = run.scheduler({1: 1})
    assert accuracy(run.epochs(3).model) > 0.95


def test_a_stream_trains_by_replay() -> None:
    dataset = Epochs()
    dataset.count = 24
    run = Run(dataset, drops={1: 1})
    for count in (24, 48, 48, 72, 96, 96):
        dataset.count = count
        seen = []
        for x, y in run.drop.loader:
            run.train_step(x, y)
            seen.append(len(y))
        assert sum(seen) == count
        run.drop.step()
    assert accuracy(run.epochs(3).model) > 0.95


def test_a_corrupt_file_that_training_never_touches_does_not_end_the_run() -> None:
    class Corrupt(Dataset[Any]):
        def __len__(self) -> int:
            return 2 * COUNT

        def __getitem__(self, index: int) -> Any:
            if index >= COUNT:
                raise OSError("corrupt")
            return quarters()[index]

    run = Run(drops={})
    run.user = DataLoader(Corrupt(), batch_size=16, sampler=torch.utils.data.SubsetRandomSampler(range(COUNT)))
    run.drop = run.scheduler({1: 1, 2: 2})
    assert accuracy(run.epochs(6).model) > 0.95
    assert int(run.drop._rows.cache.filled.sum()) == COUNT
