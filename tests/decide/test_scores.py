from __future__ import annotations

import math

import pytest

from learndrop_ext.decide.deltas import LayerChange
from learndrop_ext.decide.scores import REST, score, scores


def change(relative: float, cosine: float | None) -> LayerChange:
    return LayerChange(
        l1=0.0, l2=relative, maximum=0.0, w_l1=1.0, w_l2=1.0, nonfinite=0, relative=relative, cosine=cosine
    )


# relative change, cosine with the delta before, score
SCORES = [
    (0.0, None, 0.0),
    (0.0, 1.0, 0.0),
    # Half at rest: r = REST.
    (0.001, 1.0, 0.5),
    (0.001, None, 0.5),
    (0.003, 1.0, 0.75),
    (0.009, 0.5, 0.45),
    (0.009, 0.25, 0.225),
    # A layer that shakes in place has stopped, however far it shakes.
    (0.5, 0.0, 0.0),
    (0.5, -0.8, 0.0),
    (math.inf, None, 1.0),
    (math.inf, 0.5, 0.5),
    # Rounding may take a cosine past 1.
    (math.inf, 1.0000001, 1.0),
]


@pytest.mark.parametrize(("relative", "cosine", "wanted"), SCORES)
def test_score(relative: float, cosine: float | None, wanted: float) -> None:
    assert REST == 1e-3
    assert score(change(relative, cosine)) == pytest.approx(wanted, abs=1e-12)


def test_scores_keeps_the_order_of_the_layers() -> None:
    changes = [change(relative, cosine) for relative, cosine, _ in SCORES]
    assert scores(changes) == tuple(score(one) for one in changes)
    assert scores([]) == ()
