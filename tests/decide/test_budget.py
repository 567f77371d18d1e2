"""Budget: decisions as a table, and what it refuses."""

from __future__ import annotations

import dataclasses
import warnings
from typing import Any

import pytest
from four_layers import four_layers

from learndrop_ext.decide.costs import LayerCost
from learndrop_ext.decide.forecast import RunCosts
from learndrop_ext.decide.policy import Budget, Decision, Situation

COSTS = four_layers()
NAMES = ("stem", "block1", "block2", "fc")


def situation(epoch: int, past: tuple[int, ...] = (), **more: Any) -> Situation:
    scores = tuple((None,) * k + (0.5,) * (4 - k) for k in past)
    values = {"epochs": 3, "prefix": past[-1] if past else 0, "scores": scores, "costs": COSTS, **more}
    return Situation(epoch=epoch, layers=NAMES, **values)


# Epochs take 26.6, 19.9, 13.7, 7.3 s; the rows of one, two and three layers 3.5, 5.5 and 7.5 s.
DECISIONS: list[tuple[str, Budget, Situation, int, str]] = [
    ("no speedup", Budget(1.0), situation(0), 0, "budget 1x: 0 of 4 layers, forecast 79.8 s of 79.8 s"),
    # 29.4 s is all that three layers from the first step can do.
    ("all it can", Budget(2.71), situation(0), 3, "budget 2.71x: 3 of 4 layers, forecast 29.4 s of 29.4 s"),
    ("not enough", Budget(4.0), situation(0), 3, "budget 4x: 3 of 4 layers, forecast 29.4 s of 20.0 s"),
    ("before its start", Budget(2.0, 2), situation(1, (0,)), 0, "budget 2x: no drop before epoch 2"),
    ("before training", Budget(1.5, 1), situation(0), 0, "budget 1.5x: no drop before epoch 1"),
    # 20 / (2 x 1.5) epochs. Three layers from then on: 6 x 26.6 + 14.8 + 13 x 7.3 = 269.3 s of 532 s, 1.98x.
    ("half of the time", Budget(1.5, 1), situation(5, (0,) * 5, epochs=20), 0, "budget 1.5x: no drop before epoch 6"),
    # 53.2 s: 26.6 s are gone, three layers take 14.8 + 7.3 s, two 19.2 + 13.7 s.
    (
        "from its start",
        Budget(1.5, 1),
        situation(1, (0,), elapsed_seconds=26.6),
        3,
        "budget 1.5x: 3 of 4 layers, forecast 48.7 s of 53.2 s",
    ),
    # Confirmed costs. 39.9 s less 19.2 s leave 20.7 s: a second epoch with two layers leaves 7.0 s for the last, too few.
    (
        "on time",
        Budget(),
        situation(1, (2,), elapsed_seconds=19.2),
        3,
        "budget 2x: 3 of 4 layers, forecast 36.8 s of 39.9 s",
    ),
    (
        "ahead of time",
        Budget(2.0),
        situation(1, (2,), elapsed_seconds=12.0),
        2,
        "budget 2x: 2 of 4 layers, forecast 39.4 s of 39.9 s",
    ),
    (
        "behind time",
        Budget(2.0),
        situation(1, (2,), elapsed_seconds=30.0),
        3,
        "budget 2x: 3 of 4 layers, forecast 47.6 s of 39.9 s",
    ),
    # The same epochs in a run that takes longer without drops.
    (
        "the measured time of the full run counts",
        Budget(2.0),
        situation(1, (2,), elapsed_seconds=19.2, full_seconds=96.0),
        2,
        "budget 2x: 2 of 4 layers, forecast 46.6 s of 48.0 s",
    ),
    (
        "slower than forecast",
        Budget(2.0),
        situation(1, (2,), elapsed_seconds=19.2, full_seconds=96.0, costs=four_layers(scale=1.3)),
        3,
        "budget 2x: 3 of 4 layers, forecast 42.1 s of 48.0 s",
    ),
    # 88.7 s: no, no, two and two layers count 8 by depth. No, no, one and three take 87.9 s, and count 10.
    ("by depth", Budget(1.2), situation(0, epochs=4), 0, "budget 1.2x: 0 of 4 layers, forecast 86.1 s of 88.7 s"),
    # 16.7 s are left: three layers take 13.8 s, two 18.2 s.
    (
        "in the last epoch",
        Budget(1.2),
        situation(3, (0, 0, 0), epochs=4, elapsed_seconds=72.0),
        3,
        "budget 1.2x: 3 of 4 layers, forecast 85.8 s of 88.7 s",
    ),
    # 37 s are left: one and three layers take 34.7 s, and nothing faster can follow one if they take 10 % longer.
    (
        "what later drops cannot make up for",
        Budget(1.2),
        situation(4, (0, 0, 0, 0), epochs=6, elapsed_seconds=96.0),
        2,
        "budget 1.2x: 2 of 4 layers, forecast 128.9 s of 133.0 s",
    ),
    ("the run has ended", Budget(2.0), situation(3, (2, 2, 3), elapsed_seconds=41.0), 3, "budget 2x: 41.0 s of 39.9 s"),
]


