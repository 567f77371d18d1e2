"""Scores so far -> decision: how many layers are dropped from the next epoch on. Pure functions of what they are given.

A policy is any callable `policy(situation) -> Decision`. It never changes anything; `drop` does.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field


@dataclass(frozen=True)
class Situation:
    """What a policy sees after an epoch.

    epoch: epochs done, >= 1. epochs: length of the run, or None when it is not known. prefix: layers dropped now.
    layers: the names of all L layers. scores: one tuple per measurement so far, each of L entries, None where a layer
    was already dropped. learning_rate: of the optimizer's first group. fill_seconds, saved_seconds: estimates for
    every prefix length 0..L-1, for its fill once and for what an epoch then gets shorter. epoch_seconds: of an epoch in
    which nothing was dropped.
    """

    epoch: int
    epochs: int | None
    prefix: int
    layers: tuple[str, ...]
    scores: tuple[tuple[float | None, ...], ...]
    learning_rate: float = 0.0
    fill_seconds: tuple[float, ...] = ()
    saved_seconds: tuple[float, ...] = ()
    epoch_seconds: float = 0.0


@dataclass(frozen=True)
class Decision:
    """How many layers are dropped from now on, and why in words."""

    prefix: int
    reason: str


Policy = Callable[[Situation], Decision]


@dataclass(frozen=True)
class StoppedLearning:
    """Drops the longest run of layers at the input side that have stopped learning.

    A layer has stopped when its smoothed score was under `threshold` for `patience` measurements in a row, the first
    `warmup` epochs not counted. The smoothed score is the exponential moving average with weight `1 - smoothing` for
    the newest measurement. A drop has to earn its fill back in the epochs left; where the length of the run is not
    known, the epochs left are taken to be as many as were done. What it saves then has to be at least the share
    `min_saving` of the run without drops: a drop that saves little costs accuracy all the same, and where this was
    measured (docs/scores.md) the same recipe with one epoch less was better. `max_dropped` bounds the share of layers
    that may be dropped.
    """

    threshold: float = 0.2
    patience: int = 2
    warmup: int = 2
    smoothing: float = 0.5
    max_dropped: float = 1.0
    min_saving: float = 0.1

    def __post_init__(self) -> None:
        for name in ("threshold", "smoothing", "max_dropped", "min_saving"):
            value = getattr(self, name)
            if not 0.0 <= value <= 1.0:
                raise ValueError(f"StoppedLearning: {name} must be within 0.0..1.0, got {value!r}")
        for name, least in (("patience", 1), ("warmup", 0)):
            value = getattr(self, name)
            if not isinstance(value, int) or value < least:
                raise ValueError(f"StoppedLearning: {name} must be a whole number >= {least}, got {value!r}")

    def __call__(self, situation: Situation) -> Decision:
        if situation.epoch <= self.warmup:
            return Decision(situation.prefix, f"warm-up: epoch {situation.epoch} of {self.warmup}")
        last = min(len(situation.layers) - 1, int(self.max_dropped * len(situation.layers)))
        prefix = situation.prefix
        while prefix < last and self._stopped(situation, prefix):
            prefix += 1
        if prefix == situation.prefix:
            return Decision(prefix, self._still(situation, prefix, last))
        stopped = f"scores under {self.threshold:g} for {self.patience} measurements"
        return _worth(situation, prefix, stopped, min_saving=self.min_saving)

    def smoothed(self, situation: Situation, layer: int) -> list[float]:
        """The smoothed scores of one layer after the warm-up, oldest first."""
        values: list[float] = []
        for measured in situation.scores[self.warmup :]:
            value = measured[layer]
            if value is not None:
                values.append(value if not values else self.smoothing * values[-1] + (1 - self.smoothing) * value)
        return values

    def _stopped(self, situation: Situation, layer: int) -> bool:
        values = self.smoothed(situation, layer)[-self.patience :]
        return len(values) == self.patience and max(values) < self.threshold

    def _still(self, situation: Situation, prefix: int, last: int) -> str:
        if prefix >= last:
            return f"all {last} layers that may be dropped are"
        values = self.smoothed(situation, prefix)
        return f"{situation.layers[prefix]} still learns: score {values[-1]:.2f}" if values else "no score yet"


@dataclass(frozen=True)
class Fixed:
    """Drops by hand: `Fixed({epoch: prefix length})`, epoch being the epochs done. `Fixed({})` never drops."""

    prefixes: Mapping[int, int] = field(default_factory=dict)

    def __post_init__(self) -> None:
        before = 0
        for epoch, prefix in sorted(self.prefixes.items()):
            if epoch < 1 or prefix < before:
                raise ValueError(
                    "Fixed: prefixes must map epochs >= 1 to prefix lengths that do not shrink, "
                    f"got {prefix} at epoch {epoch}"
                )
            before = prefix

    def __call__(self, situation: Situation) -> Decision:
        prefix = max([situation.prefix, *(p for e, p in self.prefixes.items() if e <= situation.epoch)])
        if prefix >= len(situation.layers):
            raise ValueError(
                f"Fixed: prefix must leave a layer to train: at most {len(situation.layers) - 1}, got {prefix}"
            )
        return Decision(prefix, "set by hand" if prefix > situation.prefix else "nothing set for this epoch")


def _worth(situation: Situation, prefix: int, reason: str, *, min_saving: float) -> Decision:
    """The longest prefix within `prefix` that earns its fill back in the epochs left and saves the share `min_saving` of the
    run, or the one there is."""
    left = situation.epoch if situation.epochs is None else situation.epochs - situation.epoch
    if not situation.fill_seconds:
        return Decision(prefix, reason)
    run = (situation.epoch + left) * situation.epoch_seconds
    for k in range(prefix, situation.prefix, -1):
        saved = situation.saved_seconds[k] * left - situation.fill_seconds[k]
        if saved > 0 and saved >= min_saving * run:
            return Decision(k, reason)
    fill, saved = situation.fill_seconds[prefix], situation.saved_seconds[prefix] * left
    wanted = "" if saved <= fill else f", {(saved - fill) / run:.1%} of the run where {min_saving:.1%} are wanted"
    return Decision(
        situation.prefix, f"not worth it: the fill takes {fill:.2f} s and {left} epochs save {saved:.2f} s{wanted}"
    )
