"""How the benchmark suites time calls, and the information they record for bench/run.py."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path

import torch
from pytest_benchmark.fixture import BenchmarkFixture

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def last_level_cache_bytes() -> int:
    """Return the size of the CPU's largest cache; 0 if Linux does not say."""
    files = Path("/sys/devices/system/cpu/cpu0/cache").glob("index*/size")
    return max((int(file.read_text().strip().removesuffix("K")) << 10 for file in files), default=0)


#: A CPU's caches hold nothing of what was last used so many bytes ago.
FAR_BYTES = max(128 << 20, 4 * last_level_cache_bytes())


def waited_for() -> float:
    """Return the time of a clock once the device has finished its work."""
    if DEVICE == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter()


def launches(call: Callable[[], object]) -> int | None:
    """Return how many kernels and copies one call starts on the GPU, None on a CPU."""
    if DEVICE == "cpu":
        return None
    call()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA], acc_events=True) as profile:
        call()
        torch.cuda.synchronize()
    return sum(event.device_type == torch.autograd.DeviceType.CUDA for event in profile.events())


def measure(
    benchmark: BenchmarkFixture,
    call: Callable[[], object],
    *,
    suite: str,
    case: str,
    contender: str,
    moved_bytes: int,
    rounds: int,
    iterations: int = 1,
    warmup_rounds: int = 2,
    again_bytes: int | None = None,
) -> None:
    """Time `call`, which reads and writes at least `moved_bytes`, as one contender of a case.

    The benchmark's timer must be `waited_for`, so that a GPU's work is part of the time.

    again_bytes: how many bytes the calls use before they use one again; `moved_bytes` by default. Where a CPU's caches may
    still have them, memory is no limit, and no share of a copy is recorded.
    """
    far = DEVICE == "cuda" or (moved_bytes if again_bytes is None else again_bytes) >= FAR_BYTES
    benchmark.extra_info |= {"suite": suite, "case": case, "contender": contender, "bytes": moved_bytes}
    benchmark.extra_info["of_a_copy"] = far
    benchmark.extra_info["launches"] = launches(call) if contender == "learndrop" else None
    benchmark.pedantic(call, rounds=rounds, iterations=iterations, warmup_rounds=warmup_rounds)


def measure_in_turn(
    benchmark: BenchmarkFixture,
    ours: Callable[[], object],
    peers: dict[str, Callable[[], object]],
    *,
    prepare: Callable[[], object],
    suite: str,
    case: str,
    moved_bytes: int,
    rounds: int,
) -> None:
    """Time `ours` and its peers in turn, `prepare` called before each: for limits that change while they are measured.

    The order of the sides changes with each round. The peers' times are kept in the benchmark's `extra_info`. Their limit is
    a bus or a disk, and one of the peers, so no share of a copy in memory is recorded.
    """
    times: dict[str, list[float]] = {name: [] for name in peers}
    benchmark.extra_info |= {"suite": suite, "case": case, "contender": "learndrop", "bytes": moved_bytes}
    benchmark.extra_info |= {"launches": None, "in_turn": times, "of_a_copy": False}

    def timed(name: str) -> None:
        prepare()
        begin = waited_for()
        peers[name]()
        times[name].append(waited_for() - begin)

    turn = 0

    def peers_first() -> None:
        nonlocal turn
        turn += 1
        names = list(peers)[turn % len(peers) :] + list(peers)[: turn % len(peers)]
        for name in names:
            timed(name)
        prepare()

    benchmark.pedantic(ours, setup=peers_first, rounds=rounds)
