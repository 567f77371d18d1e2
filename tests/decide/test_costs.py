from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import nn

from learndrop_ext.decide.costs import (
    CutChoice,
    Estimate,
    LayerCost,
    TierCost,
    choose_cut,
    estimate,
    forward_flops,
    measure_layers,
    row_seconds,
)
from learndrop_ext.decide.probes import copy_bytes_per_second, disk_bytes_per_second
from learndrop_ext.graph.chain import split_layers
from learndrop_ext.ops import free_bytes

CPU = torch.device("cpu")


def network() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(3, 8, 3, padding=1),
        nn.BatchNorm2d(8),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Conv2d(8, 16, 3, stride=2, padding=1, bias=False),
        nn.Flatten(),
        nn.Linear(256, 10),
    )


def test_measure_layers_counts_flops_of_one_sample() -> None:
    chain = split_layers(network(), torch.rand(2, 3, 16, 16))
    costs = measure_layers(chain, torch.rand(4, 3, 16, 16))
    # Two for each multiplication with its addition: outputs x weights of one output.
    assert [cost.flops for cost in costs] == [
        2 * (8 * 16 * 16) * (3 * 3 * 3),
        2 * (16 * 4 * 4) * (8 * 3 * 3),
        2 * 10 * 256,
    ]
    assert [cost.name for cost in costs] == ["0", "4", "6"]
    assert [cost.shape for cost in costs] == [(8, 8, 8), (256,), (10,)]
    assert all(cost.seconds > 0 for cost in costs)
    assert forward_flops(costs) == 110_592 + 36_864 + 5_120
    assert forward_flops(costs[1:]) == 41_984
    assert forward_flops([]) == 0


@pytest.mark.parametrize("training", [True, False])
def test_measure_layers_leaves_flags_and_buffers(training: bool) -> None:
    model = network().train(training)
    chain = split_layers(model, torch.rand(2, 3, 16, 16))
    before = {key: value.clone() for key, value in model.state_dict().items()}
    flags = [m.training for m in chain.modules()]
    measure_layers(chain, torch.rand(2, 3, 16, 16), repeats=1)
    assert [m.training for m in chain.modules()] == flags
    assert all(m.training is training for m in model.modules())
    torch.testing.assert_close(dict(model.state_dict()), before, rtol=0, atol=0)


def test_measure_layers_leaves_flags_after_an_error() -> None:
    model = network()
    chain = split_layers(model, torch.rand(2, 3, 16, 16))
    with pytest.raises(RuntimeError):
        measure_layers(chain, torch.rand(2, 4, 16, 16))
    assert all(m.training for m in model.modules())


def test_free_bytes_of_the_host() -> None:
    assert 1 << 20 < free_bytes(CPU) < 1 << 50


def test_copy_bytes_per_second() -> None:
    assert 1e8 < copy_bytes_per_second(CPU, size=1 << 22) < 1e13


# Rows of 4096, 4096, 1024 and 256 bytes as fp16 with fp32 values of 8192, 8192, 2048 and 512: at 1e6 bytes a second a
# gather takes 12.288, 12.288, 3.072 and 0.768 ms.
LAYERS = (
    LayerCost("stem", 100, 0.010, (8, 16, 16)),
    LayerCost("block1", 100, 0.010, (8, 16, 16)),
    LayerCost("block2", 100, 0.010, (8, 8, 8)),
    LayerCost("fc", 100, 0.010, (128,)),
    LayerCost("head", 1, 0.0, None),
)
CHEAP = (
    LayerCost("stem", 1, 0.0, (8, 8, 8)),
    LayerCost("expand", 1, 0.001, (64, 8, 8)),
    LayerCost("squeeze", 1, 0.001, (8, 8, 8)),
)

