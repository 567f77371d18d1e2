from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch

from learndrop_ext.decide import probes
from learndrop_ext.decide.probes import (
    copy_bytes_per_second,
    disk_bytes_per_second,
    median_seconds,
    tier_speeds,
)
from learndrop_ext.rows.config import CacheConfig
from learndrop_ext.rows.plan import Budgets

CPU = torch.device("cpu")


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """Lets the runs that are timed take the seconds given, one after the other."""

    def take(*seconds: float) -> None:
        def readings() -> Iterator[float]:
            now = 100.0
            for one in seconds:
                yield now
                now += one
                yield now

        reading = readings()
        monkeypatch.setattr(probes, "perf_counter", lambda: next(reading))

    return take


def test_median_seconds(clock: Callable[..., None]) -> None:
    ran: list[int] = []
    clock(50.0, 60.0, 4.0, 1.0, 3.0)
    assert median_seconds(lambda: ran.append(0), CPU, repeats=3, warmup=2) == 3.0
    assert len(ran) == 5
    clock(9.0, 2.0)
    assert median_seconds(lambda: None, CPU, repeats=1) == 2.0


def test_copy_bytes_per_second(clock: Callable[..., None]) -> None:
    # A byte read and a byte written for each of 1,000; the first copy warms up.
    clock(9.0, 4.0, 1.0, 2.0)
    assert copy_bytes_per_second(CPU, size=1000) == 1000.0


def test_disk_bytes_per_second(tmp_path: Path, clock: Callable[..., None]) -> None:
    clock(4.0)
    assert disk_bytes_per_second(tmp_path, size=3 << 20) == (3 << 20) / 4
    assert list(tmp_path.iterdir()) == []
    with pytest.raises(OSError, match="No such file"):
        disk_bytes_per_second(tmp_path / "none")


@pytest.mark.parametrize(
    ("budgets", "folder", "seconds", "speeds"),
    [
        (Budgets(100, 0, 0), False, [1.0] * 4, (2.0 * (1 << 24), float("inf"), float("inf"))),
        # A CPU model has no host tier of its own.
        (Budgets(100, 50, 0), False, [2.0] * 4, (1.0 * (1 << 24), float("inf"), float("inf"))),
        (Budgets(100, 0, 70), False, [2.0] * 4, (1.0 * (1 << 24), float("inf"), float("inf"))),
        (Budgets(100, 0, 70), True, [4.0] + [1.0] * 4, (2.0 * (1 << 24), float("inf"), (1 << 25) / 4)),
    ],
)
def test_tier_speeds(
    tmp_path: Path,
    clock: Callable[..., None],
    budgets: Budgets,
    folder: bool,
    seconds: list[float],
    speeds: tuple[float, ...],
) -> None:
    clock(*seconds)
    config = CacheConfig(store=tmp_path if folder else None)
    assert tier_speeds(budgets, config, CPU) == speeds
