from __future__ import annotations

import json
import math
from typing import Any

import pytest
from four_layers import four_layers

from learndrop_ext.decide.costs import CutChoice, LayerCost
from learndrop_ext.decide.forecast import (
    DropForecast,
    RowsForecast,
    RunCosts,
    forecast,
    largest_speedup,
    one_drop,
    plan_seconds,
)
from learndrop_ext.rows.plan import TierPlan

COSTS = four_layers()
FREEZE_ONLY = four_layers(cuts=(0, 0, 0, 0), row_seconds=(0.0,) * 4, write_seconds=(0.0,) * 4)
# The rows after the first layer stay for a prefix of two, those after three are kept for three.
EARLY_CUT = four_layers(cuts=(0, 1, 1, 3))
# What an epoch on rows begins with takes as long as a layer; it is measured, and so not scaled.
FIXED = four_layers(fixed_seconds=2.0)
SLOW_ROWS = four_layers(row_seconds=(0.0, 99.0, 99.0, 99.0), write_seconds=(0.0, 99.0, 99.0, 99.0))


@pytest.mark.parametrize(
    ("costs", "wanted"),
    [
        (COSTS, (26.6, 19.9, 13.7, 7.3)),
        (four_layers(scale=1.5), (39.9, 29.85, 20.55, 10.95)),
        (FIXED, (26.6, 21.9, 15.7, 9.3)),
        (four_layers(scale=1.5, fixed_seconds=2.0), (39.9, 31.85, 22.55, 12.95)),
        # Images, and the frozen layers run again: 0.5 + prefix + live + optimizer + 1.
        (FREEZE_ONLY, (26.6, 22.4, 18.2, 13.8)),
        # The second layer is run again: one second more.
        (EARLY_CUT, (26.6, 19.9, 15.7, 7.3)),
        # Nobody knows the parameters: the optimizer takes 0.8 s whatever is live.
        (
            four_layers(layers=tuple(LayerCost("", 1, 1.0, 3.0, (4,)) for _ in range(4))),
            (28.6, 22.1, 16.1, 10.1),
        ),
    ],
)
def test_epoch_seconds(costs: RunCosts, wanted: tuple[float, ...]) -> None:
    assert [costs.epoch_seconds(k) for k in range(4)] == pytest.approx(wanted)


@pytest.mark.parametrize(
    ("costs", "before", "after", "wanted", "extra"),
    [
        # An image, the frozen layers, a row stored, and the live layers.
        (COSTS, 0, 1, 2 * (0.5 + 1 + 0.5 + 8 + 0.7 + 1), 3.5),
        (COSTS, 0, 3, 2 * (0.5 + 3 + 0.5 + 2 + 0.4 + 1), 7.5),
        (COSTS, 1, 3, 2 * (0.25 + 2 + 0.5 + 2 + 0.4 + 1), 5.0),
        (COSTS, 2, 2, 13.7, 0.0),
        (four_layers(scale=2.0), 1, 3, 24.6, 10.0),
        (FIXED, 0, 0, 26.6, 0.0),
        (FIXED, 0, 1, 25.4, 3.5),
        (FIXED, 1, 3, 14.3, 5.0),
        (four_layers(scale=2.0, fixed_seconds=2.0), 1, 3, 26.6, 10.0),
        (FREEZE_ONLY, 0, 2, 18.2, 0.0),
        (FREEZE_ONLY, 1, 3, 13.8, 0.0),
        # The rows after the first layer serve both.
        (EARLY_CUT, 1, 2, 15.7, 0.0),
        (EARLY_CUT, 0, 2, 2 * (0.5 + 2 + 0.5 + 5 + 0.6 + 1), 3.5),
        # Two layers lie between the cuts.
        (EARLY_CUT, 2, 3, 2 * (0.25 + 2 + 0.5 + 2 + 0.4 + 1), 5.0),
        # Rows so slow that making them costs less than reading them.
        (four_layers(row_seconds=(0.0, 9.0, 9.0, 9.0)), 0, 1, 23.4, 0.0),
    ],
)
def test_filling_seconds(costs: RunCosts, before: int, after: int, wanted: float, extra: float) -> None:
    assert costs.filling_seconds(before, after) == pytest.approx(wanted)
    assert costs.fill_seconds(before, after) == pytest.approx(extra)


