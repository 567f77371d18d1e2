"""Policies: scores and costs so far -> how many layers are dropped from the next epoch on. Pure functions.

A policy is any callable `policy(situation) -> Decision`. The scheduler carries out its decision.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import ClassVar, Protocol, runtime_checkable

from learndrop_ext.decide.deltas import LayerChange
from learndrop_ext.decide.forecast import RunCosts, largest_speedup, one_drop, plan_seconds
from learndrop_ext.decide.schedules import best_prefixes
from learndrop_ext.warn import warn


@dataclass(frozen=True)
class Situation:
    """What a policy sees, once before training and after each epoch.

    Args:
        epoch: number of epochs done; 0 before training.
        epochs: length of the run, or None if it is not known.
        prefix: number of layers dropped now.
        layers: names of all L layers.
        scores: for each epoch done, a tuple of L scores, None for layers that were dropped in it; () before training.
        learning_rate: learning rate of the optimizer's first group.
        learning_rates: that before training and after each epoch done; () before training.
        is_scheduled: whether an `LRScheduler` sets it.
        fill_seconds: for every prefix length 0..L-1, what a drop to it costs once.
        saved_seconds: for every prefix length, what a drop to it saves per epoch.
        epoch_seconds: time of an epoch without drops.
        costs: costs of this run; None before they were measured, as before training under a policy without `check`.
        elapsed_seconds: wall-clock time of the run so far, including the work of drops.
        full_seconds: time of the whole run without drops; 0.0 to take it from `costs`.
        undropped: number of epochs done when all layers were last made live again, or None.
        changes: the L measured changes of each epoch done, from which the scores are computed; None as in `scores`.
        asleep: number of first layers that do not train: those dropped, and those behind them of which no parameter is held
            by the optimizer and requires a gradient.
    """

    epoch: int
    epochs: int | None
    prefix: int
    layers: tuple[str, ...]
    scores: tuple[tuple[float | None, ...], ...]
    learning_rate: float = 0.0
    learning_rates: tuple[float, ...] = ()
    is_scheduled: bool = False
    fill_seconds: tuple[float, ...] = ()
    saved_seconds: tuple[float, ...] = ()
    epoch_seconds: float = 0.0
    costs: RunCosts | None = None
    elapsed_seconds: float = 0.0
    full_seconds: float = 0.0
    undropped: int | None = None
    changes: tuple[tuple[LayerChange | None, ...], ...] = ()
    asleep: int = 0

    @property
    def past(self) -> tuple[int, ...]:
        """The prefix in every epoch done."""
        return tuple(sum(score is None for score in measured) for measured in self.scores)


@dataclass(frozen=True)
class Decision:
    """What a policy decides.

    Args:
        prefix: number of layers dropped from now on.
        reason: the reason in words.
        recalibrate: whether the batch norms of layers that are dropped now get the statistics of their inputs under the
            weights that they are frozen with; see `forward.statistics`. Not before training.
    """

    prefix: int
    reason: str
    recalibrate: bool = True


Policy = Callable[[Situation], Decision]


@runtime_checkable
class PlanningPolicy(Protocol):
    """A policy that plans a run's time: layers are timed before training, and it may refuse what they say."""

    @property
    def speedup(self) -> float:
        """Time of the run without drops over the time asked for."""

    def check(self, costs: RunCosts, epochs: int | None) -> None:
        """Raise ValueError if the target cannot be met."""

    def __call__(self, situation: Situation) -> Decision:
        """Decide."""


def uses_costs(policy: Policy) -> bool:
    """Return whether a policy reads the costs of a situation; one that does not says so by `uses_costs = False`."""
    return bool(getattr(policy, "uses_costs", True))


#: A plan that uses less than this share of the time asked for is made again with equal weights, which allow more sums.
USED = 0.96
#: A plan made before the first step, and a run at its end, give a warning if they take more than this times the time asked
#: for, and the run as many seconds more.
LATE, LATE_SECONDS = 1.1, 5.0
#: Largest sum of the weights of all layers. Time and memory of planning grow with it; k^2 is exact up to 63 layers.
LARGEST_SUM = 4000
#: How far epochs may be from their forecast, either way, before one with dropped layers has been measured.
UNCONFIRMED = 1.1


