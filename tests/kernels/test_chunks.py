"""build_table: what a chunk table holds, what it follows, and what it refuses."""

from __future__ import annotations

import re

import pytest
import torch
from torch import Tensor, nn

from learndrop_ext.kernels.chunks import DeltaTable, build_table, is_dense


def test_build_table_cuts_parameters_into_chunks() -> None:
    w = torch.zeros(8192 * 2 + 5)
    half = torch.zeros(7, dtype=torch.float16)
    table = build_table([[w], [], [half, w[:0]]], persistence=True)
    at, small = w.data_ptr(), half.data_ptr()
    rows = [
        [at, 0, 8192, 0, 4],
        [at + 32768, 32768, 8192, 0, 4],
        [at + 65536, 65536, 5, 0, 4],
        [0, 0, 0, 1, 4],
        [small, 65568, 7, 2, 2 + 4],
    ]
    assert table.chunks.tolist() == rows
    assert table.starts.tolist() == [[0, 0], [3, 1], [4, 2], [5, 3]]
    assert table.anchors.shape == (2, 65568 + 16)
    assert table.partials.shape == (5 + 3, 8)
    assert table.counters.tolist() == [0] * (3 + 3 + 2)
    assert (len(table), table.columns, table.role, table.builds) == (3, 8, 0, 1)


def test_build_table_marks_addresses_that_are_no_multiple_of_16_bytes() -> None:
    w = torch.zeros(20, dtype=torch.float64)
    assert build_table([[w, w[1:]], [w[2:]]]).chunks[:, 4].tolist() == [3 + 4, 3, 3 + 4]


def test_build_table_lays_anchors_in_storage_order_at_multiples_of_16_bytes() -> None:
    conv = torch.arange(24.0).view(1, 2, 3, 4).to(memory_format=torch.channels_last)
    table = build_table([[torch.ones(1), conv]])
    assert table.anchors.view(torch.float32)[0, 4:].tolist() == conv.permute(0, 2, 3, 1).flatten().tolist()
    newest = table.anchor_values()[0, 1][0]
    assert torch.equal(newest, conv)
    assert newest.stride() == conv.stride()


def test_build_table_counts_a_shared_parameter_in_its_first_layer() -> None:
    w = torch.zeros(3)
    table = build_table([[w], [w, torch.zeros(2)], [w.detach()]])
    assert [(entry.layer, entry.weight.numel()) for entry in table.entries] == [(0, 3), (1, 2)]
    values = table.anchor_values()
    assert values[0, 0][0].data_ptr() == values[1, 0][0].data_ptr() == values[2, 0][0].data_ptr()


def moved(table: DeltaTable) -> bool:
    """refresh_pointers, with its answer checked against what stale says before and after."""
    before = table.stale()
    assert table.refresh_pointers() == before
    assert not table.stale()
    return before


def anchors(table: DeltaTable) -> list[Tensor]:
    return [value.clone() for values in table.anchor_values().values() for value in values]


def test_refresh_pointers_keep_the_anchors_of_a_parameter_that_moved() -> None:
    w, other = nn.Parameter(torch.ones(2, 3)), nn.Parameter(torch.ones(2))
    table = build_table([[w, other]], persistence=True)
    assert not moved(table)
    w.data = torch.full((2, 3), 5.0)
    assert moved(table)
    assert table.builds == 2
    assert all(bool((value == 1).all()) for value in anchors(table))
    assert table.chunks[0, 0] == w.data_ptr()


def test_refresh_pointers_keep_anchors_across_another_order_of_dimensions() -> None:
    values = torch.arange(24.0).view(1, 2, 3, 4)
    w = nn.Parameter(values.clone())
    table = build_table([[w]])
    w.data = w.data.to(memory_format=torch.channels_last)
    assert moved(table)
    assert torch.equal(anchors(table)[0], values)