def test_filling_seconds_without_storing() -> None:
    assert COSTS.filling_seconds(0, 3, stored=False) == pytest.approx(14.8 - 1.0)
    assert COSTS.filling_seconds(3, 3, stored=False) == pytest.approx(7.3)
    assert FIXED.filling_seconds(0, 3, stored=False) == pytest.approx(14.8 - 1.0 + 2.0)


def test_drop_estimates() -> None:
    fills, saved = four_layers(views=2).drop_estimates(0)
    assert fills == pytest.approx((0.0, 7.0, 11.0, 15.0))
    assert saved == pytest.approx((0.0, 6.7, 12.9, 19.3))
    fills, saved = COSTS.drop_estimates(2)
    assert fills == pytest.approx((0.0, 0.0, 0.0, 3.0))
    assert saved == pytest.approx((0.0, 0.0, 0.0, 6.4))
    fills, saved = FIXED.drop_estimates(0)
    assert fills == pytest.approx((0.0, 3.5, 5.5, 7.5))
    assert saved == pytest.approx((0.0, 4.7, 10.9, 17.3))
    # An epoch on rows takes them whatever is dropped.
    fills, saved = FIXED.drop_estimates(2)
    assert fills == pytest.approx((0.0, 0.0, 0.0, 3.0))
    assert saved == pytest.approx((0.0, 0.0, 0.0, 6.4))