@dataclass(frozen=True)
class StoppedLearning:
    """Drops all layers before the first one that is still learning.

    A layer has stopped learning when its smoothed score was below `threshold` for `patience` measurements in a row after the
    first `warmup` epochs. The smoothed score is the exponential moving average with weight `1 - smoothing` for the newest
    measurement. A drop must pay for its fill in the epochs left; if the length of the run is not known, as many are assumed
    as have been done. It must also save at least the share `min_saving` of the run without drops: a drop that saves little
    still costs accuracy, and in a measurement (docs/scores.md) training one epoch less was better. At most the share
    `max_dropped` of the layers is dropped. After `undrop()` only later measurements count. Layers that the user has frozen
    are not waited for: they are dropped after the first epoch, by which a drop's costs are known.

    At a high learning rate a layer may fluctuate and still improve as the rate falls (docs/scores.md). With an
    `LRScheduler`, or a learning rate that has changed, a drop waits until the rate is at most the share `annealed` of its
    highest so far.

    Args:
        threshold (float, optional): score below which a layer counts as stopped. Default: 0.2
        patience (int, optional): number of measurements in a row. Default: 2
        warmup (int, optional): number of epochs that do not count. Default: 2
        smoothing (float, optional): weight of older measurements. Default: 0.5
        max_dropped (float, optional): largest share of the layers to drop. Default: 1.0
        min_saving (float, optional): smallest share of the run to save. Default: 0.1
        annealed (float, optional): share of the highest learning rate; 1.0 drops at any. Default: 0.5

    Raises:
        ValueError: a value is out of range.
    """

    threshold: float = 0.2
    patience: int = 2
    warmup: int = 2
    smoothing: float = 0.5
    max_dropped: float = 1.0
    min_saving: float = 0.1
    annealed: float = 0.5

    def __post_init__(self) -> None:
        for name in ("threshold", "smoothing", "max_dropped", "min_saving", "annealed"):
            if not 0.0 <= (value := getattr(self, name)) <= 1.0:
                raise ValueError(f"StoppedLearning: {name} must be within 0.0..1.0, got {value!r}")
        for name, least in (("patience", 1), ("warmup", 0)):
            if not _is_whole(value := getattr(self, name), least):
                raise ValueError(f"StoppedLearning: {name} must be a whole number >= {least}, got {value!r}")

    def __call__(self, situation: Situation) -> Decision:
        last = min(len(situation.layers) - 1, int(self.max_dropped * len(situation.layers)))
        frozen = min(situation.asleep, last) if situation.epoch > (situation.undropped or 0) else 0
        prefix = max(situation.prefix, frozen)
        rates = (*situation.learning_rates, situation.learning_rate)
        may_fall = situation.is_scheduled or min(rates) < max(rates)
        waits = may_fall and situation.learning_rate > self.annealed * max(rates)
        while not waits and situation.epoch > self.warmup and prefix < last and self._stopped(situation, prefix):
            prefix += 1
        if prefix > situation.prefix:
            stopped = f"scores under {self.threshold:g} for {self.patience} measurements"
            reason = "frozen by the user" if prefix == frozen else stopped
            return _worth(situation, prefix, reason, min_saving=self.min_saving)
        if situation.epoch <= self.warmup:
            return Decision(prefix, f"warm-up: epoch {situation.epoch} of {self.warmup}")
        if waits and prefix < last:
            share = situation.learning_rate / max(rates)
            return Decision(
                prefix, f"the learning rate is {share:.0%} of its highest; drops wait for {self.annealed:.0%}"
            )
        return Decision(prefix, self._still(situation, prefix, last))

    def smoothed(self, situation: Situation, layer: int) -> list[float]:
        """Return the smoothed scores of one layer after the warm-up, oldest first."""
        first = max(self.warmup, situation.undropped or 0)
        return smoothed_scores(situation, layer, first=first, smoothing=self.smoothing)

    def _stopped(self, situation: Situation, layer: int) -> bool:
        values = self.smoothed(situation, layer)[-self.patience :]
        return len(values) == self.patience and max(values) < self.threshold

    def _still(self, situation: Situation, prefix: int, last: int) -> str:
        if prefix >= last:
            return f"all {last} layers that may be dropped are"
        values = self.smoothed(situation, prefix)
        if not values:
            return "no score yet"
        name, score = situation.layers[prefix], _digits(values[-1], self.threshold)
        under = next((i for i, value in enumerate(reversed(values)) if value >= self.threshold), len(values))
        if not under:
            return f"{name} still learns: score {score}, threshold {self.threshold:g}"
        return (
            f"{name} may still learn: score {score} is under {self.threshold:g} "
            f"for {under} of {self.patience} measurements"
        )


@dataclass(frozen=True)
class Fixed:
    """Drops set by hand: `Fixed({epoch: prefix length})`, where epoch is the number of epochs done, 0 before training.

    `Fixed({})` never drops. After `undrop()` only entries of later epochs count. Layers are frozen as they are, with
    `recalibrate=True` as other policies do it, see `Decision`.
    """

    prefixes: Mapping[int, int] = field(default_factory=dict)
    recalibrate: bool = False
    uses_costs: ClassVar[bool] = False

    def __post_init__(self) -> None:
        before = 0
        for epoch, prefix in sorted(self.prefixes.items()):
            if epoch < 0 or prefix < before:
                raise ValueError(
                    "Fixed: prefixes must map epochs >= 0 to prefix lengths that do not shrink, "
                    f"got {prefix} at epoch {epoch}"
                )
            before = prefix

    def __call__(self, situation: Situation) -> Decision:
        undropped = -1 if situation.undropped is None else situation.undropped
        due = (p for e, p in self.prefixes.items() if undropped < e <= situation.epoch)
        prefix = max([situation.prefix, *due])
        if prefix >= len(situation.layers):
            raise ValueError(
                f"Fixed: prefix must leave a layer to train: at most {len(situation.layers) - 1}, got {prefix}"
            )
        reason = "set by hand" if prefix > situation.prefix else "nothing set for this epoch"
        return Decision(prefix, reason, self.recalibrate)


