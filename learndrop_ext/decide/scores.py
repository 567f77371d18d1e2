"""Changes of the layers -> one score a layer: how much it still learns.

The paper scores "how much each layer's parameters change and whether the layer will continue learning" without giving
the formula in its abstract; this one is our own.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

from learndrop_ext.decide.deltas import LayerChange

#: Relative change per measurement at which a layer counts as half at rest: what the layers of an annealed run change by
#: in its last epoch (docs/scores.md).
REST = 1e-3


def score(change: LayerChange) -> float:
    """How much one layer still learns, in [0, 1]: 0 means not at all, 1 means it travels straight on.

    score = p * r / (r + REST), with r = ||delta|| / ||w|| the relative change since the last measurement and
    p = max(0, cosine between this delta and the one before) its persistence. Both are needed: under SGD noise r
    follows the learning rate and never reaches 0, while a layer that shakes in place has successive deltas that do not
    point the same way (cosine near or below 0) however large they are. Without a previous delta p is 1: nothing is
    known against the layer.

    On MNIST (docs/scores.md) the first convolution has r = 0.183 and cosine 0.437 after epoch 2, score 0.435; after
    epoch 5, at the peak of the learning rate, r is still 0.078 and the cosine -0.111, score 0; after epoch 12, the
    learning rate all but gone, r = 0.001 and cosine 0.885, score 0.468.
    """
    persistence = 1.0 if change.cosine is None else min(max(change.cosine, 0.0), 1.0)
    r = change.relative
    if math.isinf(r):
        return persistence
    return persistence * r / (r + REST)


def scores(changes: Sequence[LayerChange]) -> tuple[float, ...]:
    """The score of each layer, in order."""
    return tuple(score(change) for change in changes)
