"""Runs with what loops do to them drawn at random: on rows in fp32, their losses are those behind layers that are frozen and
run at each step."""

from __future__ import annotations

import contextlib
import copy
import random
from collections import UserDict
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.utils.data import BatchSampler, DataLoader, Dataset, RandomSampler, Subset, default_collate

from learndrop_ext import CacheConfig, DropScheduler, Fixed
from learndrop_ext.app.models import build_model

EPOCHS = 6
#: What happens before an epoch, or in it.
EVENTS = ("nothing", "refresh", "refresh some", "grow", "relabel", "resume", "undrop", "break", "evaluate")
EVENTS += ("resize", "weights", "optimizer", "accumulate")


class Net(nn.Module):
    """Four layers, of which the last draws random numbers."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.conv1, self.bn1 = nn.Conv2d(3, 6, 3, padding=1), nn.BatchNorm2d(6)
        self.conv2, self.bn2 = nn.Conv2d(6, 8, 3, padding=1, stride=2), nn.BatchNorm2d(8)
        self.conv3, self.dropout, self.fc = nn.Conv2d(8, 8, 3, padding=1), nn.Dropout(0.2), nn.Linear(8, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.bn1(self.conv1(x)).relu()
        x = self.conv3(self.bn2(self.conv2(x)).relu()).relu()
        scores: torch.Tensor = self.fc(self.dropout(x.mean((2, 3))))
        return scores


class Samples(Dataset[Any]):
    """One or two images, a label and the number of each sample. named: as a dict."""

    def __init__(self, count: int, images: int, *, named: bool) -> None:
        generator = torch.Generator().manual_seed(3)
        self.x = torch.randn(80, images, 3, 8, 8, generator=generator)
        self.given = torch.randint(0, 4, (80,), generator=generator)
        self.count, self._named, self.size = count, named, 8

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, index: int) -> Any:
        x = self.x[index] if self.size == 8 else nn.functional.interpolate(self.x[index], size=self.size)
        images, label, number = [*x], self.given[index], str(index)
        if self._named:
            return {**dict(zip("ab", images, strict=False)), "label": label, "number": number}
        return (*images, label, number)


class Labelled(Samples):
    """A dataset that offers its labels, and whose batches hold no more."""

    @property
    def targets(self) -> list[int]:
        return self.given[: self.count].tolist()

    def __getitem__(self, index: int) -> Any:
        return super().__getitem__(index)[:-1]


def processed(samples: list[Any]) -> UserDict[str, Any]:
    return UserDict(default_collate(samples))


class Wrapper(nn.Module):
    """Counts its calls, as DistributedDataParallel must get each one that trains."""

    calls = 0

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.module = module

    def forward(self, x: torch.Tensor) -> Any:
        Wrapper.calls += self.module.training
        return self.module(x)


def drawn_ahead(batches: Iterable[Any]) -> Iterator[Any]:
    """Each batch once the next one is there."""
    iterator = iter(batches)
    last = next(iterator)
    for batch in iterator:
        yield last
        last = batch
    yield last


class Drawn:
    """What one run is like."""

    def __init__(self, seed: int) -> None:
        draw = random.Random(seed)
        self.kind = draw.choice(["tuple", "dict", "UserDict", "labels"])
        self.images = draw.choice([1, 1, 2])
        self.count = draw.choice([24, 29, 40])
        self.batch = draw.choice([4, 7, 8])
        self.drop_last = draw.random() < 0.3
        self.workers = draw.choice([0, 0, 0, 1])
        self.sampler = draw.choice(["shuffle", "shuffle", "order", "replacement", "batches"])
        self.own_generator = draw.random() < 0.5
        self.micro_batches = draw.random() < 0.25 and self.images == 1
        self.channels_last = draw.random() < 0.3
        self.normalises = draw.random() < 0.3
        self.store = draw.random() < 0.35
        self.half = self.store and draw.random() < 0.5
        self.budget = draw.choice([None, None, 6_000, 20_000, 60_000])
        self.drops = dict(zip(sorted(draw.sample(range(5), 3)), sorted(draw.sample(range(1, 4), 3)), strict=True))
        for epoch in draw.sample(list(self.drops), draw.choice([0, 1, 2])):
            del self.drops[epoch]
        self.events = [draw.choice(EVENTS) for _ in range(EPOCHS)]
        self.wraps = draw.random() < 0.3
        self.ahead = draw.random() < 0.3 and not self.workers
        self.autocasts = [draw.random() < 0.5 for _ in range(EPOCHS)] if draw.random() < 0.3 else [False] * EPOCHS
        self.deep = draw.random() < 0.3 and not any(self.autocasts) and self.sampler != "replacement"
        if self.deep:  # its batch norms want several images
            self.drop_last, self.micro_batches = True, False

    @property
    def input(self) -> Any:
        keys = [0, 1] if self.kind in ("tuple", "labels") else ["a", "b"]
        return keys[0] if self.images == 1 else keys

    def dataset(self) -> Samples:
        kind = Labelled if self.kind == "labels" else Samples
        return kind(self.count, self.images, named=self.kind in ("dict", "UserDict"))

    def loader(self, samples: Samples) -> tuple[DataLoader[Any], torch.Generator | None]:
        dataset: Any = Subset(samples, [*range(0, self.count, 2), 1]) if self.half else samples
        generator = torch.Generator().manual_seed(5) if self.own_generator else None
        options: dict[str, Any] = {"batch_size": self.batch, "drop_last": self.drop_last, "generator": generator}
        if self.sampler == "shuffle":
            options["shuffle"] = True
        elif self.sampler == "replacement":
            options["sampler"] = RandomSampler(dataset, replacement=True, num_samples=30, generator=generator)
        elif self.sampler == "batches":
            options = {
                "batch_sampler": BatchSampler(RandomSampler(dataset, generator=generator), self.batch, self.drop_last)
            }
        collate = processed if self.kind == "UserDict" else None
        return DataLoader(dataset, num_workers=self.workers, collate_fn=collate, **options), generator


class Training:
    """A run, on rows or behind frozen layers. losses: of all steps, and what evaluations gave."""

    def __init__(self, drawn: Drawn, folder: Path | None) -> None:
        self.drawn, self.samples = drawn, drawn.dataset()
        self._cache = None
        if folder is not None:
            options: dict[str, Any] = {"store": folder, "key": str} if drawn.store else {}
            if drawn.budget is not None:
                options["budget_bytes"] = drawn.budget
            self._cache = CacheConfig(codec="fp32", **options)
        self.losses: list[float] = []
        self._begin()

    def _begin(self) -> None:
        self.model: Any = build_model("resnet10", num_classes=4, width=8, seed=0) if self.drawn.deep else Net()
        if self.drawn.channels_last:
            self.model.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        self.optimizer = torch.optim.SGD(self.model.parameters(), lr=0.005 if self.drawn.deep else 0.05, momentum=0.9)
        self.loader, self.generator = self.drawn.loader(self.samples)
        self.drop = DropScheduler(
            self.model,
            self.optimizer,
            self.loader,
            policy=Fixed(self.drawn.drops),
            epochs=EPOCHS,
            cache=self._cache,
            input=self.drawn.input,
            wrap=Wrapper if self.drawn.wraps else None,
        )

    def resume(self) -> None:
        """Go on as another process would."""
        states = [copy.deepcopy(one.state_dict()) for one in (self.model, self.drop, self.optimizer)]
        generators = [g for g in (torch.default_generator, self.generator) if g is not None]
        random_states = [generator.get_state() for generator in generators]
        self.drop.close()
        self._begin()
        for one, state in zip((self.model, self.drop, self.optimizer), states, strict=True):
            one.load_state_dict(state)
        generators = [g for g in (torch.default_generator, self.generator) if g is not None]
        for generator, state in zip(generators, random_states, strict=True):
            generator.set_state(state)

    def happens(self, event: str) -> None:
        """Do what happens before an epoch."""
        if event == "refresh":
            self.drop.refresh()
        elif event == "refresh some":
            self.drop.refresh([0, 3, 5])
        elif event == "grow" and not self.drawn.half:
            self.samples.count += 5
        elif event == "relabel":
            self.samples.given = (self.samples.given + 1) % 4
        elif event == "resume" and self.losses:
            self.resume()
        elif event == "undrop" and self.drop.prefix:
            self.drop.undrop()
        elif event == "resize":
            self.samples.size = 12 if self.samples.size == 8 else 8
        elif event == "weights":
            with torch.no_grad():
                next(self.model.parameters()).mul_(1.1)
        elif event == "optimizer":
            self.optimizer = torch.optim.SGD(self.model.parameters(), lr=0.02)
            self.drop.optimizer = self.optimizer
        elif event == "evaluate":
            self.model.eval()
            with torch.no_grad():
                self.losses.append(float(self.model(self.samples.x[:4, 0]).sum()))

    def called(self, x: torch.Tensor) -> Any:
        before = Wrapper.calls
        scores = self.drop.model(x)
        assert Wrapper.calls == before + self.drawn.wraps
        return scores

    def loss(self, batch: Any, *, joined: bool) -> torch.Tensor:
        images = [batch[key] for key in (self.drawn.input if self.drawn.images == 2 else [self.drawn.input])]
        if self.drawn.normalises:
            images = [(x - 0.1) / 0.9 for x in images]
        labels = batch[self.drawn.images] if self.drawn.kind in ("tuple", "labels") else batch["label"]
        if self.drawn.kind != "labels":
            numbers = batch[-1] if self.drawn.kind == "tuple" else batch["number"]
            assert labels.tolist() == [int(self.samples.given[int(i)]) for i in numbers]
        if self.drawn.micro_batches:
            parts = zip(images[0].split(3), labels.split(3), strict=True)
            return (
                torch.stack([nn.functional.cross_entropy(self.called(x), y, reduction="sum") for x, y in parts]).sum()
                / 8
            )
        if self.drawn.images == 2:
            one, other = self.called(torch.cat(images)).chunk(2) if joined else map(self.called, images)
            return nn.functional.cross_entropy(one + other, labels)
        return nn.functional.cross_entropy(self.called(images[0]), labels)

    def train(self) -> list[float]:
        """Return the losses."""
        with contextlib.closing(self.drop):
            for epoch, event in enumerate(self.drawn.events):
                self.happens(event)
                self.model.train()
                batches = drawn_ahead(self.drop.loader) if self.drawn.ahead else self.drop.loader
                for i, batch in enumerate(batches, 1):
                    with torch.autocast("cpu", torch.bfloat16, enabled=self.drawn.autocasts[epoch]):
                        loss = self.loss(batch, joined=epoch % 2 == 0)
                    loss.backward()
                    if event != "accumulate" or i % 2 == 0:
                        self.optimizer.step()
                        self.optimizer.zero_grad()
                    self.losses.append(loss.item())
                    # Workers have drawn further batches by then, and so differ from a loop on rows.
                    if event == "break" and i == 2 and not self.drawn.workers:
                        break
                self.drop.step()
            return self.losses


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("seed", range(16))
def test_losses_are_those_behind_layers_that_run(seed: int, tmp_path: Path) -> None:
    found = []
    for folder in (None, tmp_path):
        torch.manual_seed(seed)
        found.append(Training(Drawn(seed), folder).train())
    assert len(found[0]) == len(found[1])
    drawn = Drawn(seed)
    assert found[1] == pytest.approx(found[0], abs=5e-3 if any(drawn.autocasts) else 1e-4), vars(drawn)
