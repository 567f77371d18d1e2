"""Whole runs on a GPU: rows in every tier, the loops that people write there, and what a step must not wait for."""

from __future__ import annotations

import io
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from learndrop_ext import Budget, CacheConfig, DropScheduler, Fixed, Policy, StoppedLearning
from learndrop_ext.app.models import build_model
from small_training import Net, called, data, epoch

pytestmark = pytest.mark.cuda

GPU = torch.device("cuda", 0)
#: Two layers of Net leave rows of 6 x 4 x 4 values: 384 bytes in fp32, 24 of them.
ROW = 384


@pytest.fixture(autouse=True)
def _deterministic() -> Iterator[None]:
    """Convolutions in full precision by algorithms that give the same bits each time."""
    flags = torch.backends.cudnn.deterministic, torch.backends.cudnn.allow_tf32
    torch.backends.cudnn.deterministic, torch.backends.cudnn.allow_tf32 = True, False
    yield
    torch.backends.cudnn.deterministic, torch.backends.cudnn.allow_tf32 = flags


def run_parts(
    dataset: Any = None, *, channels_last: bool = False, **options: Any
) -> tuple[Net, torch.optim.Optimizer, DataLoader[Any]]:
    torch.manual_seed(0)
    model = Net().to(GPU, memory_format=torch.channels_last if channels_last else torch.contiguous_format)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
    settings: dict[str, Any] = {"batch_size": 8, "shuffle": True, "generator": torch.Generator().manual_seed(1)}
    return model, optimizer, DataLoader(data() if dataset is None else dataset, **settings | options)


def losses_of(epochs: int = 4, **options: Any) -> list[float]:
    model, optimizer, loader = run_parts()
    with DropScheduler(model, optimizer, loader, **{"policy": Fixed({1: 2}), "cache": "fp32"} | options) as drop:
        losses = []
        for _ in range(epochs):
            losses += epoch(drop, optimizer)
            drop.step()
        return losses


def losses_behind_a_frozen_prefix(epochs: int = 4) -> list[float]:
    model, optimizer, loader = run_parts()
    prefix = nn.ModuleList([model.conv1, model.bn1, model.conv2, model.bn2])
    losses = []
    for done in range(epochs):
        model.train()
        if done:
            prefix.eval()
            prefix.requires_grad_(False)
            for parameter in prefix.parameters():
                parameter.grad = None
        for x, y in loader:
            loss = nn.functional.cross_entropy(model(x.to(GPU)), y.to(GPU))
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            losses.append(loss.item())
    return losses


def test_training_on_rows_equals_training_behind_a_frozen_prefix() -> None:
    torch.testing.assert_close(losses_of(), losses_behind_a_frozen_prefix(), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    "budgets",
    [
        pytest.param({"budget_bytes": 0, "host_bytes": 1 << 20}, id="host"),
        pytest.param({"budget_bytes": 0, "store_bytes": 1 << 20}, id="disk"),
        pytest.param({"budget_bytes": 22 * ROW, "host_bytes": 8 * ROW, "store_bytes": 1 << 20}, id="all"),
    ],
)
def test_rows_of_other_tiers_train_as_those_of_the_device(budgets: dict[str, int], tmp_path: Path) -> None:
    config = CacheConfig(codec="fp32", store=tmp_path, **budgets)  # type: ignore[arg-type]
    assert losses_of(cache=config) == losses_of()


@pytest.mark.parametrize("codec", ["fp16", "bf16", "uint8"])
def test_rows_of_every_codec_train_closely(codec: str) -> None:
    torch.testing.assert_close(losses_of(cache=codec), losses_of(), rtol=5e-2, atol=5e-2)


@pytest.mark.filterwarnings("ignore:Synchronization debug mode is a prototype:UserWarning")
def test_a_step_on_rows_does_not_wait_for_the_device() -> None:
    model, optimizer, loader = run_parts(data(64))
    with DropScheduler(model, optimizer, loader, policy=Fixed({0: 2}), cache="fp16") as drop:
        epoch(drop, optimizer)
        drop.step()
        model.train()
        try:
            for step, (x, y) in enumerate(drop.loader):
                loss = nn.functional.cross_entropy(model(x), y)
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
                # An epoch reads a few samples again before its first step, and waits for its last one.
                torch.cuda.set_sync_debug_mode("error" if step < len(drop.loader) - 2 else "default")
        finally:
            torch.cuda.set_sync_debug_mode("default")
        assert x.device == GPU


def assert_all_among(rows: torch.Tensor, choices: torch.Tensor, tolerance: float) -> None:
    """Each of the rows [n, D] is one of the choices [m, D]."""
    apart = (rows.float()[:, None] - choices.float()[None]).abs().amax(2)
    assert float(apart.amin(1).max()) <= tolerance


def test_rows_are_made_under_the_autocast_of_the_step() -> None:
    model, optimizer, loader = run_parts(channels_last=True)
    with DropScheduler(model, optimizer, loader, policy=Fixed({0: 2}), cache="bf16") as drop:
        for _ in range(3):
            model.train()
            for x, y in drop.loader:
                with torch.autocast("cuda", torch.bfloat16):
                    loss = nn.functional.cross_entropy(model(x), y)
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
            drop.step()
        with torch.no_grad(), torch.autocast("cuda", torch.bfloat16):
            wanted = drop.chain.prefix(2).eval()(data().tensors[0].to(GPU))
            rows = [called(drop, x)[1] for x, _ in drop.loader]
        assert all(row.dtype == torch.bfloat16 for row in rows)
        assert all(row.is_contiguous(memory_format=torch.channels_last) for row in rows)
        assert_all_among(torch.cat(rows).flatten(1), wanted.flatten(1), 2e-2)


