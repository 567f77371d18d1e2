"""The criteria as tables: what is known of a layer's channels in, scores out."""

from __future__ import annotations

import pytest
import torch

from learndrop_ext.width.criteria import CRITERIA, Coreset, Seen, Zeros, connections

# Columns: l1, l2 squared, largest, zeros.
NORMS = torch.tensor([[3.0, 9.0, 3.0, 0.0], [4.0, 4.0, 1.0, 2.0], [0.0, 0.0, 0.0, 5.0]], dtype=torch.float64)
OUTGOING = torch.tensor([[1.0, 0.5], [4.0, 2.0], [2.0, 1.0]], dtype=torch.float64)


def seen(**changes: torch.Tensor) -> Seen:
    return Seen(**{"norms": NORMS, "outgoing": OUTGOING} | changes)


@pytest.mark.parametrize(
    ("name", "scores"),
    [
        ("l1", [3.0, 4.0, 0.0]),
        ("l2", [3.0, 2.0, 0.0]),
        ("zeros", [0.0, 2.0, 5.0]),
        ("activation", [0.3, 0.1, 0.2]),
        ("connections", [0.25, 2 / 3, 0.0]),
    ],
)
def test_scores_of_three_channels(name: str, scores: list[float]) -> None:
    found = CRITERIA[name](seen(activation=torch.tensor([0.3, 0.1, 0.2], dtype=torch.float64)), torch.Generator())
    assert found.tolist() == pytest.approx(scores)


def test_connections_of_a_layer_without_weights_are_zero() -> None:
    none = seen(norms=torch.zeros(3, 4, dtype=torch.float64))
    assert connections(none, torch.Generator()).tolist() == [0, 0, 0]


def test_random_scores_are_those_of_their_seed() -> None:
    draw = CRITERIA["random"]
    one, same, other = (draw(seen(), torch.Generator().manual_seed(seed)) for seed in (0, 0, 1))
    assert torch.equal(one, same)
    assert not torch.equal(one, other)


def test_a_neuron_contributes_at_most_its_bound() -> None:
    # outgoing * relu(incoming): 0.5 * 3, 2 * 2 and 1 * 0, of 5.5 in all
    assert Coreset().bounds(seen()).tolist() == pytest.approx([1.5 / 5.5, 4 / 5.5, 0.0])
    # tanh(2 * incoming)
    doubled = Coreset(torch.tanh, bound=2.0).bounds(seen())
    weights = torch.tensor([0.5, 2.0, 1.0], dtype=torch.float64) * torch.tanh(torch.tensor([6.0, 4.0, 0.0]).double())
    assert doubled.tolist() == pytest.approx((weights / weights.sum()).tolist())


def test_a_coreset_has_the_layers_sum_in_mean() -> None:
    """The kept neurons, scaled, add up to what all did, over many draws."""
    known = Seen(torch.rand(12, 4, dtype=torch.float64) + 0.1, torch.rand(12, 2, dtype=torch.float64) + 0.1)
    coreset, generator = Coreset(), torch.Generator().manual_seed(0)
    bounds = coreset.bounds(known)
    sums = []
    for _ in range(4000):
        scores = coreset(known, generator)
        keep = scores >= scores.topk(6).values[-1]
        sums.append((bounds * coreset.scales(known, scores, keep))[keep].sum())
    mean, error = torch.stack(sums).mean(), torch.stack(sums).std() / 4000**0.5
    assert abs(mean - 1) < 4 * error
    assert error < 0.01


def test_a_coreset_of_all_neurons_scales_nothing() -> None:
    scores = Coreset()(seen(), torch.Generator().manual_seed(0))
    assert Coreset().scales(seen(), scores, torch.ones(3, dtype=torch.bool)).tolist() == [1, 1, 1]


@pytest.mark.parametrize("share", [-0.1, 1.5, float("nan")])
def test_zeros_refuse_a_share_that_is_none(share: float) -> None:
    with pytest.raises(ValueError, match=r"Zeros: share must be within 0\.\.1, got"):
        Zeros(share)


@pytest.mark.parametrize("bound", [0.0, -1.0, float("nan")])
def test_a_coreset_refuses_a_bound_that_is_not_above_0(bound: float) -> None:
    with pytest.raises(ValueError, match="Coreset: bound must be above 0, got"):
        Coreset(bound=bound)
