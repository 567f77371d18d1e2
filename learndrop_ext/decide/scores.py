"""Changes of the layers -> one score per layer: how much it is still learning.

The paper's abstract says that its scores measure "how much each layer's parameters change and whether the layer will
continue learning", and gives no formula. This formula is our own.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

from learndrop_ext.decide.deltas import LayerChange

#: Relative change per measurement at which a layer counts as half at rest: that of layers in the last epoch of an annealed
#: run (docs/scores.md).
REST = 1e-3


def score(change: LayerChange) -> float:
    """Return how much a layer is still learning, in [0, 1]: 0 is not at all, 1 is straight ahead.

    score = p * r / (r + REST), where r = ||delta|| / ||w|| is the relative change since the last measurement, and
    p = max(0, cosine between this delta and the previous one) is its persistence. Both are needed. With SGD noise r follows
    the learning rate and never reaches 0; but successive deltas of a layer that only fluctuates do not point the same way
    (cosine near or below 0), however large they are. Without a previous delta, p is 1.

    On MNIST (docs/scores.md) the first convolution has r = 0.183, cosine 0.437 and score 0.435 after epoch 2. After epoch 5,
    at the peak of the learning rate, r is still 0.078, but the cosine is -0.111 and the score 0. After epoch 12, with the
    learning rate almost 0, r is 0.001, the cosine 0.885 and the score 0.468.
    """
    persistence = 1.0 if change.cosine is None else min(max(change.cosine, 0.0), 1.0)
    r = change.relative
    if math.isinf(r):
        return persistence
    return persistence * r / (r + REST)


def scores(changes: Sequence[LayerChange]) -> tuple[float, ...]:
    """Return the score of each layer."""
    return tuple(score(change) for change in changes)
