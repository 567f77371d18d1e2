"""append_rows and gather_rows compared with the torch calls that do the same.

    pytest bench/bench_row_ops.py --benchmark-only          (on a GPU if there is one, else with torch's CPU threads)

The cache is many times larger than the last-level cache, and each call uses another batch of an epoch: all rows are read
before one is read again. On a GPU a round is BATCHES calls with one synchronisation at the end, so that times are the
device's and not those of a launch. "into out" writes to existing tensors, and appends read them, which take turns so that
none is in a CPU's caches. The other cases return a new tensor, whose pages the operating system must map first if it is
large, except "ActivationCache", which reuses the memory of earlier batches; what is used again may be in the caches.
"""

from __future__ import annotations

import functools
import itertools
import math
from collections.abc import Callable
from dataclasses import dataclass

import pytest
import torch
from measure import DEVICE, FAR_BYTES, measure, waited_for
from pytest_benchmark.fixture import BenchmarkFixture
from torch import Tensor

from learndrop_ext import ops
from learndrop_ext.rows.cache import ActivationCache

# The last-level cache is 36 MB on the Xeon, 50 MB on an H200.
CACHE_BYTES = (4 << 30) if DEVICE == "cuda" else max(256 << 20, FAR_BYTES)
BATCHES = 16
# Batch and row: 2 KB, 32 KB, 128 KB and 196 KB of fp16 (the last is ResNet-50's deepest cut at 224 px).
CASES = [(128, (1024,)), (128, (64, 16, 16)), (128, (64, 32, 32)), (128, (2048, 7, 7))]
if DEVICE == "cuda":
    # Moves 308 MB from fp16 to fp32, six times the L2 of an H100, and takes 0.1 ms at 3 TB/s: more than its launch.
    CASES.append((512, (2048, 7, 7)))
LARGEST = CASES[-1]
ROUNDS, ITERATIONS = (20, BATCHES) if DEVICE == "cuda" else (40, 1)
pytestmark = pytest.mark.benchmark(timer=waited_for)
CODES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


@dataclass(frozen=True)
class Data:
    """A filled cache, the same rows as a plain table, a batch of activations, and the batches' indices."""

    shape: tuple[int, ...]
    codec: str
    cache: Tensor  # [R, S] uint8
    table: Tensor  # [R, D] of the codec's type
    scale: Tensor  # [R, 1, C]: a uint8 table's
    rows: list[Tensor]  # of [B, *shape] fp32, channels last
    indices: list[Tensor]  # of [B], an epoch
    on_host: list[Tensor]

    def bytes_moved(self, dtype: torch.dtype) -> int:
        return len(self.rows[0]) * (ops.row_bytes(self.shape, self.codec) + math.prod(self.shape) * dtype.itemsize)


