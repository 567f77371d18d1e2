"""Single weights set to zero, without training again."""

from __future__ import annotations

import torch
from torch import nn
from torch.nn.utils import prune

from learndrop_ext.width.penalties import LAYERS

RULES = ("flat", "triangular", "relative")


def sparsify(model: nn.Module, amount: float, rule: str = "flat") -> dict[str, float]:
    """Mask the smallest weights of convolutions and linear layers by `torch.nn.utils.prune`. Nothing gets faster.

    Args:
        model: its layers get a buffer `weight_mask`, and their parameter the name `weight_orig`.
        amount: within 0..1, both excluded.
        rule: "flat", this share of each layer; "triangular", amount * i / n of layer i of n, so that the first layers keep
            the most; "relative", weights of at most `amount` times the layer's largest. Default: "flat"

    Returns:
        {layer: share of its weights that are zero}.

    Raises:
        ValueError: the amount or the rule is another, or the model has no such layer. Nothing is changed.
    """
    layers = {name: module for name, module in model.named_modules() if isinstance(module, LAYERS)}
    if rule not in RULES or not 0 < amount < 1 or not layers:
        raise ValueError(
            f"sparsify: rule must be one of {', '.join(RULES)}, amount between 0 and 1, and model have layers with weights, "
            f"got {rule!r}, {amount!r} and {len(layers)} such layers"
        )
    shares = {}
    for i, (name, layer) in enumerate(layers.items(), 1):
        size = layer.weight.detach().abs()
        gone = round(size.numel() * amount * (i / len(layers) if rule == "triangular" else 1))
        smallest = torch.zeros(size.numel(), dtype=torch.bool, device=size.device)
        smallest[torch.argsort(size.flatten(), stable=True)[:gone]] = True
        masked = size <= amount * size.amax() if rule == "relative" else smallest.view_as(size)
        prune.custom_from_mask(layer, "weight", ~masked)
        shares[name] = float((layer.weight == 0).double().mean())
    return shares