# layers, prefix, kept, rows, budget, choice
CUTS = [
    (LAYERS, 0, 0, 10, 10**9, CutChoice(0, 0, "")),
    (LAYERS, 1, 0, 10, 10**9, CutChoice(1, 4096, "rows after stem")),
    (LAYERS, 3, 0, 10, 10**9, CutChoice(3, 1024, "rows after block2")),
    # Rows of one size: the later cut saves the forward pass of the layer between.
    (LAYERS, 2, 0, 10, 10**9, CutChoice(2, 4096, "rows after block1")),
    # The budget takes 10 rows of 1,024 bytes and not one byte less.
    (LAYERS, 3, 0, 10, 10_240, CutChoice(3, 1024, "rows after block2")),
    (LAYERS, 3, 0, 10, 10_239, CutChoice(0, 0, "no rows: the smallest take 0 MB and the budget is 0 MB")),
    (LAYERS, 3, 0, 10**6, 10**9, CutChoice(0, 0, "no rows: the smallest take 1,024 MB and the budget is 1,000 MB")),
    # 8x the bytes behind `expand` cost 21.5 ms more than its forward pass of 1 ms saves.
    (CHEAP, 2, 0, 10, 10**9, CutChoice(1, 1024, "rows after stem")),
    (CHEAP, 3, 0, 10, 10**9, CutChoice(3, 1024, "rows after squeeze")),
    # Of two that cost the same the later one: less is run again.
    ((CHEAP[0], CHEAP[0]), 2, 0, 10, 10**9, CutChoice(2, 1024, "rows after stem")),
    # Rows that are there already stay where the later ones are larger, and go where the later ones are better.
    (CHEAP, 2, 1, 10, 10**9, CutChoice(1, 0, "rows stay after stem")),
    (CHEAP, 3, 1, 10, 10**9, CutChoice(3, 1024, "rows after squeeze")),
    (LAYERS, 3, 1, 10, 10_239, CutChoice(1, 0, "rows stay after stem")),
    # A layer without one tensor leaving it cannot be cached; the rows before it can.
    (LAYERS, 5, 0, 10, 10**9, CutChoice(4, 256, "rows after fc")),
]


@pytest.mark.parametrize(("layers", "prefix", "kept", "rows", "budget", "wanted"), CUTS)
def test_choose_cut(
    layers: tuple[LayerCost, ...], prefix: int, kept: int, rows: int, budget: int, wanted: CutChoice
) -> None:
    tiers = [TierCost(budget, 1e6)]
    choice = choose_cut(layers, prefix, kept=kept, rows=rows, codec="fp16", tiers=tiers)
    assert choice == wanted


def test_choose_cut_counts_the_bytes_of_the_codec() -> None:
    rows = {
        codec: choose_cut(LAYERS, 3, kept=0, rows=1, codec=codec, tiers=[TierCost(10**9, 1e6)]).row_bytes
        for codec in ("fp32", "fp16", "bf16", "uint8")
    }
    # uint8: 512 values and 8 bytes a channel, rounded up to a multiple of 128.
    assert rows == {"fp32": 2048, "fp16": 1024, "bf16": 1024, "uint8": 640}


# Forward seconds 1, 2, 3, 4: training the whole takes 3 x 10 = 30 units.
FOUR = tuple(LayerCost(str(i), 1, float(i), (1,)) for i in (1, 2, 3, 4))

# before, after, epoch seconds, samples, rows, wanted
ESTIMATES = [
    # Rows behind the first two: 3 of 30 units a pass, 21 of 30 stay.
    ((0, 0), (2, 2), 60.0, 100, 100, Estimate(6.0, 18.0)),
    # Twice the rows (views): twice the fill, the same saving.
    ((0, 0), (2, 2), 60.0, 100, 200, Estimate(12.0, 18.0)),
    # Rows one layer earlier: layer 2 is run without gradients, 2 + 21 of 30 units stay.
    ((0, 0), (2, 1), 60.0, 100, 100, Estimate(2.0, 14.0)),
    # Frozen and no rows: 3 + 21 of 30.
    ((0, 0), (2, 0), 60.0, 100, 100, Estimate(0.0, 12.0)),
    # A second drop: 27 units now (1 frozen and cached), 12 then, layers 2 and 3 fill.
    ((1, 1), (3, 3), 54.0, 10, 10, Estimate(10.0, 30.0)),
    ((2, 2), (2, 2), 50.0, 10, 10, Estimate(0.0, 0.0)),
    ((4, 4), (4, 4), 50.0, 10, 10, Estimate(0.0, 0.0)),
    ((0, 0), (2, 2), 60.0, 0, 0, Estimate(0.0, 0.0)),
]


