"""The rules of other work as tables: what was measured in, layers dropped and the reason out. Expected values by hand."""

from __future__ import annotations

import math
import re
from collections.abc import Sequence

import pytest

from learndrop_ext.decide.deltas import LayerChange
from learndrop_ext.decide.policy import Decision, Policy, Situation
from learndrop_ext.decide.rules import AutoFreeze, FreezeOut, LinearFreeze, PipeTransformer


def at(epoch: int, *, epochs: int | None = 64, prefix: int = 0, L: int = 5, undropped: int | None = None) -> Situation:
    """The situation after `epoch` epochs, for rules that look at nothing else."""
    names = tuple(f"layer{i}" for i in range(L))
    return Situation(epoch=epoch, epochs=epochs, prefix=prefix, layers=names, scores=(), undropped=undropped)


def measured(*norms: Sequence[float | None], prefix: int = 0, undropped: int | None = None) -> Situation:
    """The situation after epochs in which the layers changed by these norms; None: dropped."""
    changes = tuple(
        tuple(None if l2 is None else LayerChange(l2, l2, l2, 1.0, 1.0, 0, l2, None) for l2 in layers)
        for layers in norms
    )
    names = tuple("abcde"[: len(norms[0])]) if norms else ("a", "b", "c", "d", "e")
    return Situation(len(norms), 64, prefix, names, scores=(), changes=changes, undropped=undropped)


@pytest.mark.parametrize(
    ("rule", "situation", "prefix"),
    [
        # t = 0.5, 0.625, 0.75, 0.875 and 1, cubed: epochs 8, 15.6, 27, 42.9 and 64 of 64.
        (FreezeOut(0.5), at(0), 0),
        (FreezeOut(0.5), at(7), 0),
        (FreezeOut(0.5), at(8), 1),
        (FreezeOut(0.5), at(15), 1),
        (FreezeOut(0.5), at(16), 2),
        (FreezeOut(0.5), at(27), 3),
        (FreezeOut(0.5), at(42), 3),
        (FreezeOut(0.5), at(43), 4),
        (FreezeOut(0.5), at(64), 4),
        (FreezeOut(0.0), at(0), 1),
        (FreezeOut(1.0), at(63), 0),
        # The default: 0.8 cubed is 0.512, epoch 32.8.
        (FreezeOut(), at(32), 0),
        (FreezeOut(), at(33), 1),
        (FreezeOut(0.5), at(8, prefix=3), 3),
        (FreezeOut(0.5), at(20, undropped=20), 0),
        (FreezeOut(0.5), at(26, undropped=20), 0),
        (FreezeOut(0.5), at(27, undropped=20), 3),
        # From a half on, 4 layers in 32 epochs: one each 8.
        (LinearFreeze(), at(0), 0),
        (LinearFreeze(), at(39), 0),
        (LinearFreeze(), at(40), 1),
        (LinearFreeze(), at(55), 2),
        (LinearFreeze(), at(64), 4),
        (LinearFreeze(0.5, 0.5), at(48), 1),
        (LinearFreeze(0.5, 0.5), at(64), 2),
        (LinearFreeze(0.0, 1.0), at(16), 1),
        (LinearFreeze(1.0, 1.0), at(64), 0),
        (LinearFreeze(0.5, 0.0), at(64), 0),
        (LinearFreeze(), at(40, prefix=2), 2),
        (LinearFreeze(), at(47, undropped=40), 0),
        (LinearFreeze(), at(48, undropped=40), 2),
    ],
)
def test_rules_in_time(rule: Policy, situation: Situation, prefix: int) -> None:
    assert rule(situation) == Decision(prefix, f"{prefix} layers after epoch {situation.epoch} of 64")


@pytest.mark.parametrize("rule", [FreezeOut(), LinearFreeze()])
def test_rules_in_time_need_the_length_of_the_run(rule: Policy) -> None:
    message = f"{type(rule).__name__}: epochs must be known, give DropScheduler(epochs=...), got None"
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        rule(at(1, epochs=None))


# Changed by 0.1, 0.2, 0.3, 0.4 and 0.5 of what they were: the median is 0.3.
SETTLING = ((10, 10, 10, 10, 10), (9, 8, 7, 6, 5))


