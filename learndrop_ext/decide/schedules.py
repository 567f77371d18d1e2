"""The drops that keep the most layers live within a time: a dynamic programme over epochs and prefix lengths.

Letters: S stages, V views, L layers, D + 1 amounts of what is given up.

A stage is one epoch, or in a long run a few epochs with one prefix. What a schedule gives up is the sum, over stages, of
the weights of the layers dropped in it. The programme finds for every stage, state and amount the least seconds of the
rest of the run that gives up that amount. The state is the prefix of the stage before and, up to V, how many epochs
have passed since the first drop: V views are read from images in the first V of them.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate

import numpy as np
from numpy.typing import NDArray

from learndrop_ext.decide.forecast import RunCosts, plan_prefixes, total_seconds

#: Elements of the table of seconds. 4e6 doubles are 32 MB, and each takes part in up to L minima: at 1e9 a second, a
#: network of 20 layers is planned in 0.1 s. Without stages of several epochs one view, 20 layers and 100 epochs would
#: take 100 * 2 * 20 * 1900 = 7.6e6.
TABLE = 4_000_000

Table = NDArray[np.float64]


@dataclass(frozen=True)
class Stage:
    """Some epochs with one prefix.

    Args:
        epoch: epochs done before it.
        length: how many it has.
        weight: how many stages it counts as in what a schedule gives up.
    """

    epoch: int
    length: int
    weight: int = 1


def best_prefixes(
    costs: RunCosts,
    epochs: int,
    *,
    epoch: int,
    prefix: int,
    seconds: float,
    past: Sequence[int] = (),
    weights: Sequence[int] | None = None,
    hold: int = 1,
) -> tuple[int, ...]:
    """Choose the prefix of each epoch left so that as much as possible stays live within `seconds`.

    Prefixes never shrink. Of the schedules that take at most `seconds`, those with the least sum of dropped layers over
    epochs are best, each layer by its weight; of these the one whose prefix is shortest at the first epoch, then at the
    second, and so on: it grows the most. Where nothing is short enough, the shortest schedule.

    Args:
        costs: what epochs cost.
        epochs: length of the run.
        epoch: epochs done, less than `epochs`.
        prefix: layers dropped now.
        seconds: for the epochs left.
        past: the prefix of every epoch done.
        weights: for each layer, what one epoch of it is worth, at least 1; 1 each by default.
        hold: for how many of the epochs left, at least one, the first prefix is kept.

    Returns:
        The prefix of each epoch from `epoch` on.
    """
    left = epochs - epoch
    worth = [1] * len(costs.layers) if weights is None else list(weights)
    given_up = list(accumulate((0 if i < prefix else w for i, w in enumerate(worth[:-1])), initial=0))
    stages = _stages(epoch, left, len(costs.layers), costs.views, given_up[-1], hold=min(hold, left))
    search = _Search(costs, epochs, stages, given_up)
    since = 0
    for k in reversed(past):
        if k == 0 or since == costs.views:
            break
        since += 1
    limit, best, best_seconds = seconds, None, np.inf
    # With one view the programme's seconds are those of the plan. With more it takes layers that are dropped while
    # views are still being filled to be converted one drop after the other: what that is off by is then made up for.
    for _ in range(3):
        found, expected = search.schedule(prefix, since if prefix else 0, limit)
        actual = total_seconds(plan_prefixes(costs, found, epochs, past=past))
        fits, fitted = actual <= seconds * (1 + 1e-9), best_seconds <= seconds * (1 + 1e-9)
        if best is None or (fits and (not fitted or actual > best_seconds)) or (not fits and actual < best_seconds):
            best, best_seconds = found, actual
        if abs(actual - expected) <= 1e-9 * expected:
            break
        limit = seconds - (actual - expected)
    assert best is not None
    return best


class _Search:
    """The table of least seconds, filled from the last stage to the first."""

    def __init__(self, costs: RunCosts, epochs: int, stages: Sequence[Stage], given_up: Sequence[int]) -> None:
        L, V, D = len(costs.layers), costs.views, sum(stage.weight for stage in stages) * given_up[-1]
        self.views = V
        self.epochs = epochs
        self.stages = stages
        self.given_up = given_up
        self.steady = np.array([costs.epoch_seconds(k) for k in range(L)])
        # filling[stored][before, after], for before <= after
        self.filling = np.stack([_filling(costs, stored=stored) for stored in (False, True)])
        # rest[stage][since, prefix of the stage before, amount]
        end = np.full((V + 1, L, D + 1), np.inf)
        end[:, :, 0] = 0.0
        self.rest: list[Table] = [end]
        for stage in reversed(stages):
            table = np.full((V + 1, L, D + 1), np.inf)
            for since in range(V + 1):
                behind = np.stack([self._behind(stage, since, k) for k in range(L)])
                extra = self._conversions(stage, since)
                for before in range(L) if since else (0,):
                    table[since, before] = (behind[before:] + extra[before, before:, None]).min(0)
            self.rest.insert(0, table)

    def schedule(self, prefix: int, since: int, limit: float) -> tuple[tuple[int, ...], float]:
        """The best prefixes within `limit` seconds, or the shortest; and the seconds they take."""
        rest = self.rest[0][since, prefix]
        amount = int(np.argmax(rest <= limit)) if (rest <= limit).any() else int(rest.argmin())
        left = max(limit, float(rest[amount])) * (1 + 1e-12)
        found: list[int] = []
        taken = 0.0
        for stage, behind in zip(self.stages, self.rest[1:], strict=True):
            extra = self._conversions(stage, since)[prefix]
            for k in range(prefix, len(self.steady)):
                seconds = self._stage_seconds(stage, since, k) + float(extra[k])
                later, then = self._later(stage, since, k), amount - stage.weight * self.given_up[k]
                if then >= 0 and taken + seconds + behind[later, k, then] <= left:
                    break
            else:
                raise AssertionError("the table holds a schedule for every amount that it has seconds for")
            taken, amount, since, prefix = taken + seconds, then, later, k
            found += [k] * stage.length
        return tuple(found), taken

    def _behind(self, stage: Stage, since: int, prefix: int) -> Table:
        """Seconds of a stage with this prefix and of all stages after it, by amount."""
        shift = stage.weight * self.given_up[prefix]
        rest = self.rest[0][self._later(stage, since, prefix), prefix]
        moved: Table = np.full_like(rest, np.inf)
        moved[shift:] = rest[: len(rest) - shift]
        moved += self._stage_seconds(stage, since, prefix)
        return moved

    def _later(self, stage: Stage, since: int, prefix: int) -> int:
        return min(self.views, since + stage.length) if prefix else 0

    def _stage_seconds(self, stage: Stage, since: int, prefix: int) -> float:
        """Of a stage that finds all views stored so far in this prefix's rows."""
        images = min(stage.length, self.views - since) if prefix else 0
        seconds = (stage.length - images) * float(self.steady[prefix])
        for epoch in range(stage.epoch, stage.epoch + images):
            seconds += float(self.filling[self._stored(epoch), 0, prefix])
        return seconds

    def _conversions(self, stage: Stage, since: int) -> Table:
        """[L, L]: seconds, beyond reading, of the epochs that make the rows of one prefix from those of another."""
        # The views stored so far, as far as each is drawn once more before the run ends.
        count = min(since, max(0, self.epochs - stage.epoch - (self.views - since)))
        extra: Table = count * (self.filling[self._stored(stage.epoch)] - self.steady)
        # The first drop has no rows to begin with, and where the prefix stays nothing is made.
        extra[0] = 0.0
        np.fill_diagonal(extra, 0.0)
        return extra

    def _stored(self, epoch: int) -> int:
        """1 where rows made in this epoch are read again, else 0."""
        return int(self.epochs - epoch > self.views)


