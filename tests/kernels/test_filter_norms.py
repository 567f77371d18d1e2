"""filter_norms in its two forms (plain torch, Triton) against hand-written rows and against each other.

Without a GPU the Triton form runs under its interpreter.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor

from learndrop_ext import ops
from learndrop_ext.kernels import reference
from learndrop_ext.kernels.filter_table import build_filter_table

DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
Form = Callable[[Sequence[Tensor], float], Tensor]


def triton_form() -> Form:
    triton = pytest.importorskip("triton")
    if DEVICE == "cpu" and triton.__version__.startswith("3.6."):
        pytest.skip("the interpreter of Triton 3.6 makes loop bounds from arrays as numpy no longer allows")
    from learndrop_ext.kernels import filter_norms

    def norms(weights: Sequence[Tensor], share: float) -> Tensor:
        table = build_filter_table([weight.to(DEVICE) for weight in weights])
        found = filter_norms.filter_norms(table, share=share)
        assert not table.counters.any()
        assert not table.maxima.any()
        again = filter_norms.filter_norms(table, share=share)  # with the same table
        assert torch.equal(again.view(torch.int64), found.view(torch.int64))
        return found.cpu()

    return norms


@pytest.fixture(params=["torch", "ops", "triton"])
def form(request: pytest.FixtureRequest) -> Form:
    if request.param == "triton":
        return triton_form()
    if request.param == "ops":
        return lambda weights, share: ops.filter_norms([w.to(DEVICE) for w in weights], share=share).cpu()
    return lambda weights, share: reference.filter_norms(build_filter_table(weights), share=share)


@pytest.mark.parametrize("dtype", DTYPES)
def test_filter_norms_of_two_layers(form: Form, dtype: torch.dtype) -> None:
    first = torch.tensor([[3.0, -4.0, 0.0], [0.5, 0.0, -0.25], [0.0, 0.0, 0.0]], dtype=dtype)
    second = torch.tensor([[[[2.0]], [[-1.0]]], [[[0.0]], [[0.25]]]], dtype=dtype)
    wanted = [[7, 25, 4, 1], [0.75, 0.3125, 0.5, 3], [0, 0, 0, 3], [3, 5, 2, 0], [0.25, 0.0625, 0.25, 2]]
    # An eighth of the largest: 0.5 in the first layer, 0.25 in the second.
    assert form([first, second], 0.125).tolist() == [pytest.approx(row, rel=1e-12) for row in wanted]


def test_filter_norms_without_a_share_count_what_is_zero(form: Form) -> None:
    assert form([torch.tensor([[0.0, -0.0, 1e-30], [1.0, 0.0, 2.0]])], 0.0)[:, 3].tolist() == [2, 1]


@pytest.mark.parametrize("dtype", DTYPES)
def test_filter_norms_of_odd_shapes(form: Form, dtype: torch.dtype) -> None:
    """Filters of one weight to more than a tile, at odd addresses, in any order of dimensions, and none."""
    torch.manual_seed(0)
    shapes: list[Any] = [
        (5,),
        (1, 1),
        (7, 3),
        (3, 1024),
        (2, 1025),
        (2, 3, 5, 5),
        (0, 4),
        (3, 0),
        (4, 1, 3, 3),
        (1, 2500),
    ]
    weights = [torch.randn(shape).to(dtype) for shape in shapes]
    weights.append(torch.randn(22).to(dtype)[1:].view(7, 3))
    weights.append(torch.randn(4, 6, 3, 3).to(dtype).to(memory_format=torch.channels_last))
    rows = []
    for weight in weights:
        largest = weight.double().abs().amax() if weight.numel() else 0.0
        for row in weight.double():
            size = row.abs().flatten()
            rows.append(
                [size.sum(), size.square().sum(), size.max() if len(size) else 0.0, (size <= 0.2 * largest).sum()]
            )
    assert torch.allclose(form(weights, 0.2), torch.tensor(rows, dtype=torch.float64), rtol=1e-12, atol=0)


@pytest.mark.filterwarnings("ignore:.* encountered in:RuntimeWarning")
@pytest.mark.parametrize("dtype", DTYPES)
def test_filter_norms_do_not_hide_what_is_not_finite(form: Form, dtype: torch.dtype) -> None:
    weights = [torch.ones(2, 3, dtype=dtype), torch.zeros(2, 3, dtype=dtype), torch.zeros(1, 3, dtype=dtype)]
    weights[0][0, 1], weights[1][1, 2] = math.nan, math.inf
    rows = form(weights, 0.5)
    assert rows[0, :3].isnan().all()
    assert rows[1].tolist() == [3, pytest.approx(3), 1, 0]  # its layer has a NaN
    assert rows[2].tolist() == [0, 0, 0, 3]
    assert rows[3].tolist() == [math.inf, math.inf, math.inf, 3]  # all are at most infinity
    assert rows[4].tolist() == [0, 0, 0, 3]


@pytest.mark.parametrize("value", [2.0**-140, 2.0**100])
def test_filter_norms_neither_overflow_nor_underflow(form: Form, value: float) -> None:
    rows = form([torch.full((1, 4), value)], 0.5)
    assert rows[0].tolist() == [4 * value, pytest.approx(4 * value**2, rel=1e-12), value, 0]


def test_filter_norms_of_no_weights(form: Form) -> None:
    assert form([], 0.1).shape == (0, 4)


@pytest.mark.parametrize(
    ("weights", "error", "message"),
    [
        (
            [torch.ones(2, 2, dtype=torch.int32)],
            TypeError,
            r"build_table: weights\[0\] must be one of float32, .* got torch\.int32",
        ),
        ([torch.ones(2, 2), torch.ones(4, 3)[:, :2]], ValueError, r"build_table: weights\[1\] must fill its memory"),
        (
            [torch.ones(3, 2).t()],
            ValueError,
            r"build_filter_table: weights\[0\] must hold one filter after the other, got shape \[2, 3\]",
        ),
        ([torch.tensor(1.0)], ValueError, r"build_filter_table: weights\[0\] must hold .* got shape \[\] with"),
        ([torch.ones(2, 2).to_sparse()], ValueError, r"build_table: weights\[0\] must be a dense tensor"),
        (
            [torch.ones(2, 2, device="meta")],
            ValueError,
            r"build_table: weights\[0\] must lie on a CPU or a CUDA device",
        ),
    ],
)
def test_filter_tables_refuse(weights: list[Tensor], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        ops.filter_norms(weights, share=0.1)


@pytest.mark.parametrize("share", [-0.1, 1.1, math.nan])
def test_filter_norms_refuse_a_share_that_is_none(share: float) -> None:
    with pytest.raises(ValueError, match=r"filter_norms: share must be within 0\.\.1, got"):
        ops.filter_norms([torch.ones(2, 2)], share=share)


@pytest.mark.cuda
def test_filter_norms_of_a_large_network_on_a_gpu() -> None:
    """More programs than fit on the device at a time: those that wait must not keep out those that they wait for."""
    torch.manual_seed(0)
    weights = [
        torch.randn(shape, device="cuda") for shape in [(4096, 4096), (2048, 512, 3, 3), (50_000, 9), (3, 200_000)]
    ]
    found = ops.filter_norms(weights, share=0.3)
    wanted = reference.filter_norms(build_filter_table([weight.cpu() for weight in weights]), share=0.3)
    assert torch.allclose(found.cpu(), wanted, rtol=1e-12, atol=0)
    assert torch.equal(ops.filter_norms(weights, share=0.3), found)