@pytest.mark.parametrize(
    ("rule", "situation", "prefix", "reason"),
    [
        (AutoFreeze(), measured(), 0, "0 of 2 measurements"),
        (AutoFreeze(), measured(SETTLING[0]), 0, "1 of 2 measurements"),
        (AutoFreeze(), measured(*SETTLING), 2, "2 layers below the percentile 50, 0.3"),
        # 0.6 of the way from 0.2 to 0.3.
        (AutoFreeze(40), measured(*SETTLING), 2, "2 layers below the percentile 40, 0.26"),
        (AutoFreeze(0), measured(*SETTLING), 0, "0 layers below the percentile 0, 0.1"),
        (AutoFreeze(100), measured(*SETTLING), 4, "4 layers below the percentile 100, 0.5"),
        # Only those in front of the first that still changes.
        (AutoFreeze(), measured((10, 10, 10), (5, 9, 9)), 0, "0 layers below the percentile 50, 0.1"),
        # It counts by how much they change, not where to: 10 to 19 is 0.9.
        (AutoFreeze(), measured((10, 10, 10), (19, 9, 5)), 0, "0 layers below the percentile 50, 0.5"),
        # Of the live layers 0.4 is the median.
        (
            AutoFreeze(),
            measured((10, 10, 10, 10, 10), (None, None, 7, 6, 5), prefix=2),
            3,
            "1 layers below the percentile 50, 0.4",
        ),
        (AutoFreeze(), measured((0, 0, 0), (1, 0, 0)), 0, "0 layers below the percentile 50, 0"),
        (AutoFreeze(), measured(*SETTLING, undropped=1), 0, "1 of 2 measurements"),
        (PipeTransformer(), measured(), 0, "no measurement yet"),
        # A third of 5 is 1.67; a half is 2.5.
        (PipeTransformer(), measured((5, 4, 3, 2, 1)), 1, "5 layers by norm, at most 1"),
        (PipeTransformer(0.5), measured((5, 4, 3, 2, 1)), 2, "5 layers by norm, at most 2"),
        (PipeTransformer(0.5), measured((1, 4, 3, 2, 5)), 1, "1 layers by norm, at most 2"),
        (PipeTransformer(1.0), measured((5, 4, 3, 2, 1)), 4, "5 layers by norm, at most 5"),
        (PipeTransformer(0.0), measured((1, 4, 3, 2, 5)), 0, "1 layers by norm, at most 0"),
        # The last measurement counts. Of 3 live layers a half is 1.5.
        (
            PipeTransformer(0.5),
            measured((1, 1, 9, 9, 9), (None, None, 3, 1, 2), prefix=2),
            3,
            "4 layers by norm, at most 3",
        ),
        (PipeTransformer(), measured((5, 4, 3, 2, 1), undropped=1), 0, "no measurement yet"),
    ],
)
def test_rules_by_norms(rule: Policy, situation: Situation, prefix: int, reason: str) -> None:
    assert rule(situation) == Decision(prefix, reason)


@pytest.mark.parametrize(
    ("rule", "name", "value", "wanted"),
    [
        (FreezeOut, "t0", -0.1, "0.0..1.0"),
        (FreezeOut, "t0", 1.1, "0.0..1.0"),
        (LinearFreeze, "start", 1.5, "0.0..1.0"),
        (LinearFreeze, "level", -1.0, "0.0..1.0"),
        (AutoFreeze, "percentile", 101.0, "0.0..100.0"),
        (AutoFreeze, "percentile", math.nan, "0.0..100.0"),
        (PipeTransformer, "alpha", math.inf, "0.0..1.0"),
    ],
)
def test_a_value_out_of_range_is_refused(rule: type, name: str, value: float, wanted: str) -> None:
    message = f"{rule.__name__}: {name} must be within {wanted}, got {value!r}"
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        rule(**{name: value})


@pytest.mark.parametrize("rule", [FreezeOut(), LinearFreeze(), AutoFreeze(), PipeTransformer()])
def test_no_rule_reads_costs(rule: Policy) -> None:
    assert rule.uses_costs is False  # type: ignore[attr-defined]
