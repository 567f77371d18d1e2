"""append_rows and gather_rows against their plain-torch meaning, to the bit, in every instruction set of this CPU."""

from __future__ import annotations

import math
import subprocess
import sys
import threading
from collections.abc import Iterator

import pytest
import rows_reference as reference
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from learndrop_ext import _C, ops

BEST = _C.build_info()["cpu_simd"]
SETS = ("portable", "avx2", "avx512")[: ("portable", "avx2", "avx512").index(BEST) + 1]
INTEGER = {torch.float32: torch.int32, torch.bfloat16: torch.int16, torch.float16: torch.int16}
IMAGES = [(64, 8, 8), (3, 5, 7), (1, 9, 4), (70, 3, 3), (100, 4, 5), (16, 1, 1), (2, 1, 6), (1, 1, 2), (1, 3, 1)]
FLAT = [(), (1,), (17,), (256,), (2, 3), (5, 1, 2, 3)]
NAN, INF = math.nan, math.inf


@pytest.fixture(params=SETS)
def simd(request: pytest.FixtureRequest) -> Iterator[str]:
    _C.select_simd(request.param)
    yield request.param
    _C.select_simd(BEST)


def bits(x: Tensor) -> Tensor:
    """The bits of a floating-point tensor, so that NaN equals NaN and -0 differs from 0."""
    return x.contiguous().view(INTEGER[x.dtype])


