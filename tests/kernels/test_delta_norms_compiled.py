"""The Triton form of delta_norms as machine code: what its PTX holds, and what only a GPU can show."""

from __future__ import annotations

import json
import re
from typing import Any

import pytest
import torch
from compiled_kernels import printed_by

from learndrop_ext import ops
from learndrop_ext.kernels import reference
from learndrop_ext.kernels.chunks import build_table

COMPILE = """
import json, os
from triton import compile
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from learndrop_ext.kernels import delta_norms

types = {"p_chunks": "*i64", "p_starts": "*i64", "p_anchors": "*u8", "p_partials": "*fp64", "p_counters": "*i32"}
types |= {"p_out": "*fp64", "L": "i32", "row_bytes": "i64"}
found = []
for refresh, persistence, fused in ((0, 0, "1"), (1, 0, "1"), (1, 1, "1"), (1, 1, "0")):
    os.environ["TRITON_DEFAULT_FP_FUSION"] = fused
    constants = delta_norms.constants(refresh=bool(refresh), persistence=bool(persistence))
    signature = types | dict.fromkeys(constants, "constexpr")
    source = ASTSource(fn=delta_norms.delta_norms_kernel, signature=signature, constexprs=constants)
    compiled = compile(source, target=GPUTarget("cuda", 90, 32), options=delta_norms.OPTIONS)
    found.append((refresh, persistence, compiled.asm["ptx"], compiled.metadata.shared))
print(json.dumps(found))
"""


@pytest.fixture(scope="module")
def forms(made_once: Any) -> list[tuple[bool, bool, str, int]]:
    """(refresh, persistence, PTX, bytes of shared memory) of the kernel for sm_90; the last is not to fuse by default."""
    return [tuple(form) for form in json.loads(printed_by(made_once, "delta_norms", COMPILE))]


@pytest.fixture(params=[0, 1, 2], ids=["norms", "refresh", "persistence"])
def compiled(request: pytest.FixtureRequest, forms: list[tuple[bool, bool, str, int]]) -> tuple[bool, bool, str, int]:
    return forms[request.param]


def vectors(ptx: str, instruction: str) -> int:
    """How many 16-byte instructions there are: four 32-bit words or two 64-bit ones."""
    return len(re.findall(rf"\b{instruction}\.global\S*\.(?:v4\.b32|v2\.b64)", ptx))


def test_delta_norms_kernel_reads_and_writes_vectors_of_16_bytes(compiled: tuple[bool, bool, str, int]) -> None:
    refresh, persistence, ptx, _ = compiled
    # A full tile takes 4 vectors a thread in fp32 and fp64, 2 in bf16 and fp16, from each stream.
    assert vectors(ptx, "ld") == (4 + 2 + 2 + 4) * (3 if persistence else 2)
    assert vectors(ptx, "st") == (4 + 2 + 2 + 4) * refresh


def test_delta_norms_kernel_uses_no_local_memory(compiled: tuple[bool, bool, str, int]) -> None:
    assert ".local" not in compiled[2]


def test_delta_norms_kernel_keeps_subnormals(compiled: tuple[bool, bool, str, int]) -> None:
    assert ".ftz" not in compiled[2]


def test_delta_norms_kernel_does_not_depend_on_the_default_of_fp_fusion(
    forms: list[tuple[bool, bool, str, int]],
) -> None:
    assert forms[2][2] == forms[3][2]


def test_delta_norms_kernel_adds_no_floats_atomically(compiled: tuple[bool, bool, str, int]) -> None:
    atomics = re.findall(r"\b(?:atom|red)\.\S+", compiled[2])
    assert len(atomics) == 3
    assert all(name.endswith(".add.u32") or name.endswith(".add.s32") for name in atomics)


def test_delta_norms_kernel_exchanges_only_scalars_between_threads(compiled: tuple[bool, bool, str, int]) -> None:
    # The sums of a group, 8 columns of 8 bytes from each of 8 warps: a tile's rows never pass through shared memory.
    assert compiled[3] <= 8 * 8 * 8


def cuda_layers() -> list[list[torch.Tensor]]:
    sizes = [[200_000, 64, 64], [0], [3_000_001, 1000], [77]]
    dtypes = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
    return [[torch.randn(n, device="cuda").to(dtypes[i % 4]) for i, n in enumerate(layer)] for layer in sizes]


@pytest.mark.cuda
def test_delta_norms_are_one_launch() -> None:
    table = build_table(cuda_layers(), persistence=True)
    out = torch.empty(4, 8, dtype=torch.float64, device="cuda")
    ops.delta_norms(table, refresh=True, out=out)
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA], acc_events=True) as profile:
        ops.delta_norms(table, refresh=True, out=out)
        torch.cuda.synchronize()
    assert [event.name for event in profile.events() if event.device_type.name == "CUDA"] == ["delta_norms_kernel"]


@pytest.mark.cuda
def test_delta_norms_run_in_a_cuda_graph() -> None:
    layers = cuda_layers()
    table = build_table(layers, persistence=True)
    out = torch.empty(4, 8, dtype=torch.float64, device="cuda")
    ops.delta_norms(table, refresh=False, out=out)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        ops.delta_norms(table, refresh=True, out=out)
    twin = build_table([[tensor.cpu() for tensor in layer] for layer in layers], persistence=True)
    for i in range(3):
        for layer in layers:
            for tensor in layer:
                tensor += i + 1
        for entry, mine in zip(twin.entries, table.entries, strict=True):
            entry.weight.copy_(mine.weight)
        graph.replay()
        wanted = reference.delta_norms(twin, refresh=True)
        torch.testing.assert_close(out.cpu(), wanted, rtol=1e-6, atol=1e-6)
        assert table.role == twin.role


@pytest.mark.cuda
def test_delta_norms_of_more_than_2_to_the_31_elements() -> None:
    n = 2**31 + 3
    w = torch.zeros(n, dtype=torch.bfloat16, device="cuda")
    table = build_table([[w]])
    w[-1] = 3
    w[2**31 - 1] = -1
    w[0] = 2
    row = [6.0, 14.0, 3.0, 6.0, 14.0, 0.0]
    assert ops.delta_norms(table, refresh=True).tolist() == [row]
    assert ops.delta_norms(table, refresh=False).tolist() == [[0.0, 0.0, 0.0, *row[3:]]]


@pytest.mark.cuda
@pytest.mark.filterwarnings("ignore:Synchronization debug mode is a prototype:UserWarning")
def test_delta_norms_do_not_wait_for_the_device() -> None:
    table = build_table(cuda_layers())
    ops.delta_norms(table, refresh=True)
    torch.cuda.synchronize()
    try:
        torch.cuda.set_sync_debug_mode("error")
        ops.delta_norms(table, refresh=True)
    finally:
        torch.cuda.set_sync_debug_mode("default")
