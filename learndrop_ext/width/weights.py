"""Penalties, to add to the loss, and masks, of the weights [C, n, ...] of all convolutions and linear layers: C filters that
read n channels. A penalty is a scalar with a gradient, and raises ValueError for a model without such layers."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn.utils import prune

from learndrop_ext.width.criteria import highest
from learndrop_ext.width.surgery import LAYERS


def in_norms(model: nn.Module) -> Tensor:
    """Return the sum of the l2 norms of each neuron's incoming weights: DropNeuron (arXiv 1606.07326)."""
    return torch.stack([w.flatten(1).norm(dim=1).sum() for w in _weights(model, "in_norms")]).sum()


def out_norms(model: nn.Module) -> Tensor:
    """Return the sum of the l2 norms of the weights that read each channel: DropNeuron's other penalty."""
    return torch.stack([w.transpose(0, 1).flatten(1).norm(dim=1).sum() for w in _weights(model, "out_norms")]).sum()


def orthogonality(model: nn.Module) -> Tensor:
    """Return the sum of ||W W^T - I||_F^2 over the weights as W [C, rest], or W^T W if C is the larger: filters that do the
    same are pushed apart. The soft orthogonality of Bansal, Chen and Wang (arXiv 1810.09102)."""
    flat = (weight.flatten(1) for weight in _weights(model, "orthogonality"))
    wide = (W if W.shape[0] <= W.shape[1] else W.t() for W in flat)
    return torch.stack([(W @ W.t() - torch.eye(len(W)).to(W)).square().sum() for W in wide]).sum()


def _weights(model: nn.Module, name: str) -> list[Tensor]:
    found = list({id(m.weight): m.weight for m in model.modules() if isinstance(m, LAYERS)}.values())
    if not found:
        raise ValueError(f"{name}: model must have a convolution or linear layer, got {type(model).__name__} without")
    return found


def sparsify(model: nn.Module, amount: float, rule: str = "flat") -> dict[str, float]:
    """Mask the smallest weights by `torch.nn.utils.prune`, and return {layer: share of its weights that are zero}.
    Nothing is trained again, and nothing gets faster.

    Args:
        model: its layers get a buffer `weight_mask`, and their parameter the name `weight_orig`.
        amount: within 0..1, both excluded.
        rule: "flat", this share of each layer; "triangular", amount * i / n of layer i of n, so that the first layers keep
            the most; "relative", weights of at most `amount` times the layer's largest. Default: "flat"

    Raises:
        ValueError: the amount or the rule is another, or the model has no such layer. Nothing is changed.
    """
    layers = {name: module for name, module in model.named_modules() if isinstance(module, LAYERS)}
    if rule not in ("flat", "triangular", "relative") or not 0 < amount < 1 or not layers:
        raise ValueError(
            "sparsify: rule must be one of flat, triangular, relative, amount between 0 and 1, and model have layers with "
            f"weights, got {rule!r}, {amount!r} and {len(layers)} such layers"
        )
    shares = {}
    for i, (name, layer) in enumerate(layers.items(), 1):
        size = layer.weight.detach().abs()
        gone = round(size.numel() * amount * (i / len(layers) if rule == "triangular" else 1))
        smallest = highest(-size.flatten(), gone).view_as(size)
        prune.custom_from_mask(layer, "weight", ~(size <= amount * size.amax() if rule == "relative" else smallest))
        shares[name] = float((layer.weight == 0).double().mean())
    return shares
