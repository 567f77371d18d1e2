"""Loops as people write them: by epochs, by steps, by the clock."""

from __future__ import annotations

import itertools
import time
from collections.abc import Iterator
from types import ModuleType
from typing import Any

import pytest
import torch
from four_quarters import COUNT, Run, accuracy, losses_without_rows, network, quarters
from torch import nn
from torch.utils.data import DataLoader, Dataset, Sampler, TensorDataset

from learndrop_ext import DropScheduler, Fixed


def test_the_task_is_learned_by_halves() -> None:
    assert accuracy(Run().epochs(8).model) > 0.95
    assert accuracy(network()) < 0.6


def test_a_grad_scaler_that_is_switched_off() -> None:
    run = Run()
    scaler = torch.amp.GradScaler("cpu", enabled=False)
    for _ in range(6):
        for x, y in run.drop.loader:
            run.optimizer.zero_grad()
            with torch.autocast("cpu", torch.bfloat16):
                loss = nn.functional.cross_entropy(run.model(x), y)
            scaler.scale(loss).backward()
            scaler.unscale_(run.optimizer)
            nn.utils.clip_grad_norm_(run.model.parameters(), 1.0)
            scaler.step(run.optimizer)
            scaler.update()
        run.drop.step()
    assert run.drop.prefix == 2
    assert accuracy(run.model) > 0.95


def test_a_loader_around_the_loader_that_prefetches(timm: ModuleType) -> None:
    run = Run(cache="fp32")
    ahead = timm.data.loader.PrefetchLoader(
        run.drop.loader, mean=(0.5 / 255,), std=(2 / 255,), channels=1, device=torch.device("cpu")
    )
    for _ in range(6):
        for x, y in ahead:  # of which the next one is drawn and normalised before the step
            run.train_step(x, y)
        run.drop.step()
    assert run.losses == losses_without_rows(6, lambda x: (x - 0.5) / 2)


@pytest.mark.parametrize("inside", ["making", "an evaluation before", "an evaluation after", "the step"])
def test_what_is_kept_in_inference_mode_is_written_to_later(inside: str) -> None:
    def evaluate(when: str) -> None:
        if inside == when:
            with torch.inference_mode():
                mean = torch.tensor(0.0)
                assert all(run.model.eval()(x - mean).isfinite().all() for x, _ in run.drop.loader)

    run = Run(drops={})
    with torch.inference_mode(inside == "making"):
        run.drop = run.scheduler({0: 1, 2: 2}, cache="fp32")
    for _ in range(6):
        evaluate("an evaluation before")
        run.model.train()
        for x, y in run.drop.loader:
            run.train_step(x - torch.tensor(0.0), y)
        evaluate("an evaluation after")
        with torch.inference_mode(inside == "the step"):
            run.drop.step()
    assert run.drop.prefix == 2
    assert bool(run.drop._rows.cache.filled.all())
    assert accuracy(run.model) > 0.95


def test_the_order_with_persistent_workers_is_the_one_without_a_drop() -> None:
    def order(drops: dict[int, int]) -> list[int]:
        run = Run(drops={})
        run.user = Run.make_loader(Labelled(), num_workers=1, persistent_workers=True)
        run.drop = run.scheduler(drops)
        found = []
        for _ in range(4):
            for x, y in run.drop.loader:
                run.train_step(x, y % 4)
                found += y.tolist()
            run.drop.step()
        return found

    assert order({1: 1, 3: 2}) == order({})


class Labelled(Dataset[Any]):
    """Labels that tell samples apart."""

    def __len__(self) -> int:
        return COUNT

    def __getitem__(self, index: int) -> Any:
        return quarters().tensors[0][index], index


def test_epochs_with_a_limit_of_batches() -> None:
    run = Run(drops={2: 1, 5: 2})
    for _ in range(16):
        for i, (x, y) in enumerate(run.drop.loader):
            if i == 3:
                break
            run.train_step(x, y)
        run.drop.step()
    assert run.drop.prefix == 2
    assert accuracy(run.model) > 0.95


def test_epochs_that_end_by_the_clock() -> None:
    run = Run(drops={2: 1})
    for _ in range(8):
        end = time.perf_counter() + 0.03
        for x, y in run.drop.loader:
            run.train_step(x, y)
            if time.perf_counter() > end:
                break
        run.drop.step()
    assert accuracy(run.epochs(3).model) > 0.95


def test_a_loader_zipped_with_a_shorter_one() -> None:
    run = Run(drops={2: 2})
    other = DataLoader(quarters(32), batch_size=16)
    for _ in range(9):
        for (x, y), _ in zip(run.drop.loader, other, strict=False):
            run.train_step(x, y)
        run.drop.step()
    for _ in range(3):
        for _, (x, y) in zip(other, run.drop.loader, strict=False):
            run.train_step(x, y)
        run.drop.step()
    assert run.drop.prefix == 2
    assert accuracy(run.epochs(2).model) > 0.95


