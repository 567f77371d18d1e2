"""The policies of the command line: stopped, budget:2.0, fixed:0=3,1=4."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from learndrop_ext.decide.policy import Budget, Fixed, Policy, StoppedLearning

FORMS = "stopped, budget:SPEEDUP, budget:SPEEDUP,start=EPOCH, or fixed:EPOCH=LAYERS,EPOCH=LAYERS,..."


@dataclass(frozen=True)
class PolicySpec:
    """The kind of a policy ("stopped", "budget" or "fixed") and the arguments of its constructor."""

    kind: str
    arguments: Mapping[str, Any] = field(default_factory=dict)

    @property
    def speedup(self) -> float:
        """The speedup given, or the default of `Budget`."""
        return float(self.arguments.get("speedup", Budget.speedup))

    def build(self, **stopped: Any) -> Policy:
        """Build the policy. `stopped` holds the arguments of `StoppedLearning`; other policies ignore it."""
        if self.kind == "stopped":
            return StoppedLearning(**stopped)
        if self.kind == "fixed":
            return Fixed(**self.arguments)
        return Budget(**self.arguments)


def parse_policy(text: str) -> PolicySpec:
    """Parse a policy of the command line: one of `FORMS`, or ValueError. "fixed:0=3,1=4" is `Fixed({0: 3, 1: 4})`."""
    kind, _, rest = text.partition(":")
    try:
        if text == "stopped":
            return PolicySpec("stopped")
        if kind == "budget":
            speedup, *options = rest.split(",")
            settings = dict(option.split("=") for option in options)
            if settings.keys() <= {"start"} and len(settings) == len(options):
                starts = {key: int(value) for key, value in settings.items()}
                return PolicySpec("budget", {"speedup": float(speedup), **starts})
        if kind == "fixed":
            pairs = [(int(epoch), int(layers)) for epoch, layers in (pair.split("=") for pair in rest.split(","))]
            if len(dict(pairs)) == len(pairs):
                return PolicySpec("fixed", {"prefixes": dict(pairs)})
    except ValueError:
        pass  # not a number: refused below
    raise ValueError(f"policy must be {FORMS}, got {text!r}")
