from __future__ import annotations

import multiprocessing
import os
import random
import time
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.utils.data import (
    BatchSampler,
    DataLoader,
    Dataset,
    IterableDataset,
    RandomSampler,
    Subset,
    SubsetRandomSampler,
    TensorDataset,
    WeightedRandomSampler,
    default_collate,
    get_worker_info,
)

from learndrop_ext.data.reading import (
    PROBED,
    check_loader,
    first_batch_ids,
    is_function_of_id,
    is_random_by_sample,
    read_batches,
    rebuilt,
)


class Images(Dataset[tuple[Tensor, int]]):
    """Image i is full of i, plus noise where `noise` gives some; which ids were read is noted."""

    def __init__(self, size: int, noise: Callable[[], float] = lambda: 0.0) -> None:
        self.size = size
        self.noise = noise
        self.read: list[int] = []

    def __len__(self) -> int:
        return self.size

    def __getitem__(self, i: int) -> tuple[Tensor, int]:
        self.read.append(i)
        return torch.full((3, 4, 4), float(i) + self.noise()), 100 + i


def read(loader: DataLoader[Any], ids: list[int], seed: int = 0) -> Any:
    """The batch of some samples."""
    ((batch, _),) = read_batches(loader, [ids], seed)
    return batch


def is_function(loader: DataLoader[Any], ids: list[int]) -> bool:
    """`is_function_of_id` of a batch that was read before."""
    return is_function_of_id(loader, 0, ids, read(loader, ids, 3), 3)


def test_read_batches_are_the_loaders_batches_with_their_times() -> None:
    data = Images(10)
    begin = time.perf_counter()
    (first, second) = read_batches(DataLoader(data, batch_size=2), [[7, 0], [3]], 0)
    for (images, labels), wanted in ((first[0], [7.0, 0.0]), (second[0], [3.0])):
        assert images[:, 0, 0, 0].tolist() == wanted
        assert labels.tolist() == [100 + i for i in wanted]
    assert data.read == [7, 0, 3]
    assert 0 < first[1] + second[1] < time.perf_counter() - begin


class InWorkers(Images):
    """Can be read in workers alone, which `opened` has prepared. Another worker is another dataset."""

    places: list[float] | None = None

    def __getitem__(self, i: int) -> tuple[Tensor, int]:
        assert self.places is not None
        assert get_worker_info() is not None
        time.sleep(0.01)
        return torch.full((3, 4, 4), self.places[i] + self.noise()), os.getpid()


def opened(worker: int) -> None:
    get_worker_info().dataset.places = [float(i) for i in range(10)]
    time.sleep(0.2)


@pytest.mark.parametrize("persistent", [False, True])
def test_samples_of_a_loader_with_workers_are_read_in_one_worker(persistent: bool) -> None:
    data = InWorkers(10, lambda: torch.rand(()).item() + random.random() + float(np.random.rand()))
    loader = DataLoader(data, batch_size=2, num_workers=2, worker_init_fn=opened, persistent_workers=persistent)
    others = set(multiprocessing.active_children())
    runs = [read_batches(loader, [[7, 0], [3]], seed) for seed in (0, 0, 1)]
    assert set(multiprocessing.active_children()) <= others
    for (first, _), (second, _) in runs:
        assert first[0].shape == (2, 3, 4, 4)
        assert len({*first[1].tolist(), *second[1].tolist()} - {os.getpid()}) == 1
    assert torch.equal(runs[0][0][0][0], runs[1][0][0][0])
    assert not torch.equal(runs[0][0][0][0], runs[2][0][0][0])
    # Without the time that the worker takes to start.
    assert all(0.02 <= first[1] < 0.2 for first, _ in runs)


