from __future__ import annotations

import random
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset, TensorDataset

from learndrop_ext.cache.cache import ActivationCache
from learndrop_ext.data.extras import BatchExtras
from learndrop_ext.data.fill import (
    check_purity,
    fill_from_images,
    fill_from_rows,
    frozen_pass,
    read_batch,
    rebuilt,
    same_image_each_time,
)
from learndrop_ext.graph.chain import Chain, split_layers

CPU = torch.device("cpu")


def network() -> nn.Sequential:
    """Three layers, starting at 0, 3 and 6."""
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(3, 4, 3, padding=1),
        nn.BatchNorm2d(4),
        nn.ReLU(inplace=True),
        nn.Conv2d(4, 2, 3, padding=1),
        nn.BatchNorm2d(2),
        nn.Flatten(),
        nn.Linear(32, 5),
    )


def split(model: nn.Module) -> Chain:
    return split_layers(model, torch.rand(2, 3, 4, 4))


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


@pytest.mark.parametrize("training", [True, False])
def test_frozen_pass_is_eval_without_gradients(training: bool) -> None:
    model = network().train(training)
    segment = split(model).prefix(2)
    before = model[1].running_mean.clone()
    with frozen_pass(segment, None, CPU):
        rows = segment(torch.rand(3, 3, 4, 4))
    assert not rows.requires_grad
    assert torch.equal(model[1].running_mean, before)
    assert all(m.training is training for m in model)
    with pytest.raises(RuntimeError), frozen_pass(segment, None, CPU):
        segment(torch.rand(3, 9, 4, 4))
    assert all(m.training is training for m in model)


@pytest.mark.parametrize("dtype", [None, torch.bfloat16])
def test_frozen_pass_has_the_autocast_of_the_training_step(dtype: torch.dtype | None) -> None:
    segment = split(network()).prefix(1)
    # An autocast around it does not count.
    with torch.autocast("cpu", dtype=torch.bfloat16), frozen_pass(segment, dtype, CPU):
        rows = segment.layers[0].train_graph.model.get_submodule("0")(torch.rand(3, 3, 4, 4))
    assert rows.dtype == (dtype or torch.float32)


def test_read_batch_is_the_loaders_batch() -> None:
    data = Images(10)
    images, labels = read_batch(DataLoader(data, batch_size=2), [7, 0])
    assert images[:, 0, 0, 0].tolist() == [7.0, 0.0]
    assert labels.tolist() == [107, 100]
    assert data.read == [7, 0]


class Many(Images):
    def __getitems__(self, ids: list[int]) -> list[tuple[Tensor, int]]:
        return [(torch.full((1,), -float(i)), i) for i in ids]


def test_read_batch_reads_many_at_once_where_the_dataset_can() -> None:
    data = Many(10)
    loader = DataLoader(data, collate_fn=lambda samples: {"x": torch.stack([x for x, _ in samples])})
    assert read_batch(loader, [3, 4])["x"].tolist() == [[-3.0], [-4.0]]
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
def test_same_image_each_time(noise: Callable[[], float], same: bool) -> None:
    data = Images(100, noise)
    torch.manual_seed(3)
    np.random.seed(4)
    random.seed(5)
    states = torch.get_rng_state(), np.random.get_state()[1].copy(), random.getstate()
    assert same_image_each_time(DataLoader(data), 0) is same
    assert torch.equal(torch.get_rng_state(), states[0])
    assert np.array_equal(np.random.get_state()[1], states[1])
    assert random.getstate() == states[2]
    # Sixteen samples from all over the dataset, three times.
    assert sorted(set(data.read)) == [0, 6, 12, 18, 25, 31, 37, 43, 50, 56, 62, 68, 75, 81, 87, 93]
    assert len(data.read) == 48


@pytest.mark.parametrize("size", [1, 2, 15])
def test_same_image_each_time_of_a_small_dataset(size: int) -> None:
    data = Images(size)
    assert same_image_each_time(DataLoader(data), 0)
    assert set(data.read) == set(range(size))


class AlwaysDropout(nn.Module):
    """Dropout that forgets to ask for self.training."""

    def forward(self, x: Tensor) -> Tensor:
        return F.dropout(x, 0.5)


