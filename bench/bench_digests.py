"""Digests of all tensors of a network compared with checksums, a hash and a sum in torch, and a copy of the same bytes.

On a GPU, many calls in a row are timed with one synchronisation at the end, so that times are the device's.

    pytest bench/bench_digests.py --benchmark-only --benchmark-group-by=param:network
"""

from __future__ import annotations

import zlib
from collections.abc import Callable

import pytest
import torch
from bench_delta_norms import NETWORKS
from measure import DEVICE, measure, waited_for
from pytest_benchmark.fixture import BenchmarkFixture
from torch import Tensor

from learndrop_ext import _C
from learndrop_ext.ops import TensorDigests, digests

ROUNDS, ITERATIONS = (20, 20) if DEVICE == "cuda" else (15, 1)

timed = pytest.mark.benchmark(timer=waited_for)


@pytest.fixture(scope="module", params=["ResNet-18", "ResNet-50"])
def network(request: pytest.FixtureRequest) -> tuple[str, list[Tensor]]:
    """Name, and parameters and buffers: weight, bias, mean, variance and number of batches of each batch norm."""
    torch.manual_seed(0)
    tensors = []
    for layer in NETWORKS[request.param]():
        for shape in layer:
            tensors.append(torch.randn(shape, device=DEVICE))
            if len(shape) == 1 and shape != (1000,):
                tensors.append(torch.randn(shape, device=DEVICE))
        batch_norms = sum(len(shape) == 4 for shape in layer)
        tensors += [torch.zeros((), dtype=torch.int64, device=DEVICE) for _ in range(batch_norms)]
    return request.param, tensors


def time_case(
    benchmark: BenchmarkFixture,
    network: tuple[str, list[Tensor]],
    contender: str,
    call: Callable[[], object],
    rounds: int = ROUNDS,
    iterations: int = ITERATIONS,
    case: str = "",
) -> None:
    measure(
        benchmark,
        call,
        suite="digests",
        case=network[0] + case,
        contender=contender,
        moved_bytes=sum(tensor.nbytes for tensor in network[1]),
        rounds=rounds,
        iterations=iterations,
    )


def contiguous_bytes(tensor: Tensor) -> memoryview:
    return tensor.cpu().contiguous().view(-1).view(torch.uint8).numpy().data


@timed
def test_digests(benchmark: BenchmarkFixture, network: tuple[str, list[Tensor]]) -> None:
    time_case(benchmark, network, "learndrop", TensorDigests(network[1]).measure)


@timed
def test_digests_once(benchmark: BenchmarkFixture, network: tuple[str, list[Tensor]]) -> None:
    """With a table for one call."""
    time_case(benchmark, network, "learndrop", lambda: digests(network[1]), 9, 1, case=", table included")


@pytest.mark.skipif(DEVICE == "cuda", reason="cores are for the CPU's form")
@timed
def test_digests_on_one_core(benchmark: BenchmarkFixture, network: tuple[str, list[Tensor]]) -> None:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    time_case(benchmark, network, "learndrop", TensorDigests(network[1]).measure, case=", one core")
    torch.set_num_threads(threads)


@timed
def test_copy(benchmark: BenchmarkFixture, network: tuple[str, list[Tensor]]) -> None:
    """A copy of as many bytes in one piece, which also writes them."""
    source = torch.zeros(sum(tensor.nbytes for tensor in network[1]), dtype=torch.uint8, device=DEVICE)
    target = torch.zeros_like(source)
    time_case(benchmark, network, "copy", lambda: target.copy_(source))


@timed
def test_sum(benchmark: BenchmarkFixture, network: tuple[str, list[Tensor]]) -> None:
    """One fp32 sum for each tensor: it misses what is moved, and what is rounded away."""
    time_case(benchmark, network, "sum", lambda: [tensor.sum() for tensor in network[1]], 9, 1)


@timed
def test_hash_tensor(benchmark: BenchmarkFixture, network: tuple[str, list[Tensor]]) -> None:
    """torch.hash_tensor combines the values by XOR: it misses what is moved."""
    if not hasattr(torch, "hash_tensor"):
        pytest.skip("this torch has no hash_tensor")
    time_case(benchmark, network, "hash_tensor", lambda: [torch.hash_tensor(tensor) for tensor in network[1]], 3, 1)


@timed
def test_crc32c(benchmark: BenchmarkFixture, network: tuple[str, list[Tensor]]) -> None:
    call = lambda: [_C.crc32c(contiguous_bytes(tensor)) for tensor in network[1]]  # noqa: E731
    time_case(benchmark, network, "crc32c", call, 5, 1)


@timed
def test_zlib(benchmark: BenchmarkFixture, network: tuple[str, list[Tensor]]) -> None:
    call = lambda: [zlib.crc32(contiguous_bytes(tensor)) for tensor in network[1]]  # noqa: E731
    time_case(benchmark, network, "zlib.crc32", call, 5, 1)


@pytest.mark.skipif(DEVICE == "cpu", reason="on a CPU the call is the work")
def test_host_time(benchmark: BenchmarkFixture, network: tuple[str, list[Tensor]]) -> None:
    """How long the caller is held up: the check of every tensor and the launch, not waited for."""
    table = TensorDigests(network[1])
    benchmark.extra_info.update(
        suite="digests", case=f"{network[0]}, host time", contender="learndrop", bytes=0, launches=2
    )
    benchmark.pedantic(table.measure, setup=torch.cuda.synchronize, rounds=200, warmup_rounds=5)
