"""Everything that cached rows depend on, so that rows that do not fit a run are refused."""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Iterable
from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class Fingerprint:
    """Everything that the row of an image depends on beside the image. Rows are used only if every field is equal."""

    weights: str  # SHA-256 of all tensors that the dropped layers use, see `weights_digest`
    cut: int  # number of layers before the rows
    codec: str  # how rows are stored
    layers: str  # names of the dropped layers, and SHA-256 of their operations
    loop: str  # what the loop did to images, and the autocast dtype
    row: str  # dtype and shape of a row
    views: str  # "one" row of a sample, an image and its "mirror" image, or "random" ones

    def difference(self, other: Fingerprint) -> str | None:
        """Return the first field in which another one differs, in words, or None."""
        for field in dataclasses.fields(self):
            ours, theirs = getattr(self, field.name), getattr(other, field.name)
            if ours != theirs:
                return f"rows must be of {field.name} {ours!r}, got {field.name} {theirs!r}"
        return None


def weights_digest(tensors: Iterable[torch.Tensor]) -> str:
    """Return the SHA-256 over the shapes and bytes of tensors."""
    digest = hashlib.sha256()
    for tensor in tensors:
        digest.update(f"{tuple(tensor.shape)}{tensor.dtype}".encode())
        digest.update(tensor.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()
