from __future__ import annotations

import dataclasses
import re
from typing import Any

import pytest

from learndrop_ext.app.datasets import load_dataset
from learndrop_ext.app.recipe import Recipe, default_views, parse_narrow, parse_policy, set_up
from learndrop_ext.decide.policy import Budget, Fixed, StoppedLearning
from learndrop_ext.decide.rules import AutoFreeze, FreezeOut, LinearFreeze, PipeTransformer


@pytest.mark.parametrize(
    ("text", "wanted"),
    [
        ("stopped", StoppedLearning(patience=3)),
        ("budget:2.5", Budget(2.5)),
        ("budget:3,start=1", Budget(3.0, start=1)),
        ("fixed:0=3,1=4", Fixed({0: 3, 1: 4})),
        ("fixed:5=2", Fixed({5: 2})),
        ("freezeout:0.5", FreezeOut(0.5)),
        ("linearfreeze:0.25", LinearFreeze(0.25)),
        ("linearfreeze:0.25,level=0.5", LinearFreeze(0.25, 0.5)),
        ("autofreeze:75", AutoFreeze(75.0)),
        ("pipetransformer:0.2", PipeTransformer(0.2)),
    ],
)
def test_parse_policy(text: str, wanted: Any) -> None:
    assert parse_policy(text, patience=3) == wanted


@pytest.mark.parametrize(
    "text",
    [
        *("", "stop", "stopped:1", "budget", "budget:", "budget:fast", "budget:2,end=1", "budget:2,start"),
        *("budget:2,1", "budget:2,start=1,start=2", "budget:2,speedup=3", "budget:2,start=1.5", "fixed", "fixed:"),
        *("fixed:3", "fixed:1=2=3", "fixed:1=2,", "fixed:1=2,1=3", "fixed:1=2.0", "freezeout", "freezeout:t0=1"),
        *("linearfreeze:0.5,0.5", "autofreeze:half", "pipetransformer:0.2,beta=1"),
    ],
)
def test_parse_policy_refuses(text: str) -> None:
    message = (
        "policy must be stopped, budget:SPEEDUP, budget:SPEEDUP,start=EPOCH, fixed:EPOCH=LAYERS,EPOCH=LAYERS,..., "
        "freezeout:T0, linearfreeze:START, linearfreeze:START,level=SHARE, autofreeze:PERCENTILE or "
        f"pipetransformer:ALPHA, got {text!r}"
    )
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        parse_policy(text)


def test_parse_policy_leaves_the_range_to_the_policy() -> None:
    with pytest.raises(ValueError, match=r"^FreezeOut: t0 must be within 0\.0\.\.1\.0, got 2\.0$"):
        parse_policy("freezeout:2")


def test_parse_narrow() -> None:
    assert parse_narrow("l1:0.5") == ("l1", 0.5)
    assert parse_narrow("coreset:1") == ("coreset", 1.0)


@pytest.mark.parametrize("text", ["l1", "l1:", "l1:0", "l1:1.5", "l1:nan", "l3:0.5", ":0.5", "l1:half", ""])
def test_parse_narrow_refuses_other_forms(text: str) -> None:
    with pytest.raises(ValueError, match=r"--narrow must be CRITERION:KEEP with one of l1, l2, .* at most 1, got"):
        parse_narrow(text)


def test_views_are_those_of_the_time_that_a_policy_leaves() -> None:
    assert default_views(None, 24, "stopped") == 1
    assert default_views("flip", 24, "stopped") == default_views("flip", 24, "budget:2") == 6
    assert default_views("standard", 24, "budget:3,start=1") == 4


RECIPE = Recipe(model="resnet10", stem="small", width=8, epochs=2, batch_size=16, lr=0.05)


@pytest.mark.parametrize(("name", "wanted"), [("optimizer", "sgd, adamw"), ("schedule", "one-cycle, constant")])
def test_a_recipe_has_known_parts(name: str, wanted: str) -> None:
    with pytest.raises(ValueError, match=f"^Recipe: {name} must be one of {wanted}, got 'best'$"):
        dataclasses.replace(RECIPE, **{name: "best"})


@pytest.mark.parametrize(("schedule", "rates"), [("constant", {0.05}), ("one-cycle", {0.05, 0.05 / 25, 0.05 / 25e4})])
def test_set_up_follows_the_schedule(schedule: str, rates: set[float]) -> None:
    setup = set_up(load_dataset("digits", limit=80), dataclasses.replace(RECIPE, schedule=schedule))
    seen = [setup.optimizer.param_groups[0]["lr"]]
    for _ in range(9):
        setup.optimizer.step()
        if setup.schedule is not None:
            setup.schedule.step()
        seen.append(setup.optimizer.param_groups[0]["lr"])
    assert {round(rate, 9) for rate in rates} <= {round(rate, 9) for rate in seen}
    assert (len({*seen}) == 1) == (schedule == "constant")