@pytest.mark.filterwarnings("default")  # those of torch.compile itself
def test_a_compiled_model_trains_on_rows() -> None:
    eager = losses_of()
    compiled = losses_of(wrap=torch.compile)
    torch.testing.assert_close(compiled, eager, rtol=1e-3, atol=1e-4)


def test_workers_and_pinned_batches_change_nothing() -> None:
    def run(**options: Any) -> list[float]:
        model, optimizer, loader = run_parts(**options)
        with DropScheduler(model, optimizer, loader, policy=Fixed({1: 2}), cache="fp32") as drop:
            return [loss for _ in range(3) for loss in (epoch(drop, optimizer), drop.step())[0]]

    assert run(num_workers=2, pin_memory=True) == run()


def test_images_that_lie_on_the_gpu() -> None:
    images = TensorDataset(*(tensor.to(GPU) for tensor in data().tensors))

    def run(dataset: Any) -> list[float]:
        model, optimizer, loader = run_parts(dataset)
        with DropScheduler(model, optimizer, loader, policy=Fixed({1: 2}), cache="fp32") as drop:
            return [loss for _ in range(3) for loss in (epoch(drop, optimizer), drop.step())[0]]

    assert run(images) == run(data())


@pytest.mark.parametrize("kind", ["mirror", "views"])
def test_rows_are_those_of_the_images_or_of_their_flips(kind: str) -> None:
    config = CacheConfig("fp32", **{kind: 2 if kind == "views" else True})  # type: ignore[arg-type]
    model, optimizer, loader = run_parts()
    with DropScheduler(model, optimizer, loader, policy=Fixed({0: 2}), cache=config) as drop:
        for _ in range(3):
            epoch(drop, optimizer)
            drop.step()
        images = data().tensors[0].to(GPU)
        prefix = drop.chain.prefix(2).eval()
        with torch.no_grad():
            plain = prefix(images)
            other = prefix(images.flip(-1)) if kind == "mirror" else plain
            choices = torch.stack([plain, other], 1).flatten(0, 1).flatten(1)
            seen = torch.cat([called(drop, x)[1] for _ in range(2) for x, _ in drop.loader]).flatten(1)
        assert_all_among(seen, choices, 1e-5)
        moved = sum(float((row - choices[0::2]).abs().amax(1).min()) > 1e-5 for row in seen)
        assert (moved > 0) == (kind != "views")


def test_a_resumed_run_equals_the_uninterrupted_one(tmp_path: Path) -> None:
    config = CacheConfig(codec="fp32", store=tmp_path, store_bytes=1 << 20)
    whole = losses_of(4, cache=config)
    model, optimizer, loader = run_parts()
    drop = DropScheduler(model, optimizer, loader, policy=Fixed({1: 2}), cache=config)
    losses = []
    for _ in range(2):
        losses += epoch(drop, optimizer)
        drop.step()
    assert loader.generator is not None
    state = [model.state_dict(), optimizer.state_dict(), drop.state_dict(), loader.generator.get_state()]
    file = io.BytesIO()
    torch.save(state, file)
    file.seek(0)
    model, optimizer, loader = run_parts()
    weights, moments, dropped, order = torch.load(file, weights_only=False)
    model.load_state_dict(weights)
    optimizer.load_state_dict(moments)
    assert loader.generator is not None
    loader.generator.set_state(order)
    with DropScheduler(model, optimizer, loader, policy=Fixed({1: 2}), cache=config) as again:
        again.load_state_dict(dropped)
        for _ in range(2):
            losses += epoch(again, optimizer)
            again.step()
    assert losses == whole


@pytest.mark.parametrize(
    "policy",
    [StoppedLearning(threshold=1.0, patience=1, warmup=1, min_saving=0.0), Budget(1.5)],
    ids=lambda p: repr(p)[:6],
)
def test_policies_that_measure_run_to_their_end(policy: Policy) -> None:
    torch.manual_seed(0)
    model = build_model("resnet18", num_classes=5, in_channels=3, width=64, seed=0).to(GPU)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    images = TensorDataset(torch.randn(2048, 3, 32, 32, device=GPU), torch.randint(0, 5, (2048,), device=GPU))
    loader = DataLoader(images, 128, shuffle=True)
    with DropScheduler(model, optimizer, loader, policy=policy, epochs=6) as drop:
        assert all(run.seconds > 0 for runs in drop.forecast().runs for run in runs)
        for _ in range(6):
            epoch(drop, optimizer)
            drop.step()
        assert drop.prefix > 0, drop.history[-1].reason
    assert all(parameter.requires_grad for parameter in model.parameters())


def test_other_algorithms_for_other_batch_sizes_are_no_change_of_the_images() -> None:
    """With TF32, as torch has it by default, the few samples that are compared are computed in another way."""
    torch.backends.cudnn.allow_tf32 = True
    torch.manual_seed(0)
    model = build_model("resnet18", num_classes=5, in_channels=3, width=64, seed=0).to(GPU)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    images = TensorDataset(torch.randn(512, 3, 64, 64), torch.randint(0, 5, (512,)))
    loader = DataLoader(images, 128, shuffle=True)
    # A warning that the rows are computed again is an error here.
    with DropScheduler(model, optimizer, loader, policy=Fixed({0: 5}), cache="fp32") as drop:
        for _ in range(4):
            epoch(drop, optimizer)
            record = drop.step()
        assert record.fill_seconds == 0


def test_undrop_trains_the_whole_model_again() -> None:
    model, optimizer, loader = run_parts()
    with DropScheduler(model, optimizer, loader, policy=Fixed({0: 2})) as drop:
        epoch(drop, optimizer)
        drop.step()
        drop.undrop()
        before = model.conv1.weight.detach().clone()
        epoch(drop, optimizer)
        assert not torch.equal(model.conv1.weight, before)
