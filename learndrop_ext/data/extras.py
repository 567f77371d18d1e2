"""The rest of a batch beside the model's input: labels, masks, ids. It is stored by sample and returned by batch.

B samples in a batch, R places.
"""

from __future__ import annotations

import copy
import math
from collections import UserDict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields, is_dataclass
from typing import Any

import numpy as np
import torch
from torch.utils import _pytree as pytree

from learndrop_ext.forward.images import Images
from learndrop_ext.rows.config import CacheConfig
from learndrop_ext.rows.plan import room_for
from learndrop_ext.rows.slots import filled_at


@dataclass(frozen=True)
class KeyPath:
    """The key of images that lie within an entry of a batch: the keys from the batch on."""

    path: tuple[int | str, ...]

    def __repr__(self) -> str:
        return repr(self.path)


#: Of the images in a batch; several, where each sample has several images.
Key = int | str | KeyPath
InputKey = Key | tuple[Key, ...]
#: As the user gives it.
GivenKey = int | str | Sequence[int | str | tuple[int | str, ...]]


@dataclass(frozen=True)
class _Input:
    """Stands for the model's input in the structure of a batch. at: which of a sample's images."""

    at: int = 0


def register(batch: Any) -> None:
    """Make pytree know the type of a batch that is a dataclass, a `UserDict`, as the image processors of transformers give,
    or a `dict` of another type."""
    kind: Any = type(batch)
    if kind in pytree.SUPPORTED_NODES:
        return
    if is_dataclass(kind):
        pytree.register_dataclass(type(batch))
    elif isinstance(batch, UserDict | dict):
        pytree.register_pytree_node(
            kind,
            lambda one: (list(one.values()), list(one)),
            lambda entries, names: kind(dict(zip(names, entries, strict=True))),
            flatten_with_keys_fn=lambda one: ([(pytree.MappingKey(k), v) for k, v in one.items()], list(one)),
        )


def to_device(batch: Any, device: torch.device) -> Any:
    """Return the batch with every tensor on the device. The copies do not block the host."""
    if device.type == "cpu":
        return batch
    return pytree.tree_map_only(torch.Tensor, lambda t: t.to(device, non_blocking=True), batch)


def one_key(key: InputKey) -> Key:
    """Return the key of the images, of several images of each sample that of the first."""
    return key[0] if isinstance(key, tuple) else key


def input_keys(key: GivenKey, config: CacheConfig) -> InputKey:
    """Return the key of the images of each sample, or a tuple if there are several.

    Raises:
        ValueError: keys are not different ones, or samples have several images and no names for a store.
    """
    if not isinstance(key, list | tuple):
        return key  # type: ignore[return-value]
    paths = [entry if isinstance(entry, tuple) and entry else (entry,) for entry in key]
    if not all(isinstance(one, int | str) for path in paths for one in path) or len(set(key)) < max(1, len(key)):
        raise ValueError(f"DropScheduler: input must be a key, or a list of different ones, got {key!r}")
    if len(key) == 1:
        return KeyPath(paths[0])
    if config.store is not None and config.key is None:
        raise ValueError(
            f"CacheConfig: key must name the samples in a store where they have several images, input={key!r}, got None"
        )
    return tuple(KeyPath(one) if isinstance(one, tuple) else one for one in key)


def input_of(batch: Any, key: InputKey) -> torch.Tensor:
    """Return the model's input: the batch itself if it is a tensor, else the entry at `key`; of n keys, the images
    [B, n, ...] of each sample. Raises ValueError."""
    if isinstance(key, tuple):
        images = [input_of(batch, one) for one in key]
        if isinstance(batch, torch.Tensor) or any(
            x.shape != images[0].shape or x.dtype != images[0].dtype for x in images
        ):
            got = "one tensor" if isinstance(batch, torch.Tensor) else ", ".join(f"{list(x.shape)}" for x in images)
            raise ValueError(f"DropScheduler: input must name entries of a batch of one shape and dtype, got {got}")
        return torch.stack(images, 1)
    if isinstance(batch, torch.Tensor):
        return batch
    found = batch
    try:
        for one in key.path if isinstance(key, KeyPath) else (key,):
            found = entry_of(found, one)
    except (KeyError, IndexError, TypeError):
        has = names_of(batch) or (f"{len(batch)} entries" if hasattr(batch, "__len__") else "no entries")
        raise ValueError(
            f"DropScheduler: input must be the position of the model's input in a batch, got {key!r}; "
            f"the batch is a {type(batch).__name__} with {has}"
        ) from None
    if not isinstance(found, torch.Tensor):
        several = isinstance(found, list | tuple) and len(found) > 1 and isinstance(found[0], torch.Tensor)
        hint = f"; for several images of each sample, give input=[({key!r}, 0), ({key!r}, 1), ...]" if several else ""
        raise ValueError(
            f"DropScheduler: input must be the position of a tensor in a batch, got {key!r}, a {type(found).__name__}{hint}"
        )
    return found