@pytest.mark.parametrize(("before", "after", "seconds", "samples", "rows", "wanted"), ESTIMATES)
def test_estimate(
    before: tuple[int, int], after: tuple[int, int], seconds: float, samples: int, rows: int, wanted: Estimate
) -> None:
    got = estimate(FOUR, before=before, after=after, epoch_seconds=seconds, samples=samples, rows=rows)
    assert got.fill_seconds == pytest.approx(wanted.fill_seconds)
    assert got.saved_seconds == pytest.approx(wanted.saved_seconds)


def test_estimate_takes_what_rows_cost_from_what_is_saved() -> None:
    # 64 s are 54 s of work, 27 units, and 10 s of rows; then 12 units and 5 s of rows. The fill runs 5 units for each of
    # the 10 rows and writes each in 0.5 s.
    got = estimate(FOUR, before=(1, 1), after=(3, 3), epoch_seconds=64.0, samples=10, rows=10, read_seconds=(1.0, 0.5))
    assert got.fill_seconds == pytest.approx(54 / 27 * 5 + 5)
    assert got.saved_seconds == pytest.approx(64 - 54 / 27 * 12 - 5)


# shape, rows, tiers, seconds: rows of 4096 bytes and 8192 of values, at 1e6 bytes a second on the device.
ROWS = [
    (10, [TierCost(40_960, 1e6)], 0.012288),
    (10, [TierCost(40_959, 1e6)], None),
    # One in ten comes from the host, at a fifth of the speed.
    (10, [TierCost(40_959, 1e6), TierCost(4096, 2e5)], 0.012288 + 0.1 * 4096 / 2e5),
    (
        10,
        [TierCost(0, 1e6), TierCost(20_480, 2e5), TierCost(20_480, 1e5)],
        0.012288 + 0.5 * 4096 / 2e5 + 0.5 * 4096 / 1e5,
    ),
    (10, [TierCost(0, 1e6), TierCost(20_480, 2e5), TierCost(20_479, 1e5)], None),
]


@pytest.mark.parametrize(("rows", "tiers", "wanted"), ROWS)
def test_row_seconds(rows: int, tiers: list[TierCost], wanted: float | None) -> None:
    assert row_seconds((8, 16, 16), rows, "fp16", tiers) == (None if wanted is None else pytest.approx(wanted))


# Two layers of 10 ms, rows of 4096 bytes after the first, of 1024 after the second.
TWO = (LAYERS[0], LayerCost("block2", 100, 0.010, (8, 8, 8)))
WIDE = (LAYERS[2], LayerCost("wide", 100, 0.010, (8, 16, 16)))


@pytest.mark.parametrize(
    ("layers", "tiers", "cut"),
    [
        (TWO, [TierCost(4096 * 10, 1e6)], 2),
        (TWO, [TierCost(0, 1e6), TierCost(4096 * 10, 1e6)], 2),
        # The rows after the first are on the device and take, with the second layer, 13.1 ms; those after the second, 8
        # of 10 on a slow disk, 45.1 ms.
        (WIDE, [TierCost(10_240, 1e6), TierCost(40_960, 1e5)], 1),
        (WIDE, [TierCost(10_240, 1e9), TierCost(40_960, 1e9)], 2),
    ],
)
def test_choose_cut_counts_what_the_slower_tiers_cost(
    layers: tuple[LayerCost, ...], tiers: list[TierCost], cut: int
) -> None:
    assert choose_cut(layers, 2, kept=0, rows=10, codec="fp16", tiers=tiers).cut == cut


def test_rows_that_are_there_stay_where_no_others_fit() -> None:
    assert choose_cut(LAYERS, 3, kept=1, rows=10, codec="fp16", tiers=[TierCost(0, 1e6)]).cut == 1


def test_disk_bytes_per_second(tmp_path: Path) -> None:
    assert 1e5 < disk_bytes_per_second(tmp_path, size=1 << 22) < 1e12
    assert list(tmp_path.iterdir()) == []
    with pytest.raises(OSError, match="No such file"):
        disk_bytes_per_second(tmp_path / "none")
