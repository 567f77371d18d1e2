"""What the rows of a cache depend on, so that rows of another run are refused."""

from __future__ import annotations

import hashlib
import re
from dataclasses import dataclass
from typing import Any

import torch

from learndrop_ext.graph.chain import Chain


@dataclass(frozen=True)
class Fingerprint:
    """All that the rows of a cache depend on.

    weights: SHA-256 of the prefix's parameters and buffers. cut: layers before the rows. samples: of the dataset.
    dataset: what it is and how it transforms, see `describe`. autocast: dtype of the frozen pass, "" for none. seed: of
    the views drawn. augmented: whether rows are [C, H, W] to be flipped or shifted. layers: SHA-256 of the prefix's code.
    images: SHA-256 of the first model inputs of the dataset.
    """

    weights: str
    cut: int
    codec: str
    views: int
    samples: int
    dataset: str
    autocast: str = ""
    seed: int = 0
    augmented: bool = False
    layers: str = ""
    images: str = ""


def describe(dataset: Any) -> str:
    """A dataset in words that are the same in the next run: its type, repr and transforms, without addresses."""
    parts = [f"{type(dataset).__module__}.{type(dataset).__qualname__}", repr(dataset)]
    parts += [f"{name}={getattr(dataset, name)!r}" for name in ("transform", "transforms") if hasattr(dataset, name)]
    return re.sub(r" at 0x[0-9a-fA-F]+", "", " ".join(parts))


def weights_digest(chain: Chain, prefix: int) -> str:
    """SHA-256 over the names, shapes and bytes of the first layers' parameters and buffers."""
    digest = hashlib.sha256()
    for i in range(prefix):
        layer = chain.layer(i)
        for tensor in [*layer.parameters(), *layer.buffers()]:
            digest.update(f"{layer.name}{tuple(tensor.shape)}{tensor.dtype}".encode())
            digest.update(tensor.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()