@pytest.mark.parametrize("workers", [0, 1])
def test_reading_leaves_the_random_state_of_the_run_and_of_the_loader(workers: int) -> None:
    generator = torch.Generator().manual_seed(2)
    loader = DataLoader(Images(9, random.random), shuffle=True, generator=generator, num_workers=workers)
    states = torch.get_rng_state(), np.random.get_state()[1].copy(), random.getstate(), generator.get_state()
    read(loader, [4, 2], 5)
    assert torch.equal(torch.get_rng_state(), states[0])
    assert np.array_equal(np.random.get_state()[1], states[1])
    assert random.getstate() == states[2]
    assert torch.equal(generator.get_state(), states[3])


class Many(Images):
    def __getitems__(self, ids: list[int]) -> list[tuple[Tensor, int]]:
        return [(torch.full((1,), -float(i)), i) for i in ids]


def test_many_are_read_at_once_where_the_dataset_can() -> None:
    data = Many(10)
    loader = DataLoader(data, collate_fn=lambda samples: {"x": torch.stack([x for x, _ in samples])})
    assert read(loader, [3, 4])["x"].tolist() == [[-3.0], [-4.0]]
    assert data.read == []


@pytest.mark.parametrize(
    ("noise", "same"),
    [
        (lambda: 0.0, True),
        (lambda: torch.rand(()).item(), False),
        (lambda: float(np.random.rand()), False),
        (random.random, False),
        (lambda: float(torch.rand(()) < 0.2), False),
    ],
    ids=["none", "torch", "numpy", "random", "one image in five"],
)
def test_is_function_of_id_sees_random_images(noise: Callable[[], float], same: bool) -> None:
    data = Images(100, noise)
    torch.manual_seed(3)
    np.random.seed(4)
    random.seed(5)
    states = torch.get_rng_state(), np.random.get_state()[1].copy(), random.getstate()
    batch = read(DataLoader(data), list(range(16)))
    data.read.clear()
    assert is_function_of_id(DataLoader(data), 0, list(range(16)), batch, 0) is same
    assert torch.equal(torch.get_rng_state(), states[0])
    assert np.array_equal(np.random.get_state()[1], states[1])
    assert random.getstate() == states[2]
    # Only these are read, once more.
    assert data.read == list(range(PROBED))


def lit_in_place(samples: list[Any]) -> Any:
    for x, _ in samples:
        x += 1
    return default_collate(samples)


def lit_together(samples: list[Any]) -> Any:
    x, y = default_collate(samples)
    return x + torch.rand(()), y


@pytest.mark.parametrize(
    "noise",
    [random.random, lambda: float(np.random.rand()), lambda: torch.rand(()).item()],
    ids=["random", "numpy", "torch"],
)
def test_samples_that_a_dataset_draws_alone_are_random_by_sample(noise: Callable[[], float]) -> None:
    data = Images(100, noise)
    for dataset in (data, Subset(data, list(range(50)))):
        for collate in (None, lit_in_place):
            loader = DataLoader(dataset, collate_fn=collate)
            random.seed(5)
            data.read.clear()
            assert is_random_by_sample(loader, 0, list(range(16)))
            assert data.read == list(range(PROBED))  # each once
            assert random.getstate() == random.Random(5).getstate()


def test_batches_that_are_random_together_are_not_random_by_sample() -> None:
    data = Images(100, random.random)
    for collate in (mixed_with(1.0), mixed_with(0.5), standardised, noisy_labels, ranked, lit_together):
        assert not is_random_by_sample(DataLoader(data, collate_fn=collate), 0, list(range(16))), collate
    for dataset in (Many(100, random.random), Subset(Subset(Many(100), range(50)), range(40))):
        assert not is_random_by_sample(DataLoader(dataset), 0, list(range(16)))


@pytest.mark.parametrize("size", [1, 2, 15])
def test_is_function_of_id_of_a_small_dataset(size: int) -> None:
    assert is_function(DataLoader(Images(size)), list(range(size)))


def without_fives(samples: list[Any]) -> Any:
    return default_collate([(x, y) for x, y in samples if y % 5])


def sometimes_without_one(samples: list[Any]) -> Any:
    return default_collate(samples[int(random.random() < 0.5 and len(samples) > 1) :])