@pytest.mark.parametrize(
    ("policy", "seen", "prefix", "reason"), [case[1:] for case in DECISIONS], ids=[case[0] for case in DECISIONS]
)
def test_budget(policy: Budget, seen: Situation, prefix: int, reason: str) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert policy(seen) == Decision(prefix, reason)


FIVE = RunCosts(
    layers=tuple(LayerCost(str(i), 1, 1.0, 3.0, (1,)) for i in range(5)),
    cuts=(0, 1, 2, 3, 4),
    row_seconds=(0.0,) * 5,
    write_seconds=(0.0,) * 5,
    image_seconds=0.0,
    other_seconds=0.0,
    samples=1,
)


# Two of seven epochs are done, the second with one layer dropped; 30 s are left. Epochs take 12, 9, 6, 3 s with one to
# four layers dropped, and 1 s more for each layer between the rows that are read and those that are made.
@pytest.mark.parametrize(
    ("last", "prefix"),
    [
        # All alike: 1, 3, 4, 4, 4 layers, the fewest at first.
        ((0.5, 0.5, 0.5, 0.5), 1),
        ((0.0, 0.0, 0.0, 0.0), 1),
        # The second hardly learns and goes at once, so that the third can stay longer: 2, 2, 4, 4, 4.
        ((0.0, 0.9, 0.9, 0.9), 2),
        # The second and third: 3, 3, 3, 3, 4.
        ((0.0, 0.0, 0.9, 0.9), 3),
        ((0.9, 0.9, 0.0, 0.0), 1),
    ],
)
def test_budget_from_a_later_start_drops_first_what_learns_least(last: tuple[float, ...], prefix: int) -> None:
    seen = Situation(
        epoch=2,
        epochs=7,
        prefix=1,
        layers=tuple("abcde"),
        scores=((0.9, *last), (None, *last)),
        costs=FIVE,
        elapsed_seconds=28.0,
        full_seconds=2 * 58.0,
    )
    assert Budget(2.0, 1)(seen).prefix == prefix


def test_budget_weighs_scores_from_one_to_four() -> None:
    scores = ((0.3, 0.0, 0.9, None, 0.15), (0.3, 0.0, 0.9, None, 0.15))
    assert Budget(2.0, 1)._weights(situation(1, scores=scores)) == ((2, 1, 4, 1),)
    # Only what was measured after undrop() counts.
    scores = ((0.9, 0.9, 0.9, 0.9), (0.0, 0.4, 0.8, 0.2))
    assert Budget(2.0, 1)._weights(situation(1, scores=scores, undropped=1)) == ((1, 3, 4, 2),)
    # Smoothed with weight 1/2: 0.4 and 0.9.
    assert Budget(2.0, 1)._weights(situation(1, scores=((0.8, 0.8, 0, 0), (0.0, 1.0, 0, 0)))) == ((2, 4, 1, 1),)
    assert Budget(2.0, 1)._weights(situation(1, scores=((0.0, 0.0, 0.0, 0.0),))) == ((1, 1, 1, 1),)


def test_budget_from_the_first_step_weighs_by_depth() -> None:
    def weights(layers: int) -> tuple[tuple[int, ...], ...]:
        return Budget()._weights(Situation(0, 3, 0, ("",) * layers, ()))

    assert weights(4) == ((1, 3, 5, 7), (1, 1, 1, 1))
    assert weights(63)[0] == tuple(range(1, 126, 2))
    # 100 * 100 / 4000 = 2.5 times coarser, and at least 1.
    assert weights(100)[0][:5] == (1, 1, 2, 3, 4)
    assert weights(100)[0][-1] == 80


