from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import nn
from torch.utils.data import BatchSampler, DataLoader, RandomSampler, Subset, TensorDataset, WeightedRandomSampler

from learndrop_ext import CacheConfig, DropScheduler, Fixed


def data(count: int = 22) -> TensorDataset:
    return TensorDataset(torch.arange(count * 12, dtype=torch.float32).view(count, 3, 2, 2) / 100, torch.arange(count))


def scheduler(loader: DataLoader[Any], **options: Any) -> DropScheduler:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 4, 1), nn.ReLU(), nn.Conv2d(4, 4, 1), nn.Flatten(), nn.Linear(16, 30))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    return DropScheduler(model, optimizer, loader, **({"policy": Fixed({1: 1}), "cache": "fp32"} | options))


def labels(loader: Any, drop: DropScheduler | None = None) -> list[list[int]]:
    found = []
    for x, y in loader:
        if drop is not None:
            drop.model(x)
        found.append(y.tolist())
    return found


LOADERS = {
    "sequential": lambda d: DataLoader(d, batch_size=5),
    "drop_last": lambda d: DataLoader(d, batch_size=5, drop_last=True),
    "shuffle": lambda d: DataLoader(d, batch_size=5, shuffle=True),
    "generator": lambda d: DataLoader(d, batch_size=5, shuffle=True, generator=torch.Generator().manual_seed(3)),
    "weighted": lambda d: DataLoader(d, batch_size=5, sampler=WeightedRandomSampler(torch.arange(22.0), 17)),
    "batch_sampler": lambda d: DataLoader(d, batch_sampler=BatchSampler(RandomSampler(d), 7, drop_last=True)),
    "subset": lambda d: DataLoader(Subset(d, [4, 8, 12, 3, 1]), batch_size=2),
    "workers": lambda d: DataLoader(d, batch_size=5, shuffle=True, num_workers=1),
}


@pytest.mark.parametrize("kind", LOADERS)
def test_the_order_is_the_users_before_and_after_a_drop(kind: str) -> None:
    torch.manual_seed(4)
    plain = LOADERS[kind](data())
    wanted = [labels(plain) for _ in range(3)]
    drop = scheduler(LOADERS[kind](data()))
    assert len(drop.loader) == len(plain)
    torch.manual_seed(4)
    if drop.loader.user.generator is not None:
        drop.loader.user.generator.manual_seed(3)
    got = [labels(drop.loader, drop)]
    drop.step()
    assert drop.prefix == 1
    got += [labels(drop.loader, drop) for _ in range(2)]
    assert got == wanted


def test_rows_are_those_of_their_samples() -> None:
    drop = scheduler(DataLoader(data(), batch_size=5, shuffle=True))
    labels(drop.loader, drop)
    drop.step()
    images = data().tensors[0]
    for x, y in drop.loader:
        with torch.no_grad():
            assert torch.equal(x, drop.chain.prefix(1).eval()(images[y]))


def test_a_collate_fn_of_the_users_is_used() -> None:
    def collate(samples: list[Any]) -> tuple[torch.Tensor, dict[str, Any]]:
        return torch.stack([x for x, _ in samples]), {
            "y": torch.stack([y for _, y in samples]),
            "tag": ["a"] * len(samples),
        }

    drop = scheduler(DataLoader(data(), batch_size=4, collate_fn=collate))
    for _ in range(2):
        for x, rest in drop.loader:
            drop.model(x)
            assert rest["tag"] == ["a"] * len(x)
        if drop.prefix == 0:
            drop.step()


def test_flip_and_shift_move_rows_on_the_way_out() -> None:
    config = CacheConfig(codec="fp32", flip=True, shift=1)
    drop = scheduler(DataLoader(data(), batch_size=22), cache=config)
    labels(drop.loader, drop)
    drop.step()
    rows = drop.loader.rows
    assert rows is not None
    still = rows.cache.gather(torch.arange(22))
    moved = next(iter(drop.loader))[0]
    kinds = set()
    for row, image in zip(moved, still, strict=True):
        for flip in (False, True):
            for dy in (-1, 0, 1):
                for dx in (-1, 0, 1):
                    base = image.flip(-1) if flip else image
                    wanted = torch.zeros_like(base)
                    for y in range(2):
                        for x in range(2):
                            if 0 <= y - dy < 2 and 0 <= x - dx < 2:
                                wanted[:, y, x] = base[:, y - dy, x - dx]
                    if torch.equal(row, wanted):
                        kinds.add((flip, dy, dx))
                        break
    assert len(kinds) > 6


def test_a_sampler_that_names_an_id_outside_the_dataset_is_refused() -> None:
    class Bad:
        def __iter__(self) -> Iterator[int]:
            return iter([0, 1, 22])

        def __len__(self) -> int:
            return 3

    drop = scheduler(DataLoader(data(), batch_size=3, sampler=Bad()))
    with pytest.raises(IndexError, match=r"samples of the dataset, within 0..21, got 22"):
        next(iter(drop.loader))


def test_a_dataset_whose_length_changes_is_refused() -> None:
    class Growing(TensorDataset):
        more = 0

        def __len__(self) -> int:
            return super().__len__() - 2 + self.more

    dataset = Growing(*data().tensors)
    drop = scheduler(DataLoader(dataset, batch_size=5))
    labels(drop.loader, drop)
    dataset.more = 1
    with pytest.raises(RuntimeError, match=r"dataset must keep its 20 samples, got 21"):
        next(iter(drop.loader))
    with pytest.raises(RuntimeError, match=r"dataset must keep its 20 samples, got 21"):
        drop.step()
    assert drop.prefix == 0


def test_loaders_without_ids_are_refused() -> None:
    class Own(DataLoader[Any]):
        def __iter__(self) -> Any:
            return iter([])

    class NoLength(TensorDataset):
        __len__ = None  # type: ignore[assignment]

    with pytest.raises(TypeError, match=r"got Own with an __iter__ of its own"):
        scheduler(Own(data(), batch_size=2))
    with pytest.raises(ValueError, match=r"must have samples, got an empty dataset"):
        scheduler(DataLoader(TensorDataset(torch.zeros(0, 3, 2, 2), torch.zeros(0)), batch_size=2))


def test_an_entry_that_is_not_per_sample_is_refused() -> None:
    def collate(samples: list[Any]) -> tuple[torch.Tensor, float]:
        return torch.stack([x for x, _ in samples]), 0.5

    drop = scheduler(DataLoader(data(), batch_size=4, collate_fn=collate))
    for x, _ in drop.loader:
        drop.model(x)
    with pytest.raises(
        ValueError, match=r"every entry of a batch must be a tensor of 4 rows .* got a float at batch\[1\]"
    ):
        drop.step()
    assert drop.prefix == 0
