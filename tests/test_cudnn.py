"""cuDNN times no algorithms in passes that are not the user's, and keeps the user's settings."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import nn

from learndrop_ext import Budget, DropScheduler, Fixed
from learndrop_ext.cudnn import without_benchmark
from learndrop_ext.forward.images import Unread
from small_training import Net, data, epoch, parts

SETTINGS = ("enabled", "benchmark", "deterministic", "allow_tf32")


def settings() -> dict[str, bool]:
    return {name: getattr(torch.backends.cudnn, name) for name in SETTINGS}


@pytest.fixture(autouse=True)
def _restored(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in SETTINGS[1:]:
        monkeypatch.setattr(torch.backends.cudnn, name, settings()[name])


@pytest.mark.parametrize("timed", [False, True])
@pytest.mark.parametrize("tf32", [False, True])
def test_only_benchmark_changes_and_comes_back(timed: bool, tf32: bool) -> None:
    torch.backends.cudnn.benchmark, torch.backends.cudnn.allow_tf32 = timed, tf32
    before = settings()
    with without_benchmark(torch.device("cuda")):
        assert settings() == before | {"benchmark": False}
    assert settings() == before
    with without_benchmark(torch.device("cuda"), deterministic=True):
        assert settings() == before | {"benchmark": False, "deterministic": True}
    assert settings() == before
    with pytest.raises(KeyError), without_benchmark(torch.device("cuda"), deterministic=True):
        raise KeyError
    assert settings() == before


def test_the_users_determinism_stays_inside() -> None:
    torch.backends.cudnn.deterministic = True
    with without_benchmark(torch.device("cuda")):
        assert torch.backends.cudnn.deterministic


def test_nothing_changes_for_a_cpu() -> None:
    torch.backends.cudnn.benchmark = True
    with without_benchmark(torch.device("cpu"), deterministic=True):
        assert settings()["benchmark"]
        assert not settings()["deterministic"]


def test_every_pass_that_is_not_the_users_is_inside(monkeypatch: pytest.MonkeyPatch) -> None:
    """On a CPU too, where the settings say nothing."""
    depth = 0
    seen: list[bool] = []
    convolution = nn.Conv2d._conv_forward

    @contextlib.contextmanager
    def noted(device: torch.device, *, deterministic: bool = False) -> Iterator[None]:
        nonlocal depth
        depth += 1
        yield
        depth -= 1

    def recorded(module: nn.Conv2d, *args: Any) -> torch.Tensor:
        if not isinstance(args[0], Unread):  # those compute nothing
            seen.append(depth > 0)
        return convolution(module, *args)

    monkeypatch.setattr(nn.Conv2d, "_conv_forward", recorded)
    for name in ("forward.cuts", "forward.proof", "guards", "decide.timing"):
        monkeypatch.setattr(f"learndrop_ext.{name}.without_benchmark", noted)
    model, optimizer, loader = parts()
    with DropScheduler(model, optimizer, loader, policy=Fixed({1: 2}), epochs=3) as drop:
        drop.forecast()
        assert set(seen) == {True}  # to find the layers, and to time them
        for _ in range(2):
            seen.clear()
            first = next(iter(drop.loader))
            assert set(seen) == set()  # what the dropped layers compute is looked at without computing it
            seen.clear()
            model.train()(first[0])
            assert set(seen) == {False}
            epoch(drop, optimizer)
            seen.clear()
            drop.step()
            assert set(seen) == (set() if drop.epoch > 1 else {True})  # to try the cut
            assert depth == 0


@pytest.mark.cuda
def test_only_training_steps_have_algorithms_timed(monkeypatch: pytest.MonkeyPatch) -> None:
    torch.backends.cudnn.benchmark = True
    gpu = torch.device("cuda")
    torch.manual_seed(0)
    model = Net().to(gpu)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    seen: list[tuple[bool, bool]] = []
    convolution = nn.Conv2d._conv_forward

    def recorded(module: nn.Conv2d, *args: Any) -> torch.Tensor:
        seen.append((torch.backends.cudnn.enabled, torch.backends.cudnn.benchmark))
        return convolution(module, *args)

    monkeypatch.setattr(nn.Conv2d, "_conv_forward", recorded)
    loader = torch.utils.data.DataLoader(data(), batch_size=8)
    with DropScheduler(model, optimizer, loader, policy=Budget(1.2), epochs=3) as drop:
        assert set(seen) == {(True, False)}
        drop.forecast()
        assert set(seen) == {(True, False)}
        if not drop.prefix:
            seen.clear()
            epoch(drop, optimizer)
            assert (True, True) in seen
