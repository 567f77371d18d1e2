"""The Triton form of digests as machine code: what its PTX holds, and what only a GPU can show."""

from __future__ import annotations

import json
import re
from importlib.metadata import version
from typing import Any

import pytest
import torch
from compiled_kernels import printed_by

from learndrop_ext import ops
from learndrop_ext.ops import TensorDigests

COMPILE = """
import json
from triton import compile
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from learndrop_ext.kernels import digests

constants = digests.constants()
types = {"p_chunks": "*i64", "p_out": "*i64"} | dict.fromkeys(constants, "constexpr")
source = ASTSource(fn=digests.digests_kernel, signature=types, constexprs=constants)
compiled = compile(source, target=GPUTarget("cuda", 90, 32), options=digests.OPTIONS)
print(json.dumps({"ptx": compiled.asm["ptx"], "shared": compiled.metadata.shared}))
"""


@pytest.fixture(scope="module")
def compiled(made_once: Any) -> tuple[str, int]:
    """PTX and bytes of shared memory of the kernel for sm_90."""
    found = json.loads(printed_by(made_once, "digests", COMPILE))
    return found["ptx"], found["shared"]


def test_digests_kernel_reads_vectors_of_16_bytes(compiled: tuple[str, int]) -> None:
    # A full block takes 4 vectors a thread.
    assert len(re.findall(r"\bld\.global\S*\.(?:v4\.b32|v2\.b64)", compiled[0])) == 4


def test_digests_kernel_uses_no_local_memory(compiled: tuple[str, int]) -> None:
    assert ".local" not in compiled[0]


def test_digests_kernel_adds_once_for_a_chunk(compiled: tuple[str, int]) -> None:
    atomics = re.findall(r"\b(?:atom|red)\.\S+", compiled[0])
    assert len(atomics) == 1
    assert atomics[0].endswith((".add.u64", ".add.s64"))


def test_digests_kernel_exchanges_only_sums_between_threads(compiled: tuple[str, int]) -> None:
    # One number of 8 bytes from each of 8 warps; Triton 3.6 takes one from each of their threads.
    assert compiled[1] <= 8 * 8 * (32 if version("triton").startswith("3.6.") else 1)


def cuda_tensors() -> list[torch.Tensor]:
    sizes = [200_000, 64, 0, 3_000_001, 77]
    dtypes = (torch.float32, torch.bfloat16, torch.uint8)
    return [torch.randn(n, device="cuda").to(dtypes[i % 3]) for i, n in enumerate(sizes)]


@pytest.mark.cuda
def test_digests_are_one_launch_after_a_copy() -> None:
    digests = TensorDigests(cuda_tensors())
    digests.measure()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA], acc_events=True) as profile:
        digests.measure()
        torch.cuda.synchronize()
    names = [event.name for event in profile.events() if event.device_type.name == "CUDA"]
    assert len(names) == 2
    assert names[-1] == "digests_kernel"


@pytest.mark.cuda
def test_digests_run_in_a_cuda_graph() -> None:
    tensors = cuda_tensors()
    digests = TensorDigests(tensors)
    digests.measure()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        found = digests.measure()
    for _ in range(2):
        for tensor in tensors:
            tensor += 1
        graph.replay()
        assert torch.equal(found.cpu(), ops.digests([tensor.cpu() for tensor in tensors]))


@pytest.mark.cuda
def test_digests_of_more_than_2_to_the_31_elements() -> None:
    n = 2**31 + 5
    w = torch.zeros(n, dtype=torch.uint8, device="cuda")
    digests = TensorDigests([w])
    found = [int(digests.measure())]
    for i in (0, 2**31 - 1, 2**31, n - 1):
        w[i] = 1
        found.append(int(digests.measure()))
        w[i] = 0
    assert len(set(found)) == 5
    assert found[0] == int(digests.measure())


@pytest.mark.cuda
@pytest.mark.filterwarnings("ignore:Synchronization debug mode is a prototype:UserWarning")
def test_digests_do_not_wait_for_the_device() -> None:
    digests = TensorDigests(cuda_tensors())
    digests.measure()
    torch.cuda.synchronize()
    try:
        torch.cuda.set_sync_debug_mode("error")
        digests.measure()
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.cuda
def test_digests_on_a_gpu_are_those_of_the_cpu() -> None:
    tensors = [tensor.cpu() for tensor in cuda_tensors()]
    tensors += [tensor[1:] for tensor in tensors if len(tensor)] + [torch.tensor(3.0)]
    tensors.append(torch.randn(8, 3, 5, 5).to(memory_format=torch.channels_last))
    assert torch.equal(ops.digests([tensor.cuda() for tensor in tensors]).cpu(), ops.digests(tensors))


@pytest.mark.cuda
def test_digests_refuse_tensors_on_several_devices() -> None:
    with pytest.raises(
        ValueError, match=r"digests: tensors\[1\] must lie on the device of the others, cpu, got cuda:0"
    ):
        ops.digests([torch.ones(1), torch.ones(1, device="cuda")])