def test_budget_from_the_first_step_does_not_look_at_scores() -> None:
    seen = situation(1, (2,), elapsed_seconds=12.0)
    other = dataclasses.replace(seen, scores=((None, None, 0.0, 0.9),))
    assert Budget(2.0)(seen) == Budget(2.0)(other)


@pytest.mark.parametrize(
    ("policy", "epochs", "message"),
    [
        (
            Budget(2.72),
            3,
            r"Budget: speedup must be at most 2.71, .* after 0 of 3 epochs can give this run, got 2.72",
        ),
        (
            Budget(1.7, 1),
            3,
            r"Budget: speedup must be at most 1.63, .* after 1 of 3 epochs can give this run, got 1.7",
        ),
        (
            Budget(1.1, 7),
            3,
            r"Budget: speedup must be at most 1.00, .* after 7 of 3 epochs can give this run, got 1.1",
        ),
        (Budget(2.0), None, r"Budget: epochs must be known, give DropScheduler\(epochs=...\), got None"),
    ],
)
def test_budget_check_refuses_what_cannot_be_reached(policy: Budget, epochs: int | None, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        policy.check(COSTS, epochs)


def test_budget_says_that_making_the_scheduler_leaves_too_little() -> None:
    # 39.9 s are asked for. With three layers the run takes 29.4 s.
    with pytest.warns(
        RuntimeWarning, match=r"asked to take 39\.9 s, and takes 49\.4 s at least: .* took 20\.0 s of them"
    ):
        decision = Budget(2.0)(situation(0, elapsed_seconds=20.0))
    assert decision.prefix == 3
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        # 43.8 s are within a tenth of that. After the first epoch nothing is said.
        assert Budget(2.0)(situation(0, elapsed_seconds=14.4)).prefix == 3
        assert Budget(2.0)(situation(1, (3,), elapsed_seconds=50.0)).prefix == 3
        assert Budget(4.0)(situation(0)).prefix == 3
    with pytest.warns(RuntimeWarning, match=r"takes 44\.0 s at least"):
        Budget(2.0)(situation(0, elapsed_seconds=14.6))


@pytest.mark.parametrize(("seconds", "late"), [(39.0, False), (44.8, False), (45.0, True), (80.0, True)])
def test_budget_says_at_the_end_that_a_run_took_too_long(seconds: float, late: bool) -> None:
    seen = situation(4, (2, 2, 2, 2), elapsed_seconds=seconds)
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        assert Budget(2.0)(seen) == Decision(2, f"budget 2x: {seconds:.1f} s of 39.9 s")
    assert [str(warning.message) for warning in said] == [
        f"budget 2x: the run took {seconds:.1f} s, and was asked to take 39.9 s: without drops it would take 79.8 s by "
        "estimate. 2 of 4 layers are dropped; fewer epochs without drops may be better in that time"
    ] * late


def test_budget_says_nothing_of_a_few_seconds() -> None:
    seen = dataclasses.replace(situation(4, (2, 2, 2, 2)), full_seconds=0.2, elapsed_seconds=5.05)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        Budget(2.0)(seen)


@pytest.mark.parametrize(("policy", "epochs"), [(Budget(2.71), 3), (Budget(1.63, 1), 3), (Budget(1.0, 9), 3)])
def test_budget_check_admits_what_can_be_reached(policy: Budget, epochs: int) -> None:
    policy.check(COSTS, epochs)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"speedup": 0.99}, r"Budget: speedup must be a number >= 1, got 0.99"),
        ({"speedup": float("nan")}, r"Budget: speedup must be a number >= 1, got nan"),
        ({"speedup": float("inf")}, r"Budget: speedup must be a number >= 1, got inf"),
        ({"speedup": "2"}, r"Budget: speedup must be a number >= 1, got '2'"),
        ({"start": -1}, r"Budget: start must be a whole number >= 0, got -1"),
        ({"start": 1.0}, r"Budget: start must be a whole number >= 0, got 1.0"),
        ({"start": True}, r"Budget: start must be a whole number >= 0, got True"),
    ],
)
def test_budget_refuses(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Budget(**arguments)


def test_budget_refuses_a_situation_without_costs_or_length() -> None:
    with pytest.raises(ValueError, match="Budget: the run's costs must be measured, got a situation without costs"):
        Budget()(situation(0, costs=None))
    with pytest.raises(ValueError, match="Budget: epochs must be known"):
        Budget()(situation(0, epochs=None))
