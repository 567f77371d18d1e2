"""Rows in pinned host memory, read by a GPU's copy engines and by the kernel, compared with one copy of as many bytes.

    pytest bench/bench_host_rows.py --benchmark-only

Needs a GPU. The sides take turns, because the bus is shared.
"""

from __future__ import annotations

import pytest
import torch
from measure import DEVICE, measure_in_turn, waited_for
from pytest_benchmark.fixture import BenchmarkFixture

from learndrop_ext.ops import transfer

CACHE_BYTES = 2 << 30
SIZES = [1 << 10, 4 << 10, 32 << 10, 128 << 10, 196 << 10]

pytestmark = [
    pytest.mark.skipif(DEVICE == "cpu", reason="needs an NVIDIA GPU"),
    pytest.mark.benchmark(timer=waited_for),
]


@pytest.mark.parametrize("way", ["copy engines", "kernel"])
@pytest.mark.parametrize("size", SIZES, ids=lambda size: f"{size >> 10}KB")
def test_host_rows(benchmark: BenchmarkFixture, size: int, way: str) -> None:
    batch = max(128, (8 << 20) // size)
    host = torch.zeros(CACHE_BYTES // size, size, dtype=torch.uint8)
    device = torch.device("cuda", torch.cuda.current_device())
    transfer.pin(host, device)
    try:
        into = torch.empty(batch, size, dtype=torch.uint8, device=device)
        index = torch.randperm(len(host))[:batch]
        stream = torch.cuda.Stream()

        def rows() -> None:
            with torch.cuda.stream(stream):
                transfer.rows_to_device(host, index, into, kernel=way == "kernel")

        def one_copy() -> None:
            with torch.cuda.stream(stream):
                into.copy_(host[:batch], non_blocking=True)

        measure_in_turn(
            benchmark,
            rows,
            {"one pinned copy": one_copy},
            prepare=torch.cuda.synchronize,
            suite="host_rows",
            case=f"bring {batch} rows of {size >> 10} KB by {way}",
            moved_bytes=batch * size,
            rounds=40,
        )
    finally:
        torch.cuda.synchronize()
        transfer.unpin(host)