def _filling(costs: RunCosts, *, stored: bool) -> Table:
    """`costs.filling_seconds(before, after)` as an array [before, after], 0 where after < before.

    In a network of 30 layers as many calls as it has entries take longer than all the rest of a plan.
    """
    cuts = np.array(costs.cuts)
    live = np.array([costs.live_seconds(k) for k in range(len(cuts))])
    source = np.array([costs.source_seconds(k) for k in range(len(cuts))])
    frozen = np.cumsum([0.0, *(layer.seconds for layer in costs.layers)])
    made = (cuts[None, :] > cuts[:, None]) & stored
    per_sample = source[:, None] + frozen[:-1] - frozen[cuts][:, None] + np.where(made, costs.write_seconds, 0.0) + live
    table: Table = np.triu(per_sample) * (costs.samples * costs.scale)
    return table


def _stages(epoch: int, left: int, layers: int, views: int, given_up: int, *, hold: int = 1) -> list[Stage]:
    """The epochs left, in as many stages as TABLE allows, those of one epoch first; before them one of `hold` epochs."""
    held = hold if hold > 1 else 0
    if held == left:
        return [Stage(epoch, held)]
    most = max(1, int((TABLE / ((views + 1) * layers * max(1, given_up))) ** 0.5) - (held > 0))
    count = min(left - held, most)
    length, longer = divmod(left - held, count)
    stages = [Stage(epoch, held, max(1, round(held / length)))] if held else []
    epoch += held
    for i in range(count):
        stages.append(Stage(epoch, length + (i >= count - longer)))
        epoch += stages[-1].length
    return stages