def names_of(batch: Any) -> list[Any]:
    """Return the keys of a mapping, or the fields of a dataclass or a named tuple; [] for what has none."""
    if isinstance(batch, Mapping):
        return list(batch)
    return [field.name for field in fields(batch)] if is_dataclass(batch) else list(getattr(batch, "_fields", ()))


def entry_of(batch: Any, key: int | str) -> Any:
    """Return an entry of a batch by its position or name. Raises KeyError, IndexError or TypeError."""
    if isinstance(key, str) and not isinstance(batch, Mapping) and key in names_of(batch):
        return getattr(batch, key)
    return batch[key]


def with_input(batch: Any, key: InputKey, model_input: Any) -> Any:
    """Return the batch with something else in place of the model's input; of n keys, with images [B, n, ...]."""
    if isinstance(batch, torch.Tensor):
        return model_input
    keys, images = (key, each_image(model_input, len(key))) if isinstance(key, tuple) else ((key,), [model_input])
    for one, x in zip(keys, images, strict=True):
        batch = _with_entry(batch, one.path if isinstance(one, KeyPath) else (one,), x)
    return batch


def _with_entry(batch: Any, path: Sequence[int | str], value: Any) -> Any:
    """The batch with another value where a path of keys leads."""
    entries, spec = pytree.tree_flatten(batch, is_leaf=lambda entry: entry is not batch)
    if spec.is_leaf():
        raise TypeError(
            "DropScheduler: loader must give batches that are tensors, lists, tuples, dicts or dataclasses, got images in a "
            f"{type(batch).__name__}"
        )
    names = names_of(batch)
    place: Any = names.index(path[0]) if path[0] in names else path[0]
    entries[place] = _with_entry(entries[place], path[1:], value) if path[1:] else value
    return pytree.tree_unflatten(entries, spec)


def each_image(images: Any, count: int) -> list[Any]:
    """Return the `count` images [B, ...] of images [B, n, ...]."""
    if isinstance(images, _Input):
        return [_Input(i) for i in range(count)]
    if isinstance(images, Images):
        return images.of_each(count)
    return [x.contiguous() for x in images.unbind(1)]


def is_ambiguous(batch: Any, key: InputKey) -> bool:
    """Return whether a batch of B samples holds a list of B tensors of B rows: one per sample, or each with a row per
    sample. A batch of another size tells."""
    count = len(input_of(batch, key))
    marked = with_input(batch, key, _Input())
    leaves = pytree.tree_leaves(marked, is_leaf=lambda value: value is not marked and _is_square(value, count))
    return count > 1 and any(_is_square(leaf, count) for leaf in leaves)


def some_of(batch: Any, take: torch.Tensor, *, key: InputKey, like: Any) -> Any:
    """Return the batch of only the samples `take` [n] int64 (CPU). like: a batch of the same structure."""
    x = input_of(batch, key)
    part = BatchExtras(key=key, device=x.device, like=like)
    at = torch.arange(len(take))
    part.put(batch, at, take)
    return part.get(at, x[take.to(x.device)])


def equal(one: Any, other: Any) -> bool:
    """Return whether two values are of one type and equal to the bit, NaN to NaN."""
    if isinstance(one, torch.Tensor) and isinstance(other, torch.Tensor):
        if one.shape != other.shape or one.dtype != other.dtype:
            return False
        other = other.to(one.device)
        return bool(((one == other) | ((one != one) & (other != other))).all())
    if isinstance(one, np.ndarray) and isinstance(other, np.ndarray):
        return one.shape == other.shape and bool(np.all((one == other) | ((one != one) & (other != other))))
    if isinstance(one, list | tuple) and isinstance(other, list | tuple):
        return len(one) == len(other) and all(map(equal, one, other))
    if isinstance(one, dict) and isinstance(other, dict):
        return one.keys() == other.keys() and all(equal(one[key], other[key]) for key in one)
    if (
        type(one) is type(other)
        and hasattr(one, "__dict__")
        and (is_dataclass(one) or getattr(type(one), "__eq__", None) is object.__eq__)
    ):
        return equal(vars(one), vars(other))
    return type(one) is type(other) and bool(one == other or (one != one and other != other))