@functools.lru_cache(maxsize=1)
def data(B: int, shape: tuple[int, ...], codec: str) -> Data:
    torch.manual_seed(0)
    D = math.prod(shape)
    S = ops.row_stride(shape, codec)
    R = max(2 * B, CACHE_BYTES // S // B * B)
    rows = torch.randn(B, *shape, device=DEVICE).relu()
    if len(shape) == 3:
        rows = rows.contiguous(memory_format=torch.channels_last)
    cache = torch.zeros(R, S, dtype=torch.uint8, device=DEVICE)
    for first in range(0, R, B):
        ops.append_rows(cache, rows, torch.arange(first, first + B), codec=codec)
    table = torch.ones(R, D, dtype=CODES.get(codec, torch.uint8), device=DEVICE)
    on_host = list(torch.randperm(R).split(B))
    scale = torch.ones(R, 1, shape[0] if len(shape) == 3 else 1, device=DEVICE)
    indices = [index.to(DEVICE) for index in on_host]
    return Data(shape, codec, cache, table, scale, in_turn(rows), indices, on_host)


def in_turn(tensor: Tensor) -> list[Tensor]:
    """The tensor and copies of it, of FAR_BYTES together."""
    return [tensor, *(tensor.clone() for _ in range(FAR_BYTES // tensor.nbytes))]


def decoded(table: Tensor, index: Tensor, dtype: torch.dtype) -> Tensor:
    return table.index_select(0, index).to(dtype)


def dequantized(table: Tensor, scale: Tensor, index: Tensor) -> Tensor:
    steps = table.index_select(0, index).view(len(index), -1, scale.shape[2]).float()
    return steps.mul_(scale.index_select(0, index)).add_(scale.index_select(0, index))


def compiled(call: Callable[..., Tensor], case: tuple[int, tuple[int, ...]]) -> Callable[..., Tensor]:
    if DEVICE == "cpu" or case != LARGEST:
        pytest.skip("compiled on a GPU only, and for the largest case")
    fused: Callable[..., Tensor] = torch.compile(call, dynamic=False)
    return fused


def fbgemm_rows() -> Callable[[Tensor, Tensor], Tensor]:
    """FBGEMM's gather of rows, where it is installed."""
    pytest.importorskip("fbgemm_gpu")
    if DEVICE == "cpu":
        pytest.skip("FBGEMM's gather is for a GPU")
    rows: Callable[[Tensor, Tensor], Tensor] = torch.ops.fbgemm.index_select_dim0
    return rows


#: Counts calls of all cases, so that none begins with what the one before has left in a cache.
CALLS = itertools.count()


def time_case(
    benchmark: BenchmarkFixture,
    call: Callable[[int], object],
    case: str,
    contender: str,
    moved_bytes: int,
    again_bytes: int = FAR_BYTES,
) -> None:
    """Time call(i), i counting the calls."""
    suite = "append_rows" if case.startswith("append") else "gather_rows"
    measure(
        benchmark,
        lambda: call(next(CALLS)),
        suite=suite,
        case=case,
        contender=contender,
        moved_bytes=moved_bytes,
        rounds=ROUNDS,
        iterations=ITERATIONS,
        warmup_rounds=8 if DEVICE == "cpu" else 1,
        again_bytes=again_bytes,
    )


def at(values: list[Tensor], i: int) -> Tensor:
    return values[i % len(values)]


def name(verb: str, B: int, shape: tuple[int, ...], types: str) -> str:
    return f"{verb} {B} x {'x'.join(map(str, shape))} {types}"


@pytest.mark.parametrize("contender", ["learndrop", "index_select + to", "torch.compile", "FBGEMM + to"])
@pytest.mark.parametrize("into_out", [False, True], ids=["new", "into_out"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=["fp32", "fp16"])
@pytest.mark.parametrize(("B", "shape"), CASES, ids=str)
def test_gather_fp16(
    benchmark: BenchmarkFixture, B: int, shape: tuple[int, ...], dtype: torch.dtype, into_out: bool, contender: str
) -> None:
    fused = compiled(decoded, (B, shape)) if contender == "torch.compile" else decoded
    fbgemm = fbgemm_rows() if contender.startswith("FBGEMM") else None
    if into_out and contender in ("torch.compile", "FBGEMM + to"):
        pytest.skip("returns a new tensor")
    d = data(B, shape, "fp16")
    flats = in_turn(torch.empty(B, math.prod(shape), dtype=dtype, device=DEVICE)) if into_out else []
    picked = torch.empty(B, math.prod(shape), dtype=torch.float16, device=DEVICE)
    shaped = torch.empty(B, *shape, dtype=dtype, device=DEVICE)
    outs = in_turn(shaped.to(memory_format=torch.channels_last) if len(shape) == 3 else shaped) if into_out else []

    def ours(i: int) -> object:
        if into_out:
            return ops.gather_known_rows(d.cache, at(d.on_host, i), shape, at(outs, i), codec="fp16")
        return ops.gather_rows(d.cache, at(d.on_host, i), shape, dtype=dtype)

    def theirs(i: int) -> object:
        if not into_out:
            return d.table.index_select(0, at(d.indices, i)).to(dtype)
        if dtype == torch.float16:
            return torch.index_select(d.table, 0, at(d.indices, i), out=at(flats, i))
        return at(flats, i).copy_(torch.index_select(d.table, 0, at(d.indices, i), out=picked))

    calls: dict[str, Callable[[int], object]] = {
        "learndrop": ours,
        "index_select + to": theirs,
        "torch.compile": lambda i: fused(d.table, at(d.indices, i), dtype),
        "FBGEMM + to": lambda i: fbgemm(d.table, at(d.indices, i)).to(dtype),
    }
    types = f"fp16 to {str(dtype).removeprefix('torch.')}{', into out' if into_out else ''}"
    again_bytes = FAR_BYTES if into_out else 0
    time_case(
        benchmark, calls[contender], name("gather", B, shape, types), contender, d.bytes_moved(dtype), again_bytes
    )


@pytest.mark.parametrize("contender", ["learndrop", "index_select + to"])
@pytest.mark.parametrize(("B", "shape"), CASES, ids=str)
def test_gather_of_a_training_step(benchmark: BenchmarkFixture, B: int, shape: tuple[int, ...], contender: str) -> None:
    """What the loader calls, while the previous batch is still held by the loop's variable."""
    d = data(B, shape, "fp16")
    cache = ActivationCache(len(d.table), shape, codec="fp16", device=torch.device(DEVICE))
    for slots in torch.arange(len(d.table)).split(B):
        cache.append(slots, d.rows[0])
    held: list[Tensor] = []

    def ours(i: int) -> object:
        held[:] = [cache.gather(at(d.on_host, i))]
        return held

    def theirs(i: int) -> object:
        held[:] = [d.table.index_select(0, at(d.indices, i)).to(torch.float32)]
        return held

    call = ours if contender == "learndrop" else theirs
    case = name("gather", B, shape, "fp16 to float32, ActivationCache")
    time_case(benchmark, call, case, contender, d.bytes_moved(torch.float32), again_bytes=0)


@pytest.mark.parametrize("contender", ["learndrop", "index_select + to + mul + add", "torch.compile"])
@pytest.mark.parametrize(("B", "shape"), CASES[1:], ids=str)
def test_gather_uint8(benchmark: BenchmarkFixture, B: int, shape: tuple[int, ...], contender: str) -> None:
    scaled = compiled(dequantized, (B, shape)) if contender == "torch.compile" else dequantized
    d = data(B, shape, "uint8")

    def ours(i: int) -> object:
        return ops.gather_rows(d.cache, at(d.on_host, i), shape, codec="uint8")

    call = ours if contender == "learndrop" else lambda i: scaled(d.table, d.scale, at(d.indices, i))
    case = name("gather", B, shape, "uint8 to float32")
    time_case(benchmark, call, case, contender, d.bytes_moved(torch.float32), again_bytes=0)


@pytest.mark.parametrize("contender", ["learndrop", "index_copy_ of to"])
@pytest.mark.parametrize("layout", ["channels_last", "contiguous"])
@pytest.mark.parametrize(("B", "shape"), CASES, ids=str)
def test_append_fp16(benchmark: BenchmarkFixture, B: int, shape: tuple[int, ...], layout: str, contender: str) -> None:
    if layout == "contiguous" and len(shape) != 3:
        pytest.skip("has one layout")
    d = data(B, shape, "fp16")
    rows = d.rows if layout == "channels_last" else [rows.contiguous() for rows in d.rows]

    def ours(i: int) -> object:
        return ops.append_rows(d.cache, at(rows, i), at(d.on_host, i))

    def theirs(i: int) -> object:
        flat = at(rows, i).permute(0, 2, 3, 1) if len(shape) == 3 else at(rows, i)
        return d.table.index_copy_(0, at(d.indices, i), flat.to(torch.float16).reshape(B, -1))

    call = ours if contender == "learndrop" else theirs
    case = name("append", B, shape, f"float32 to fp16, {layout}")
    time_case(benchmark, call, case, contender, d.bytes_moved(torch.float32))


@pytest.mark.parametrize(("B", "shape"), CASES[1:], ids=str)
def test_append_uint8(benchmark: BenchmarkFixture, B: int, shape: tuple[int, ...]) -> None:
    d = data(B, shape, "uint8")
    case = name("append", B, shape, "float32 to uint8")
    call = lambda i: ops.append_rows(d.cache, at(d.rows, i), at(d.on_host, i), codec="uint8")  # noqa: E731
    time_case(benchmark, call, case, "learndrop", d.bytes_moved(torch.float32))