@dataclass(frozen=True)
class Budget:
    """Drops as few layers as possible for the run to take 1 / `speedup` of its time.

    Before training and after each epoch, it plans how many layers are dropped in each remaining epoch, from the costs of the
    layers, which the constructor of DropScheduler measures in two training steps, and the time taken so far. Of all plans
    that end in time it follows the one with the smallest loss. With `start=0` dropping layer i for an epoch counts 2 i - 1,
    so that k dropped layers count k^2: rather a few layers for many epochs than many for a few, because the first layers are
    the most general. Of several such plans it takes the one that drops the fewest layers at first. Such a plan grows only in
    the second half of the run, unless it would end too late: a layer that has been trained for a while is best frozen when
    the learning rate has fallen.

    Each plan makes up for epochs that took longer or shorter than forecast; a run that ends late all the same ends with a
    RuntimeWarning. Since dropped layers stay dropped, the first drop is no larger than it would be if epochs were 10 %
    shorter than forecast, as long as later drops can make up for epochs that are as forecast or 10 % longer.

    Args:
        speedup (float, optional): time of the run without drops over the time asked for, at least 1. Default: 2.0
        start (int, optional): least number of epochs without drops. From a start later than 0, dropping a layer for an
            epoch counts from 1 (score 0) to 4 (the highest score), by its score smoothed with weight 1/2. So layers with low
            scores are dropped early, and a plan stops growing before a layer with a high score. Nothing is dropped in the
            first half of the time asked for, epochs / (2 speedup) epochs, if the rest can make up for it. Default: 0

    Raises:
        ValueError: speedup is below 1 or not finite, or start is not a whole number >= 0. When called: the length of the
            run or its costs are not known.
    """

    speedup: float = 2.0
    start: int = 0

    def __post_init__(self) -> None:
        if not (isinstance(self.speedup, int | float) and math.isfinite(self.speedup) and self.speedup >= 1):
            raise ValueError(f"Budget: speedup must be a number >= 1, got {self.speedup!r}")
        if not _is_whole(self.start, 0):
            raise ValueError(f"Budget: start must be a whole number >= 0, got {self.start!r}")

    def check(self, costs: RunCosts, epochs: int | None) -> None:
        """Raise ValueError if no drop is fast enough, naming the largest speedup, or if the run's length is not known."""
        length = _known(epochs)
        largest = largest_speedup(costs, length, start=min(self.start, length))
        if largest < self.speedup:
            # Rounded down, so that the speedup in the message can be reached.
            reached = math.floor(largest * 100) / 100
            raise ValueError(
                f"Budget: speedup must be at most {reached:.2f}, the largest that drops after {self.start} of {length} "
                f"epochs can give this run, got {self.speedup:g}"
            )

    def __call__(self, situation: Situation) -> Decision:
        epochs, costs = _known(situation.epochs), situation.costs
        if costs is None:
            raise ValueError("Budget: the run's costs must be measured, got a situation without costs")
        name = f"budget {self.speedup:g}x"
        if situation.epoch < (begin := self._begin(costs, epochs, situation.prefix)):
            return Decision(situation.prefix, f"{name}: no drop before epoch {begin}")
        wanted = (situation.full_seconds or costs.epoch_seconds(0) * epochs) / self.speedup
        elapsed, L = situation.elapsed_seconds, len(situation.layers)
        if situation.epoch >= epochs:
            if elapsed > max(LATE * wanted, wanted + LATE_SECONDS):
                warn(
                    f"{name}: the run took {elapsed:.1f} s, and was asked to take {wanted:.1f} s: without drops it would "
                    f"take {self.speedup * wanted:.1f} s by estimate. {situation.prefix} of {L} layers are dropped; fewer "
                    "epochs without drops may be better in that time"
                )
            return Decision(situation.prefix, f"{name}: {elapsed:.1f} s of {wanted:.1f} s")
        for weights in self._weights(situation):
            prefixes = self._prefixes(situation, costs, epochs, wanted - elapsed, weights)
            total = elapsed + sum(plan_seconds(costs, prefixes, past=situation.past))
            if total > USED * wanted:
                break
        prefix = prefixes[0]
        if not situation.epoch and elapsed and total > LATE * wanted:
            warn(
                f"{name}: the run is asked to take {wanted:.1f} s, and takes {total:.1f} s at least: making the "
                f"DropScheduler took {elapsed:.1f} s of them. {prefix} of {L} layers are dropped; ask for a smaller "
                "speedup, or train for more epochs"
            )
        return Decision(prefix, f"{name}: {prefix} of {L} layers, forecast {total:.1f} s of {wanted:.1f} s")

    def _begin(self, costs: RunCosts, epochs: int, prefix: int) -> int:
        """The number of epochs without drops, of which there was none until now if `prefix` is 0."""
        half = int(epochs / (2 * self.speedup)) if self.start and not prefix else 0
        drops = (one_drop(costs, epochs, prefix=k, start=half) for k in range(len(costs.layers) - 1, 0, -1))
        is_in_time = half > self.start and any(drop.speedup >= UNCONFIRMED * self.speedup for drop in drops)
        return half if is_in_time else self.start

    def _prefixes(
        self, situation: Situation, costs: RunCosts, epochs: int, seconds: float, weights: Sequence[int]
    ) -> tuple[int, ...]:
        """The prefix of each remaining epoch, within `seconds`."""
        past = situation.past
        first_half = 0 if self.start else -(-epochs // 2) - situation.epoch  # remaining epochs of the first half
        hold = max(1, first_half)

        def best(first: tuple[int, ...], seconds: float) -> tuple[int, ...]:
            """`first` and the best prefixes after it, within `seconds` together."""
            epoch = situation.epoch + len(first)
            if epoch == epochs:
                return first
            prefix = max((situation.prefix, *first))
            begun = sum(plan_seconds(costs, (*first, *(prefix,) * (epochs - epoch)), past=past)[: len(first)])
            more = best_prefixes(
                costs,
                epochs,
                epoch=epoch,
                prefix=prefix,
                seconds=seconds - begun,
                past=(*past, *first),
                weights=weights,
                hold=1 if first else hold,
            )
            return (*first, *more)

        def total(prefixes: tuple[int, ...]) -> float:
            return sum(plan_seconds(costs, prefixes, past=past))

        if any(past) and first_half > 0:
            held = best((situation.prefix,) * hold, seconds)
            if total(held) <= seconds:
                return held
        planned = best((), seconds)
        if any(past):
            return planned
        # No epoch with dropped layers has confirmed the costs yet.
        for prefix in range(best((), seconds * UNCONFIRMED)[0], planned[0]):
            cautious = best((prefix,) * hold, seconds)
            if total(cautious) <= seconds and total(best((prefix,) * hold, 0.0)) * UNCONFIRMED <= seconds:
                return cautious
        return planned

    def _weights(self, situation: Situation) -> tuple[tuple[int, ...], ...]:
        """The loss of dropping each layer for an epoch, in the order to try: 1, 3, 5, ... by depth, then 1 each if no such
        plan uses the time; from a later start 1 to 4 by score."""
        if not self.start:
            L = len(situation.layers)
            coarser = max(1.0, L * L / LARGEST_SUM)
            return tuple(max(1, round(w / coarser)) for w in range(1, 2 * L, 2)), (1,) * L
        smoothed = [
            smoothed_scores(situation, i, first=situation.undropped or 0, smoothing=0.5)
            for i in range(len(situation.layers))
        ]
        latest = [values[-1] if values else 0.0 for values in smoothed]
        top = max(latest)
        return (tuple(1 + round(3 * value / top) if top > 0 else 1 for value in latest),)


def _known(epochs: int | None) -> int:
    if epochs is None:
        raise ValueError("Budget: epochs must be known, give DropScheduler(epochs=...), got None")
    return epochs


def _is_whole(value: object, least: int) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= least


def smoothed_scores(situation: Situation, layer: int, *, first: int, smoothing: float) -> list[float]:
    """Return the exponential moving averages of one layer's scores from epoch `first` on, oldest first.

    The newest score has the weight 1 - smoothing.
    """
    values: list[float] = []
    for measured in situation.scores[first:]:
        value = measured[layer]
        if value is not None:
            values.append(value if not values else smoothing * values[-1] + (1 - smoothing) * value)
    return values


def _digits(value: float, threshold: float) -> str:
    """Format a score with two decimals, or as many as distinguish it from zero and the threshold."""
    for digits in range(2, 17):
        text = f"{value:.{digits}f}"
        if float(text) == value or (float(text) != threshold and float(text) > 0):
            return text
    return repr(value)


def _worth(situation: Situation, prefix: int, reason: str, *, min_saving: float) -> Decision:
    """Decide on the longest prefix up to `prefix` that pays for its fill in the epochs left and saves the share `min_saving`
    of the run, or on the current one."""
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
