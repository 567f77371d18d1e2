"""The Triton form of filter_norms as machine code: what its PTX holds, and what only a GPU can show."""

from __future__ import annotations

import re
from typing import Any

import pytest
import torch
from compiled_kernels import printed_by

from learndrop_ext.kernels.filter_table import build_filter_table

COMPILE = """
from triton import compile
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from learndrop_ext.kernels import filter_norms

types = {"p_segments": "*i64", "p_starts": "*i64", "p_maxima": "*i64", "p_counters": "*i32", "p_share": "*fp64"}
types |= {"p_out": "*fp64", "F": "i32", "TILE": "constexpr"}
source = ASTSource(fn=filter_norms.filter_norms_kernel, signature=types, constexprs={"TILE": filter_norms.TILE})
print(compile(source, target=GPUTarget("cuda", 90, 32), options=filter_norms.OPTIONS).asm["ptx"])
"""


@pytest.fixture(scope="module")
def ptx(made_once: Any) -> str:
    return printed_by(made_once, "filter_norms", COMPILE)


def test_filter_norms_kernel_uses_no_local_memory_and_keeps_subnormals(ptx: str) -> None:
    assert ".local" not in ptx
    assert ".ftz" not in ptx


def test_filter_norms_kernel_adds_no_floats_atomically(ptx: str) -> None:
    """Counters are added to, and the maxima are integers: neither depends on the order."""
    atomics = re.findall(r"\b(?:atom|red)\.\S+", ptx)
    assert sorted(name.split(".", 4)[-1] for name in atomics) == ["add.u32", "add.u32", "max.s64"]


def test_filter_norms_kernel_waits_in_a_loop_that_reads_with_acquire(ptx: str) -> None:
    """What it reads after the wait is what the programs it waited for wrote before they counted themselves."""
    before, read, after = ptx.partition("ld.global.gpu.acquire.b32")
    assert read
    label = re.findall(r"^(\$L__BB\w+):", before, re.MULTILINE)[-1]
    back = re.search(r"\bbra\s+(\$L__BB\w+);", after)
    assert back is not None
    assert back[1] == label
    assert len(re.findall(r"atom\.global\.gpu\.acq_rel\.add\.u32", ptx)) == 2


@pytest.mark.cuda
def test_filter_norms_are_one_launch() -> None:
    from learndrop_ext.kernels import filter_norms

    table = build_filter_table([torch.randn(300, 500, device="cuda"), torch.randn(64, 3, 3, 3, device="cuda").half()])
    filter_norms.filter_norms(table, share=0.1)
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA], acc_events=True) as profile:
        filter_norms.filter_norms(table, share=0.1)
        torch.cuda.synchronize()
    names = [event.name for event in profile.events() if event.device_type.name == "CUDA"]
    assert [name for name in names if "filter_norms" in name] == ["filter_norms_kernel"]
    assert len(names) <= 2  # the share is written to the device
