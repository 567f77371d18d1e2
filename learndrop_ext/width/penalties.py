"""Penalties to add to the loss, scalars with a gradient, of the weights [C, n, ...] of all convolutions and linear layers:
C filters that read n channels. Each raises ValueError for a model without such layers."""

from __future__ import annotations

import torch
from torch import Tensor, nn

LAYERS = (nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.Linear)


def in_norms(model: nn.Module) -> Tensor:
    """Return the sum of the l2 norms of each neuron's incoming weights: DropNeuron (arXiv 1606.07326)."""
    return torch.stack([w.flatten(1).norm(dim=1).sum() for w in _weights(model, "in_norms")]).sum()


def out_norms(model: nn.Module) -> Tensor:
    """Return the sum of the l2 norms of the weights that read each channel: DropNeuron's other penalty."""
    return torch.stack([w.transpose(0, 1).flatten(1).norm(dim=1).sum() for w in _weights(model, "out_norms")]).sum()


def orthogonality(model: nn.Module) -> Tensor:
    """Return the sum of ||W W^T - I||_F^2 over the weights as W [C, rest], or W^T W if C is the larger: filters that do the
    same are pushed apart. The soft orthogonality of Bansal, Chen and Wang (arXiv 1810.09102)."""
    terms = []
    for weight in _weights(model, "orthogonality"):
        W = weight.flatten(1)
        gram = W @ W.t() if W.shape[0] <= W.shape[1] else W.t() @ W
        terms.append((gram - torch.eye(len(gram), dtype=W.dtype, device=W.device)).square().sum())
    return torch.stack(terms).sum()


def _weights(model: nn.Module, name: str) -> list[Tensor]:
    found = list({id(m.weight): m.weight for m in model.modules() if isinstance(m, LAYERS)}.values())
    if not found:
        raise ValueError(f"{name}: model must have a convolution or linear layer, got {type(model).__name__} without")
    return found
