from __future__ import annotations

import random
from collections.abc import Sequence
from itertools import combinations_with_replacement
from typing import Any

import pytest
from four_layers import four_layers

from learndrop_ext.decide import schedules
from learndrop_ext.decide.costs import LayerCost
from learndrop_ext.decide.forecast import RunCosts, plan_seconds
from learndrop_ext.decide.schedules import Stage, best_prefixes

COSTS = four_layers()

# keywords of best_prefixes, prefixes. Epochs take 26.6, 19.9, 13.7, 7.3 s; the rows of one layer 3.5 s to make, of two
# 5.5 s, of three 7.5 s, of two and three from those of one 3 s and 5 s, of three from those of two 3 s; 1 s less of it
# in the last epoch, which stores none.
CASES: list[tuple[dict[str, Any], tuple[int, ...]]] = [
    ({"seconds": 3 * 26.6}, (0, 0, 0)),
    # One layer in one epoch: best in the last, which takes 19.9 + 2.5 s.
    ({"seconds": 2 * 26.6 + 22.4}, (0, 0, 1)),
    ({"seconds": 2 * 26.6 + 22.3}, (0, 0, 2)),
    ({"seconds": 26.6 + 23.4 + 19.9}, (0, 1, 1)),
    # 2 layer-epochs in 71.4 s, more than are left; of those with 3 that fit, the first drop is last.
    ({"seconds": 69.8}, (0, 0, 3)),
    ({"seconds": 14.8 + 7.3 + 7.3}, (3, 3, 3)),
    # Nothing is short enough: the shortest.
    ({"seconds": 1.0}, (3, 3, 3)),
    ({"seconds": -5.0}, (3, 3, 3)),
    # A prefix that is there stays.
    ({"epoch": 1, "prefix": 2, "past": (2,), "seconds": 99.0}, (2, 2)),
    ({"epoch": 1, "prefix": 2, "past": (2,), "seconds": 13.7 + 9.3}, (2, 3)),
    ({"epoch": 1, "prefix": 2, "past": (2,), "seconds": 22.9}, (3, 3)),
    # The second layer counts four times: rather three layers in one epoch than two.
    ({"seconds": 2 * 26.6 + 22.3, "weights": (1, 4, 1, 1)}, (0, 1, 1)),
]


@pytest.mark.parametrize(("more", "wanted"), CASES)
def test_best_prefixes(more: dict[str, Any], wanted: tuple[int, ...]) -> None:
    assert best_prefixes(COSTS, 3, **{"epoch": 0, "prefix": 0, **more}) == wanted


@pytest.mark.parametrize("hold", [1, 2, 3, 7])
def test_the_first_prefix_is_held(hold: int) -> None:
    draw = random.Random(hold)
    for _ in range(20):
        costs = random_costs(draw, 4, 1)
        seconds = draw.uniform(0.3, 1.0) * 4 * costs.epoch_seconds(0)
        found = best_prefixes(costs, 4, epoch=0, prefix=0, seconds=seconds, hold=hold)
        assert len(set(found[:hold])) == 1
        held = [p for p in combinations_with_replacement(range(4), 4) if len(set(p[:hold])) == 1]
        times = {p: sum(plan_seconds(costs, p)) for p in held}
        fitting = [p for p in held if times[p] <= seconds]
        if fitting:
            assert sum(found) == min(map(sum, fitting))
        else:
            assert times[found] == pytest.approx(min(times.values()))


def random_costs(draw: random.Random, layers: int, views: int) -> RunCosts:
    seconds = [draw.uniform(0.2, 3.0) for _ in range(layers)]
    cuts = [0]
    for k in range(1, layers):
        cuts.append(draw.choice([cuts[-1], k, 0]))
    return RunCosts(
        layers=tuple(LayerCost("", 1, s / 3, s, (1,), first_seconds=s / 2, parameters=1) for s in seconds),
        cuts=tuple(cuts),
        row_seconds=(0.0,) + (0.1,) * (layers - 1),
        write_seconds=(0.0,) + (0.2,) * (layers - 1),
        image_seconds=draw.uniform(0.0, 1.0),
        other_seconds=0.1,
        samples=1,
        views=views,
        optimizer_seconds=0.2,
        fixed_seconds=draw.choice([0.0, 0.5]),
        wrap_seconds=draw.choice([0.0, 0.0, 1.5]),
    )


# With the last three and two or three views, layers are dropped while views are being filled, and the first search is wrong.
@pytest.mark.parametrize("seed", [*range(40), 293, 1252, 1569])
@pytest.mark.parametrize("views", [1, 2, 3])
def test_best_prefixes_are_the_best_of_all(seed: int, views: int) -> None:
    draw = random.Random(seed)
    layers, epochs = draw.randint(2, 5), draw.randint(1, 5)
    costs = random_costs(draw, layers, views)
    epoch = draw.randint(0, epochs - 1)
    past = tuple(sorted(draw.choices(range(layers), k=epoch)))
    prefix = past[-1] if past else 0
    weights = [draw.randint(1, 4) for _ in range(layers)] if draw.random() < 0.5 else [1] * layers
    seconds = costs.epoch_seconds(0) * (epochs - epoch) / draw.uniform(1.0, 3.0)

    def total(prefixes: Sequence[int]) -> float:
        return sum(plan_seconds(costs, prefixes, past=past))

    def given_up(prefixes: Sequence[int]) -> int:
        return sum(sum(weights[prefix:k]) for k in prefixes)

    everything = list(combinations_with_replacement(range(prefix, layers), epochs - epoch))
    in_time = [prefixes for prefixes in everything if total(prefixes) <= seconds]
    wanted = min(in_time, key=lambda p: (given_up(p), p)) if in_time else min(everything, key=total)
    found = best_prefixes(costs, epochs, epoch=epoch, prefix=prefix, seconds=seconds, past=past, weights=weights)
    if in_time:
        assert found == wanted
    else:
        assert total(found) == pytest.approx(total(wanted))


@pytest.mark.parametrize(
    ("left", "table", "wanted"),
    [
        (5, 10**9, [(2, 1), (3, 1), (4, 1), (5, 1), (6, 1)]),
        # sqrt(320 / (2 * 4 * 4)) = 3.2 stages.
        (5, 320, [(2, 1), (3, 2), (5, 2)]),
        (6, 320, [(2, 2), (4, 2), (6, 2)]),
        (5, 1, [(2, 5)]),
    ],
)
def test_long_runs_are_planned_in_stages(
    monkeypatch: pytest.MonkeyPatch, left: int, table: int, wanted: list[tuple[int, int]]
) -> None:
    monkeypatch.setattr(schedules, "TABLE", table)
    assert schedules._stages(2, left, 4, 1, 4) == [Stage(epoch, length) for epoch, length in wanted]


@pytest.mark.parametrize("views", [1, 3])
def test_best_prefixes_of_a_long_run_end_in_time(monkeypatch: pytest.MonkeyPatch, views: int) -> None:
    monkeypatch.setattr(schedules, "TABLE", 20_000)
    costs = four_layers(views=views)
    full = costs.epoch_seconds(0) * 90
    found = best_prefixes(costs, 90, epoch=0, prefix=0, seconds=full / 2)
    assert len(found) == 90
    assert list(found) == sorted(found)
    assert 0.97 * full / 2 < sum(plan_seconds(costs, found)) <= full / 2
