"""Samples are read where the user's loader reads them, and no more of them than are needed."""

from __future__ import annotations

import io
import multiprocessing
import time
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from small_loading import network
from torch.utils.data import DataLoader, Dataset, get_worker_info

from learndrop_ext import Budget, CacheConfig, DropScheduler, Fixed
from learndrop_ext.data.reading import PROBED
from small_training import called

COUNT = 40


class Archive(Dataset[Any]):
    """Photos in an archive that is opened where it is first read: a handle has one position in the file."""

    archive: zipfile.ZipFile | None = None

    def __init__(self, path: Path) -> None:
        self.path = path
        with zipfile.ZipFile(path, "w") as archive:
            for i in range(COUNT):
                np.save(file := io.BytesIO(), np.full((3, 2, 2), i / 100, np.float32))
                archive.writestr(f"{i}.npy", file.getvalue())

    def __len__(self) -> int:
        return COUNT

    def __getitem__(self, i: int) -> Any:
        if self.archive is None:
            self.archive = zipfile.ZipFile(self.path)
        return torch.from_numpy(np.load(io.BytesIO(self.archive.read(f"{i}.npy")))), i


class Prepared(Dataset[Any]):
    """Photos that `worker_init_fn` opens in each worker."""

    file: torch.Tensor | None = None

    def __len__(self) -> int:
        return COUNT

    def __getitem__(self, i: int) -> Any:
        assert self.file is not None, "read outside of a worker"
        return self.file[i].expand(3, 2, 2).clone(), i


def open_file(worker: int) -> None:
    get_worker_info().dataset.file = torch.arange(COUNT).view(COUNT, 1, 1, 1) / 100


@pytest.mark.parametrize("kind", ["an archive", "worker_init_fn"])
@pytest.mark.parametrize("persistent", [False, True])
def test_samples_of_a_loader_with_workers_are_read_in_workers_alone(
    kind: str, persistent: bool, tmp_path: Path
) -> None:
    dataset: Any = Prepared() if kind == "worker_init_fn" else Archive(tmp_path / "photos.zip")
    loader = DataLoader(
        dataset,
        batch_size=8,
        num_workers=2,
        worker_init_fn=open_file if kind == "worker_init_fn" else None,
        persistent_workers=persistent,
    )
    model = network()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    cache = CacheConfig(codec="fp32", store=tmp_path, key=str)
    drop = DropScheduler(model, optimizer, loader, policy=Fixed({1: 1}), cache=cache)
    wanted = (torch.arange(COUNT) / 100).view(COUNT, 1, 1, 1).expand(COUNT, 3, 2, 2)

    def trained(count: int) -> None:
        for _ in range(count):
            found = []
            for x, y in drop.loader:
                output, got = called(drop, x)
                output.mean().backward()
                rows = wanted if not drop.prefix else drop.chain.prefix(1)(wanted).detach()
                torch.testing.assert_close(got, rows[y])
                found += y.tolist()
            assert found == list(range(COUNT))
            drop.step()

    trained(4)  # images, rows that are kept, rows that are read
    x, y = next(iter(drop.loader))
    assert torch.equal(x.read(), wanted[y])
    drop.state_dict()
    drop.refresh()
    trained(1)
    batches = iter(drop.loader)
    next(batches)
    drop.undrop()  # the rest of the epoch is read by number
    assert torch.equal(torch.cat([x for x, _ in batches]), wanted[8:])
    trained(1)
    assert getattr(dataset, "archive", None) is None
    assert getattr(dataset, "file", None) is None


class Counted(Dataset[Any]):
    """Photos; how many were read, in any process."""

    def __init__(self, *, noise: float = 0.0) -> None:
        self.noise = noise
        self.reads = multiprocessing.Value("q", 0)

    def __len__(self) -> int:
        return 2000

    def __getitem__(self, i: int) -> Any:
        with self.reads.get_lock():
            self.reads.value += 1
        return torch.full((3, 2, 2), i / 2000) + self.noise * torch.rand(()), i % 4


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize(
    ("options", "again"),
    [
        ({"policy": Budget(1.1), "epochs": 20}, PROBED),
        ({"policy": Fixed({0: 1})}, PROBED),
        ({"policy": Fixed({0: 1}), "cache": None}, 0),
        ({"policy": Fixed({1: 1}), "cache": CacheConfig(views=2)}, 0),
    ],
    ids=["a budget", "a drop at once", "no rows", "views"],
)
def test_making_a_scheduler_reads_one_batch_and_a_few_samples_again(
    options: dict[str, Any], again: int, workers: int
) -> None:
    dataset = Counted()
    model = network()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    loader = DataLoader(dataset, batch_size=256, shuffle=True, num_workers=workers)
    drop = DropScheduler(model, optimizer, loader, **options)
    assert PROBED == 8
    assert dataset.reads.value == 256 + again
    drop.forecast(5)
    assert dataset.reads.value == 256 + again


def test_random_samples_are_read_once_more_to_see_whether_each_is_random_by_itself() -> None:
    dataset = Counted(noise=1.0)
    model = network()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    drop = DropScheduler(model, optimizer, DataLoader(dataset, batch_size=256), epochs=20)
    assert drop.config.views > 1
    assert dataset.reads.value == 256 + 2 * PROBED


class FirstIsSlow(Dataset[Any]):
    """The first batch is read last."""

    def __len__(self) -> int:
        return COUNT

    def __getitem__(self, i: int) -> Any:
        time.sleep(0.3 if i == 0 else 0)
        return torch.full((3, 2, 2), i / 100), i


def test_batches_of_workers_that_keep_no_order_have_the_rows_of_their_samples() -> None:
    model = network()
    loader = DataLoader(FirstIsSlow(), batch_size=4, num_workers=2, in_order=False)
    drop = DropScheduler(model, torch.optim.SGD(model.parameters(), lr=0.01), loader, policy=Fixed({0: 1}))
    model.train()
    for x, y in drop.loader:
        assert x.standing.ids.tolist() == y.tolist()
        model(x)
    drop.close()
