"""Scopes: which channels stay, given the scores of n layers and the share of channels that is to be left.

A scope is a function (scores, widths, left, least) -> keep. For each layer: scores [C] float64, its width before the first
cut, and the result [C] bool. Of these widths, `left` is the share to be left, `least` the share that each layer keeps.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

Scope = Callable[[Sequence[Tensor], Sequence[int], float, float], tuple[Tensor, ...]]


def layer_share(scores: Sequence[Tensor], widths: Sequence[int], left: float, least: float) -> tuple[Tensor, ...]:
    """Keep the same share of each layer."""
    return tuple(highest(s, count(max(left, least), width)) for s, width in zip(scores, widths, strict=True))


def global_threshold(scores: Sequence[Tensor], widths: Sequence[int], left: float, least: float) -> tuple[Tensor, ...]:
    """Keep what is above one threshold over all layers: "Pruning at a glance" (arXiv 1912.00200).

    Scores are compared after division by their layer's mean: our own choice, the abstract gives no formula.
    """
    safe = torch.cat([highest(s, count(least, width)) for s, width in zip(scores, widths, strict=True)])
    relative = torch.cat([s / s.mean().clamp(min=torch.finfo(s.dtype).tiny) for s in scores])
    gone = max(0, min(len(safe) - count(left, sum(widths)), int((~safe).sum())))
    keep = ~highest(-relative.masked_fill(safe, math.inf), gone)
    return tuple(keep.split([len(s) for s in scores]))


@dataclass(frozen=True)
class Below:
    """Remove scores of at most `share` of the layer's highest, however many: what a penalty has driven to nothing.

    Args:
        share: at least 0 and less than 1. Default: 0.001
    """

    share: float = 1e-3

    def __post_init__(self) -> None:
        if not 0 <= self.share < 1:
            raise ValueError(f"Below: share must be at least 0 and less than 1, got {self.share!r}")

    def __call__(
        self, scores: Sequence[Tensor], widths: Sequence[int], left: float, least: float
    ) -> tuple[Tensor, ...]:
        safe = (highest(s, count(least, width)) for s, width in zip(scores, widths, strict=True))
        return tuple((s > self.share * s.amax()) | kept for s, kept in zip(scores, safe, strict=True))


def highest(scores: Tensor, number: int) -> Tensor:
    """Return where the highest of [C] scores are, [C] bool; of equal ones the first."""
    keep = torch.zeros(len(scores), dtype=torch.bool)
    keep[torch.argsort(scores, descending=True, stable=True)[:number]] = True
    return keep


def count(share: float, width: int) -> int:
    """Return a share of a width as a number of channels, rounded up, at least one."""
    return max(1, math.ceil(share * width - 1e-9))


SCOPES: dict[str, Scope] = {"layer": layer_share, "global": global_threshold}
