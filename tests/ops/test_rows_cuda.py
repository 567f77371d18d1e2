"""append_rows and gather_rows on a GPU: the same bits as on the CPU, on the caller's stream, in a CUDA graph."""

from __future__ import annotations

import subprocess
import sys

import pytest
import rows_reference as reference
import torch

from learndrop_ext import ops
from learndrop_ext.ops import transfer

pytestmark = pytest.mark.cuda

SHAPES = [
    (64, 8, 8),
    (3, 5, 7),
    (24, 9, 9),
    (2, 40, 40),
    (70, 3, 3),
    (256, 14, 14),
    (16, 1, 1),
    (1, 28, 28),
    (1280, 3, 3),
    (2048, 2, 3),
    (24, 16, 17),
    (7, 16, 33),
    (17,),
    (512,),
    (1000,),
    (100_352,),
    (),
]
INTEGER = {torch.float32: torch.int32, torch.bfloat16: torch.int16, torch.float16: torch.int16}


def bits(x: torch.Tensor) -> torch.Tensor:
    return x.contiguous().view(INTEGER[x.dtype])


def sample(B: int, shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
    g = torch.Generator().manual_seed(0)
    x = torch.randn(B, *shape, generator=g) * torch.exp(3 * torch.randn(B, *shape, generator=g))
    rows = x.view(B, -1)
    rows[1, 0], rows[2, -1], rows[3, rows.shape[1] // 2] = torch.nan, -torch.inf, 7e4
    rows[4] = 0.1
    rows[5] *= 1e-41
    return x.to(dtype)


@pytest.mark.parametrize("codec", ops.CODECS)
@pytest.mark.parametrize("dtype", ops.DTYPES, ids=str)
def test_row_ops_give_the_bits_of_the_cpu(dtype: torch.dtype, codec: str) -> None:
    index = torch.tensor([8, 1, 0, 5, 4, 7])
    again = torch.tensor([5, 5, 1, 8, 7, 0])
    for shape in SHAPES:
        x = sample(6, shape, dtype)
        cpu = torch.full((9, ops.row_stride(shape, codec)), 0xAB, dtype=torch.uint8)
        gpu = cpu.cuda()
        ops.append_rows(cpu, x, index, codec=codec)
        forms = [x.cuda(), x.repeat_interleave(2, 0).cuda()[::2]]
        if len(shape) == 3:
            forms += [x.cuda().contiguous(memory_format=torch.channels_last), x.cuda().transpose(2, 3).contiguous().mT]
        for rows in forms:
            gpu.fill_(0xAB)
            ops.append_rows(gpu, rows, index.cuda() if rows is forms[0] else index, codec=codec)
            assert torch.equal(gpu.cpu(), cpu), (shape, rows.stride())
        for out in ops.DTYPES:
            want = ops.gather_rows(cpu, again, shape, codec=codec, dtype=out)
            for given in (again.cuda(), again):
                got = ops.gather_rows(gpu, given, shape, codec=codec, dtype=out)
                assert torch.equal(bits(got.cpu()), bits(want)), (shape, out, given.device)


@pytest.mark.parametrize("count", [1, 895, 896, 897, 2000])
def test_an_index_of_the_host_is_read_when_the_call_returns(count: int) -> None:
    rows = torch.arange(3000, dtype=torch.float32).repeat_interleave(8).view(3000, 8)
    gpu = torch.zeros(3000, ops.row_stride((8,), "fp32"), dtype=torch.uint8, device="cuda")
    ops.append_rows(gpu, rows.cuda(), torch.arange(3000), codec="fp32")
    index = torch.randint(3000, (count,), generator=torch.Generator().manual_seed(count))
    wanted = index.clone()
    torch.cuda._sleep(20_000_000)  # the kernel starts after the index has changed
    got = ops.gather_rows(gpu, index, (8,), codec="fp32")
    index.fill_(-1)
    assert torch.equal(got.cpu(), rows[wanted])


def test_every_half_and_many_floats_convert_as_on_the_cpu() -> None:
    halves = torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16).view(1, -1)
    floats = torch.randint(-(2**31), 2**31, (1, 2**20), generator=torch.Generator().manual_seed(1)).to(torch.int32)
    for x in (halves.view(torch.float16), halves.view(torch.bfloat16), floats.view(torch.float32)):
        for codec in ("fp32", "bf16", "fp16"):
            cpu = torch.empty(1, ops.row_stride(x.shape[1:], codec), dtype=torch.uint8)
            cpu.fill_(0)
            gpu = cpu.cuda()
            reference.append_rows(cpu, x, torch.tensor([0]), codec=codec)
            ops.append_rows(gpu, x.cuda(), torch.tensor([0]), codec=codec)
            assert torch.equal(gpu.cpu(), cpu), (x.dtype, codec)


@pytest.mark.parametrize("dtype", ops.DTYPES, ids=str)
def test_gather_rows_of_uint8_gives_the_quiet_nan(dtype: torch.dtype) -> None:
    cache = torch.zeros(1, 128, dtype=torch.uint8, device="cuda")
    rows = torch.tensor([[1.0, torch.nan, 2.0, 3.0]], device="cuda")
    ops.append_rows(cache, rows, torch.tensor([0]), codec="uint8")
    got = ops.gather_rows(cache, torch.tensor([0]), (4,), codec="uint8", dtype=dtype)
    quiet = {torch.float32: 0x7FC00000, torch.bfloat16: 0x7FC0, torch.float16: 0x7E00}[dtype]
    assert bits(got.cpu()).tolist() == [[quiet] * 4]


def test_an_error_of_cuda_is_not_left_for_the_next_call() -> None:
    cache = torch.zeros(1, 128, dtype=torch.uint8, device="cuda")
    pageable = torch.zeros(4, 128, dtype=torch.uint8)
    with pytest.raises(RuntimeError, match="CUDA says"):
        transfer.pin(pageable, torch.device("cuda", 99))
    assert ops.gather_rows(cache, torch.tensor([0]), (8,)).tolist() == [[0.0] * 8]


def test_rows_beyond_four_gigabytes() -> None:
    D, R = 2**20, 2200  # fp16: 4.6 GB, more than 2^32 bytes; R * D is more than 2^31 values
    cache = torch.empty(R, ops.row_stride((D,), "fp16"), dtype=torch.uint8, device="cuda")
    rows = torch.stack([torch.full((D,), 3.0), torch.arange(D) % 2048]).cuda()
    ops.append_rows(cache, rows, torch.tensor([0, R - 1]))
    assert torch.equal(ops.gather_rows(cache, torch.tensor([R - 1, 0]), (D,)), rows.flip(0))


def test_a_batch_beyond_four_billion_values() -> None:
    D, B = 2**20, 4100
    cache = torch.empty(2, ops.row_stride((D,), "fp16"), dtype=torch.uint8, device="cuda")
    ops.append_rows(cache, torch.stack([torch.full((D,), 3.0), torch.full((D,), 5.0)]).cuda(), torch.tensor([0, 1]))
    index = torch.zeros(B, dtype=torch.int64)
    index[-1] = 1
    out = ops.gather_rows(cache, index, (D,), dtype=torch.float16)
    assert bool((out[-1] == 5).all() and (out[-2] == 3).all() and (out[0] == 3).all())


def test_row_ops_run_on_the_current_stream() -> None:
    shape = (64, 32, 32)
    cache = torch.zeros(64, ops.row_stride(shape, "fp16"), dtype=torch.uint8, device="cuda")
    rows = torch.zeros(64, *shape, device="cuda")
    index = torch.arange(64, device="cuda")
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        torch.cuda._sleep(20_000_000)
        rows.fill_(2.0)
        ops.append_rows(cache, rows, index)
        got = ops.gather_rows(cache, index, shape)
    torch.cuda.current_stream().wait_stream(stream)
    assert bool((got == 2).all())


def test_row_ops_in_a_cuda_graph() -> None:
    shape = (16, 8, 8)
    cache = torch.zeros(8, ops.row_stride(shape, "fp16"), dtype=torch.uint8, device="cuda")
    rows = torch.ones(4, *shape, device="cuda")
    index = torch.arange(4, device="cuda")
    out = torch.empty(4, *shape, device="cuda").contiguous(memory_format=torch.channels_last)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        ops.append_rows(cache, rows, index)
        ops.gather_known_rows(cache, index, shape, out, codec="fp16")
    rows.copy_(torch.randint(0, 99, rows.shape))
    index.add_(3)
    graph.replay()
    assert torch.equal(out, rows)


def test_a_cuda_graph_takes_no_index_of_the_host() -> None:
    cache = torch.zeros(8, 128, dtype=torch.uint8, device="cuda")
    out = torch.empty(4, 8, device="cuda")
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out.fill_(1)
        with pytest.raises(ValueError, match="index must be on cuda:0 while a CUDA graph is captured"):
            ops.gather_rows(cache, torch.arange(4), (8,))


def test_gather_rows_leaves_the_current_device() -> None:
    if torch.cuda.device_count() < 2:
        pytest.skip("needs two GPUs")
    cache = torch.zeros(2, 128, dtype=torch.uint8, device="cuda:1")
    with torch.cuda.device(0):
        got = ops.gather_rows(cache, torch.tensor([0, 1]), (8,))
        assert torch.cuda.current_device() == 0
    assert got.device == torch.device("cuda:1")


TRAP = """
import torch
from learndrop_ext import ops
cache = torch.zeros(4, 128, dtype=torch.uint8, device="cuda")
ops.gather_rows(cache, torch.tensor([4], device="cuda"), (8,))
torch.cuda.synchronize()
"""


def test_gather_rows_traps_on_a_bad_index_on_the_device() -> None:
    done = subprocess.run([sys.executable, "-c", TRAP], capture_output=True, text=True, check=False)
    assert done.returncode != 0
    assert "CUDA error" in done.stderr
