"""What samples are called in every run, and their labels, both without reading them. n samples, N in a dataset."""

from __future__ import annotations

import hashlib
import os
import re
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
import torch
from torch.utils.data import ConcatDataset, Subset, TensorDataset

#: samples [n] -> their labels [n]
LabelsOf = Callable[[torch.Tensor], "torch.Tensor | None"]
#: In the repr of an object that is described by its type alone.
ADDRESS = r" at 0x[0-9a-fA-F]+"


def parts(
    dataset: Any, ids: torch.Tensor, position: torch.Tensor | None = None
) -> Iterator[tuple[Any, torch.Tensor, torch.Tensor]]:
    """Yield the base datasets that samples `ids` [n] come from, through any depth of Subset and ConcatDataset, each with its
    samples' indices [m] in it and their positions [m] in `ids`."""
    position = torch.arange(len(ids)) if position is None else position
    if isinstance(dataset, Subset):
        inside = [int(dataset.indices[i]) for i in ids.tolist()]
        yield from parts(dataset.dataset, torch.tensor(inside, dtype=torch.int64), position)
    elif isinstance(dataset, ConcatDataset):
        ends = torch.tensor(dataset.cumulative_sizes)
        which = torch.searchsorted(ends, ids, right=True)
        for i, inner in enumerate(dataset.datasets):
            mine = which == i
            if bool(mine.any()):
                yield from parts(inner, ids[mine] - (int(ends[i - 1]) if i else 0), position[mine])
    else:
        yield dataset, ids, position


def sample_keys(loader: Any, ids: torch.Tensor, *, key: Callable[[int], str | int] | None, input: Any) -> list[bytes]:
    """Return what samples `ids` [n] of a DataLoader's dataset are called: digests of what their images depend on.

    That is the path, size and time of a sample's file, for a base dataset whose `samples` or `imgs` begin with paths; the
    image's own values, for one in memory (a TensorDataset, or `data` of three dimensions or more); else its index, for one
    that `tells_apart`. Type and transforms of the base dataset, and the `collate_fn`, are a part of it.

    Args:
        key: index in the DataLoader's dataset -> the sample's name, in place of these.
        input: position of the model's input in a batch.
    """
    names: list[Any] = [None] * len(ids)
    for base, index, position in parts(loader.dataset, ids):
        described = _digest(describe(base), described_object(loader.collate_fn))
        if key is not None:
            values: Sequence[Any] = [key(i) for i in ids[position].tolist()]
        elif (files := _files(base)) is not None:
            values = [_file(_path(files[i]), getattr(base, "root", "")) for i in index.tolist()]
        elif (images := _in_memory(base, input)) is not None:
            values = [_content(images[i]) for i in index.tolist()]
        else:
            values = index.tolist()
        for at, value in zip(position.tolist(), values, strict=True):
            names[at] = _digest(described, value)
    return names


def check_described(dataset: Any) -> None:
    """Raise ValueError for a dataset whose samples have no name that is the same in every run."""
    for base, *_ in parts(dataset, torch.arange(len(dataset))):
        if _files(base) is None and _in_memory(base, 0) is None and not tells_apart(base):
            raise ValueError(
                "DropScheduler: loader must be over a dataset of files, in memory, or one that its repr tells from others, "
                f"where rows are kept in a store, got {describe(base)[:200]}; give it a __repr__ that names its samples and "
                "its transforms with all their values, or give CacheConfig(key=...), a name for each index"
            )


def describe(dataset: Any) -> str:
    """Return a base dataset's type, repr and transforms, without memory addresses, its folder and its length, so that they
    are the same in the next run, and where it has grown or moved."""
    text = " ".join(_described(dataset))
    text = re.sub(ADDRESS, "", text)
    root = getattr(dataset, "root", None)
    if isinstance(root, str | os.PathLike) and os.fspath(root):
        text = text.replace(str(root), "ROOT")
    return re.sub(rf"\b{len(dataset)}\b", "N", text) if hasattr(dataset, "__len__") else text


def described_object(value: Any) -> str:
    """Return a function's or an object's name, or its repr without memory addresses."""
    name = getattr(value, "__qualname__", None)
    return f"{value.__module__}.{name}" if name is not None else re.sub(ADDRESS, "", repr(value))


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
    names = [name for name in ("transform", "transforms", "_fingerprint", "loader") if hasattr(dataset, name)]
    kind = f"{type(dataset).__module__}.{type(dataset).__qualname__}"
    return [kind, repr(dataset), *(f"{name}={getattr(dataset, name)!r}" for name in names)]


def _files(base: Any) -> Sequence[Any] | None:
    """A dataset's list of files, see `_path`, or None."""
    found = getattr(base, "samples", None) or getattr(base, "imgs", None)
    if not isinstance(found, list | tuple) or not found or len(found) != len(base):
        return None
    path = _path(found[0])
    return found if isinstance(path, str | os.PathLike) and os.path.exists(path) else None


def _path(sample: Any) -> Any:
    """The path of a sample of a dataset of files: a pair with its label, or the path alone."""
    return sample[0] if isinstance(sample, list | tuple) and sample else sample


def _file(path: Any, root: Any) -> str:
    state = os.stat(path)
    name = os.path.relpath(path, root) if isinstance(root, str | os.PathLike) and os.fspath(root) else path
    return f"{name} {state.st_size} {state.st_mtime_ns}"


def _in_memory(base: Any, input: Any) -> Any:
    """The images of a dataset that has them in memory, an array or a tensor [N, ...], or None."""
    if isinstance(base, TensorDataset):
        return base.tensors[input if isinstance(input, int) and input < len(base.tensors) else 0]
    found: Any = getattr(base, "data", None)
    is_array = isinstance(found, np.ndarray | torch.Tensor) and found.ndim >= 3
    return found if is_array and len(found) == len(base) else None


def _content(image: Any) -> bytes:
    values = image.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy() if torch.is_tensor(image) else image
    return hashlib.blake2b(np.ascontiguousarray(values).tobytes(), digest_size=16).digest()


def _digest(*values: Any) -> bytes:
    return hashlib.blake2b(repr(values).encode(), digest_size=16).digest()


def labels_of(dataset: Any, given: Any, ids: torch.Tensor) -> torch.Tensor | None:
    """Return the labels [n] of samples `ids` [n] as they are now: those `given`, or what the dataset offers without reading,
    in `targets`, `labels`, or the second entries of `samples`; or None."""
    if given is not None:
        return torch.as_tensor(given)[ids]
    out: torch.Tensor | None = None
    for base, index, position in parts(dataset, ids):
        labels = _labels(base)
        if labels is None:
            return None
        out = labels.new_empty(len(ids)) if out is None else out
        out[position] = labels[index.to(labels.device)].to(out)
    return out


def _labels(base: Any) -> torch.Tensor | None:
    """The labels [N] of a base dataset, or None, as of one that changes them when it reads a sample."""
    if getattr(base, "target_transform", None) is not None:
        return None
    found = next((value for name in ("targets", "labels") if (value := getattr(base, name, None)) is not None), None)
    if found is None:
        pairs = getattr(base, "samples", None)
        if isinstance(pairs, list | tuple) and pairs and isinstance(pairs[0], tuple) and len(pairs[0]) == 2:
            found = [label for _, label in pairs]
    try:
        labels = torch.as_tensor(found)
    except (TypeError, ValueError, RuntimeError):
        return None
    return labels if labels.ndim == 1 and len(labels) == len(base) else None
