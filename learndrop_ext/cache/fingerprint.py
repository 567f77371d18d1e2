"""Everything that cached rows depend on, so that rows that do not fit a run are refused."""

from __future__ import annotations

import hashlib
import re
from dataclasses import dataclass
from typing import Any

import torch

from learndrop_ext.graph.chain import Chain

#: In the repr of an object that is described by its type alone.
ADDRESS = r" at 0x[0-9a-fA-F]+"


@dataclass(frozen=True)
class Fingerprint:
    """Everything that cached rows depend on. Rows are used only if every field is equal.

    Args:
        weights (str): SHA-256 of the dropped layers' parameters and buffers, see `weights_digest`.
        cut (int): number of layers before the rows.
        codec (str): how rows are stored.
        views (int): number of rows of each sample.
        samples (int): length of the dataset.
        dataset (str): description of the dataset and its transforms, see `describe`.
        autocast (str, optional): autocast dtype under which the rows were computed; "" for none. Default: ""
        seed (int, optional): random seed of the views. Default: 0
        layers (str, optional): SHA-256 of the dropped layers' code. Default: ""
        images (str, optional): SHA-256 of a few model inputs of the dataset. Default: ""
        mirror (bool, optional): whether every second row is of the flipped image. Default: False
    """

    weights: str
    cut: int
    codec: str
    views: int
    samples: int
    dataset: str
    autocast: str = ""
    seed: int = 0
    layers: str = ""
    images: str = ""
    mirror: bool = False


def describe(dataset: Any) -> str:
    """Return a dataset's type, repr and transforms, without memory addresses, so that they are the same in the next run."""
    return re.sub(ADDRESS, "", " ".join(_described(dataset)))


def tells_apart(dataset: Any) -> bool:
    """Return whether `describe` can tell a dataset from others of its type.

    It cannot if the repr has no more than the type's name, if it or a transform names an object by its type and address, or
    if values are left out ("..."). A function that has a name is described by it.
    """
    kind, own, *transforms = _described(dataset)
    text = re.sub(rf"<function [\w.]+{ADDRESS}>", "", " ".join([own, *transforms]))
    more = set(re.findall(r"\w+", own)) - set(re.findall(r"\w+", kind))
    return bool(more) and re.search(ADDRESS, text) is None and "..." not in text


def _described(dataset: Any) -> list[str]:
    """The type of a dataset, its repr, and its transforms; the datasets of Hugging Face have a fingerprint."""
    names = [name for name in ("transform", "transforms", "_fingerprint") if hasattr(dataset, name)]
    kind = f"{type(dataset).__module__}.{type(dataset).__qualname__}"
    return [kind, repr(dataset), *(f"{name}={getattr(dataset, name)!r}" for name in names)]


def weights_digest(chain: Chain, prefix: int) -> str:
    """Return the SHA-256 over the names, shapes and bytes of the first layers' parameters and buffers."""
    digest = hashlib.sha256()
    for i in range(prefix):
        layer = chain.layer(i)
        for tensor in [*layer.parameters(), *layer.buffers()]:
            digest.update(f"{layer.name}{tuple(tensor.shape)}{tensor.dtype}".encode())
            digest.update(tensor.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()