def sample(B: int, shape: tuple[int, ...], dtype: torch.dtype, seed: int = 0) -> Tensor:
    """Values of many magnitudes, with a NaN, an infinity, an overflow of fp16, a constant row and subnormals."""
    g = torch.Generator().manual_seed(seed)
    x = torch.randn(B, *shape, generator=g) * torch.exp(3 * torch.randn(B, *shape, generator=g))
    rows = x.view(B, -1)
    rows[1 % B, 0] = NAN
    rows[2 % B, -1] = -INF
    rows[3 % B, rows.shape[1] // 2] = 7e4
    rows[4 % B] = 0.1
    rows[5 % B] *= 1e-41
    return x.to(dtype)


def layouts(x: Tensor) -> list[Tensor]:
    """The same values in other places: a view with gaps, and for images channels last and a transposed plane."""
    spread = torch.full((x.shape[0], 2, *x.shape[1:]), 9.0, dtype=x.dtype)
    spread[:, 1] = x
    found = [x, spread[:, 1]]
    if x.ndim == 2:
        wide = torch.full((x.shape[0], 2 * x.shape[1]), 9.0, dtype=x.dtype)
        wide[:, ::2] = x
        found.append(wide[:, ::2])
    if x.ndim == 4:
        found += [x.contiguous(memory_format=torch.channels_last), x.transpose(2, 3).contiguous().transpose(2, 3)]
        padded = torch.nn.functional.pad(x, (1, 2, 1, 1), value=9.0).contiguous(memory_format=torch.channels_last)
        found.append(padded[:, :, 1:-1, 1:-2])
    return found


def caches(R: int, shape: tuple[int, ...], codec: str) -> tuple[Tensor, Tensor]:
    cache = torch.full((R, ops.row_stride(shape, codec)), 0xAB, dtype=torch.uint8)
    return cache, cache.clone()


@pytest.mark.parametrize("codec", ops.CODECS)
@pytest.mark.parametrize("dtype", ops.DTYPES, ids=str)
def test_append_rows_and_gather_rows_equal_the_reference(simd: str, dtype: torch.dtype, codec: str) -> None:
    index = torch.tensor([8, 1, 0, 5, 4, 7])
    again = torch.tensor([5, 5, 1, 8, 7, 0, 5])
    for shape in IMAGES + FLAT:
        x = sample(len(index), shape, dtype)
        cache, expected = caches(9, shape, codec)
        reference.append_rows(expected, x, index, codec=codec)
        for rows in layouts(x):
            cache.fill_(0xAB)
            ops.append_rows(cache, rows, index, codec=codec)
            assert torch.equal(cache, expected), (shape, rows.stride())
        for out in ops.DTYPES:
            got = ops.gather_rows(cache, again, shape, codec=codec, dtype=out)
            assert got.shape == (7, *shape)
            assert got.dtype == out
            want = reference.gather_rows(cache, again, shape, codec=codec, dtype=out)
            assert torch.equal(bits(got), bits(want)), (shape, out)


@pytest.mark.parametrize(
    ("codec", "values", "stored"),
    [
        ("fp16", [65504.0, 65519.0, 7e4, INF, -1e30, -INF], [65504.0, 65504.0, 65504.0, 65504.0, -65504.0, -65504.0]),
        ("fp16", [2.0**-24, 2.0**-25, 3 * 2.0**-25, -(2.0**-24)], [2.0**-24, 0.0, 2.0**-23, -(2.0**-24)]),
        ("fp16", [1 + 2.0**-11, 1 + 3 * 2.0**-11], [1.0, 1 + 2.0**-9]),
        ("bf16", [1 + 2.0**-8, 1 + 3 * 2.0**-8, 3.4e38, INF], [1.0, 1 + 2.0**-6, INF, INF]),
        ("fp32", [1e-45, -0.0, INF], [1e-45, -0.0, INF]),
        ("uint8", [0.0, 1.0, 255.0, 2.5, 3.5, 254.4], [0.0, 1.0, 255.0, 2.0, 4.0, 254.0]),
        ("uint8", [-3.25, -3.25, -3.25], [-3.25, -3.25, -3.25]),
        ("uint8", [1e-45, 3e-45, 0.0], [0.0, 0.0, 0.0]),
    ],
)
def test_gather_rows_gives_back_what_the_codec_keeps(
    simd: str, codec: str, values: list[float], stored: list[float]
) -> None:
    cache, _ = caches(1, (len(values),), codec)
    ops.append_rows(cache, torch.tensor([values]), torch.tensor([0]), codec=codec)
    got = ops.gather_rows(cache, torch.tensor([0]), (len(values),), codec=codec)
    assert torch.equal(bits(got), bits(torch.tensor([stored])))


@pytest.mark.parametrize("codec", ["fp32", "bf16", "fp16"])
def test_gather_rows_keeps_nan(simd: str, codec: str) -> None:
    cache, _ = caches(1, (20,), codec)
    ops.append_rows(cache, torch.tensor([[1.0, NAN] * 10]), torch.tensor([0]), codec=codec)
    for dtype in ops.DTYPES:
        got = ops.gather_rows(cache, torch.tensor([0]), (20,), codec=codec, dtype=dtype)
        assert got.isnan().tolist() == [[False, True] * 10]


@pytest.mark.parametrize("bad", [NAN, INF, -INF, -3e38])
def test_append_rows_uint8_makes_the_channel_of_a_value_it_cannot_hold_nan(simd: str, bad: float) -> None:
    x = torch.ones(1, 20, 2, 3)
    x[0, 7, 1, 1] = bad
    x[0, 7, 0, 0] = 3e38
    cache, _ = caches(1, (20, 2, 3), "uint8")
    ops.append_rows(cache, x, torch.tensor([0]), codec="uint8")
    got = ops.gather_rows(cache, torch.tensor([0]), (20, 2, 3), codec="uint8")[0]
    assert got.isnan().all((1, 2)).nonzero().tolist() == [[7]]
    assert bool((got[got.isfinite()] == 1).all())


def test_append_rows_uint8_is_within_half_a_step(simd: str) -> None:
    x = torch.randn(8, 48, 9, 9, generator=torch.Generator().manual_seed(3)).relu()
    cache, _ = caches(8, (48, 9, 9), "uint8")
    ops.append_rows(cache, x, torch.arange(8), codec="uint8")
    got = ops.gather_rows(cache, torch.arange(8), (48, 9, 9), codec="uint8")
    step = (x.amax((2, 3), True) - x.amin((2, 3), True)) / 255
    assert bool(((got - x).abs() <= step * (0.5 + 1e-5)).all())


def test_every_half_and_many_floats_convert_alike_in_every_instruction_set(simd: str) -> None:
    halves = torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16).view(1, -1)
    floats = torch.randint(-(2**31), 2**31, (1, 2**18), generator=torch.Generator().manual_seed(1)).to(torch.int32)
    for x in (halves.view(torch.float16), halves.view(torch.bfloat16), floats.view(torch.float32)):
        for codec in ("fp32", "bf16", "fp16"):
            cache, expected = caches(1, tuple(x.shape[1:]), codec)
            ops.append_rows(cache, x, torch.tensor([0]), codec=codec)
            reference.append_rows(expected, x, torch.tensor([0]), codec=codec)
            assert torch.equal(cache, expected), (x.dtype, codec)


