"""Schedules and controllers: the share of the channels that is left after each step."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass

#: (step, number of steps, share to be left in the end) -> share to be left after the step
Schedule = Callable[[int, int, float], float]


@dataclass(frozen=True)
class OneCycle:
    """From the first step to the last, most in the middle: "One-cycle pruning" (arXiv 2107.02086). At time t = step / steps,
    the share (1 + e^(b - a)) / (1 + e^(b - a t)) of all that go is gone."""

    a: float = 14.0
    b: float = 6.0

    def __call__(self, step: int, steps: int, keep: float) -> float:
        return 1 - (1 - keep) * (1 + math.exp(self.b - self.a)) / (1 + math.exp(self.b - self.a * step / steps))


@dataclass(frozen=True)
class Linear:
    """The same number in every step."""

    def __call__(self, step: int, steps: int, keep: float) -> float:
        return 1 - (1 - keep) * step / steps


@dataclass(frozen=True)
class Iterative:
    """A share of what is left, every so many steps, until `keep` is reached: DropNet (arXiv 2207.06646)."""

    share: float = 0.2
    every: int = 1

    def __post_init__(self) -> None:
        if not 0 < self.share < 1 or self.every < 1:
            raise ValueError(f"Iterative: share must be between 0 and 1 and every at least 1, got {self}")

    def __call__(self, step: int, steps: int, keep: float) -> float:
        return max(keep, (1 - self.share) ** (step // self.every))


@dataclass(frozen=True)
class OneShot:
    """All at once, in one step, counted from 1."""

    step: int

    def __post_init__(self) -> None:
        if self.step < 1:
            raise ValueError(f"OneShot: step must be at least 1, got {self.step!r}")

    def __call__(self, step: int, steps: int, keep: float) -> float:
        return keep if step >= self.step else 1.0


@dataclass(frozen=True)
class Tolerance:
    """Accuracy that may be lost, in place of a rate: "Play and prune" (arXiv 1905.04446). While the accuracy is within
    `points`, at least 0, of the best so far, each step takes `rate`, above 0 and at most 1, of all channels more. When it is
    not, the last state that was within comes back and the rate is halved, which is our own choice."""

    points: float
    rate: float = 0.1

    def __post_init__(self) -> None:
        if not (self.points >= 0 and 0 < self.rate <= 1):
            raise ValueError(f"Tolerance: points must be at least 0 and rate above 0 and at most 1, got {self}")

    def __call__(self, accuracies: Iterable[float], keep: float) -> tuple[float, float, bool]:
        """Return the share to be left after steps with these accuracies, at least `keep`, the best accuracy that was within
        the tolerance, and whether the last one was."""
        left, accepted, rate, best, within = 1.0, 1.0, self.rate, -math.inf, True
        for accuracy in accuracies:
            within = accuracy >= best - self.points
            if within:
                left, accepted, best = max(keep, left - rate), left, max(best, accuracy)
            else:
                left, rate = accepted, rate / 2
        return left, best, within