def test_read_seconds_are_those_of_the_rows_alone() -> None:
    assert [FIXED.read_seconds(k) for k in range(4)] == [0.0, 0.5, 0.5, 0.5]


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"cuts": (0, 1, 2)}, r"RunCosts: cuts must have an entry for each of the 4 layers, got 3"),
        ({"row_seconds": ()}, r"RunCosts: row_seconds must have an entry for each of the 4 layers, got 0"),
        ({"write_seconds": (0.0,) * 5}, r"RunCosts: write_seconds must have an entry .* got 5"),
        ({"cuts": (0, 1, 2, 4)}, r"RunCosts: cuts must lie within the prefix, got \[0, 1, 2, 4\]"),
        ({"cuts": (-1, 1, 2, 3)}, r"RunCosts: cuts must lie within the prefix, got \[-1, 1, 2, 3\]"),
        ({"views": 0}, r"RunCosts: views must be at least 1, got 0"),
    ],
)
def test_run_costs_refuses(changed: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        four_layers(**changed)


# costs, the prefixes of the epochs before, and the prefix and seconds of each epoch
PLANS: list[tuple[RunCosts, tuple[int, ...], list[tuple[int, float]]]] = [
    (COSTS, (), [(0, 26.6)] * 2),
    (COSTS, (), [(3, 14.8), (3, 7.3), (3, 7.3)]),
    # Images are read in one epoch only; then rows come from rows.
    (COSTS, (), [(0, 26.6), (1, 23.4), (3, 12.3), (3, 7.3)]),
    # Rows of the last epoch would never be read.
    (COSTS, (), [(0, 26.6), (0, 26.6), (3, 13.8)]),
    (COSTS, (), [(1, 23.4), (1, 19.9), (3, 11.3)]),
    # Two views: two epochs of images.
    (four_layers(views=2), (), [(0, 26.6), (3, 14.8), (3, 14.8), (3, 7.3), (3, 7.3)]),
    # The second view is stored at the new cut at once, the first is brought there when it is next drawn.
    (four_layers(views=2), (), [(1, 23.4), (3, 14.8), (3, 12.3), (3, 7.3), (3, 7.3)]),
    # Each of two views is drawn once in the two epochs left.
    (four_layers(views=2), (), [(0, 26.6), (3, 13.8), (3, 13.8)]),
    (four_layers(views=2), (), [(3, 14.8), (3, 13.8), (3, 7.3)]),
    (FREEZE_ONLY, (), [(0, 26.6), (2, 18.2), (2, 18.2)]),
    (FIXED, (), [(0, 26.6), (1, 25.4), (3, 14.3), (3, 9.3)]),
    (FIXED, (), [(0, 26.6), (3, 15.8)]),
    # The rows of two layers do not fit: frozen, and no rows kept.
    (
        four_layers(cuts=(0, 1, 0, 3), row_seconds=(0.0, 0.25, 0.0, 0.25), write_seconds=(0.0, 0.5, 0.0, 0.5)),
        (),
        [(2, 18.2), (3, 14.8), (3, 7.3)],
    ),
    # The rest of a run.
    (COSTS, (1, 1), [(3, 12.3), (3, 7.3)]),
    (COSTS, (3,), [(3, 7.3)] * 2),
    (four_layers(views=2), (0, 0, 3), [(3, 14.8), (3, 7.3), (3, 7.3)]),
    # Rows freed by undrop() in between are not there.
    (COSTS, (3, 3, 0), [(3, 14.8), (3, 7.3)]),
    (four_layers(views=2), (3, 3, 0), [(3, 14.8), (3, 13.8), (3, 7.3)]),
]


@pytest.mark.parametrize(("costs", "past", "wanted"), PLANS)
def test_plan_seconds(costs: RunCosts, past: tuple[int, ...], wanted: list[tuple[int, float]]) -> None:
    found = plan_seconds(costs, [prefix for prefix, _ in wanted], past=past)
    assert found == pytest.approx([seconds for _, seconds in wanted])


@pytest.mark.parametrize(
    ("costs", "epochs", "start", "seconds"),
    [
        (COSTS, 5, 0, 14.8 + 4 * 7.3),
        (COSTS, 5, 2, 2 * 26.6 + 14.8 + 2 * 7.3),
        (COSTS, 1, 0, 13.8),
        (COSTS, 3, 3, 3 * 26.6),
        (FREEZE_ONLY, 5, 0, 5 * 13.8),
        # Rows that take longer than the layers that they stand in for: best not stored, in the last epoch.
        (SLOW_ROWS, 9, 0, 8 * 26.6 + 13.8),
        (COSTS, 3, 1, 26.6 + 14.8 + 7.3),
        (four_layers(scale=1e-3), 3, 1, 26.6 + 14.8 + 7.3),
        (FIXED, 5, 0, 16.8 + 4 * 9.3),
        (FIXED, 5, 2, 2 * 26.6 + 16.8 + 2 * 9.3),
        # An epoch begins so slowly that dropping later, or never, is faster.
        (four_layers(fixed_seconds=15.0), 9, 0, 29.8 + 8 * 22.3),
        (four_layers(fixed_seconds=99.0), 9, 0, 9 * 26.6),
    ],
)
def test_largest_speedup(costs: RunCosts, epochs: int, start: int, seconds: float) -> None:
    assert largest_speedup(costs, epochs, start=start) == pytest.approx(epochs * 26.6 / seconds)


def test_largest_speedup_of_a_run_that_takes_no_time_is_infinite() -> None:
    assert largest_speedup(four_layers(scale=0.0), 2) == math.inf


def test_largest_speedup_is_at_least_that_of_no_drop() -> None:
    dear = four_layers(layers=tuple(LayerCost("", 1, 5.0, 3.0, (4,)) for _ in range(4)))
    assert largest_speedup(dear, 1) == 1.0


@pytest.mark.parametrize("views", [1, 2, 5])
@pytest.mark.parametrize("prefix", [1, 3])
# Rows of 9 s take longer to read than to make.
@pytest.mark.parametrize("row", [0.25, 9.0])
@pytest.mark.parametrize("fixed", [0.0, 2.0])
def test_one_drop_is_a_plan_of_a_whole_run(views: int, prefix: int, row: float, fixed: float) -> None:
    costs = four_layers(views=views, row_seconds=(0.0, row, row, row), fixed_seconds=fixed)
    for start in range(6):
        drop = one_drop(costs, 6, prefix=prefix, start=start)
        left = 6 - start
        seconds = plan_seconds(costs, [0] * start + [prefix] * left)
        assert drop.seconds == pytest.approx(sum(seconds))
        fills = [max(0.0, one - costs.epoch_seconds(prefix)) for one in seconds[start:]]
        assert drop.fill_seconds == pytest.approx(sum(fills))
        # Rows are read behind the epochs that make them, one for each view.
        assert drop.read_seconds == pytest.approx(max(0, left - views) * 2 * row)
        assert drop.speedup == pytest.approx(6 * 26.6 / drop.seconds)


# Two rows: of 4 kB both on the device, of 1 MB one there and one in the file.
CHOICES = (
    CutChoice(0, 0, ""),
    CutChoice(1, 4096, "", TierPlan(2)),
    CutChoice(2, 1_000_000, "", TierPlan(1, 0, 1)),
    CutChoice(3, 1_000_000, "", TierPlan(1, 0, 1)),
)


def test_forecast() -> None:
    found = forecast(COSTS, 3, CHOICES)
    assert found.full_seconds == pytest.approx(79.8)
    assert found.layers == ("stem", "block1", "block2", "fc")
    assert [[run.seconds for run in row] for row in found.runs] == [
        pytest.approx([23.4 + 2 * 19.9, 26.6 + 23.4 + 19.9, 53.2 + 22.4]),
        pytest.approx([19.2 + 2 * 13.7, 26.6 + 19.2 + 13.7, 53.2 + 18.2]),
        pytest.approx([14.8 + 2 * 7.3, 26.6 + 14.8 + 7.3, 53.2 + 13.8]),
    ]
    assert found.runs[2][1] == DropForecast(
        3, 1, pytest.approx(48.7), pytest.approx(79.8 / 48.7), pytest.approx(7.5), pytest.approx(0.5)
    )
    assert found.largest_speedup == pytest.approx(79.8 / 29.4) == largest_speedup(COSTS, 3)
    assert found.rows == (
        RowsForecast(1, (8192, 0, 0)),
        RowsForecast(2, (1_000_000, 0, 1_000_000)),
        RowsForecast(3, (1_000_000, 0, 1_000_000)),
    )
    assert json.loads(json.dumps(found.as_dict()))["runs"][2][1]["fill_seconds"] == pytest.approx(7.5)


def test_forecast_counts_what_epochs_on_rows_begin_with() -> None:
    plain, found = (forecast(costs, 3, CHOICES) for costs in (COSTS, FIXED))
    assert found.full_seconds == plain.full_seconds
    for rows, before in zip(found.runs, plain.runs, strict=True):
        assert [run.seconds for run in rows] == pytest.approx(
            [run.seconds + 2.0 * left for run, left in zip(before, (3, 2, 1), strict=True)]
        )
        assert [run.fill_seconds for run in rows] == pytest.approx([run.fill_seconds for run in before])
    assert found.largest_speedup == pytest.approx(79.8 / (29.4 + 6.0))


TABLE = """\
3 epochs without drops: 79.8 s
layers      from epoch 0  from epoch 1  from epoch 2  rows
1 (stem)    63.2 s 1.26x  69.9 s 1.14x  75.6 s 1.06x  8.2 kB on device
2 (block1)  46.6 s 1.71x  59.5 s 1.34x  71.4 s 1.12x  1 MB on device, 1 MB on disk
3 (block2)  29.4 s 2.71x  48.7 s 1.64x  67.0 s 1.19x  1 MB on device, 1 MB on disk
largest speedup: 2.71x"""


def test_forecast_prints_a_table() -> None:
    assert str(forecast(COSTS, 3, CHOICES)) == TABLE


@pytest.mark.parametrize(
    ("epochs", "starts", "shown"),
    [(3, 6, "0 1 2"), (6, 6, "0 1 2 3 4 5"), (7, 6, "0 1 2 4 5 6"), (21, 3, "0 10 20"), (9, 1, "0")],
)
def test_forecast_shows_some_starts(epochs: int, starts: int, shown: str) -> None:
    head = forecast(COSTS, epochs, CHOICES).format_table(starts=starts).splitlines()[1]
    assert head.split() == ["layers", *(word for start in shown.split() for word in ("from", "epoch", start)), "rows"]


def test_forecast_without_rows() -> None:
    found = forecast(FREEZE_ONLY, 2, [CutChoice(0, 0, "frozen, no rows kept")] * 4)
    assert found.rows == (RowsForecast(0, (0, 0, 0)),) * 3
    assert str(found).splitlines()[2].endswith("none")


@pytest.mark.parametrize("epochs", [0, 1.5])
def test_forecast_refuses(epochs: Any) -> None:
    with pytest.raises(ValueError, match=f"forecast: epochs must be a whole number >= 1, got {epochs}"):
        forecast(COSTS, epochs, CHOICES)
