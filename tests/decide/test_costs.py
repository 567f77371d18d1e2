from __future__ import annotations

import pytest
import torch
from torch import nn

from learndrop_ext.decide.costs import (
    CutChoice,
    LayerCost,
    choose_cut,
    fit_to_step,
    format_bytes,
    live_seconds,
    row_seconds,
    rows_in_tiers,
    smallest_row,
)
from learndrop_ext.decide.probes import StepSeconds, TierCost
from learndrop_ext.graph.chain import split_layers

# Seconds per sample of three layers, a step of 8 samples and its optimizer; layers, other and optimizer seconds per sample.
MEASURED = (
    LayerCost("a", 1, 0.1, 0.4, None, first_seconds=0.2),
    LayerCost("b", 1, 0.1, 0.4, None),
    LayerCost("c", 1, 0.1, 0.4, None, first_seconds=0.3),
)


def test_live_seconds() -> None:
    assert live_seconds(MEASURED) == pytest.approx(1.0)
    assert live_seconds(MEASURED[1:]) == pytest.approx(0.8)
    assert live_seconds(MEASURED[2:]) == pytest.approx(0.3)
    assert live_seconds([]) == 0.0


@pytest.mark.parametrize(
    ("step", "share", "other", "optimizer"),
    [
        (StepSeconds(8.8, 0.8), 1.0, 0.0, 0.1),
        (StepSeconds(12.0, 0.8, 3.2), 1.0, 0.4, 0.1),
        # One by one the layers took half or twice as long as together.
        (StepSeconds(16.8, 0.8), 2.0, 0.0, 0.1),
        (StepSeconds(4.8, 0.8), 0.5, 0.0, 0.1),
        (StepSeconds(8.0, 0.8, 3.2), 0.5, 0.4, 0.1),
        (StepSeconds(4.0, 5.0), 0.0, 0.0, 0.5),
        (StepSeconds(4.0, 0.8, 6.4), 0.0, 0.4, 0.1),
    ],
)
def test_fit_to_step(step: StepSeconds, share: float, other: float, optimizer: float) -> None:
    layers, rest, steps = fit_to_step(MEASURED, step, batch=8)
    assert (rest, steps) == (pytest.approx(other), pytest.approx(optimizer))
    assert [layer.seconds for layer in layers] == pytest.approx([0.1 * share] * 3)
    assert [layer.train_seconds for layer in layers] == pytest.approx([0.4 * share] * 3)
    assert [layer.first_live_seconds for layer in layers] == pytest.approx([0.2 * share, 0.4 * share, 0.3 * share])
    assert (live_seconds(layers) + rest + steps) * 8 == pytest.approx(step.step)


# Rows of 4096, 4096, 1024 and 256 bytes as fp16 with fp32 values of 8192, 8192, 2048 and 512: at 1e6 bytes a second a
# gather takes 12.288, 12.288, 3.072 and 0.768 ms.
LAYERS = (
    LayerCost("stem", 100, 0.010, 0.0, (8, 16, 16)),
    LayerCost("block1", 100, 0.010, 0.0, (8, 16, 16)),
    LayerCost("block2", 100, 0.010, 0.0, (8, 8, 8)),
    LayerCost("fc", 100, 0.010, 0.0, (128,)),
    LayerCost("head", 1, 0.0, 0.0, None),
)
CHEAP = (
    LayerCost("stem", 1, 0.0, 0.0, (8, 8, 8)),
    LayerCost("expand", 1, 0.001, 0.0, (64, 8, 8)),
    LayerCost("squeeze", 1, 0.001, 0.0, (8, 8, 8)),
)

HEADLESS = LayerCost("heads", 1, 0.0, 0.0, None)