def test_append_rows_keeps_subnormals_when_torch_flushes_them(simd: str) -> None:
    x = sample(6, (33,), torch.float32)
    for codec in ops.CODECS:
        cache, expected = caches(6, (33,), codec)
        ops.append_rows(expected, x, torch.arange(6), codec=codec)
        try:
            torch.set_flush_denormal(True)
            ops.append_rows(cache, x, torch.arange(6), codec=codec)
        finally:
            torch.set_flush_denormal(False)
        assert torch.equal(cache, expected)


# 16 MB out, written past the caches; one long row cut into slices; odd sizes that leave heads and tails.
@pytest.mark.parametrize(("B", "shape"), [(40, (64, 40, 41)), (1, (3_000_001,)), (1, (63, 200, 201)), (700, (1023,))])
@pytest.mark.parametrize("codec", ops.CODECS)
def test_large_batches_equal_the_reference(B: int, shape: tuple[int, ...], codec: str) -> None:
    x = sample(B, shape, torch.float32)
    cache, expected = caches(B + 2, shape, codec)
    index = torch.randperm(B + 2, generator=torch.Generator().manual_seed(2))[:B]
    before = torch.get_num_threads()
    torch.set_num_threads(3)
    try:
        ops.append_rows(cache, x, index, codec=codec)
        reference.append_rows(expected, x, index, codec=codec)
        assert torch.equal(cache, expected)
        for dtype in (torch.float32, torch.float16):
            got = ops.gather_rows(cache, index, shape, codec=codec, dtype=dtype)
            want = reference.gather_rows(cache, index, shape, codec=codec, dtype=dtype)
            assert torch.equal(bits(got), bits(want))
    finally:
        torch.set_num_threads(before)


def test_gather_rows_into_parts_of_a_tensor() -> None:
    cache, _ = caches(4, (3, 5, 5), "fp16")
    x = sample(4, (3, 5, 5), torch.float16)
    ops.append_rows(cache, x, torch.arange(4))
    whole = torch.full((6, 3, 5, 5), 9.0).contiguous(memory_format=torch.channels_last)
    out = whole[1:5]
    ops.gather_known_rows(cache, torch.arange(4), (3, 5, 5), out, codec="fp16")
    assert torch.equal(bits(out), bits(x.clamp(-65504, 65504).float()))
    assert bool((whole[0] == 9).all() and (whole[5] == 9).all())


def test_rows_of_a_part_of_a_cache_and_strided_index() -> None:
    cache, _ = caches(10, (40,), "fp16")
    x = sample(3, (40,), torch.bfloat16)
    ops.append_rows(cache[4:8], x, torch.tensor([0, 9, 3, 9, 1, 9])[::2])
    assert bool((cache[[0, 1, 2, 3, 6, 8, 9]] == 0xAB).all())
    got = ops.gather_rows(cache, torch.tensor([4, 7, 5]), (40,), dtype=torch.bfloat16)
    assert torch.equal(got.isnan(), x.isnan())


@pytest.mark.parametrize("shape", [(4, 3, 3), (5,)])
def test_empty_batch(shape: tuple[int, ...]) -> None:
    nothing = torch.empty(0, dtype=torch.int64)
    for R in (0, 3):
        cache, untouched = caches(R, shape, "fp16")
        ops.append_rows(cache, torch.empty(0, *shape), nothing)
        assert torch.equal(cache, untouched)
        assert ops.gather_rows(cache, nothing, shape).shape == (0, *shape)


