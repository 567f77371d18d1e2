from __future__ import annotations

import re

import pytest

from learndrop_ext.app.policies import PolicySpec, parse_policy
from learndrop_ext.decide.policy import Budget, Fixed, StoppedLearning


@pytest.mark.parametrize(
    ("text", "wanted"),
    [
        ("stopped", PolicySpec("stopped")),
        ("budget:2.0", PolicySpec("budget", {"speedup": 2.0})),
        ("budget:3,start=1", PolicySpec("budget", {"speedup": 3.0, "start": 1})),
        ("fixed:0=3,1=4", PolicySpec("fixed", {"prefixes": {0: 3, 1: 4}})),
        ("fixed:5=2", PolicySpec("fixed", {"prefixes": {5: 2}})),
    ],
)
def test_parse_policy(text: str, wanted: PolicySpec) -> None:
    assert parse_policy(text) == wanted


@pytest.mark.parametrize(
    "text",
    [
        *(
            "",
            "stop",
            "stopped:1",
            "budget",
            "budget:",
            "budget:fast",
            "budget:2,end=1",
            "budget:2,start",
            "budget:2,1",
        ),
        *("budget:2,start=1,start=2", "budget:2,start=1.5", "fixed", "fixed:", "fixed:3", "fixed:1=2=3", "fixed:1=2,"),
        *("fixed:1=2,1=3", "fixed:1=2.0"),
    ],
)
def test_parse_policy_refuses(text: str) -> None:
    message = (
        "policy must be stopped, budget:SPEEDUP, budget:SPEEDUP,start=EPOCH, or fixed:EPOCH=LAYERS,EPOCH=LAYERS,..., "
        f"got {text!r}"
    )
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        parse_policy(text)


def test_build_gives_each_kind_its_arguments() -> None:
    assert parse_policy("stopped").build(patience=3) == StoppedLearning(patience=3)
    assert parse_policy("fixed:0=2").build(patience=3) == Fixed({0: 2})
    assert parse_policy("budget:2.5,start=1").build(patience=3) == Budget(2.5, start=1)
