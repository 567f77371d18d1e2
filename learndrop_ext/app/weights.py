"""Weights from a file, matched to a network that may have another number of classes."""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping
from pathlib import Path

import torch
from torch import Tensor

#: Keys under which a checkpoint may hold the state_dict, beside the epoch, the optimizer and so on.
NESTED = ("state_dict", "model", "model_state_dict")


def read_weights(path: str | Path) -> dict[str, Tensor]:
    """Return the tensors of a .safetensors file, or one written by `torch.save`, by key, in file order.

    Code in a pickle is never run. Raises ValueError if the file is missing or damaged, or holds anything other than tensors,
    and ImportError if it needs safetensors and that is not installed.
    """
    path = Path(path)
    if not path.is_file():
        raise ValueError(f"weights must be a file, got {path}, which is {'a folder' if path.is_dir() else 'not there'}")
    content = _read_safetensors(path) if path.suffix == ".safetensors" else _read_pickle(path)
    if isinstance(content, Mapping):
        content = next((content[key] for key in NESTED if isinstance(content.get(key), Mapping)), content)
    if not isinstance(content, Mapping) or not content:
        raise ValueError(f"weights: {path} must hold a state_dict, got {type(content).__name__}")
    for key, value in content.items():
        if not isinstance(value, Tensor):
            raise ValueError(f"weights: {path} must hold tensors only, got {type(value).__name__} at {key!r}")
    # DataParallel and DistributedDataParallel prefix each key with "module.".
    return {str(key).removeprefix("module."): value for key, value in content.items()}


def _read_safetensors(path: Path) -> object:
    try:
        from safetensors import SafetensorError
        from safetensors.torch import load_file
    except ImportError as error:
        raise ImportError(
            f'weights: {path} needs safetensors, which is not installed: pip install "learndrop_ext[pretrained]"'
        ) from error
    try:
        return load_file(path)
    except (SafetensorError, OSError) as error:
        raise ValueError(f"weights: {path} must be a whole safetensors file, got: {error}") from error


def _read_pickle(path: Path) -> object:
    try:
        return torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # A damaged pickle can raise anything.
        if code := re.search(r"GLOBAL (\S+)", str(error)):
            raise ValueError(
                f"weights: {path} must hold tensors only, got a pickle that asks for {code[1]}; it was not run"
            ) from error
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise ValueError(f"weights: {path} must be a file written by torch.save, got: {reason}") from error


def fit_weights(
    weights: Mapping[str, Tensor], network: Mapping[str, Tensor], *, classifier: Collection[str], path: str | Path
) -> tuple[dict[str, Tensor], str]:
    """Match the tensors of a file to those of a network by name or, if the names differ, by order and shape.

    Return them by the keys of the network, and a line about what was matched and what was left out.

    Matching by order needs as many tensors as the network has, each of the same shape. A classifier of another shape, or
    missing in the file, is left out: `classifier` holds the keys of `network` whose shapes depend on the number of classes.
    Batch counters of BatchNorm may be missing. Raises ValueError, with the first key that differs, if the weights of the
    file `path` are of another network.
    """
    wanted = {key: value for key, value in network.items() if not _is_counter(key)}
    given = {key: value for key, value in weights.items() if not _is_counter(key)}
    in_order = dict(zip(wanted, given.values(), strict=False))
    by_order = (
        any(key not in given for key in wanted if key not in classifier)
        and len(given) == len(wanted)
        and all(in_order[key].shape == value.shape for key, value in wanted.items() if key not in classifier)
    )
    if by_order:
        given = in_order
    for key, value in wanted.items():
        if key in classifier:
            continue
        if key not in given:
            raise ValueError(f"weights: {path} must be of this network, got no {key!r} {list(value.shape)}")
        if given[key].shape != value.shape:
            raise ValueError(
                f"weights: {path} must be of this network, with {key!r} {list(value.shape)}, got {list(given[key].shape)}"
            )
    for key, value in given.items():
        if key not in wanted:
            raise ValueError(f"weights: {path} must be of this network, which has no {key!r} {list(value.shape)}")
    tensors = {key: given[key] for key in wanted if key in given and given[key].shape == wanted[key].shape}
    left_out = [key for key in wanted if key not in tensors]
    counters = {key: weights[key] for key in network if _is_counter(key) and key in weights}
    words = [f"{len(tensors)} of {len(wanted)} tensors from {path}"]
    if by_order:
        words.append("matched by order and shape, since the names differ")
    if left_out:
        words.append(f"{', '.join(left_out)} left out: the classifier is new")
    return tensors | counters, "weights: " + "; ".join(words)


def _is_counter(key: str) -> bool:
    return key.endswith("num_batches_tracked")