@dataclass
class _Column:
    """One entry of the batches, by place.

    kind: "tensor" or "array" (a row per sample), "list" (a value per sample), "constant" or "input" (not stored).
    form: a description that is the same in all batches.
    """

    name: str
    kind: str
    form: str
    stored: Any = None

    @property
    def has_rows(self) -> bool:
        return self.kind in ("tensor", "array")

    @property
    def varies(self) -> bool:
        """Whether it differs between samples, and is stored."""
        return self.kind in ("tensor", "array", "list")

    def put(self, leaf: Any, at: torch.Tensor, take: torch.Tensor | None) -> None:
        """Store the samples `take` [n] of a batch's entry at places [n]; all with None."""
        if self.has_rows:
            self.stored = _written(self.stored, at, leaf if take is None else leaf[take.numpy()])
        elif self.kind == "list":
            places = at.tolist()
            self.stored.extend([None] * (max(places, default=-1) + 1 - len(self.stored)))
            for place, i in zip(places, range(len(leaf)) if take is None else take.tolist(), strict=True):
                self.stored[place] = copy.deepcopy(leaf[i])  # the loop may change its own, as it may scale boxes

    def get(self, at: torch.Tensor, where: torch.Tensor) -> Any:
        """Return the entry of a batch at places [B]. where: the same on the device."""
        if self.kind == "tensor" and self.stored.device == where.device:
            return self.stored.index_select(0, where)
        if self.kind == "tensor":
            return self.stored.index_select(0, at).pin_memory().to(where.device, non_blocking=True)
        if self.kind == "array":
            return self.stored[at.numpy()]
        if self.kind == "list":
            values = [copy.deepcopy(self.stored[place]) for place in at.tolist()]
            return tuple(values) if self.form.startswith("a tuple") else values
        return self.stored

    def values(self) -> Any:
        """Return what is stored as a tensor on the CPU or, of values that are no numbers, a list."""
        if self.kind == "array" and self.stored.dtype.kind in "US":
            return self.stored.tolist()
        return torch.as_tensor(self.stored).cpu().clone() if self.has_rows else list(self.stored)