def test_a_batch_of_which_collate_fn_leaves_samples_out_is_compared_with_what_is_there() -> None:
    for size in (4, 8, 16):
        assert is_function(DataLoader(Images(20), collate_fn=without_fives), list(range(size)))
        assert not is_function(DataLoader(Images(20, random.random), collate_fn=without_fives), list(range(size)))
    found = [
        is_function_of_id(loader, 0, list(range(8)), read(loader, list(range(8)), seed), seed)
        for loader in [DataLoader(Images(20), collate_fn=sometimes_without_one)]
        for seed in range(20)
    ]
    assert not all(found)
    loader = DataLoader(Images(20, random.random), collate_fn=without_fives)
    assert is_random_by_sample(loader, 0, list(range(8)))
    assert not is_random_by_sample(DataLoader(Images(20), collate_fn=sometimes_without_one), 0, list(range(8)))


def mixed_with(p: float) -> Callable[[list[Any]], Any]:
    """MixUp, with probability p."""

    def collate(samples: list[Any]) -> Any:
        x, y = default_collate(samples)
        if random.random() < p:
            order = torch.randperm(len(x))
            x, y = 0.7 * x + 0.3 * x[order], (y, y[order], 0.7)
            return x, y[0]
        return x, y

    return collate


def standardised(samples: list[Any]) -> Any:
    x, y = default_collate(samples)
    return (x - x.mean()) / (x.std() + 1e-6), y


def noisy_labels(samples: list[Any]) -> Any:
    x, y = default_collate(samples)
    return x, torch.where(torch.rand(len(y)) < 0.1, 0, y)


def ranked(samples: list[Any]) -> Any:
    x, y = default_collate(samples)
    return x, y.argsort()


@pytest.mark.parametrize(
    ("collate", "same"),
    [
        (default_collate, True),
        (mixed_with(1.0), False),
        (mixed_with(0.5), False),
        (standardised, False),
        (noisy_labels, False),
        (ranked, False),
    ],
    ids=[
        "default",
        "mixup",
        "mixup half the time",
        "standardised over the batch",
        "noisy labels",
        "ranks in the batch",
    ],
)
def test_is_function_of_id_sees_what_collate_fn_does(collate: Callable[[list[Any]], Any], same: bool) -> None:
    # Descending images: a rank in the batch is another one in half of it.
    loader = DataLoader(Images(16), collate_fn=collate)
    assert is_function(loader, list(range(15, -1, -1))) is same


class Chosen:
    """A batch sampler of given batches; what it gave is noted."""

    def __init__(self, batches: list[list[int]]) -> None:
        self.batches = batches
        self.given = 0

    def __iter__(self) -> Iterator[list[int]]:
        for batch in self.batches:
            self.given += 1
            yield batch


class Stream:
    """A batch sampler that cannot be copied."""

    def __init__(self) -> None:
        self.batches = (batch for batch in [[3, 4], [5]])

    def __iter__(self) -> Iterator[list[int]]:
        return self.batches


def test_the_first_batch_is_the_one_that_the_sampler_draws() -> None:
    data = Images(40)
    assert first_batch_ids(DataLoader(data, batch_size=3)) == [0, 1, 2]
    assert first_batch_ids(DataLoader(Subset(data, [7, 9]), batch_size=3)) == [0, 1]
    batch = first_batch_ids(DataLoader(data, batch_size=3, sampler=SubsetRandomSampler([3, 8, 30])))
    assert sorted(batch) == [3, 8, 30]
    assert first_batch_ids(DataLoader(data, batch_sampler=Chosen([[9, 9], [2, 9]]))) == [9, 9]
    assert first_batch_ids(DataLoader(data, batch_sampler=Chosen([[50, -1, 5]]))) == [5]
    weights = torch.zeros(40)
    weights[11] = 1
    assert first_batch_ids(DataLoader(data, batch_size=2, sampler=WeightedRandomSampler(weights, 50))) == [11, 11]
    assert data.read == []