def cycle(loader: Any) -> Iterator[Any]:
    while True:
        yield from loader


@pytest.mark.parametrize("every", [4, 6, 9])
@pytest.mark.parametrize("workers", [0, 1])
def test_training_by_steps_without_epochs(every: int, workers: int) -> None:
    # Six batches an epoch: measured in mid-epoch, at its end, and across two of them.
    run = Run(drops={})
    run.user = Run.make_loader(num_workers=workers)
    run.drop = run.scheduler({1: 1, 3: 2})
    for step, (x, y) in enumerate(itertools.islice(cycle(run.drop.loader), 60), 1):
        run.train_step(x, y)
        if step % every == 0:
            run.drop.step()
    assert run.drop.prefix == 2
    assert [record.samples for record in run.drop.history][:3] == [16 * every] * 3
    assert accuracy(run.model) > 0.95


class Endless(Sampler[int]):
    """Permutations without end, with or without a length that is never reached."""

    def __iter__(self) -> Iterator[int]:
        generator = torch.Generator().manual_seed(2)
        while True:
            yield from torch.randperm(COUNT, generator=generator).tolist()


class Long(Endless):
    def __len__(self) -> int:
        return 1 << 40


@pytest.mark.parametrize("sampler", [Endless, Long])
@pytest.mark.parametrize("workers", [0, 1])
def test_an_endless_sampler_goes_on_once_all_samples_have_rows(sampler: type[Endless], workers: int) -> None:
    run = Run(drops={})
    run.user = DataLoader(quarters(), 16, sampler=sampler(), num_workers=workers)
    run.drop = run.scheduler({1: 1, 3: 2})
    for steps, (x, y) in enumerate(run.drop.loader, 1):
        run.train_step(x, y)
        if steps % 6 == 0:
            run.drop.step()
        if steps == 60:
            run.drop.refresh(torch.tensor([3, 5]))  # read in this process, when they are drawn
        if steps == 120:
            break
    assert run.drop.prefix == 2
    computes = [record.fill_flops > 0 for record in run.drop.history]
    assert computes[9:] == [False, True, *[False] * 9]
    assert accuracy(run.model) > 0.95


def test_a_loop_that_calls_parts_of_the_model_is_refused_after_a_drop() -> None:
    run = Run(drops={1: 1})
    run.epochs(1)
    for _ in range(2):  # the first epoch reads images
        x, y = next(iter(run.drop.loader))
        with pytest.raises(
            RuntimeError, match="images must go through the model, and 0, a part of it, was called on them"
        ):
            run.model[1:](run.model[0](x))
        run.train_step(x, y)
        run.epochs(1)


@pytest.mark.parametrize("before", [0, 1, 2])
def test_itertools_cycle_keeps_the_first_epochs_batches_and_is_refused_at_the_next_step(before: int) -> None:
    run = Run(drops={1: 2}, cache="fp32").epochs(before)
    endless = itertools.cycle(run.drop.loader)  # plain images, images whose rows are kept, images that are not read
    for x, y in itertools.islice(endless, 6):
        run.train_step(x, y)
    run.drop.step()
    rows = run.drop._rows.cache.nbytes
    for x, y in itertools.islice(endless, 30):
        run.train_step(x, y)  # as the whole model with its first layers frozen
    with pytest.raises(RuntimeError, match=r"wanted batches of drop.loader since the last step, got none"):
        run.drop.step()
    assert accuracy(run.model) > 0.95
    assert run.drop._rows.cache.nbytes == rows


@pytest.mark.filterwarnings("ignore")
def test_a_policy_that_never_drops_takes_less_than_200_microseconds_a_step() -> None:
    # 1 % of a step of 20 ms. By CPU time, the least of several rounds: other work on the machine does not count.
    data = TensorDataset(torch.zeros(800, 4), torch.zeros(800, dtype=torch.int64))
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    plain = DataLoader(data, batch_size=4, shuffle=True)
    drop = DropScheduler(model, optimizer, DataLoader(data, batch_size=4, shuffle=True), policy=Fixed({}))

    def seconds(loader: Any, call: nn.Module) -> float:
        begin = time.process_time()
        for x, _ in loader:
            call(x)
        return time.process_time() - begin

    pairs = [(seconds(drop.loader, drop.model), seconds(plain, model)) for _ in range(30)]
    least = min(own for own, _ in pairs) - min(other for _, other in pairs)
    assert least / 200 < 200e-6