class BatchExtras:
    """Everything in a batch but the model's input, stored by place, as `collate_fn` made it.

    Tensors and numpy arrays of B rows are stacked (tensors on the device, or where `move` has put them). Lists and tuples
    of B values are stored value by value, whatever the values are: strings, None, different numbers of boxes. A value that
    is the same in every batch (None, a number, a name) is stored once.

    like: a batch with the structure of all batches. Default: the first one stored. In a batch of two samples, a list of two
    values could also be part of the structure.
    """

    def __init__(self, *, key: InputKey, device: torch.device, like: Any = None) -> None:
        self.key, self.device, self._like = key, device, like
        self._home = device
        self.clear()

    def clear(self) -> None:
        """Forget all that was stored."""
        self._spec: Any = None
        self._columns: list[_Column] = []
        self.filled = torch.empty(0, dtype=torch.bool)  # which places hold extras; its length grows in steps

    @property
    def nbytes(self) -> int:
        """Bytes of what is stored, without lists."""
        return sum(column.stored.nbytes for column in self._columns if column.has_rows)

    @property
    def row_bytes(self) -> int:
        """Bytes of one sample's entries, without those in lists. Raises ValueError, as `put`, if `like` cannot be stored."""
        columns = [column for column in self._columns_of(self._like)[1] if column.has_rows]
        return sum(column.stored.itemsize * math.prod(column.stored.shape[1:]) for column in columns)

    def move(self, device: torch.device) -> None:
        """Store tensors there from now on; batches are still given on the device."""
        self._home = device
        for column in self._columns:
            if column.kind == "tensor":
                column.stored = column.stored.to(device)

    def put(self, batch: Any, at: torch.Tensor, take: torch.Tensor | None = None) -> None:
        """Store the samples of a batch, or of `take` [n] only, at places [B] or [n] int64 (CPU).

        Raises:
            ValueError: an entry is neither per sample nor constant, or unlike that of the first batch. Nothing is stored.
        """
        if self._spec is None:
            self._spec, self._columns = self._columns_of(batch if self._like is None else self._like)
        for column, leaf in zip(self._columns, self._leaves(batch), strict=True):
            column.put(leaf, at, take)
        self.filled = _written(self.filled, at, torch.ones(len(at), dtype=torch.bool))

    def get(self, at: torch.Tensor, model_input: torch.Tensor, where: torch.Tensor | None = None) -> Any:
        """Return the batch at places [B] int64 (CPU, and `where` on the device), with `model_input` as its images."""
        if where is None:
            where = at.to(self.device, non_blocking=True)
        images = each_image(model_input, len(self.key)) if isinstance(self.key, tuple) else [model_input]
        leaves = [images[c.stored.at] if c.kind == "input" else c.get(at, where) for c in self._columns]
        spec = self._spec
        if spec.type in (list, tuple) and spec.num_nodes == spec.num_leaves + 1:  # for which pytree takes 8 us
            return spec.type(leaves)
        return pytree.tree_unflatten(leaves, spec)

    def has(self, at: torch.Tensor) -> bool:
        """Return whether all places [B] were written."""
        return len(at) > 0 and bool(filled_at(self, at).all())

    def is_labels(self, batch: Any, labels: torch.Tensor | None) -> bool:
        """Return whether `labels` [B] are all that a batch holds beside its images, and all that varies in others."""
        if labels is None:
            return False
        spec, columns = self._columns_of(batch)
        leaves = zip(columns, spec.flatten_up_to(batch), strict=True)
        varying = [(column.kind, leaf) for column, leaf in leaves if column.varies]
        if len(varying) != 1:
            return False
        ((kind, leaf),) = varying
        return kind == "tensor" and leaf.shape == labels.shape and bool((leaf.to(labels.device) == labels).all())

    def put_labels(self, at: torch.Tensor, labels: torch.Tensor) -> None:
        """Store the labels [n] of samples at places [n], where they are all that varies, see `is_labels`."""
        if self._spec is None:
            self._spec, self._columns = self._columns_of(self._like)
        (column,) = (one for one in self._columns if one.varies)
        column.stored = _written(column.stored, at, labels.to(column.stored))
        self.filled = _written(self.filled, at, torch.ones(len(at), dtype=torch.bool))

    def first_difference(self, batch: Any, at: torch.Tensor, others: Sequence[Any] = ()) -> str | None:
        """Return the name of the first entry of a batch that differs from what is stored at places [B], or None. Entries
        that differ in `others`, further readings of the same samples, are random and not compared."""
        where = at.to(self.device)
        readings = [self._spec.flatten_up_to(one) for one in (batch, *others)]
        for i, column in enumerate(self._columns):
            leaf, *again = (leaves[i] for leaves in readings)
            random = not all(equal(leaf, other) for other in again)
            if column.kind != "input" and not random and not equal(leaf, column.get(at, where)):
                return column.name
        return None

    def state(self) -> dict[str, Any]:
        """Return everything stored, as plain values and tensors on the CPU."""
        varying = [column for column in self._columns if column.varies]
        return {
            "filled": self.filled.clone(),
            "forms": [column.form for column in varying],
            "values": [column.values() for column in varying],
        }

    def load(self, state: dict[str, Any]) -> None:
        """Replace what is stored by a `state`, if its entries are like those of this run's batches."""
        spec, columns = self._columns_of(self._like)
        varying = [column for column in columns if column.varies]
        if [column.form for column in varying] != state["forms"]:
            return
        for column, values in zip(varying, state["values"], strict=True):
            if column.kind == "tensor":
                column.stored = values.to(self._home)
            elif isinstance(values, torch.Tensor):
                column.stored = values.numpy()
            else:
                column.stored = np.array(values) if column.kind == "array" else list(values)
        self._spec, self._columns, self.filled = spec, columns, state["filled"]

    def _columns_of(self, batch: Any) -> tuple[Any, list[_Column]]:
        """The structure of a batch, and its columns without values."""
        count = len(input_of(batch, self.key))
        marked = with_input(batch, self.key, _Input())

        def is_leaf(value: Any) -> bool:
            """Whether a container holds one value per sample and is not part of the batch's structure."""
            if value is marked or not isinstance(value, list | tuple) or hasattr(value, "_fields"):
                return False
            holds_input = any(isinstance(one, _Input) for one in value)
            return len(value) == count > 0 and not holds_input and not _is_square(value, count)

        pairs, spec = pytree.tree_flatten_with_path(marked, is_leaf=is_leaf)
        columns = []
        for path, leaf in pairs:
            name = f"batch{pytree.keystr(path)}"
            kind, form = ("input", "the model's input") if isinstance(leaf, _Input) else _kind(name, leaf, count)
            column = _Column(name, kind, form, [] if kind == "list" else leaf)
            if column.has_rows:
                column.stored = leaf[:0].to(self._home) if kind == "tensor" else leaf[:0]
            columns.append(column)
        return spec, columns

    def _leaves(self, batch: Any) -> list[Any]:
        """The entries of a batch, checked against the first one."""
        count = len(input_of(batch, self.key))
        try:
            leaves: list[Any] = self._spec.flatten_up_to(batch)
        except ValueError as error:
            raise ValueError(
                f"DropScheduler: all batches must have the same structure, got another one than {self._spec}: {error}"
            ) from None
        for column, leaf in zip(self._columns, leaves, strict=True):
            if column.kind == "input":
                continue
            _, form = _kind(column.name, leaf, count)
            if form != column.form:
                raise ValueError(
                    f"DropScheduler: entries of all batches must be alike, wanted {column.form} as in the first, got {form} "
                    f"at {column.name}"
                )
            if column.kind == "constant" and not equal(leaf, column.stored):
                raise ValueError(
                    "DropScheduler: every entry of a batch must be per sample or the same in all batches, got "
                    f"{leaf!r} after {column.stored!r} at {column.name}"
                )
        return leaves