@pytest.mark.parametrize("change", [torch.zeros(4), torch.zeros(3, dtype=torch.float64), torch.zeros(3, 1)])
def test_refresh_pointers_start_anew_where_shape_or_dtype_changed(change: Tensor) -> None:
    w, other = nn.Parameter(torch.ones(3)), nn.Parameter(torch.ones(2))
    table = build_table([[w, other]])
    w.data = change
    other.data = torch.full((2,), 7.0)
    assert moved(table)
    assert torch.equal(anchors(table)[0], change)
    assert torch.equal(anchors(table)[1], torch.ones(2))


def test_refresh_pointers_see_a_parameter_that_shrank_in_place() -> None:
    w = nn.Parameter(torch.ones(6))
    table = build_table([[w]])
    w.data = w.data[:4]
    assert moved(table)
    assert table.chunks[0, 2] == 4


def test_refresh_pointers_see_a_shared_parameter_that_parted() -> None:
    shared = torch.ones(3)
    one, two = nn.Parameter(shared), nn.Parameter(shared)
    table = build_table([[one], [two]])
    assert len(table.entries) == 1
    two.data = torch.full((3,), 2.0)
    assert moved(table)
    assert len(table.entries) == 2
    assert all(bool((value == 1).all()) for value in anchors(table))


def test_a_table_holds_the_memory_it_was_built_for() -> None:
    w = nn.Parameter(torch.ones(1000))
    table = build_table([[w]])
    before = w.data_ptr()
    w.data = torch.empty(0)
    # Were the memory free, the allocator would give the same address again, and the change of dtype go unseen.
    w.data = torch.ones(2000, dtype=torch.bfloat16)[:1000]
    assert w.data_ptr() != before
    assert moved(table)


@pytest.mark.parametrize(
    ("shape", "stride", "dense"),
    [
        ((2, 3), (3, 1), True),
        ((2, 3), (1, 2), True),
        ((2, 1, 3), (3, 99, 1), True),
        ((1,), (7,), True),
        ((0, 5), (9, 9), True),
        ((), (), True),
        ((2, 3), (4, 1), False),
        ((2, 3), (0, 1), False),
        ((2, 3), (1, 1), False),
        ((3,), (2,), False),
    ],
)
def test_is_dense(shape: tuple[int, ...], stride: tuple[int, ...], dense: bool) -> None:
    assert is_dense(torch.zeros(100).as_strided(shape, stride)) == dense


@pytest.mark.parametrize(
    ("second", "error", "message"),
    [
        (torch.ones(3, 4)[:, :2], ValueError, "must fill its memory without gaps or overlap, got shape (3, 2) with"),
        (torch.ones(3).expand(2, 3), ValueError, "must fill its memory without gaps or overlap, got shape (2, 3)"),
        (
            torch.ones(3, dtype=torch.int64),
            TypeError,
            "must be one of float32, bfloat16, float16, float64, got torch.int",
        ),
        (torch.ones(3, dtype=torch.complex64), TypeError, "got torch.complex64"),
        (torch.ones(3, device="meta"), ValueError, "must lie on a CPU or a CUDA device, got meta"),
        (torch.ones(3).to_sparse(), ValueError, "must be a dense tensor, got layout torch.sparse_coo"),
        (
            torch.frombuffer(bytearray(17), dtype=torch.float32, offset=1),
            ValueError,
            "must lie at a multiple of 4 bytes",
        ),
    ],
)
def test_build_table_names_the_parameter_it_refuses(second: Tensor, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=r"build_table: layers\[1\]\[0\] .*" + re.escape(message)):
        build_table([[torch.ones(2)], [second]])


def test_build_table_refuses_a_parameter_whose_memory_was_freed() -> None:
    w = torch.ones(3)
    w.untyped_storage().resize_(0)
    with pytest.raises(ValueError, match=r"layers\[0\]\[0\] must have memory, got 3 elements with none"):
        build_table([[w]])


@pytest.mark.cuda
def test_build_table_refuses_two_devices() -> None:
    with pytest.raises(ValueError, match=r"layers\[0\]\[1\] must lie on the device of the others, cpu, got cuda:0"):
        build_table([[torch.ones(2), torch.ones(2, device="cuda")]])
