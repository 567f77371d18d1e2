"""The scopes as tables: scores, widths and shares in, the channels that stay out."""

from __future__ import annotations

import pytest
import torch

from learndrop_ext.width.criteria import SCOPES, Below, Scope, count


def kept(scope: Scope, scores: list[list[float]], widths: list[int], left: float, least: float) -> list[list[int]]:
    keeps = scope([torch.tensor(s, dtype=torch.float64) for s in scores], widths, left, least)
    return [keep.nonzero().flatten().tolist() for keep in keeps]


LOW, HIGH = [1.0, 2.0, 3.0, 4.0], [10.0, 40.0, 20.0, 30.0]


@pytest.mark.parametrize(
    ("scope", "scores", "widths", "left", "least", "stays"),
    [
        ("layer", [LOW, HIGH], [4, 4], 0.5, 0.1, [[2, 3], [1, 3]]),
        ("layer", [LOW, HIGH], [4, 8], 0.5, 0.1, [[2, 3], [0, 1, 2, 3]]),  # the second has been narrowed before
        ("layer", [[5.0, 5.0, 5.0]], [3], 0.5, 0.1, [[0, 1]]),  # rounded up, the first of equal ones
        ("layer", [LOW], [4], 0.01, 0.0, [[3]]),  # one stays
        ("layer", [LOW], [4], 0.25, 0.75, [[1, 2, 3]]),
        ("layer", [LOW], [4], 1.0, 0.1, [[0, 1, 2, 3]]),
        # means 1 and 1: the four lowest are 0.1, 0.2, 0.3 of the second and 0.5 of the first
        ("global", [[0.5, 1.5], [0.1, 0.2, 0.3, 3.4]], [2, 4], 1 / 3, 0.1, [[1], [3]]),
        # means 1 and 100: relative to them the first layer has the lowest
        ("global", [[0.2, 1.8], [90.0, 110.0]], [2, 2], 0.75, 0.1, [[1], [0, 1]]),
        # two would go, but each layer keeps half
        ("global", [[0.1, 0.2, 9.0, 9.0], [1.0, 1.0, 1.0, 1.0]], [4, 4], 0.25, 0.5, [[2, 3], [0, 1]]),
        ("global", [LOW], [4], 1.0, 0.1, [[0, 1, 2, 3]]),
        ("global", [LOW], [8], 0.75, 0.1, [[0, 1, 2, 3]]),  # fewer are there than may be left
        ("global", [[0.0, 0.0]], [2], 0.5, 0.1, [[0]]),
    ],
)
def test_what_stays(
    scope: str, scores: list[list[float]], widths: list[int], left: float, least: float, stays: list[list[int]]
) -> None:
    assert kept(SCOPES[scope], scores, widths, left, least) == stays


def test_below_removes_what_is_nothing_whatever_share_is_to_be_left() -> None:
    scores = [[1.0, 1e-9, 0.5, 0.0], [0.0, 0.0]]
    assert kept(Below(1e-3), scores, [4, 2], 1.0, 0.1) == [[0, 2], [0]]
    assert kept(Below(0.5), scores, [4, 2], 1.0, 0.1) == [[0], [0]]
    assert kept(Below(0.5), scores, [4, 2], 1.0, 0.75) == [[0, 1, 2], [0, 1]]


@pytest.mark.parametrize("share", [-1.0, 1.0, float("nan")])
def test_below_refuses_a_share_that_would_remove_all(share: float) -> None:
    with pytest.raises(ValueError, match="Below: share must be at least 0 and less than 1, got"):
        Below(share)


@pytest.mark.parametrize(
    ("share", "width", "number"), [(0.5, 5, 3), (0.3, 10, 3), (0.7, 10, 7), (0.0, 9, 1), (1.0, 7, 7)]
)
def test_a_share_in_whole_channels(share: float, width: int, number: int) -> None:
    assert count(share, width) == number