def _kind(name: str, leaf: Any, count: int) -> tuple[str, str]:
    """The kind and the form of an entry; see `_Column`."""
    if isinstance(leaf, torch.Tensor | np.ndarray) and leaf.ndim > 0 and len(leaf) == count:
        if isinstance(leaf, torch.Tensor):
            return "tensor", f"{leaf.dtype} rows {list(leaf.shape[1:])}"
        dtype = leaf.dtype.kind if leaf.dtype.kind in "US" else leaf.dtype  # strings of any width
        return "array", f"{dtype} rows {list(leaf.shape[1:])}"
    if isinstance(leaf, list | tuple) and len(leaf) == count:
        return "list", f"a {type(leaf).__name__} of values"
    if leaf is None or isinstance(leaf, str | bytes | int | float | np.generic):
        return "constant", f"a {type(leaf).__name__}"
    if isinstance(leaf, torch.Tensor | np.ndarray):
        got = f"a {'tensor' if isinstance(leaf, torch.Tensor) else 'numpy array'} {list(leaf.shape)}"
    else:
        got = f"{len(leaf)} values" if isinstance(leaf, list | tuple) else f"a {type(leaf).__name__}"
    raise ValueError(
        f"DropScheduler: every entry of a batch must be a tensor of {count} rows or a list of {count} values, one per "
        f"sample, or a value that is the same in all batches, got {got} at {name}"
    )


def _is_square(value: Any, count: int) -> bool:
    """Whether a container holds `count` tensors of `count` rows."""
    return (
        isinstance(value, list | tuple)
        and len(value) == count
        and all(isinstance(v, torch.Tensor | np.ndarray) and v.ndim > 0 and len(v) == count for v in value)
    )


def _written(stack: Any, at: torch.Tensor, rows: Any) -> Any:
    """The stack with rows [n, ...] at places [n]. Its memory grows in steps."""
    size = int(at.max()) + 1 if len(at) else 0
    if size > len(stack):
        shape = (max(size, room_for(len(stack))) - len(stack), *stack.shape[1:])
        if isinstance(stack, torch.Tensor):
            stack = torch.cat([stack, stack.new_zeros(shape)])
        else:
            stack = np.concatenate([stack, np.zeros(shape, dtype=stack.dtype)])
    if isinstance(stack, np.ndarray) and stack.dtype != rows.dtype:  # wider strings
        stack = stack.astype(np.promote_types(stack.dtype, rows.dtype))
    stack[at.numpy()] = rows.to(stack.device) if isinstance(stack, torch.Tensor) else rows
    return stack
