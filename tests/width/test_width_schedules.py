"""Schedules and the controller as tables: steps and accuracies in, shares out."""

from __future__ import annotations

import itertools
import math

import pytest

from learndrop_ext.width.schedules import Iterative, Linear, OneCycle, OneShot, Schedule, Tolerance


@pytest.mark.parametrize(
    ("schedule", "keep", "left"),
    [
        (OneShot(3), 0.2, [1, 1, 0.2, 0.2]),
        (Linear(), 0.2, [0.8, 0.6, 0.4, 0.2]),
        (Iterative(0.5), 0.2, [0.5, 0.25, 0.2, 0.2]),
        (Iterative(0.5, every=2), 0.2, [1, 0.5, 0.5, 0.25]),
        # b - a t is 2.5, -1, -4.5 and -8
        (OneCycle(), 0.0, [1 - (1 + math.exp(-8)) / (1 + math.exp(x)) for x in (2.5, -1.0, -4.5)] + [0.0]),
        (OneCycle(a=10, b=5), 0.5, [1 - 0.5 * (1 + math.exp(-5)) / (1 + math.exp(x)) for x in (2.5, 0, -2.5)] + [0.5]),
    ],
)
def test_what_is_left_after_each_of_four_steps(schedule: Schedule, keep: float, left: list[float]) -> None:
    assert [schedule(step, 4, keep) for step in range(1, 5)] == pytest.approx(left)


def test_one_cycle_takes_most_in_the_middle() -> None:
    left = [1.0, *(OneCycle()(step, 20, 0.2) for step in range(1, 21))]
    taken = [before - after for before, after in itertools.pairwise(left)]
    assert min(taken) > 0
    assert taken.index(max(taken)) in (7, 8, 9)  # at t = b / a
    assert left[-1] == pytest.approx(0.2)


def test_tolerance_grows_while_it_is_kept_and_steps_back_and_halves_when_not() -> None:
    controller = Tolerance(points=2.0, rate=0.2)
    table = [
        # accuracy, then left, best, within
        (80.0, 0.8, 80.0, True),
        (78.0, 0.6, 80.0, True),  # 2 points are allowed
        (77.9, 0.8, 80.0, False),  # back to 0.8
        (81.0, 0.7, 81.0, True),  # half of the rate
        (70.0, 0.8, 81.0, False),
        (60.0, 0.8, 81.0, False),
        (79.0, 0.775, 81.0, True),  # an eighth
    ]
    for step, (_, *wanted) in enumerate(table, 1):
        assert list(controller([accuracy for accuracy, *_ in table[:step]], 0.5)) == pytest.approx(wanted)


def test_tolerance_stops_at_the_least_share() -> None:
    assert Tolerance(1.0, rate=0.4)([50.0, 50.0], 0.5)[0] == 0.5


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (
            lambda: Iterative(share=0.0),
            r"Iterative: share must be between 0 and 1 and every at least 1, got .*share=0\.0",
        ),
        (lambda: Iterative(share=1.0), "Iterative: share must be"),
        (lambda: Iterative(every=0), "Iterative: .*every=0"),
        (lambda: OneShot(0), "OneShot: step must be at least 1, got 0"),
        (lambda: Tolerance(-1.0), r"Tolerance: points must be at least 0 and rate .*points=-1\.0"),
        (lambda: Tolerance(math.nan), "Tolerance: points must be"),
        (lambda: Tolerance(1.0, rate=0.0), r"Tolerance: .*rate=0\.0"),
    ],
)
def test_settings_that_are_refused(make: object, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make()  # type: ignore[operator]
