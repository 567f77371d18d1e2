"""Penalties against sums written by hand, and masks of single weights."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import prune

from learndrop_ext.width import in_norms, orthogonality, out_norms, sparsify


def two_layers() -> nn.Sequential:
    model = nn.Sequential(nn.Linear(2, 2, bias=False), nn.ReLU(), nn.Linear(2, 1))
    with torch.no_grad():
        model[0].weight.copy_(torch.tensor([[3.0, 4.0], [0.0, 0.0]]))
        model[2].weight.copy_(torch.tensor([[5.0, 12.0]]))
    return model


@pytest.mark.parametrize(
    ("penalty", "wanted"),
    [
        (in_norms, 5 + 0 + 13),
        (out_norms, (3 + 4) + (5 + 12)),
        # [[25, 0], [0, 0]] - I of the first; of the second, with one filter, 169 - 1
        (orthogonality, 24**2 + 1 + 168**2),
    ],
)
def test_a_penalty_is_the_sum_over_the_layers(penalty: Callable[[nn.Module], Tensor], wanted: float) -> None:
    model = two_layers()
    value = penalty(model)
    assert value.item() == pytest.approx(wanted)
    value.backward()
    assert all(layer.weight.grad is not None for layer in (model[0], model[2]))


def test_norms_of_a_convolution_are_over_whole_filters() -> None:
    conv = nn.Conv2d(2, 3, 3)
    nn.init.ones_(conv.weight)
    assert in_norms(conv).item() == pytest.approx(3 * math.sqrt(18))
    assert out_norms(conv).item() == pytest.approx(2 * math.sqrt(27))


def test_a_shared_weight_counts_once() -> None:
    one, other = nn.Linear(2, 2), nn.Linear(2, 2)
    other.weight = one.weight
    assert in_norms(nn.Sequential(one, other)).item() == pytest.approx(in_norms(one).item())


def test_a_layer_with_more_filters_than_weights_can_be_orthogonal() -> None:
    tall = nn.Linear(2, 4, bias=False)
    nn.init.orthogonal_(tall.weight)
    assert orthogonality(tall).item() == pytest.approx(0, abs=1e-10)


@pytest.mark.parametrize("penalty", [in_norms, out_norms, orthogonality])
def test_a_model_without_weights_has_no_penalty(penalty: Callable[[nn.Module], Tensor]) -> None:
    with pytest.raises(
        ValueError, match=f"{penalty.__name__}: model must have a convolution or linear layer, got ReLU"
    ):
        penalty(nn.ReLU())


def three_layers() -> nn.Sequential:
    model = nn.Sequential(nn.Linear(10, 10), nn.Linear(10, 10), nn.Linear(10, 10))
    with torch.no_grad():
        for i, layer in enumerate(model):
            layer.weight.copy_((i + 1) * torch.arange(100).view(10, 10) / 99)
    return model


@pytest.mark.parametrize(
    ("rule", "amount", "shares"),
    [
        ("flat", 0.5, [0.5, 0.5, 0.5]),
        ("triangular", 0.6, [0.2, 0.4, 0.6]),
        ("relative", 0.5, [0.5, 0.5, 0.5]),
    ],
)
def test_sparsify_masks_the_smallest(rule: str, amount: float, shares: list[float]) -> None:
    model = three_layers()
    found = sparsify(model, amount, rule)
    # A weight of 0 is there already: it is one of those that go.
    assert list(found.items()) == [(str(i), pytest.approx(share)) for i, share in enumerate(shares)]
    for layer, share in zip(model, shares, strict=True):
        assert (layer.weight.flatten() == 0).nonzero().flatten().tolist() == list(range(round(100 * share)))
        assert (layer.weight_orig != 0).sum() == 99
        prune.remove(layer, "weight")
        assert (layer.weight == 0).sum() == round(100 * share)


def test_relative_is_against_the_layers_own_largest() -> None:
    model = three_layers()
    with torch.no_grad():
        model[1].weight[0, 0] = 1000.0
    assert list(sparsify(model, 0.5, "relative").values()) == pytest.approx([0.5, 0.99, 0.5])


def test_masked_weights_stay_zero_in_training() -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 1))
    sparsify(model, 0.5)
    zeros = model[0].weight == 0
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0, momentum=0.9, weight_decay=0.1)
    for _ in range(3):
        model(torch.randn(8, 4)).square().sum().backward()
        optimizer.step()
    assert torch.equal(model[0](torch.zeros(1, 4)), model[0].bias[None])
    assert bool((model[0].weight[zeros] == 0).all())


@pytest.mark.parametrize(
    ("model", "amount", "rule", "got"),
    [
        (nn.Linear(2, 2), 0.5, "steep", "got 'steep'"),
        (nn.Linear(2, 2), 0.0, "flat", r"'flat', 0\.0"),
        (nn.Linear(2, 2), 1.0, "flat", r"'flat', 1\.0"),
        (nn.ReLU(), 0.5, "flat", "and 0 such layers"),
    ],
)
def test_sparsify_refuses(model: nn.Module, amount: float, rule: str, got: str) -> None:
    with pytest.raises(ValueError, match=f"sparsify: rule must be one of flat, triangular, relative, .*{got}"):
        sparsify(model, amount, rule)
    assert not prune.is_pruned(model)
