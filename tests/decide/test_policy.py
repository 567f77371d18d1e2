from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import pytest

from learndrop_ext.decide.policy import (
    Budget,
    Decision,
    Fixed,
    PlanningPolicy,
    Situation,
    StoppedLearning,
    uses_costs,
)

LAYERS = ("stem", "block1", "block2", "fc")


def after(*measured: tuple[float | None, ...], prefix: int = 0, **more: Any) -> Situation:
    """The situation after as many epochs as there are measurements."""
    more = {"epoch": len(measured), "epochs": 20, "layers": LAYERS, **more}
    return Situation(prefix=prefix, scores=measured, **more)


MOVING = (0.9, 0.9, 0.9, 0.9)
FIRST_RESTS = (0.0, 0.9, 0.9, 0.9)
TWO_REST = (0.0, 0.0, 0.9, 0.9)
MIDDLE_RESTS = (0.9, 0.0, 0.0, 0.9)
ALL_REST = (0.0, 0.0, 0.0, 0.0)
QUICK = StoppedLearning(threshold=0.1, warmup=0, patience=2, smoothing=0.0)
STOPPED = "scores under 0.1 for 2 measurements"
UNDER_ONCE = "stem may still learn: score 0.00 is under 0.1 for 1 of 2 measurements"

# policy, situation, prefix, reason
STOPPED_LEARNING: list[tuple[str, StoppedLearning, Situation, int, str]] = [
    ("warm-up", StoppedLearning(warmup=2), after(ALL_REST, ALL_REST), 0, "warm-up: epoch 2 of 2"),
    ("warm-up keeps the prefix", StoppedLearning(warmup=2), after(ALL_REST, prefix=1), 1, "warm-up: epoch 1 of 2"),
    ("before training", StoppedLearning(), after(), 0, "warm-up: epoch 0 of 2"),
    ("frozen layers", StoppedLearning(), after(TWO_REST, asleep=2), 2, "frozen by the user"),
    ("frozen layers before training", StoppedLearning(), after(asleep=2), 0, "warm-up: epoch 0 of 2"),
    ("frozen after undrop()", StoppedLearning(), after(TWO_REST, asleep=2, undropped=1), 0, "warm-up: epoch 1 of 2"),
    ("few frozen layers", StoppedLearning(max_dropped=0.25), after(TWO_REST, asleep=2), 1, "frozen by the user"),
    ("frozen layers and one that stops", QUICK, after(TWO_REST, TWO_REST, asleep=1), 2, STOPPED),
    (
        "frozen layers that are dropped",
        StoppedLearning(),
        after(MOVING, prefix=2, asleep=2),
        2,
        "warm-up: epoch 1 of 2",
    ),
    ("before training, no warm-up", QUICK, after(), 0, "warm-up: epoch 0 of 0"),
    (
        "warm-up does not count",
        StoppedLearning(warmup=2),
        after(*[ALL_REST] * 3),
        0,
        "stem may still learn: score 0.00 is under 0.2 for 1 of 2 measurements",
    ),
    ("after undrop() only what follows counts", QUICK, after(*[ALL_REST] * 5, undropped=5), 0, "no score yet"),
    (
        "one measurement after undrop()",
        QUICK,
        after(*[ALL_REST] * 5, undropped=4),
        0,
        "stem may still learn: score 0.00 is under 0.1 for 1 of 2 measurements",
    ),
    ("two measurements after undrop()", QUICK, after(*[ALL_REST] * 5, undropped=3), 3, STOPPED),
    ("undrop() within the warm-up", StoppedLearning(0.1, warmup=2), after(*[ALL_REST] * 4, undropped=1), 3, STOPPED),
    ("first after warm-up", StoppedLearning(0.1, warmup=2), after(*[ALL_REST] * 4), 3, STOPPED),
    (
        "the rate rises",
        QUICK,
        after(ALL_REST, ALL_REST, learning_rates=(0.01, 0.02, 0.04), learning_rate=0.04),
        0,
        "the learning rate is 100% of its highest; drops wait for 50%",
    ),
    (
        "the rate falls",
        QUICK,
        after(ALL_REST, ALL_REST, prefix=1, learning_rates=(0.04, 0.04, 0.03), learning_rate=0.03),
        1,
        "the learning rate is 75% of its highest; drops wait for 50%",
    ),
    (
        "the rate has fallen by half",
        QUICK,
        after(ALL_REST, ALL_REST, learning_rates=(0.04, 0.04, 0.02), learning_rate=0.02),
        3,
        STOPPED,
    ),
    (
        "a scheduler has not lowered the rate yet",
        QUICK,
        after(ALL_REST, ALL_REST, learning_rates=(0.1,) * 3, learning_rate=0.1, is_scheduled=True),
        0,
        "the learning rate is 100% of its highest; drops wait for 50%",
    ),
    (
        "a constant rate",
        QUICK,
        after(ALL_REST, ALL_REST, learning_rates=(0.1,) * 3, learning_rate=0.1),
        3,
        STOPPED,
    ),
    (
        "any rate will do",
        StoppedLearning(threshold=0.1, warmup=0, patience=2, smoothing=0.0, annealed=1.0),
        after(ALL_REST, ALL_REST, learning_rates=(0.01, 0.02, 0.04), learning_rate=0.04, is_scheduled=True),
        3,
        STOPPED,
    ),
    (
        "all are dropped, at any rate",
        QUICK,
        after(ALL_REST, ALL_REST, prefix=3, learning_rates=(0.01, 0.02, 0.04), learning_rate=0.04),
        3,
        "all 3 layers that may be dropped are",
    ),
    (
        "frozen layers are dropped at any rate",
        QUICK,
        after(ALL_REST, ALL_REST, asleep=1, learning_rates=(0.01, 0.02, 0.04), learning_rate=0.04),
        1,
        "frozen by the user",
    ),
    ("all learn", QUICK, after(MOVING, MOVING), 0, "stem still learns: score 0.90, threshold 0.1"),
    (
        "too few measurements",
        QUICK,
        after(ALL_REST),
        0,
        "stem may still learn: score 0.00 is under 0.1 for 1 of 2 measurements",
    ),
    (
        "just at the threshold",
        QUICK,
        after((0.1, 0, 0, 0), (0.1, 0, 0, 0)),
        0,
        "stem still learns: score 0.10, threshold 0.1",
    ),
    (
        "just above the threshold",
        QUICK,
        after((0.1, 0, 0, 0), (0.10004, 0, 0, 0)),
        0,
        "stem still learns: score 0.10004, threshold 0.1",
    ),
    (
        "hardly above nothing",
        StoppedLearning(0.0, 1, 0, 0.0),
        after((0.0000123, 0, 0, 0)),
        0,
        "stem still learns: score 0.00001, threshold 0",
    ),
    (
        "too little for 16 decimals",
        StoppedLearning(0.0, 1, 0, 0.0),
        after((1e-17, 0, 0, 0)),
        0,
        "stem still learns: score 1e-17, threshold 0",
    ),
    ("no measurement", QUICK, after(epoch=1), 0, "no score yet"),
    ("one stopped", QUICK, after(FIRST_RESTS, FIRST_RESTS), 1, STOPPED),
    ("two stopped", QUICK, after(TWO_REST, TWO_REST), 2, STOPPED),
    ("only in the last", QUICK, after(MOVING, TWO_REST), 0, UNDER_ONCE),
    ("only before the last", QUICK, after(TWO_REST, MOVING), 0, "stem still learns: score 0.90, threshold 0.1"),
    ("longest run", QUICK, after(FIRST_RESTS, TWO_REST), 1, STOPPED),
    (
        "stopped behind a learner",
        QUICK,
        after(MIDDLE_RESTS, MIDDLE_RESTS),
        0,
        "stem still learns: score 0.90, threshold 0.1",
    ),
    ("the last layer stays", QUICK, after(ALL_REST, ALL_REST), 3, STOPPED),
    ("at the threshold", QUICK, after((0.1, 0, 0, 0), (0.0, 0, 0, 0)), 0, UNDER_ONCE),
    ("goes on behind the prefix", QUICK, after((None, 0.0, 0.9, 0.9), (None, 0.0, 0.9, 0.9), prefix=1), 2, STOPPED),
    (
        "next one learns",
        QUICK,
        after((None, 0.3, 0.0, 0.0), (None, 0.5, 0.0, 0.0), prefix=1),
        1,
        "block1 still learns: score 0.50, threshold 0.1",
    ),
    (
        "nothing left",
        QUICK,
        after((None, None, None, 0.0), (None, None, None, 0.0), prefix=3),
        3,
        "all 3 layers that may be dropped are",
    ),
    (
        "half at most",
        StoppedLearning(0.1, warmup=0, max_dropped=0.5, smoothing=0.0),
        after(ALL_REST, ALL_REST),
        2,
        STOPPED,
    ),
    (
        "none at most",
        StoppedLearning(warmup=0, max_dropped=0.0),
        after(ALL_REST),
        0,
        "all 0 layers that may be dropped are",
    ),
    # 0.8 -> 0.4 -> 0.2 -> 0.1 -> 0.05: under 0.15 from the fourth on.
    (
        "smoothing holds it back",
        StoppedLearning(0.15, warmup=0),
        after((0.8, 1, 1, 1), *[FIRST_RESTS] * 3),
        0,
        "stem may still learn: score 0.10 is under 0.15 for 1 of 2 measurements",
    ),
    (
        "smoothing lets it go",
        StoppedLearning(0.15, warmup=0),
        after((0.8, 1, 1, 1), *[FIRST_RESTS] * 4),
        1,
        "scores under 0.15 for 2 measurements",
    ),
    ("patience of one", StoppedLearning(0.2, 1, 0, 0.0), after(TWO_REST), 2, "scores under 0.2 for 1 measurements"),
    (
        "worth it",
        QUICK,
        after(TWO_REST, TWO_REST, fill_seconds=(0, 5, 9, 12), saved_seconds=(0, 1, 2, 3)),
        2,
        STOPPED,
    ),
    (
        "only the shorter is worth it",
        QUICK,
        after(TWO_REST, TWO_REST, epochs=7, fill_seconds=(0, 4.9, 20, 30), saved_seconds=(0, 1, 2, 3)),
        1,
        STOPPED,
    ),
    (
        "a tie is not worth it",
        QUICK,
        after(FIRST_RESTS, FIRST_RESTS, epochs=7, fill_seconds=(0, 5, 9, 9), saved_seconds=(0, 1, 1, 1)),
        0,
        "not worth it: the fill takes 5.00 s and 5 epochs save 5.00 s",
    ),
    (
        "the run ends",
        QUICK,
        after(ALL_REST, ALL_REST, epochs=2, fill_seconds=(0, 1, 1, 1), saved_seconds=(0, 9, 9, 9)),
        0,
        "not worth it: the fill takes 1.00 s and 0 epochs save 0.00 s",
    ),
    (
        "unknown length: as many as were done",
        QUICK,
        after(FIRST_RESTS, FIRST_RESTS, epochs=None, fill_seconds=(0, 3, 9, 9), saved_seconds=(0, 1, 1, 1)),
        0,
        "not worth it: the fill takes 3.00 s and 2 epochs save 2.00 s",
    ),
    (
        "unknown length, longer run",
        QUICK,
        after(*[FIRST_RESTS] * 4, epochs=None, fill_seconds=(0, 3, 9, 9), saved_seconds=(0, 1, 1, 1)),
        1,
        STOPPED,
    ),
    # 18 epochs of 2 s less a fill of 16 s: 20 of 200 s.
    (
        "saves just enough of the run",
        QUICK,
        after(FIRST_RESTS, FIRST_RESTS, fill_seconds=(0, 16, 17, 17), saved_seconds=(0, 2, 2, 2), epoch_seconds=10.0),
        1,
        STOPPED,
    ),
    (
        "saves too little of the run",
        QUICK,
        after(FIRST_RESTS, FIRST_RESTS, fill_seconds=(0, 17, 9, 9), saved_seconds=(0, 2, 2, 2), epoch_seconds=10.0),
        0,
        "not worth it: the fill takes 17.00 s and 18 epochs save 36.00 s, 9.5% of the run where 10.0% are wanted",
    ),
    (
        "the longer saves enough, where the shorter does not",
        QUICK,
        after(TWO_REST, TWO_REST, fill_seconds=(0, 17, 8, 9), saved_seconds=(0, 2, 2, 2), epoch_seconds=10.0),
        2,
        STOPPED,
    ),
    (
        "as little as is wished",
        StoppedLearning(0.1, warmup=0, smoothing=0.0, min_saving=0.0),
        after(FIRST_RESTS, FIRST_RESTS, fill_seconds=(0, 17, 9, 9), saved_seconds=(0, 2, 2, 2), epoch_seconds=10.0),
        1,
        STOPPED,
    ),
    (
        "too little of a run of unknown length",
        QUICK,
        after(
            FIRST_RESTS,
            FIRST_RESTS,
            epochs=None,
            fill_seconds=(0, 1, 9, 9),
            saved_seconds=(0, 2, 2, 2),
            epoch_seconds=10.0,
        ),
        0,
        "not worth it: the fill takes 1.00 s and 2 epochs save 4.00 s, 7.5% of the run where 10.0% are wanted",
    ),
]