@pytest.mark.parametrize(
    ("shape", "codec", "bytes_", "stride"),
    [
        ((64, 8, 8), "fp16", 8192, 8192),
        ((3, 5, 7), "fp32", 420, 512),
        ((17,), "bf16", 34, 128),
        ((), "fp32", 4, 128),
        ((3, 5, 7), "uint8", 137, 256),
        ((64, 8, 8), "uint8", 4608, 4608),
        ((512, 1, 1), "uint8", 528, 640),
        ((1000,), "uint8", 1016, 1024),
    ],
)
def test_row_bytes_and_row_stride(shape: tuple[int, ...], codec: str, bytes_: int, stride: int) -> None:
    assert ops.row_bytes(shape, codec) == bytes_
    assert ops.row_stride(shape, codec) == stride


def test_gather_rows_from_several_threads_at_once() -> None:
    shape = (64, 32, 32)
    cache, _ = caches(32, shape, "fp16")
    x = sample(32, shape, torch.float16)
    ops.append_rows(cache, x, torch.arange(32))
    want = ops.gather_rows(cache, torch.arange(32), shape)
    wrong: list[int] = []

    def read(seed: int) -> None:
        for i in range(10):
            index = torch.randperm(32, generator=torch.Generator().manual_seed(100 * seed + i))
            if not torch.equal(bits(ops.gather_rows(cache, index, shape)), bits(want[index])):
                wrong.append(seed)

    readers = [threading.Thread(target=read, args=(seed,)) for seed in range(4)]
    for reader in readers:
        reader.start()
    for reader in readers:
        reader.join()
    assert wrong == []


FORK = """
import os, signal, torch
from learndrop_ext import ops
torch.set_num_threads(4)
D = {values}
cache = torch.zeros(64, ops.row_stride((D,), "fp16"), dtype=torch.uint8)
index = torch.arange(64)
ops.append_rows(cache, torch.ones(64, D), index)
out = torch.zeros(64, D)
ops.gather_known_rows(cache, index, (D,), out, codec="fp16")
child = os.fork()
if child == 0:
    signal.alarm(20)
    out.numpy()[:] = 0
    ops.gather_known_rows(cache, index, (D,), out, codec="fp16")
    os._exit(0 if (out.numpy() == 1).all() else 3)
_, status = os.waitpid(child, 0)
print(os.waitstatus_to_exitcode(status))
"""


@pytest.mark.parametrize("values", [50_000, 1_000])
def test_gather_rows_in_a_forked_child(values: int) -> None:
    """As in a DataLoader's worker: the parent's threads, ours and torch's, do not exist in the child."""
    program = FORK.format(values=values)
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=60, check=True)
    assert done.stdout.split() == ["0"]


@settings(max_examples=60, deadline=None)
@given(
    steps=st.lists(st.lists(st.integers(0, 5), min_size=0, max_size=6, unique=True), max_size=6),
    shape=st.one_of(st.tuples(st.integers(1, 40)), st.tuples(st.integers(1, 20), st.integers(1, 4), st.integers(1, 4))),
    dtype=st.sampled_from(ops.DTYPES),
    codec=st.sampled_from(["fp32", "bf16", "fp16"]),
    seed=st.integers(0, 99),
)
def test_a_sequence_of_appends_reads_back_as_a_dictionary(
    steps: list[list[int]], shape: tuple[int, ...], dtype: torch.dtype, codec: str, seed: int
) -> None:
    cache, _ = caches(6, shape, codec)
    kept: dict[int, Tensor] = {}
    for i, index in enumerate(steps):
        x = torch.randn(len(index), *shape, generator=torch.Generator().manual_seed(seed + i)).to(dtype)
        ops.append_rows(cache, x, torch.tensor(index, dtype=torch.int64), codec=codec)
        kept |= {slot: row.to(reference.STORED[codec]) for slot, row in zip(index, x, strict=True)}
        got = ops.gather_rows(cache, torch.tensor(list(kept), dtype=torch.int64), shape, codec=codec, dtype=dtype)
        for row, want in zip(got, kept.values(), strict=True):
            assert torch.equal(row, want.to(dtype))
