"""Everything that cached rows depend on, so that rows that do not fit a run are refused."""

from __future__ import annotations

import dataclasses
import hashlib
import inspect
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn


@dataclass(frozen=True)
class Fingerprint:
    """Everything that the row of an image depends on beside the image. Rows are used only if every field is equal."""

    weights: str  # SHA-256 of the dropped layers' parameters and buffers, see `weights_digest`
    cut: int  # number of layers before the rows
    codec: str  # how rows are stored
    layers: str  # names of the dropped layers, and SHA-256 of their code, see `code_digest`
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


def weights_digest(modules: Iterable[nn.Module], parameters: Iterable[torch.Tensor]) -> str:
    """Return the SHA-256 over the shapes and bytes of the dropped layers' parameters, and of their modules' buffers."""
    digest = hashlib.sha256()
    buffers = (buffer for module in modules for buffer in module.buffers())
    for tensor in (*parameters, *buffers):
        digest.update(f"{tuple(tensor.shape)}{tensor.dtype}".encode())
        digest.update(tensor.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def code_digest(modules: Iterable[nn.Module], around: Iterable[nn.Module] = ()) -> str:
    """Return the SHA-256 over the source and the settings of the dropped layers' modules, and of those `around` that run
    other layers too: any of their methods may be a part of their forward."""
    digest = hashlib.sha256()
    parts_of: list[tuple[nn.Module, list[Any]]] = [
        (inner, [type(inner).forward]) for outer in modules for inner in outer.modules()
    ]
    for outer in around:
        own = [kind for kind in type(outer).__mro__ if kind is not object and not kind.__module__.startswith("torch.")]
        parts_of.append((outer, own))
    for module, parts in parts_of:
        try:
            code = "".join(inspect.getsource(part) for part in parts)
        except (OSError, TypeError):
            code = ""
        kind = f"{type(module).__module__}.{type(module).__qualname__}"
        settings = sorted((name, value) for name, value in vars(module).items() if isinstance(value, int | float | str))
        plain = [(name, value) for name, value in settings if not name.startswith("_") and name != "training"]
        digest.update(f"{kind}{code}{plain}".encode())
    return digest.hexdigest()
