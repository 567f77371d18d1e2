"""The schedule of drops that keeps the most layers live within a time: dynamic programming over epochs and prefix lengths.

S stages, V views, L layers, D + 1 levels of loss.

A stage is one epoch or, in a long run, a few epochs with one prefix. The loss of a schedule is the sum, over stages, of the
weights of the layers dropped in it. For every stage, state and loss, the table holds the least seconds in which the rest of
the run can be trained at that loss. The state is the prefix of the stage before, and the number of epochs since the first
drop up to V, because V views are read from images in the first V of them.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate, combinations_with_replacement, product

import numpy as np
from numpy.typing import NDArray

from learndrop_ext.decide.forecast import RunCosts, plan_seconds

#: Largest number of elements of the table. 4e6 doubles are 32 MB, and each takes part in up to L minima: at 1e9 per second,
#: a network of 20 layers is planned in 0.1 s. With stages of one epoch, one view, 20 layers and 100 epochs would take
#: 100 * 2 * 20 * 1900 = 7.6e6.
TABLE = 4_000_000

Table = NDArray[np.float64]


@dataclass(frozen=True)
class Stage:
    """Some epochs with one prefix."""

    epoch: int  # number of epochs done before it
    length: int  # number of its epochs
    weight: int = 1  # number of stages that it counts as in a schedule's loss


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
    """Return the prefix of each remaining epoch, chosen so that as much as possible stays live within `seconds`.

    Prefixes never shrink. Of the schedules that take at most `seconds`, the one with the smallest loss is chosen: the sum of
    the weights of dropped layers over epochs. Of several, it is the one with the shortest prefix in the first epoch, then in
    the second, and so on, which grows the most. If none is short enough, it is the shortest schedule.

    Args:
        costs: costs of the run.
        epochs: length of the run.
        epoch: number of epochs done, less than `epochs`.
        prefix: number of layers dropped now.
        seconds: time for the remaining epochs.
        past: the prefix of every epoch done.
        weights: the loss of dropping each layer for one epoch, at least 1. Default: 1 each
        hold: number of remaining epochs, at least one, in which the first prefix is kept.
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
    limit = seconds
    tried: dict[float, tuple[int, ...]] = {}  # schedules by their seconds
    # With one view the table's seconds are those of the plan. With more views, it assumes that layers dropped while views
    # are being filled are converted one drop after the other. The limit is then corrected by the difference.
    for _ in range(3):
        found, expected = search.schedule(prefix, since if prefix else 0, limit)
        actual = sum(plan_seconds(costs, found, past=past))
        tried.setdefault(actual, found)
        if abs(actual - expected) <= 1e-9 * expected:
            break
        limit = seconds - (actual - expected)
    in_time = [taken for taken in tried if taken <= seconds * (1 + 1e-9)]
    return tried[max(in_time, default=min(tried))]


class _Search:
    """The table of least seconds, filled from the last stage to the first."""

    def __init__(self, costs: RunCosts, epochs: int, stages: Sequence[Stage], given_up: Sequence[int]) -> None:
        L, V, D = len(costs.layers), costs.views, sum(stage.weight for stage in stages) * given_up[-1]
        self.views = V
        self.epochs = epochs
        self.stages = stages
        self.given_up = given_up
        self.wrapping = costs.wrap_seconds * (1 - np.eye(L))
        self.steady = np.array([costs.epoch_seconds(k) for k in range(L)])
        # filling[stored][before, after], for before <= after
        self.filling = np.zeros((2, L, L))
        for stored, (before, after) in product((0, 1), combinations_with_replacement(range(L), 2)):
            self.filling[stored, before, after] = costs.filling_seconds(before, after, stored=bool(stored))
        # rest[stage][since, prefix of the stage before, amount]
        end = np.full((V + 1, L, D + 1), np.inf)
        end[:, :, 0] = 0.0
        self.rest: list[Table] = [end]
        for stage in reversed(stages):
            table = np.full((V + 1, L, D + 1), np.inf)
            for since in range(V + 1):
                behind = np.stack([self._behind(stage, self.rest[0], since, k) for k in range(L)])
                extra = self._conversions(stage, since)
                for before in range(L) if since else (0,):
                    table[since, before] = (behind[before:] + extra[before, before:, None]).min(0)
            self.rest.insert(0, table)

    def schedule(self, prefix: int, since: int, limit: float) -> tuple[tuple[int, ...], float]:
        """The best prefixes within `limit` seconds, or the shortest ones, and their seconds."""
        rest = self.rest[0][since, prefix]
        amount = int(np.argmax(rest <= limit)) if (rest <= limit).any() else int(rest.argmin())
        left = max(limit, float(rest[amount])) * (1 + 1e-12)
        found: list[int] = []
        taken = 0.0
        for stage, after in zip(self.stages, self.rest[1:], strict=True):
            extra = self._conversions(stage, since)[prefix]
            behind = np.array([self._behind(stage, after, since, k)[amount] for k in range(len(extra))])
            # The first one in time, which is there: the table holds a schedule for every amount that it has seconds for.
            k = prefix + int(np.argmax(taken + (extra + behind)[prefix:] <= left))
            taken += float(extra[k]) + self._stage_seconds(stage, since, k)
            amount -= stage.weight * self.given_up[k]
            since, prefix = self._later(stage, since, k), k
            found += [k] * stage.length
        return tuple(found), taken

    def _behind(self, stage: Stage, after: Table, since: int, prefix: int) -> Table:
        """Seconds of a stage with this prefix and of all stages after it, whose table is `after`, by loss."""
        shift = stage.weight * self.given_up[prefix]
        rest = after[self._later(stage, since, prefix), prefix]
        moved: Table = np.full_like(rest, np.inf)
        moved[shift:] = rest[: len(rest) - shift]
        moved += self._stage_seconds(stage, since, prefix)
        return moved

    def _later(self, stage: Stage, since: int, prefix: int) -> int:
        return min(self.views, since + stage.length) if prefix else 0

    def _stage_seconds(self, stage: Stage, since: int, prefix: int) -> float:
        """Seconds of a stage if all views stored so far are rows of this prefix."""
        images = min(stage.length, self.views - since) if prefix else 0
        seconds = (stage.length - images) * float(self.steady[prefix])
        for epoch in range(stage.epoch, stage.epoch + images):
            seconds += float(self.filling[self._stored(epoch), 0, prefix])
        return seconds

    def _conversions(self, stage: Stage, since: int) -> Table:
        """[L, L]: extra seconds of a drop from one prefix to another: to wrap what is live, and of the epochs that compute
        the rows of the one from those of the other."""
        # The views stored so far that are drawn again before the run ends.
        count = min(since, max(0, self.epochs - stage.epoch - (self.views - since)))
        extra: Table = count * (self.filling[self._stored(stage.epoch)] - self.steady)
        # Before the first drop there are no rows to convert, and if the prefix stays none are computed.
        extra[0] = 0.0
        np.fill_diagonal(extra, 0.0)
        return extra + self.wrapping

    def _stored(self, epoch: int) -> int:
        """1 if rows computed in this epoch are read again, else 0."""
        return int(self.epochs - epoch > self.views)


def _stages(epoch: int, left: int, layers: int, views: int, given_up: int, *, hold: int = 1) -> list[Stage]:
    """A stage of `hold` epochs, and the other remaining epochs in as many stages as TABLE allows, the shortest first."""
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
