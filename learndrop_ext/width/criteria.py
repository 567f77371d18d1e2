"""Criteria: which of C channels (filters of a convolution, neurons of a linear layer) go first: the lowest scores.
Scopes: which stay, given the scores of n layers and the share of their channels that is to be left."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Seen:
    """What is known of C channels. Of channels that several layers write to (a residual sum), norms are means over these.

    Args:
        norms: [C, 4] float64, of the incoming weights: l1, l2 squared, largest absolute value, number of zeros.
        outgoing: [C, 2] float64, of the weights that read the channel: l2, largest absolute value.
        activation: [C] float64, mean absolute value in training since the last step; None without `uses_activations`.
    """

    norms: Tensor
    outgoing: Tensor
    activation: Tensor | None = None

    @property
    def incoming(self) -> Tensor:
        """[C] float64, l2 norm of the incoming weights."""
        return self.norms[:, 1].sqrt()


#: (what is known of C channels, random numbers on the CPU) -> scores [C] float64
Criterion = Callable[[Seen, torch.Generator], Tensor]
#: (scores [C] float64 and width before the first cut of each layer, share of these widths to be left, share that each layer
#: keeps) -> what stays of each layer, [C] bool
Scope = Callable[[Sequence[Tensor], Sequence[int], float, float], tuple[Tensor, ...]]


def random(seen: Seen, generator: torch.Generator) -> Tensor:
    """Return random scores in [0, 1)."""
    return torch.rand(len(seen.norms), dtype=torch.float64, generator=generator)


def connections(seen: Seen, generator: torch.Generator) -> Tensor:
    """Return the smaller of the incoming and the outgoing l2 norm, each over the largest of its layer: 0 for a neuron that
    the penalties of DropNeuron (arXiv 1606.07326) have driven to nothing on either side."""
    both = torch.stack([seen.incoming, seen.outgoing[:, 0]])
    return (both / both.amax(1, keepdim=True).clamp(min=torch.finfo(both.dtype).tiny)).amin(0)


class Activation:
    """The mean absolute value over the epoch's training samples, where the next layer reads the channel, behind activation
    and pool: DropNet (arXiv 2207.06646)."""

    uses_activations = True

    def __call__(self, seen: Seen, generator: torch.Generator) -> Tensor:
        assert seen.activation is not None, "measured for a criterion with uses_activations"
        return seen.activation


@dataclass(frozen=True)
class Zeros:
    """The number of incoming weights that are as good as zero, at most `share`, within 0..1, of the layer's largest; filters
    with the fewest go: Zero-keep filter pruning."""

    share: float = 0.01

    def __post_init__(self) -> None:
        if not 0 <= self.share <= 1:
            raise ValueError(f"Zeros: share must be within 0..1, got {self.share!r}")

    def __call__(self, seen: Seen, generator: torch.Generator) -> Tensor:
        return seen.norms[:, 3]


@dataclass(frozen=True)
class Coreset:
    """A random sample of the neurons of fully connected layers, by a bound on what each contributes. Needs no data.

    For inputs of norm at most `bound`, neuron i with incoming weights v_i and outgoing ones w_ki adds at most
    b_i = max_k |w_ki| * |activation(bound * ||v_i||)| to an output, for an activation that grows: the sensitivity of
    "Data-independent neural pruning via coresets" (arXiv 1907.04018), which draws with replacement. To keep a given number,
    this keeps the highest b_i / u_i, u_i uniform in (0, 1], and scales outgoing weights by max(b_i, t) / b_i, t being the
    highest that goes: priority sampling (Duffield, Lund, Thorup 2007), whose sums have no bias. `activation` is that of the
    layers, `bound` above 0."""

    activation: Callable[[Tensor], Tensor] = torch.relu
    bound: float = 1.0
    linear_only = True

    def __post_init__(self) -> None:
        if not self.bound > 0:
            raise ValueError(f"Coreset: bound must be above 0, got {self.bound!r}")

    def bounds(self, seen: Seen) -> Tensor:
        """Return b_i over the sum of all, [C] float64."""
        bounds = seen.outgoing[:, 1] * self.activation(self.bound * seen.incoming).abs()
        return bounds / bounds.sum().clamp(min=torch.finfo(bounds.dtype).tiny)

    def __call__(self, seen: Seen, generator: torch.Generator) -> Tensor:
        return self.bounds(seen) / (1 - random(seen, generator))

    def scales(self, seen: Seen, scores: Tensor, keep: Tensor) -> Tensor:
        """Return what to multiply outgoing weights by, [C] float64. keep: [C] bool, the neurons that stay."""
        bounds, highest = self.bounds(seen), (scores * ~keep).amax()
        return torch.where(keep & (bounds > 0), torch.maximum(bounds, highest) / bounds, 1.0)


def layer_share(scores: Sequence[Tensor], widths: Sequence[int], left: float, least: float) -> tuple[Tensor, ...]:
    """Keep the same share of each layer."""
    return tuple(highest(s, count(max(left, least), width)) for s, width in zip(scores, widths, strict=True))


def global_threshold(scores: Sequence[Tensor], widths: Sequence[int], left: float, least: float) -> tuple[Tensor, ...]:
    """Keep what is above one threshold over all layers: "Pruning at a glance" (arXiv 1912.00200). Scores are
    compared after division by their layer's mean: our own choice, the abstract gives no formula."""
    safe = torch.cat(layer_share(scores, widths, least, least))
    relative = torch.cat([s / s.mean().clamp(min=torch.finfo(s.dtype).tiny) for s in scores])
    gone = max(0, min(len(safe) - count(left, sum(widths)), int((~safe).sum())))
    keep = ~highest(-relative.masked_fill(safe, math.inf), gone)
    return tuple(keep.split([len(s) for s in scores]))


@dataclass(frozen=True)
class Below:
    """Remove scores of at most `share`, at least 0 and less than 1, of the layer's highest, however many: what a penalty has
    driven to nothing."""

    share: float = 1e-3

    def __post_init__(self) -> None:
        if not 0 <= self.share < 1:
            raise ValueError(f"Below: share must be at least 0 and less than 1, got {self.share!r}")

    def __call__(
        self, scores: Sequence[Tensor], widths: Sequence[int], left: float, least: float
    ) -> tuple[Tensor, ...]:
        safe = layer_share(scores, widths, least, least)
        return tuple((s > self.share * s.amax()) | kept for s, kept in zip(scores, safe, strict=True))


def highest(scores: Tensor, number: int) -> Tensor:
    """Return where the highest of [C] scores are, [C] bool; of equal ones the first."""
    order = torch.argsort(scores, descending=True, stable=True)
    return torch.zeros_like(scores, dtype=torch.bool).index_fill(0, order[:number], True)


def count(share: float, width: int) -> int:
    """Return a share of a width as a number of channels, rounded up, at least one."""
    return max(1, math.ceil(share * width - 1e-9))


CRITERIA: dict[str, Criterion] = {
    # The sum of the absolute incoming weights: "Pruning filters while training" (arXiv 2003.02800).
    "l1": lambda seen, generator: seen.norms[:, 0],
    "l2": lambda seen, generator: seen.incoming,
    "activation": Activation(),
    "zeros": Zeros(),
    "random": random,
    "coreset": Coreset(),
    "connections": connections,
}
SCOPES: dict[str, Scope] = {"layer": layer_share, "global": global_threshold}