@pytest.mark.parametrize(
    ("policy", "situation", "prefix", "reason"),
    [case[1:] for case in STOPPED_LEARNING],
    ids=[case[0] for case in STOPPED_LEARNING],
)
def test_stopped_learning(policy: StoppedLearning, situation: Situation, prefix: int, reason: str) -> None:
    assert policy(situation) == Decision(prefix, reason)


def test_stopped_learning_smooths_what_was_measured_after_the_warm_up() -> None:
    situation = after((9.0,) * 4, (1.0,) * 4, (0.0, 0.5, None, 0.0), (0.4, 0.0, None, 1.0))
    policy = StoppedLearning(warmup=1, smoothing=0.75)
    assert policy.smoothed(situation, 0) == pytest.approx([1.0, 0.75, 0.6625])
    assert policy.smoothed(situation, 1) == pytest.approx([1.0, 0.875, 0.65625])
    assert policy.smoothed(situation, 2) == [1.0]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"threshold": -0.1}, r"StoppedLearning: threshold must be within 0.0..1.0, got -0.1"),
        ({"threshold": float("nan")}, r"StoppedLearning: threshold must be within 0.0..1.0, got nan"),
        ({"smoothing": 1.5}, r"StoppedLearning: smoothing must be within 0.0..1.0, got 1.5"),
        ({"annealed": 1.5}, r"StoppedLearning: annealed must be within 0.0..1.0, got 1.5"),
        ({"max_dropped": 2}, r"StoppedLearning: max_dropped must be within 0.0..1.0, got 2"),
        ({"patience": 0}, r"StoppedLearning: patience must be a whole number >= 1, got 0"),
        ({"patience": True}, r"StoppedLearning: patience must be a whole number >= 1, got True"),
        ({"patience": 1.5}, r"StoppedLearning: patience must be a whole number >= 1, got 1.5"),
        ({"warmup": -1}, r"StoppedLearning: warmup must be a whole number >= 0, got -1"),
    ],
)
def test_stopped_learning_refuses(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        StoppedLearning(**arguments)


# prefixes, epoch, prefix now, prefix then, reason
FIXED: list[tuple[Mapping[int, int], int, int, int, str]] = [
    ({}, 5, 0, 0, "nothing set for this epoch"),
    ({3: 2}, 2, 0, 0, "nothing set for this epoch"),
    ({3: 2}, 3, 0, 2, "set by hand"),
    ({3: 2}, 4, 2, 2, "nothing set for this epoch"),
    # A resumed run makes up for what was set before it.
    ({3: 2}, 9, 0, 2, "set by hand"),
    ({3: 1, 5: 3}, 5, 1, 3, "set by hand"),
    ({5: 3, 3: 1}, 4, 0, 1, "set by hand"),
    ({3: 1}, 3, 2, 2, "nothing set for this epoch"),
    # Before training.
    ({0: 3, 1: 3}, 0, 0, 3, "set by hand"),
    ({0: 2, 1: 3}, 1, 2, 3, "set by hand"),
    ({1: 3}, 0, 0, 0, "nothing set for this epoch"),
    ({0: 0, 1: 3}, 0, 0, 0, "nothing set for this epoch"),
]


@pytest.mark.parametrize("recalibrate", [False, True])
@pytest.mark.parametrize(("prefixes", "epoch", "now", "prefix", "reason"), FIXED)
def test_fixed(prefixes: Mapping[int, int], epoch: int, now: int, prefix: int, reason: str, recalibrate: bool) -> None:
    situation = Situation(epoch=epoch, epochs=None, prefix=now, layers=LAYERS, scores=())
    assert Fixed(prefixes, recalibrate)(situation) == Decision(prefix, reason, recalibrate)


def test_fixed_leaves_layers_as_they_are() -> None:
    assert not Fixed({1: 1}).recalibrate


@pytest.mark.parametrize(
    ("prefixes", "message"),
    [
        ({-1: 1}, "Fixed: prefixes must map epochs >= 0 to prefix lengths that do not shrink, got 1 at epoch -1"),
        ({2: -1}, "Fixed: prefixes must map epochs >= 0 .*, got -1 at epoch 2"),
        ({2: 3, 5: 2}, "Fixed: prefixes must map epochs >= 0 .*, got 2 at epoch 5"),
    ],
)
def test_fixed_refuses_prefixes(prefixes: Mapping[int, int], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Fixed(prefixes)


@pytest.mark.parametrize(("undropped", "prefix"), [(None, 3), (0, 3), (1, 3), (2, 3), (3, 0), (4, 0)])
def test_fixed_after_undrop(undropped: int | None, prefix: int) -> None:
    situation = Situation(epoch=4, epochs=None, prefix=0, layers=LAYERS, scores=(), undropped=undropped)
    assert Fixed({1: 2, 3: 3})(situation).prefix == prefix


def test_situation_knows_the_prefix_of_every_epoch() -> None:
    assert after(MOVING, (None, 0.1, 0.1, 0.1), (None, None, None, 0.1), MOVING).past == (0, 1, 3, 0)
    assert after().past == ()


def test_fixed_refuses_to_drop_every_layer() -> None:
    situation = Situation(epoch=3, epochs=None, prefix=0, layers=LAYERS, scores=())
    with pytest.raises(ValueError, match="Fixed: prefix must leave a layer to train: at most 3, got 4"):
        Fixed({3: 4})(situation)


def by_hand(situation: Situation) -> Decision:
    return Decision(situation.prefix, "by hand")


class Plans:
    speedup = 1.5

    def check(self, costs: Any, epochs: int | None) -> None:
        pass

    def __call__(self, situation: Situation) -> Decision:
        return by_hand(situation)


@pytest.mark.parametrize(
    ("policy", "uses", "plans"),
    [
        (Fixed(), False, False),
        (StoppedLearning(), True, False),
        (by_hand, True, False),
        (Budget(), True, True),
        (Plans(), True, True),
    ],
)
def test_policies_say_whether_they_use_costs_and_plan(policy: Any, uses: bool, plans: bool) -> None:
    assert uses_costs(policy) is uses
    assert isinstance(policy, PlanningPolicy) is plans
