from __future__ import annotations

import pytest
import torch
from torch import nn

from learndrop_ext.decide.costs import (
    CutChoice,
    LayerCost,
    choose_cut,
    format_bytes,
    live_seconds,
    row_seconds,
    smallest_row,
)
from learndrop_ext.forward.chain import split_layers
from learndrop_ext.rows.config import CacheConfig
from learndrop_ext.rows.plan import Budgets, TierPlan, plan_for

# Seconds per sample.
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


# Rows of 4096, 4096, 1024 and 256 bytes as fp16.
LAYERS = (
    LayerCost("stem", 100, 0.010, 0.0, (8, 16, 16)),
    LayerCost("block1", 100, 0.010, 0.0, (8, 16, 16)),
    LayerCost("block2", 100, 0.010, 0.0, (8, 8, 8)),
    LayerCost("fc", 100, 0.010, 0.0, (128,)),
    LayerCost("head", 1, 0.0, 0.0, None),
)
# Rows of 1024, 8192 and 1024 bytes.
WIDE = (
    LayerCost("stem", 1, 0.0, 0.0, (8, 8, 8)),
    LayerCost("expand", 1, 0.001, 0.0, (64, 8, 8)),
    LayerCost("squeeze", 1, 0.001, 0.0, (8, 8, 8)),
)

# layers, prefix, kept, rows, budget, choice
CUTS = [
    (LAYERS, 0, 0, 10, 10**9, CutChoice(0, 0, "")),
    (LAYERS, 1, 0, 10, 10**9, CutChoice(1, 4096, "rows after stem")),
    (LAYERS, 2, 0, 10, 10**9, CutChoice(2, 4096, "rows after block1")),
    (LAYERS, 3, 0, 10, 10**9, CutChoice(3, 1024, "rows after block2")),
    # The budget takes 10 rows of 1,024 bytes and not one byte less.
    (LAYERS, 3, 0, 10, 10_240, CutChoice(3, 1024, "rows after block2")),
    (LAYERS, 3, 0, 10, 10_239, CutChoice(0, 0, "no rows: they take 10.24 kB and the budget is 10.239 kB")),
    (LAYERS, 3, 0, 10**6, 10**9, CutChoice(0, 0, "no rows: they take 1.024 GB and the budget is 1 GB")),
    # Three decimals do not tell 1,024,000,000 bytes from one less.
    (
        LAYERS,
        3,
        0,
        10**6,
        1_023_999_999,
        CutChoice(0, 0, "no rows: they take 1,024,000,000 bytes and the budget is 1,023,999,999 bytes"),
    ),
    # Rows lie at the end of the prefix, whatever it costs; smaller ones of a shorter prefix would fit.
    (WIDE, 2, 0, 10, 10**9, CutChoice(2, 8192, "rows after expand")),
    (WIDE, 2, 0, 10, 81_919, CutChoice(0, 0, "no rows: they take 81.92 kB and the budget is 81.919 kB")),
    # Rows that are there stay where those at the end do not fit.
    (WIDE, 2, 1, 10, 10**9, CutChoice(2, 8192, "rows after expand")),
    (
        WIDE,
        2,
        1,
        10,
        81_919,
        CutChoice(1, 1024, "rows stay after stem (no rows: they take 81.92 kB and the budget is 81.919 kB)"),
    ),
    # They may no longer fit into what is free, and are still read.
    (LAYERS, 2, 2, 10, 10**9, CutChoice(2, 4096, "rows after block1")),
    (LAYERS, 2, 2, 10, 0, CutChoice(2, 4096, "rows after block1")),
    # Rows kept for a longer prefix do not count for a shorter one.
    (LAYERS, 2, 3, 10, 10**9, CutChoice(2, 4096, "rows after block1")),
    (LAYERS, 2, 3, 10, 0, CutChoice(0, 0, "no rows: they take 40.96 kB and the budget is 0 bytes")),
    (LAYERS, 0, 3, 10, 10**9, CutChoice(0, 0, "")),
]


@pytest.mark.parametrize(("layers", "prefix", "kept", "rows", "budget", "wanted"), CUTS)
def test_choose_cut(
    layers: tuple[LayerCost, ...], prefix: int, kept: int, rows: int, budget: int, wanted: CutChoice
) -> None:
    choice = choose_cut(layers, prefix, kept=kept, rows=rows, codec="fp16", budgets=Budgets(budget))
    assert choice == wanted
    # Existing rows that free memory does not hold are taken to be on the device.
    assert choice.plan == (TierPlan(rows) if choice.cut else None)


def test_choose_cut_counts_the_bytes_of_the_codec() -> None:
    rows = {
        codec: choose_cut(LAYERS, 3, kept=0, rows=1, codec=codec, budgets=Budgets(10**9)).row_bytes
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
    ("plan", "wanted"),
    # A row of 4096 bytes and 8192 of values, at 1e6 bytes a second on the device, 2e5 on the host and 1e5 on disk.
    [
        (TierPlan(10), 0.012288),
        (TierPlan(9, 1), 0.012288 + 0.1 * 4096 / 2e5),
        (TierPlan(0, 5, 5, staging=10), 0.012288 + 0.5 * 4096 / 2e5 + 0.5 * 4096 / 1e5),
        (TierPlan(0), 0.012288),
    ],
)
def test_row_seconds(plan: TierPlan, wanted: float) -> None:
    assert row_seconds((8, 16, 16), "fp16", plan, (1e6, 2e5, 1e5)) == pytest.approx(wanted)


@pytest.mark.parametrize(
    ("budgets", "cut"),
    [
        ((40_960,), 2),
        ((0, 40_960), 2),
        ((0, 20_480, 20_480), 2),
        ((20_480, 20_479), 0),
        ((0, 0), 0),
        ((20_480, 0, 20_480), 0),  # rows from a file are read ahead into memory on the device
        ((20_480, 0, 40_960), 2),
    ],
)
def test_choose_cut_spreads_rows_over_the_tiers(budgets: tuple[int, ...], cut: int) -> None:
    choice = choose_cut(LAYERS, 2, kept=0, rows=10, codec="fp16", budgets=Budgets(*budgets))
    assert choice.cut == cut
    assert choice.plan == plan_for((8, 16, 16), "fp16", 10, Budgets(*budgets))


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
    assert [layer.shape for layer in chain] == [(8, 16, 16), (4, 8, 8), (64,), None]
    assert smallest_row(chain, CacheConfig(codec)) == row