class OverTheBatch(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x - x.mean(0, keepdim=True)


class Kept(nn.Module):
    """Holds a module whole: `layers=` stops the tracer there."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner
        self.scale = nn.Parameter(torch.ones(()))

    def forward(self, x: Tensor) -> Tensor:
        return self.inner(x) * self.scale


def conv() -> nn.Conv2d:
    return nn.Conv2d(3, 3, 3, padding=1)


def named(**parts: nn.Module) -> nn.Sequential:
    model = nn.Sequential()
    for name, part in parts.items():
        model.add_module(name, part)
    return model


IMPURE: list[tuple[str, Callable[[], nn.Module], tuple[str, ...] | None, str]] = [
    (
        "batch norm on batch statistics",
        lambda: named(a=conv(), norm=nn.BatchNorm2d(3, track_running_stats=False), b=conv()),
        None,
        r"those of norm \(BatchNorm2d\) change",
    ),
    (
        "functional dropout always on",
        lambda: named(a=conv(), noise=AlwaysDropout(), b=conv(), c=conv()),
        None,
        "those of layer b change",
    ),
    (
        "a whole module with dropout always on",
        lambda: named(a=conv(), noise=Kept(AlwaysDropout()), b=conv()),
        ("a", "noise", "b"),
        r"those of noise.inner \(AlwaysDropout\) change",
    ),
    (
        "a mean over the batch",
        lambda: named(a=conv(), centre=OverTheBatch(), b=conv()),
        None,
        "those of layer a change",
    ),
]


@pytest.mark.parametrize("count", [1, 4])
@pytest.mark.parametrize(("build", "layers", "message"), [c[1:] for c in IMPURE], ids=[c[0] for c in IMPURE])
def test_check_purity_names_the_guilty_module(
    build: Callable[[], nn.Module], layers: tuple[str, ...] | None, message: str, count: int
) -> None:
    torch.manual_seed(0)
    model = build()
    chain = split_layers(model, torch.rand(2, 3, 4, 4), layers=layers)
    flags = [m.training for m in model.modules()]
    with pytest.raises(
        ValueError, match=f"DropScheduler: .*{message} .* in eval mode too; drop only the layers before"
    ):
        check_purity(chain.prefix(len(chain) - 1), torch.rand(count, 3, 4, 4), model, None)
    assert [m.training for m in model.modules()] == flags
    assert not any(m._forward_hooks for m in model.modules())


def test_check_purity_passes_the_layers_before_the_guilty_one() -> None:
    model = named(a=conv(), b=conv(), noise=AlwaysDropout(), c=conv())
    chain = split_layers(model, torch.rand(2, 3, 4, 4))
    check_purity(chain.prefix(2), torch.rand(4, 3, 4, 4), model, None)


@pytest.mark.parametrize("count", [1, 2, 3, 8])
@pytest.mark.parametrize("autocast", [None, torch.bfloat16])
def test_check_purity_passes_clean_layers(count: int, autocast: torch.dtype | None) -> None:
    torch.manual_seed(0)
    model = named(
        a=conv(),
        norm=nn.BatchNorm2d(3),
        drop=nn.Dropout(),
        b=conv(),
        group=nn.GroupNorm(3, 3),
        act=nn.RReLU(inplace=True),
        c=conv(),
        instance=nn.InstanceNorm2d(3),
        d=conv(),
    )
    chain = split_layers(model, torch.rand(2, 3, 4, 4))
    x = torch.rand(count, 3, 4, 4)
    noise = torch.get_rng_state()
    state = {key: value.clone() for key, value in model.state_dict().items()}
    check_purity(chain.prefix(3), x, model, autocast)
    assert torch.equal(torch.get_rng_state(), noise)
    torch.testing.assert_close(dict(model.state_dict()), state, rtol=0, atol=0)
    assert all(m.training for m in model.modules())


def filled(
    data: Dataset[Any], ids: list[int], slots: list[int], *, views: int = 1, workers: int = 0, seed: int = 0
) -> tuple[ActivationCache, BatchExtras]:
    segment = split(network()).prefix(0)
    cache = ActivationCache(8, (3, 4, 4), codec="fp32", device=CPU)
    rest = BatchExtras(8, key=0, device=CPU)
    loader = DataLoader(data, batch_size=3, num_workers=workers)
    fill_from_images(
        loader,
        torch.tensor(ids),
        torch.tensor(slots),
        segment,
        cache,
        rest,
        views=views,
        batch_size=2,
        seed=seed,
        autocast=None,
    )
    return cache, rest


def pixel(cache: ActivationCache, *slots: int) -> list[float]:
    return [float(v) for v in cache.gather(torch.tensor(slots))[:, 0, 0, 0]]


def test_fill_from_images_puts_each_sample_at_its_slot() -> None:
    data = Images(50)
    cache, rest = filled(data, [40, 7, 3, 12, 9], [0, 5, 2, 7, 3])
    assert pixel(cache, 0, 2, 3, 5, 7) == [40.0, 3.0, 9.0, 7.0, 12.0]
    assert cache.filled.tolist() == [True, False, True, True, False, True, False, True]
    assert rest.get(torch.tensor([5, 0]), torch.zeros(2))[1].tolist() == [107, 140]
    assert data.read == [40, 7, 3, 12, 9]


def test_fill_from_images_draws_a_view_for_each_reading() -> None:
    cache, rest = filled(Images(9, random.random), [5, 2, 8], [0, 1, 3], views=2)
    first, second = pixel(cache, 0, 2, 6), pixel(cache, 1, 3, 7)
    assert [int(v) for v in first] == [int(v) for v in second] == [5, 2, 8]
    assert all(a != b for a, b in zip(first, second, strict=True))
    assert rest.get(torch.tensor([0, 1, 6, 7]), torch.zeros(4))[1].tolist() == [105, 105, 108, 108]


@pytest.mark.parametrize("noise", [random.random, lambda: torch.rand(()).item(), lambda: float(np.random.rand())])
def test_fill_from_images_is_fixed_by_its_seed_and_leaves_the_runs_own_random_state(
    noise: Callable[[], float],
) -> None:
    ids, slots = [0, 1, 2, 3], [3, 2, 1, 0]
    once, _ = filled(Images(9, noise), ids, slots, seed=5)
    random.seed(1)
    np.random.seed(1)
    torch.manual_seed(1)
    wanted = noise()
    random.seed(1)
    np.random.seed(1)
    torch.manual_seed(1)
    again, _ = filled(Images(9, noise), ids, slots, seed=5)
    torch.manual_seed(1)
    assert noise() == wanted
    other, _ = filled(Images(9, noise), ids, slots, seed=6)
    assert pixel(once, 0, 1, 2, 3) == pixel(again, 0, 1, 2, 3)
    assert pixel(once, 0, 1, 2, 3) != pixel(other, 0, 1, 2, 3)


def test_fill_from_images_reads_with_the_loaders_workers() -> None:
    data = Images(9)
    cache, _ = filled(data, [4, 6, 1], [0, 1, 2], workers=1)
    assert pixel(cache, 0, 1, 2) == [4.0, 6.0, 1.0]
    assert data.read == []


def test_fill_from_rows_runs_the_cached_rows_through_the_newly_dropped_layers() -> None:
    model = network()
    chain = split(model)
    images = torch.rand(5, 3, 4, 4)
    model.train()(images)
    old = ActivationCache(7, (4, 4, 4), codec="fp32", device=CPU)
    slots = torch.tensor([6, 0, 3, 2, 5])
    with frozen_pass(chain.prefix(1), None, CPU):
        old.append(slots, chain.prefix(1)(images))
    cache = ActivationCache(7, (32,), codec="fp32", device=CPU)
    fill_from_rows(old, chain.segment(1, 2), cache, batch_size=2, autocast=None)
    assert cache.filled.tolist() == old.filled.tolist()
    model.eval()
    with torch.no_grad():
        # One batch of five against three of two: the sums of a convolution may differ in their last bits.
        torch.testing.assert_close(cache.gather(slots), chain.eval().prefix(2)(images))
    assert model.train().training


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
    assert (again.dataset, again.collate_fn, again.generator) == (data, collate, generator)
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
    # No worker outlives a fill, and the user's generator is not drawn from.
    filling = rebuilt(loader, [[0]], fill_seed=5)
    assert (filling.num_workers, filling.persistent_workers) == (2, False)
    assert isinstance(filling.generator, torch.Generator)
    assert filling.generator.initial_seed() == 5
    assert rebuilt(loader, [[0]], workers=False).num_workers == 0
