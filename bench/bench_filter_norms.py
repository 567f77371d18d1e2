"""filter_norms compared with the same in torch, all in one run, on a GPU if there is one.

Each benchmark measures every filter of a network: l1, l2 squared, largest value, and how many weights are at most a
hundredth of their layer's largest. On a GPU, calls in a row are timed with one synchronisation at the end.

    pytest bench/bench_filter_norms.py --benchmark-only --benchmark-group-by=param:network
"""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from bench_delta_norms import NETWORKS
from measure import DEVICE, measure, waited_for
from pytest_benchmark.fixture import BenchmarkFixture
from torch import Tensor

from learndrop_ext import ops

ROUNDS, ITERATIONS = (20, 20) if DEVICE == "cuda" else (9, 1)
SHARE = 0.01


@pytest.fixture(scope="module", params=["ResNet-18", "ResNet-50", "VGG-16 at 32"])
def network(request: pytest.FixtureRequest) -> tuple[str, list[Tensor]]:
    torch.manual_seed(0)
    shapes = [shape for layer in NETWORKS[request.param]() for shape in layer if len(shape) > 1]
    return request.param, [torch.randn(shape, device=DEVICE) for shape in shapes]


def foreach(weights: list[Tensor]) -> list[Tensor]:
    """Lists of rows: one launch for each kind of norm and about as many as there are filters for the rest."""
    rows = [row for weight in weights for row in weight.flatten(1).unbind()]
    norms = [torch.stack(torch._foreach_norm(rows, order)) for order in (1, 2, float("inf"))]
    sizes, counts = [len(weight) for weight in weights], []
    for weight, largest in zip(weights, norms[2].split(sizes), strict=True):
        counts.append((weight.flatten(1).abs() <= SHARE * largest.amax()).sum(1))
    return [*norms, torch.cat(counts)]


def loop(weights: list[Tensor]) -> list[Tensor]:
    """Layer by layer."""
    rows = []
    for weight in weights:
        size = weight.flatten(1).abs()
        largest = size.amax(1)
        zeros = (size <= SHARE * largest.amax()).sum(1)
        rows.append(torch.stack([size.sum(1), size.square().sum(1), largest, zeros], dim=1))
    return rows


CONTENDERS: dict[str, Callable[[list[Tensor]], object]] = {
    "learndrop": lambda weights: ops.filter_norms(weights, share=SHARE),
    "foreach recipe": foreach,
    "loop over layers": loop,
}


@pytest.mark.benchmark(timer=waited_for)
@pytest.mark.parametrize("contender", CONTENDERS)
def test_filter_norms(benchmark: BenchmarkFixture, network: tuple[str, list[Tensor]], contender: str) -> None:
    name, weights = network
    measure(
        benchmark,
        lambda: CONTENDERS[contender](weights),
        suite="filter_norms",
        case=name,
        contender=contender,
        moved_bytes=sum(weight.nbytes for weight in weights),
        rounds=ROUNDS,
        iterations=ITERATIONS,
    )
