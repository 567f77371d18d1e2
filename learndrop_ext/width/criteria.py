"""Criteria: which of C channels (filters of a convolution, neurons of a linear layer) go first. The lowest scores do."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar

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


def l1(seen: Seen, generator: torch.Generator) -> Tensor:
    """Return the sum of the absolute incoming weights: "Pruning filters while training" (arXiv 2003.02800)."""
    return seen.norms[:, 0]


def l2(seen: Seen, generator: torch.Generator) -> Tensor:
    """Return the Euclidean norm of the incoming weights."""
    return seen.incoming


def random(seen: Seen, generator: torch.Generator) -> Tensor:
    """Return random scores in [0, 1)."""
    return torch.rand(len(seen.norms), dtype=torch.float64, generator=generator)


def connections(seen: Seen, generator: torch.Generator) -> Tensor:
    """Return the smaller of the incoming and the outgoing l2 norm, each over the largest of its layer: 0 for a neuron that
    the penalties of DropNeuron (arXiv 1606.07326) have driven to nothing on either side."""
    both = torch.stack([seen.incoming, seen.outgoing[:, 0]])
    return (both / both.amax(1, keepdim=True).clamp(min=torch.finfo(both.dtype).tiny)).amin(0)


@dataclass(frozen=True)
class Activation:
    """The mean absolute value over the epoch's training samples, where the next layer reads the channel, behind activation
    and pool: DropNet (arXiv 2207.06646)."""

    uses_activations: ClassVar[bool] = True

    def __call__(self, seen: Seen, generator: torch.Generator) -> Tensor:
        assert seen.activation is not None, "measured for a criterion with uses_activations"
        return seen.activation


@dataclass(frozen=True)
class Zeros:
    """The number of incoming weights that are as good as zero; filters with the fewest go: Zero-keep filter pruning.

    Args:
        share: weights of at most this share of the layer's largest count as zero, within 0..1. Default: 0.01
    """

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
    highest that goes: priority sampling (Duffield, Lund, Thorup 2007), whose sums have no bias.

    Args:
        activation: the layers' activation function. Default: torch.relu
        bound: norm of the inputs, above 0. Default: 1.0
    """

    activation: Callable[[Tensor], Tensor] = torch.relu
    bound: float = 1.0
    linear_only: ClassVar[bool] = True

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
        bounds, gone = self.bounds(seen), scores[~keep]
        highest = gone.amax() if len(gone) else scores.new_zeros(())
        return torch.where(keep & (bounds > 0), torch.maximum(bounds, highest) / bounds, 1.0)


CRITERIA: dict[str, Criterion] = {
    **{"l1": l1, "l2": l2, "activation": Activation(), "zeros": Zeros(), "random": random},
    **{"coreset": Coreset(), "connections": connections},
}
