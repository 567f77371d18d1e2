"""Everything that cached rows depend on, so that rows that do not fit a run are refused."""

from __future__ import annotations

import hashlib
import inspect
import re
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

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
        loop (str, optional): what the loop did to images, and the autocast dtype. Default: ""
        seed (int, optional): random seed of the views. Default: 0
        layers (str, optional): SHA-256 of the dropped layers' names and code. Default: ""
        images (str, optional): SHA-256 of a few model inputs of the dataset. Default: ""
        mirror (bool, optional): whether every second row is of the flipped image. Default: False
    """

    weights: str
    cut: int
    codec: str
    views: int
    samples: int
    dataset: str
    loop: str = ""
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


def weights_digest(modules: Iterable[nn.Module], parameters: Iterable[torch.Tensor]) -> str:
    """Return the SHA-256 over the shapes and bytes of the dropped layers' parameters, and of their modules' buffers."""
    digest = hashlib.sha256()
    buffers = (buffer for module in modules for buffer in module.buffers())
    for tensor in (*parameters, *buffers):
        digest.update(f"{tuple(tensor.shape)}{tensor.dtype}".encode())
        digest.update(tensor.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def code_digest(modules: Iterable[nn.Module], around: Iterable[nn.Module] = ()) -> str:
    """Return the SHA-256 over the source and the settings of the dropped layers' modules.

    Args:
        modules: the dropped layers' modules.
        around: modules that run both dropped layers and others. Any of their methods may be a part of their forward.
    """
    digest = hashlib.sha256()
    inside: list[tuple[nn.Module, list[Any]]] = [
        (inner, [type(inner).forward]) for outer in modules for inner in outer.modules()
    ]
    for module, parts in [*inside, *((outer, _own_classes(outer)) for outer in around)]:
        try:
            code = "".join(inspect.getsource(part) for part in parts)
        except (OSError, TypeError):
            code = ""
        kind = f"{type(module).__module__}.{type(module).__qualname__}"
        settings = sorted((name, value) for name, value in vars(module).items() if isinstance(value, int | float | str))
        plain = [(name, value) for name, value in settings if not name.startswith("_") and name != "training"]
        digest.update(f"{kind}{code}{plain}".encode())
    return digest.hexdigest()


def _own_classes(module: nn.Module) -> list[type]:
    """The classes of a module that are not torch's."""
    return [kind for kind in type(module).__mro__ if kind is not object and not kind.__module__.startswith("torch.")]


def images_digest(images: torch.Tensor) -> str:
    """Return the SHA-256 of some images."""
    pixels = images.cpu().contiguous().view(-1).view(torch.uint8).numpy()
    return hashlib.sha256(pixels.tobytes()).hexdigest()
