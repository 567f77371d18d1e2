"""Every refusal of the row ops: what was wanted, what came, and nothing written."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from typing import Any

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from learndrop_ext import _C, backend_info, ops
from learndrop_ext.ops import rows as rows_module

SHAPE = (3, 4, 4)


def cache_of(R: int = 5, S: int = 128) -> torch.Tensor:
    return torch.full((R, S), 0xAB, dtype=torch.uint8)


def int64(*values: int) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.int64)


# What is changed in a good call, the error, its message.
BOTH: list[tuple[dict[str, Any], type[Exception], str]] = [
    ({"codec": "fp8"}, ValueError, "codec must be one of fp32, bf16, fp16, uint8, got 'fp8'"),
    ({"cache": cache_of().float()}, TypeError, "cache must be uint8, got torch.float32"),
    ({"cache": cache_of()[0]}, ValueError, "cache must be contiguous [R, S], got [128] with strides (1,)"),
    ({"cache": cache_of()[::2]}, ValueError, "cache must be contiguous [R, S], got [3, 128] with strides (256, 1)"),
    (
        {"cache": cache_of(S=128), "codec": "fp32"},
        ValueError,
        "S must be 256 or a larger multiple of 128 for fp32 rows of shape (3, 4, 4), got 128",
    ),
    (
        {"cache": cache_of(S=136)},
        ValueError,
        "S must be 128 or a larger multiple of 128 for fp16 rows of shape (3, 4, 4), got 136",
    ),
    ({"cache": cache_of(6).flatten()[1:641].view(5, 128)}, ValueError, "cache must lie at a multiple of 16 bytes"),
    ({"index": int64(1, 2).int()}, TypeError, "index must be int64, got torch.int32"),
    ({"index": int64(1, 2)[None]}, ValueError, "index must be [B], got [1, 2]"),
    ({"index": int64(1, 5)}, IndexError, "index must be in [0, 5), got 5 at position 1"),
    ({"index": int64(-1, 2)}, IndexError, "index must be in [0, 5), got -1 at position 0"),
    ({"index": int64(1, 2).to("meta")}, ValueError, "index must be on the CPU or cpu, got meta"),
]


APPEND: list[tuple[dict[str, Any], type[Exception], str]] = [
    (
        {"rows": torch.ones(2, *SHAPE).double()},
        TypeError,
        "rows must be float32, bfloat16 or float16, got torch.float64",
    ),
    ({"rows": torch.tensor(1.0)}, ValueError, "rows must be [B, *shape], got []"),
    ({"rows": torch.ones(2, *SHAPE, device="meta")}, ValueError, "rows must be on the cache's device cpu, got meta"),
    ({"rows": torch.ones(2, 0, 4, 4)}, ValueError, "a row must have 1 to 2147483647 values, got shape (0, 4, 4)"),
    ({"rows": torch.ones(3, *SHAPE)}, ValueError, "index must be [3], one for each row, got [2]"),
    ({"index": int64(4, 4)}, ValueError, "index must name no row twice, got 4 twice"),
    ({"rows": torch.ones(3, *SHAPE), "index": int64(3, 0, 3)}, ValueError, "index must name no row twice, got 3 twice"),
    (
        {"cache": torch.ones(5, 128, dtype=torch.uint8, device="meta"), "rows": torch.ones(2, *SHAPE, device="meta")},
        ValueError,
        "cache must be on the CPU or a CUDA device, got meta",
    ),
]
GATHER: list[tuple[dict[str, Any], type[Exception], str]] = [
    ({"dtype": torch.float64}, TypeError, "dtype must be float32, bfloat16 or float16, got torch.float64"),
    ({"shape": (3, -4, 4)}, ValueError, "a row must have 1 to 2147483647 values, got shape (3, -4, 4)"),
    ({"shape": (2**16, 2**15)}, ValueError, "a row must have 1 to 2147483647 values, got shape (65536, 32768)"),
    (
        {"cache": torch.ones(5, 128, dtype=torch.uint8, device="meta")},
        ValueError,
        "cache must be on the CPU or a CUDA device, got meta",
    ),
]


@pytest.mark.parametrize(("change", "error", "message"), BOTH + APPEND)
def test_append_rows_refuses(change: dict[str, Any], error: type[Exception], message: str) -> None:
    call = {"cache": cache_of(), "rows": torch.ones(2, *SHAPE), "index": int64(1, 2), "codec": "fp16"} | change
    with pytest.raises(error, match=re.escape(f"append_rows: {message}")):
        ops.append_rows(**call)
    if not call["cache"].is_meta:
        assert bool((call["cache"] == 0xAB).all())


@pytest.mark.parametrize(("change", "error", "message"), BOTH + GATHER)
def test_gather_rows_refuses(change: dict[str, Any], error: type[Exception], message: str) -> None:
    call = {"cache": cache_of(), "index": int64(1, 2), "shape": SHAPE, "codec": "fp16"} | change
    with pytest.raises(error, match=re.escape(f"gather_rows: {message}")):
        ops.gather_rows(**call)


def test_row_bytes_refuses_a_codec() -> None:
    with pytest.raises(ValueError, match="row_bytes: codec must be one of fp32, bf16, fp16, uint8, got 'int4'"):
        ops.row_bytes(SHAPE, "int4")


def test_row_ops_refuse_cuda_in_a_build_without_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rows_module, "CUDA_COMPILED", False)
    wanted = "cache is on cuda:0, but learndrop_ext was built without CUDA: .* build it again with LEARNDROP_CUDA=1"
    with FakeTensorMode(allow_non_fake_inputs=True):
        cache = torch.empty(5, 128, dtype=torch.uint8, device="cuda:0")
        with pytest.raises(RuntimeError, match=f"gather_rows: {wanted}"):
            ops.gather_rows(cache, int64(1), SHAPE)


@pytest.mark.parametrize("name", ["sse9", ""])
def test_select_simd_refuses(name: str) -> None:
    with pytest.raises(ValueError, match=rf"LEARNDROP_SIMD must be one of what this CPU has \(.*\), got '{name}'"):
        _C.select_simd(name)


LOAD = """
import importlib.util
spec = importlib.util.spec_from_file_location("learndrop_ext._C", {path!r})
module = importlib.util.module_from_spec(spec)
spec.loader.exec_module(module)
print(module.build_info()["cpu_simd"])
"""


@pytest.mark.parametrize(("name", "said"), [("portable", "portable\n"), ("mmx", "got 'mmx'")])
def test_build_info_follows_the_environment(name: str, said: str) -> None:
    environment = {**os.environ, "LEARNDROP_SIMD": name}
    program = LOAD.format(path=_C.__file__)
    done = subprocess.run([sys.executable, "-c", program], env=environment, capture_output=True, text=True, check=False)
    assert said in done.stdout + done.stderr
    assert (done.returncode == 0) == (name == "portable")


def test_backend_info() -> None:
    info = backend_info()
    assert info.torch == torch.__version__
    assert info.threads == torch.get_num_threads()
    assert info.cuda_compiled == bool(info.cuda_architectures) == (info.cuda_runtime is not None)
    assert info.cpu_simd in ("portable", "avx2", "avx512")
    assert len(info.gpus) == torch.cuda.device_count() or not info.cuda_compiled