def test_the_first_batch_leaves_the_sampler_and_the_random_state_alone() -> None:
    generator = torch.Generator().manual_seed(2)
    states = torch.get_rng_state(), generator.get_state()
    for loader in (
        DataLoader(Images(40), batch_size=3, shuffle=True, generator=generator),
        DataLoader(Images(40), batch_size=3, shuffle=True),
    ):
        assert len(first_batch_ids(loader)) == 3
    chosen = Chosen([[1], [2]])
    first_batch_ids(DataLoader(Images(40), batch_sampler=chosen))
    assert torch.equal(torch.get_rng_state(), states[0])
    assert torch.equal(generator.get_state(), states[1])
    assert chosen.given == 0


def test_the_first_batch_of_a_sampler_that_cannot_be_copied_is_the_first_of_the_dataset() -> None:
    stream = Stream()
    loader = DataLoader(Images(40), batch_sampler=stream)
    assert first_batch_ids(loader) == list(range(32))
    assert list(stream) == [[3, 4], [5]]


def test_rebuilt_keeps_all_but_the_batches() -> None:
    generator = torch.Generator()
    collated: list[int] = []

    def collate(samples: list[Any]) -> Tensor:
        collated.append(len(samples))
        return torch.stack([s[0] for s in samples])

    data = TensorDataset(torch.arange(10.0))
    loader = DataLoader(data, batch_size=4, shuffle=True, collate_fn=collate, generator=generator)
    again = rebuilt(loader, [[3, 1], [9]])
    assert [batch.tolist() for batch in again] == [[3.0, 1.0], [9.0]]
    assert collated == [2, 1]
    assert (again.dataset, again.generator) == (data, generator)
    assert again.num_workers == 0


def started(worker: int) -> None:
    """A worker_init_fn."""


def test_rebuilt_keeps_the_workers() -> None:
    loader = DataLoader(
        TensorDataset(torch.arange(10.0)),
        num_workers=2,
        prefetch_factor=5,
        persistent_workers=True,
        timeout=30,
        worker_init_fn=started,
        multiprocessing_context="spawn",
    )
    again = rebuilt(loader, [[0]])
    assert again.generator is loader.generator is None
    assert (again.num_workers, again.prefetch_factor, again.timeout) == (2, 5, 30)
    assert again.persistent_workers
    assert again.worker_init_fn is started
    assert again.multiprocessing_context is loader.multiprocessing_context


class Lines(IterableDataset[Any]):
    def __iter__(self) -> Iterator[Any]:
        yield from range(3)


class Own(DataLoader[Any]):
    def __iter__(self) -> Any:
        return iter([])


class NoLength(Dataset[Any]):
    def __getitem__(self, i: int) -> Any:
        return i


@pytest.mark.parametrize(
    ("loader", "error", "message"),
    [
        ([1, 2], TypeError, "loader must be a torch DataLoader, got list"),
        (Own(Images(2)), TypeError, "got Own with an __iter__ of its own"),
        (DataLoader(Lines()), TypeError, "dataset with ids .*, got an IterableDataset, Lines"),
        (DataLoader(NoLength(), sampler=Chosen([])), TypeError, "over a dataset with a length, got NoLength without"),
        (
            DataLoader(Images(2), batch_size=None),
            ValueError,
            "give it batch_size or batch_sampler, got batch_size=None",
        ),
        (DataLoader(Images(0)), ValueError, "must have samples, got an empty dataset"),
    ],
)
def test_check_loader_refuses(loader: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=f"DropScheduler: .*{message}"):
        check_loader(loader)


def test_check_loader_takes_any_sampler() -> None:
    data = Images(9)
    check_loader(DataLoader(data, batch_sampler=BatchSampler(RandomSampler(data), 4, drop_last=True)))
    check_loader(DataLoader(data, batch_sampler=Chosen([[1]])))
