"""delta_norms compared with the same in torch, all in one run, on a GPU if there is one.

Each benchmark measures all layers of a network and refreshes the anchors. On a GPU, many calls in a row are timed with one
synchronisation at the end, so that times are the device's and not those of a launch.

    pytest bench/bench_delta_norms.py --benchmark-only --benchmark-group-by=param:network
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import pytest
import torch
from measure import DEVICE, measure, waited_for
from pytest_benchmark.fixture import BenchmarkFixture
from torch import Tensor

from learndrop_ext import ops
from learndrop_ext.kernels.chunks import build_table

Shapes = list[list[tuple[int, ...]]]

ROUNDS, ITERATIONS = (20, 20) if DEVICE == "cuda" else (9, 1)
# A torch recipe takes seconds for the large networks on a CPU.
LARGEST_BYTES = 1 << 40 if DEVICE == "cuda" else 150 << 20


def convolution(out: int, into: int, size: int) -> list[tuple[int, ...]]:
    """Weight of a convolution, weight and bias of its batch norm."""
    return [(out, into, size, size), (out,), (out,)]


def resnet(depths: tuple[int, ...], *, bottleneck: bool) -> Shapes:
    """Parameters of a ResNet for 1,000 classes, one layer a block."""
    layers: Shapes = [convolution(64, 3, 7)]
    into = 64
    for stage, depth in enumerate(depths):
        width = 64 << stage
        out = 4 * width if bottleneck else width
        for _ in range(depth):
            if bottleneck:
                block = convolution(width, into, 1) + convolution(width, width, 3) + convolution(out, width, 1)
            else:
                block = convolution(width, into, 3) + convolution(width, width, 3)
            layers.append(block + (convolution(out, into, 1) if into != out else []))
            into = out
    return [*layers, [(1000, into), (1000,)]]


def vgg16(*, pixels: int) -> Shapes:
    """Parameters of VGG-16 with batch norm: for 224 pixels with its classifier of three, for 32 with one of 10 classes."""
    layers: Shapes = []
    into = 3
    for out in (64, 64, 128, 128, 256, 256, 256, 512, 512, 512, 512, 512, 512):
        layers.append([*convolution(out, into, 3), (out,)])
        into = out
    if pixels == 32:
        return [*layers, [(10, 512), (10,)]]
    return [*layers, [(4096, 512 * 49), (4096,), (4096, 4096), (4096,), (1000, 4096), (1000,)]]


def vit_large() -> Shapes:
    """Parameters of ViT-L/16 for 1,000 classes, one layer a block."""
    D, M = 1024, 4096
    block = [(D,), (D,), (3 * D, D), (3 * D,), (D, D), (D,), (D,), (D,), (M, D), (M,), (D, M), (D,)]
    return [[(D, 3, 16, 16), (D,), (1, 1, D), (1, 197, D)], *[block] * 24, [(D,), (D,), (1000, D), (1000,)]]


def mixed() -> Shapes:
    """1,000 tensors of 1 to 250,000 elements in 50 layers."""
    sizes = torch.randint(1, 500, (1000, 2), generator=torch.Generator().manual_seed(0)).tolist()
    return [[tuple(size) for size in sizes[i : i + 20]] for i in range(0, 1000, 20)]


NETWORKS: dict[str, Callable[[], Shapes]] = {
    "ResNet-18": lambda: resnet((2, 2, 2, 2), bottleneck=False),
    "ResNet-50": lambda: resnet((3, 4, 6, 3), bottleneck=True),
    "ResNet-152": lambda: resnet((3, 8, 36, 3), bottleneck=True),
    "VGG-16 at 32": lambda: vgg16(pixels=32),
    "VGG-16 at 224": lambda: vgg16(pixels=224),
    "ViT-L/16": vit_large,
    "1,000 mixed tensors": mixed,
}


@dataclass(frozen=True)
class Network:
    """Parameters in layers, and their bytes."""

    name: str
    layers: list[list[Tensor]]
    bytes: int

    @property
    def parameters(self) -> list[Tensor]:
        return [tensor for layer in self.layers for tensor in layer]


@pytest.fixture(scope="module", params=NETWORKS)
def network(request: pytest.FixtureRequest) -> Iterator[Network]:
    shapes = NETWORKS[request.param]()
    size = 4 * sum(torch.Size(shape).numel() for layer in shapes for shape in layer)
    if size > LARGEST_BYTES:
        pytest.skip(f"{size >> 20} MB of parameters are for a GPU")
    torch.manual_seed(0)
    mixes = "mixed" in request.param
    dtypes = [torch.float32, torch.bfloat16, torch.float16, torch.float64] if mixes else [torch.float32]
    layers = [
        [torch.randn(shape, device=DEVICE).to(dtypes[i % len(dtypes)]) for i, shape in enumerate(layer)]
        for layer in shapes
    ]
    yield Network(request.param, layers, sum(tensor.nbytes for layer in layers for tensor in layer))
    layers.clear()
    if DEVICE == "cuda":
        torch.cuda.empty_cache()


def time_case(
    benchmark: BenchmarkFixture,
    case: str,
    contender: str,
    moved_bytes: int,
    call: Callable[[], object],
    rounds: int = ROUNDS,
    iterations: int = ITERATIONS,
) -> None:
    measure(
        benchmark,
        call,
        suite="delta_norms",
        case=case,
        contender=contender,
        moved_bytes=moved_bytes,
        rounds=rounds,
        iterations=iterations,
    )


timed = pytest.mark.benchmark(timer=waited_for)


@timed
@pytest.mark.parametrize("persistence", [False, True], ids=["norms", "norms and persistence"])
def test_delta_norms(benchmark: BenchmarkFixture, network: Network, persistence: bool) -> None:
    table = build_table(network.layers, persistence=persistence)
    out = torch.empty(len(table), table.columns, dtype=torch.float64, device=DEVICE)
    case = f"{network.name}, persistence" if persistence else network.name
    moved_bytes = (4 if persistence else 3) * network.bytes
    time_case(benchmark, case, "learndrop", moved_bytes, lambda: ops.delta_norms(table, refresh=True, out=out))


def foreach_norms(weights: list[Tensor], anchors: list[Tensor]) -> list[list[Tensor]]:
    deltas = torch._foreach_sub(weights, anchors)
    norms = [list(torch._foreach_norm(deltas, order)) for order in (1, 2, float("inf"))]
    norms.append(list(torch._foreach_norm(weights, 2)))
    torch._foreach_copy_(anchors, weights)
    return norms


@timed
@pytest.mark.parametrize("contender", ["foreach recipe", "foreach recipe, torch.compile"])
def test_foreach_recipe(benchmark: BenchmarkFixture, network: Network, contender: str) -> None:
    """What torch offers for lists of tensors; the sums per layer are left to the reader."""
    call = foreach_norms
    if contender.endswith("torch.compile"):
        if DEVICE == "cpu" or network.name != "ResNet-50":
            pytest.skip("compiled on a GPU only, and for one network: compiling takes longer than all the rest")
        call = torch.compile(foreach_norms, dynamic=False)
    weights = network.parameters
    anchors = [tensor.clone() for tensor in weights]
    # Up to 0.1 s a call for the mixed tensors, which take a launch each.
    time_case(benchmark, network.name, contender, 3 * network.bytes, lambda: call(weights, anchors), 9, 1)


@timed
def test_loop_over_layers(benchmark: BenchmarkFixture, network: Network) -> None:
    """The same norms parameter by parameter."""
    pairs = [[(tensor, tensor.clone()) for tensor in layer] for layer in network.layers]

    def call() -> list[Tensor]:
        rows = []
        for layer in pairs:
            for weight, anchor in layer:
                delta = weight - anchor
                rows.append(torch.stack([delta.norm(1), delta.norm(2), delta.abs().max(), weight.norm(2)]))
                anchor.copy_(weight)
        return rows

    # Thousands of launches, up to 50 ms a call on a GPU.
    time_case(benchmark, network.name, "loop over parameters", 3 * network.bytes, call, rounds=5, iterations=1)


@timed
def test_foreach_norm_alone(benchmark: BenchmarkFixture, network: Network) -> None:
    """One l2 norm of each parameter: no anchor, no delta, a third of the bytes."""
    weights = network.parameters
    call = lambda: torch._foreach_norm(weights, 2)  # noqa: E731
    time_case(benchmark, network.name, "_foreach_norm alone", network.bytes, call, 9, 1)


@timed
def test_apex(benchmark: BenchmarkFixture, network: Network) -> None:
    """apex's fused l2 norm of each parameter and of all: no anchor, no delta."""
    amp_C = pytest.importorskip("amp_C")
    applier = pytest.importorskip("apex.multi_tensor_apply").multi_tensor_applier
    weights = network.parameters
    if len({tensor.dtype for tensor in weights}) > 1:
        pytest.skip("apex takes one dtype")
    flag = torch.zeros(1, dtype=torch.int32, device=DEVICE)
    call = lambda: applier(amp_C.multi_tensor_l2norm, flag, [weights], True)  # noqa: E731
    time_case(benchmark, network.name, "apex multi_tensor_l2norm", network.bytes, call)


@pytest.mark.skipif(DEVICE == "cpu", reason="on a CPU the call is the work")
@pytest.mark.parametrize("network", ["ResNet-50", "ResNet-152"], indirect=True)
def test_host_time(benchmark: BenchmarkFixture, network: Network) -> None:
    """How long the caller is held up: the check of every pointer and the launch, not waited for."""
    table = build_table(network.layers)
    out = torch.empty(len(table), table.columns, dtype=torch.float64, device=DEVICE)
    benchmark.extra_info.update(
        suite="delta_norms", case=f"{network.name}, host time", contender="learndrop", bytes=0, launches=1
    )
    call = lambda: ops.delta_norms(table, refresh=True, out=out)  # noqa: E731
    benchmark.pedantic(call, setup=torch.cuda.synchronize, rounds=200, warmup_rounds=5)
