"""Networks by name, built in or from timm and torchvision, with random or pretrained weights.

A name is a key of `learndrop_ext.app.models.MODELS`, `timm:NAME` or `torchvision:NAME`.
"""

from __future__ import annotations

import difflib
import importlib
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from types import ModuleType
from typing import Any

import torch
from torch import nn

from learndrop_ext.app.models import MODELS, build_model
from learndrop_ext.app.weights import fit_weights, read_weights
from learndrop_ext.ops import free_bytes
from learndrop_ext.rng import fork_rng


@dataclass(frozen=True)
class Network:
    """A network in train mode on the CPU, and a line about the source of its weights, empty if they are random."""

    model: nn.Module
    note: str


def is_external(name: str) -> bool:
    """Return whether a name is that of a timm or torchvision network."""
    return name.startswith(("timm:", "torchvision:"))


def check_network(name: str) -> None:
    """Raise ValueError, with the closest matches, if a name is unknown, and ImportError if its library is missing."""
    library, _, inner = name.partition(":")
    if not is_external(name):
        if (name.removesuffix("_bn") if name.startswith("vgg") else name) not in MODELS:
            raise ValueError(f"model must be one of {', '.join(MODELS)}, timm:NAME or torchvision:NAME, got {name!r}")
    elif library == "timm":
        timm = _library("timm")
        if not timm.is_model(inner):
            raise ValueError(f"model must be a network of timm, got {name!r}{_nearest(inner, timm.list_models())}")
    else:
        models = _library("torchvision.models")
        known = models.list_models(module=models)
        if inner not in known:
            raise ValueError(f"model must be a classifier of torchvision, got {name!r}{_nearest(inner, known)}")


def _nearest(name: str, known: list[str]) -> str:
    near = difflib.get_close_matches(name, known, n=3, cutoff=0.5)
    return f"; the nearest: {', '.join(near)}" if near else ""


def _library(module: str) -> ModuleType:
    name = module.partition(".")[0]
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise ImportError(
            f'model: {name} could not be imported ({error}): pip install "learndrop_ext[pretrained]"'
        ) from error
    except RuntimeError as error:
        # torchvision registers its operators on import, which fails if it was built for another version of torch.
        raise ImportError(f"model: {name} does not fit the torch that is installed: {error}") from error


def pixel_statistics(name: str) -> tuple[tuple[float, ...], tuple[float, ...]] | None:
    """Return the mean and standard deviation of pixels in [0, 1] that published weights expect, or None."""
    library, _, inner = name.partition(":")
    if not is_external(name):
        return None
    if library == "timm":
        config = _library("timm").get_pretrained_cfg(inner)
        return None if config is None else (tuple(config.mean), tuple(config.std))
    presets = _library("torchvision.models").get_model_weights(inner).DEFAULT.transforms()
    return tuple(presets.mean), tuple(presets.std)


def build_network(
    name: str,
    *,
    num_classes: int,
    in_channels: int = 3,
    stem: str = "small",
    width: int = 64,
    weights: str | None = None,
    seed: int = 0,
) -> Network:
    """Build a network with random or pretrained weights and a new classifier. The global random state does not change.

    stem, width: for networks of `MODELS`, see `build_model`. weights: None for random weights, "default" for those of timm
    or torchvision, or a file, see `read_weights`. Raises ValueError if the name is unknown, the weights do not fit or
    cannot be downloaded, or the network does not take these channels or does not fit into the free memory; ImportError if
    the name or the file needs a library that is not installed.
    """
    check_network(name)
    library, _, inner = name.partition(":")
    if is_external(name) and in_channels != 3:
        raise ValueError(f"model: {name} needs images of 3 channels, got {in_channels}")
    create: partial[Any]
    if library == "torchvision":
        create = partial(_library("torchvision.models").get_model, inner, weights=None)
    elif library == "timm" and weights == "default":
        create = partial(_fetched, name, _library("timm").create_model, inner, pretrained=True)
    elif library == "timm":
        create = partial(_library("timm").create_model, inner.partition(".")[0])
    elif weights == "default":
        raise ValueError(f"weights: 'default' needs a model timm:NAME or torchvision:NAME, got {name!r}")
    else:
        sizes: dict[str, Any] = {"in_channels": in_channels, "stem": stem, "width": width}
        check_memory(name, num_classes=num_classes, **sizes)
        create = partial(build_model, name, **sizes)
    with fork_rng(seed):
        model = create(num_classes=num_classes)
        if weights is None:
            return Network(model, "")
        if weights == "default" and library == "timm":
            return Network(model, f"weights: those of timm for {inner}; the classifier is new")
        other = create(num_classes=num_classes + 1).state_dict()
    classifier = {key for key, value in model.state_dict().items() if other[key].shape != value.shape}
    if weights == "default":
        default = _library("torchvision.models").get_model_weights(inner).DEFAULT
        found, origin = _fetched(name, default.get_state_dict, progress=False), str(default)
    else:
        found, origin = read_weights(weights), weights
    tensors, note = fit_weights(found, model.state_dict(), classifier=classifier, path=origin)
    model.load_state_dict(tensors, strict=False)
    return Network(model, note)


def _fetched(name: str, fetch: Callable[..., Any], *args: Any, **options: Any) -> Any:
    """Return the result of a download. Any error becomes a ValueError."""
    try:
        return fetch(*args, **options)
    except Exception as error:
        reason = (str(error).strip() or "no reason given").splitlines()[0]
        raise ValueError(
            f"weights: the default weights of {name} could not be fetched ({type(error).__name__}: {reason}); "
            "give --weights FILE, or none for random weights"
        ) from error


def check_memory(name: str, **sizes: Any) -> None:
    """Raise ValueError if training a network of `MODELS` needs more than the free memory of this machine."""
    try:
        with torch.device("meta"):
            parameters = sum(p.numel() for p in build_model(name, **sizes).parameters())
    except (RuntimeError, TypeError) as error:  # raised by torch for sizes whose product overflows
        reason = str(error).splitlines()[0]
        raise ValueError(f"model: {name} of width {sizes['width']} is too large: {reason}") from error
    # fp32 weights, gradients, momentum of the optimizer, and the anchor of the measurement
    wanted, free = 4 * 4 * parameters, free_bytes(torch.device("cpu"))
    if wanted > free:
        raise ValueError(
            f"model: {name} of width {sizes['width']} has {parameters / 1e6:,.0f} million parameters and needs "
            f"{wanted / 2**30:,.1f} GiB for training, got {free / 2**30:,.1f} GiB of free memory"
        )