# layers, prefix, kept, rows, budget, choice
CUTS = [
    (LAYERS, 0, 0, 10, 10**9, CutChoice(0, 0, "")),
    (LAYERS, 1, 0, 10, 10**9, CutChoice(1, 4096, "rows after stem")),
    (LAYERS, 3, 0, 10, 10**9, CutChoice(3, 1024, "rows after block2")),
    # Rows of one size: the later cut saves the forward pass of the layer between.
    (LAYERS, 2, 0, 10, 10**9, CutChoice(2, 4096, "rows after block1")),
    # The budget takes 10 rows of 1,024 bytes and not one byte less.
    (LAYERS, 3, 0, 10, 10_240, CutChoice(3, 1024, "rows after block2")),
    (LAYERS, 3, 0, 10, 10_239, CutChoice(0, 0, "no rows: the smallest take 10.24 kB and the budget is 10.239 kB")),
    (LAYERS, 3, 0, 10**6, 10**9, CutChoice(0, 0, "no rows: the smallest take 1.024 GB and the budget is 1 GB")),
    # 8x the bytes behind `expand` cost 21.5 ms more than its forward pass of 1 ms saves.
    (CHEAP, 2, 0, 10, 10**9, CutChoice(1, 1024, "rows after stem")),
    (CHEAP, 3, 0, 10, 10**9, CutChoice(3, 1024, "rows after squeeze")),
    # Of two that cost the same the later one: less is run again.
    ((CHEAP[0], CHEAP[0]), 2, 0, 10, 10**9, CutChoice(2, 1024, "rows after stem")),
    # Rows that are there already stay where the later ones are larger, and go where the later ones are better.
    (CHEAP, 2, 1, 10, 10**9, CutChoice(1, 1024, "rows stay after stem")),
    (CHEAP, 3, 1, 10, 10**9, CutChoice(3, 1024, "rows after squeeze")),
    (LAYERS, 3, 1, 10, 10_239, CutChoice(1, 4096, "rows stay after stem")),
    (LAYERS, 2, 2, 10, 10**9, CutChoice(2, 4096, "rows stay after block1")),
    # They may no longer fit into what is free, and are still read.
    (CHEAP[1:], 2, 1, 10, 10_240, CutChoice(2, 1024, "rows after squeeze")),
    (CHEAP, 2, 0, 10, 100, CutChoice(0, 0, "no rows: the smallest take 10.24 kB and the budget is 100 bytes")),
    # Three decimals do not tell 1,024,000,000 bytes from one less.
    (
        LAYERS,
        3,
        0,
        10**6,
        1_023_999_999,
        CutChoice(0, 0, "no rows: the smallest take 1,024,000,000 bytes and the budget is 1,023,999,999 bytes"),
    ),
    # Rows kept for a longer prefix do not count for a shorter one.
    (LAYERS, 2, 3, 10, 10**9, CutChoice(2, 4096, "rows after block1")),
    (LAYERS, 0, 3, 10, 10**9, CutChoice(0, 0, "")),
    (
        (HEADLESS,),
        1,
        0,
        10,
        10**9,
        CutChoice(0, 0, "no rows: no cut within the prefix has rows that can be kept"),
    ),
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


@pytest.mark.parametrize(
    ("count", "text"),
    [
        (0, "0 bytes"),
        (999, "999 bytes"),
        (1000, "1 kB"),
        (10_240, "10.24 kB"),
        (1_024_000_000, "1.024 GB"),
        (999_999, "999.999 kB"),
        (20_000_000, "20 MB"),
        (3_500_000_000_000, "3.5 TB"),
    ],
)
def test_format_bytes(count: int, text: str) -> None:
    assert format_bytes(count) == text


def test_format_bytes_of_few_decimals() -> None:
    assert format_bytes(8192, decimals=1) == "8.2 kB"
    assert format_bytes(100_000_000, decimals=0) == "100 MB"


@pytest.mark.parametrize(
    ("rows", "stride", "budgets", "counts"),
    [
        (10, 100, [1000], (10,)),
        (10, 100, [999, 100], (9, 1)),
        (10, 100, [99, 550, 500], (0, 5, 5)),
        (10, 100, [99, 550, 499], None),
        (10, 100, [10**6, 10**6], (10, 0)),
        (0, 100, [50], (0,)),
    ],
)
def test_rows_in_tiers(rows: int, stride: int, budgets: list[int], counts: tuple[int, ...] | None) -> None:
    assert rows_in_tiers(rows, stride, [TierCost(budget, 1.0) for budget in budgets]) == counts


# shape, rows, tiers, seconds: rows of 4096 bytes and 8192 of values, at 1e6 bytes a second on the device.
ROWS = [
    (10, [TierCost(40_960, 1e6)], 0.012288),
    (0, [TierCost(40_960, 1e6), TierCost(4096, 2e5)], 0.012288),
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
TWO = (LAYERS[0], LayerCost("block2", 100, 0.010, 0.0, (8, 8, 8)))
WIDE = (LAYERS[2], LayerCost("wide", 100, 0.010, 0.0, (8, 16, 16)))


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


def test_fit_to_step_where_no_layer_takes_time() -> None:
    layers = (LayerCost("a", 1, 0.0, 0.0, None),)
    assert fit_to_step(layers, StepSeconds(8.8, 0.8, 0.4), batch=8) == (layers, pytest.approx(1.0), pytest.approx(0.1))


@pytest.mark.parametrize(("codec", "row"), [("fp32", 4 * 64), ("fp16", 2 * 64)])  # after the third layer
def test_smallest_row(codec: str, row: int) -> None:
    model = nn.Sequential(
        nn.Conv2d(3, 8, 3, padding=1),
        nn.Conv2d(8, 4, 3, padding=1, stride=2),
        nn.Conv2d(4, 4, 3, padding=1, stride=2),
        nn.Flatten(),
        nn.Linear(64, 2),
    )
    chain = split_layers(model, torch.rand(2, 3, 16, 16))
    assert [chain.layer(i).shape for i in range(4)] == [(8, 16, 16), (4, 8, 8), (64,), (2,)]
    assert smallest_row(chain, codec) == row
