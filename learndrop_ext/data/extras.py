"""The rest of a batch beside the model's input: labels, masks, ids. It is stored by sample and returned by batch.

B samples in a batch, R places.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch.utils import _pytree as pytree

from learndrop_ext.rows.slots import filled_at

InputKey = int | str


def to_device(batch: Any, device: torch.device) -> Any:
    """Return the batch with every tensor on the device. The copies do not block the host."""
    if device.type == "cpu":
        return batch
    return pytree.tree_map_only(torch.Tensor, lambda t: t.to(device, non_blocking=True), batch)


def input_of(batch: Any, key: InputKey) -> torch.Tensor:
    """Return the model's input: the batch itself if it is a tensor, else the entry at `key`.

    Raises:
        ValueError: there is no such entry, or it is not a tensor.
    """
    if isinstance(batch, torch.Tensor):
        return batch
    try:
        found = batch[key]
    except (KeyError, IndexError, TypeError):
        has = list(batch) if isinstance(batch, dict) else f"{len(batch)} entries" if hasattr(batch, "__len__") else ""
        raise ValueError(
            f"DropScheduler: input must be the position of the model's input in a batch, got {key!r}; "
            f"the batch is a {type(batch).__name__} with {has}"
        ) from None
    if not isinstance(found, torch.Tensor):
        raise ValueError(
            f"DropScheduler: input must be the position of a tensor in a batch, got {key!r}, a {type(found).__name__}"
        )
    return found


def check_count(batch: Any, count: int, key: InputKey) -> None:
    """Raise ValueError unless a batch has its `count` samples, so that each can be told by its id."""
    got = len(input_of(batch, key))
    if got != count:
        raise ValueError(
            f"drop.loader: collate_fn must give every sample of a batch, because rows are kept by sample, wanted {count}, "
            f"got {got}; leave out samples that cannot be read with a Subset or a sampler, or give cache=None"
        )


def with_input(batch: Any, key: InputKey, model_input: torch.Tensor) -> Any:
    """Return the batch with another tensor in place of the model's input."""
    pairs, spec = pytree.tree_flatten_with_path(batch)
    leaves = [leaf for _, leaf in pairs]
    place = _input_place(pairs, input_of(batch, key), key)
    return pytree.tree_unflatten([*leaves[:place], model_input, *leaves[place + 1 :]], spec)


def is_ambiguous(batch: Any, key: InputKey) -> bool:
    """Return whether a batch of B samples holds a list of B tensors of B rows: one per sample, or each with a row per
    sample. A batch of another size tells."""
    count = len(input_of(batch, key))
    found: list[Any] = []

    def is_leaf(value: Any) -> bool:
        if value is not batch and _is_square(value, count):
            found.append(value)
        return False

    pytree.tree_flatten(batch, is_leaf=is_leaf)
    return count > 1 and len(found) > 0


def some_of(batch: Any, take: torch.Tensor, *, key: InputKey, like: Any) -> Any:
    """Return the batch of only the samples `take` [n] int64 (CPU). like: a batch of the same structure."""
    x = input_of(batch, key)
    part = BatchExtras(key=key, device=x.device, like=like)
    at = torch.arange(len(take))
    part.put(batch, at, take)
    return part.get(at, x[take.to(x.device)])


@dataclass(frozen=True)
class _Entry:
    """One leaf of a batch. kind: "input", "tensor", "array" or "list" (a value per sample), or "constant"."""

    path: tuple[Any, ...]
    kind: str
    form: str  # a description that must be the same in all batches

    @property
    def name(self) -> str:
        return f"batch{pytree.keystr(self.path)}"


class BatchExtras:
    """Everything in a batch but the model's input, stored by place, as `collate_fn` made it.

    Tensors and numpy arrays of B rows are stacked (tensors on the device). Lists and tuples of B values are stored value by
    value, whatever the values are: strings, None, different numbers of boxes. A value that is the same in every batch
    (None, a number, a name) is stored once.

    Args:
        key: position of the model's input in a batch.
        device: device of the stored tensors.
        like: a batch with the structure of all batches. Default: the first one stored. In a batch of two samples, a list
            of two values could also be part of the structure.
    """

    def __init__(self, *, key: InputKey, device: torch.device, like: Any = None) -> None:
        self.key = key
        self.device = device
        self._like = like
        self._spec: Any = None
        self._entries: list[_Entry] = []
        self._stacks: list[Any] = []
        self.filled = torch.empty(0, dtype=torch.bool)  # which places hold extras; its length grows in steps
        self._end = 0  # behind the last of them
        self._whole: bool | None = None  # whether all places before the end hold extras; None if it is not known

    def check(self, batch: Any) -> None:
        """Raise ValueError for a batch that cannot be stored, naming the entry."""
        self._read(batch)

    def put(self, batch: Any, at: torch.Tensor, take: torch.Tensor | None = None) -> None:
        """Store the extras of a batch.

        Args:
            batch: a batch of B samples.
            at: [B] int64 on the CPU, their places; [n] with `take`.
            take: [n] int64 on the CPU, the samples of the batch to store. Default: all

        Raises:
            ValueError: an entry is neither per sample nor constant, or the structure is not that of the first batch.
                Nothing is stored.
        """
        if self._spec is None:
            entries, leaves, spec = self._read(batch if self._like is None else self._like)
            self._stacks = [self._new_stack(entry, leaf) for entry, leaf in zip(entries, leaves, strict=True)]
            self._spec, self._entries = spec, entries
        entries, leaves, _ = self._read(batch)
        for i, (entry, leaf) in enumerate(zip(entries, leaves, strict=True)):
            if entry.kind in ("tensor", "array"):
                rows = leaf if take is None else leaf[take if entry.kind == "tensor" else take.numpy()]
                self._stacks[i] = _put_rows(self._stacks[i], at, rows)
            elif entry.kind == "list":
                chosen = range(len(leaf)) if take is None else take.tolist()
                stack = self._stacks[i]
                for place, sample in zip(at.tolist(), chosen, strict=True):
                    stack.extend([None] * (place + 1 - len(stack)))
                    stack[place] = _own(leaf[sample])
        self.filled = _put_rows(self.filled, at, torch.ones(len(at), dtype=torch.bool))
        self._end, self._whole = max(self._end, int(at.max()) + 1 if len(at) else 0), None

    def get(self, at: torch.Tensor, model_input: torch.Tensor) -> Any:
        """Return the batch at places [B] int64 (CPU), with `model_input` in place of the images."""
        leaves: list[Any] = []
        where = at if self.device.type == "cpu" else at.to(self.device, non_blocking=True)
        for entry, stack in zip(self._entries, self._stacks, strict=True):
            if entry.kind == "input":
                leaves.append(model_input)
            elif entry.kind == "tensor":
                leaves.append(stack.index_select(0, where))
            elif entry.kind == "array":
                leaves.append(stack[at.numpy()])
            elif entry.kind == "list":
                values = [_own(stack[place]) for place in at.tolist()]
                leaves.append(tuple(values) if entry.form.startswith("a tuple") else values)
            else:
                leaves.append(stack)
        return pytree.tree_unflatten(leaves, self._spec)

    def has(self, at: torch.Tensor) -> bool:
        """Return whether all places [B] were written."""
        if not len(at) or int(at.max()) >= self._end:
            return False
        if self._whole is None:
            self._whole = bool(self.filled[: self._end].all())
        return self._whole or bool(self.filled[at].all())

    def move(self, before: torch.Tensor, after: torch.Tensor) -> None:
        """Store at places `after` [n] what is at `before` [n], and forget all else."""
        there = filled_at(self, before)
        if not bool(there.any()):
            self.clear()
            return
        batch = self.get(before[there], torch.empty(int(there.sum())))
        self.clear()
        self.put(batch, after[there])

    def clear(self) -> None:
        """Forget all that was stored."""
        self._end, self._whole = 0, None
        self._spec, self._entries, self._stacks = None, [], []
        self.filled = torch.empty(0, dtype=torch.bool)

    def first_difference(self, batch: Any, at: torch.Tensor, others: Sequence[Any] = ()) -> str | None:
        """Return the name of the first entry of a batch that differs from what is stored at places [B], or None.

        Entries that differ between the batch and `others`, further readings of the same samples, are random and not
        compared.
        """
        wanted = self._leaves(self.get(at, input_of(batch, self.key)))
        again = [self._leaves(other) for other in others]
        for i, (entry, leaf) in enumerate(zip(self._entries, self._leaves(batch), strict=True)):
            random = not all(_equal(leaf, leaves[i]) for leaves in again)
            if entry.kind != "input" and not random and not _equal(leaf, wanted[i]):
                return entry.name
        return None

    def state(self) -> tuple[dict[str, Any], list[torch.Tensor]]:
        """Return everything stored, as plain values and tensors on the CPU.

        Raises:
            TypeError: the structure or a value of the batches cannot be expressed that way.
        """
        try:
            spec = pytree.treespec_dumps(self._spec)
        except NotImplementedError as error:
            raise TypeError(f"BatchExtras.state: batches must be of plain containers, got {error}") from None
        stacks, tensors = [], [self.filled]
        for entry, stack in zip(self._entries, self._stacks, strict=True):
            if entry.kind in ("tensor", "array"):
                tensors.append(torch.as_tensor(stack).cpu())
                stack = None
            stacks.append(stack)
        entries = [[_plain_path(entry.path), entry.kind, entry.form] for entry in self._entries]
        return {"spec": spec, "entries": entries, "stacks": stacks}, tensors

    def load(self, values: dict[str, Any], tensors: Sequence[torch.Tensor]) -> None:
        """Replace what is stored by a `state`."""
        self._spec = pytree.treespec_loads(values["spec"])
        self._entries = [_Entry(_path_of(path), kind, form) for path, kind, form in values["entries"]]
        self.filled, *stored = tensors
        self._end, self._whole = len(self.filled), None
        left = iter(stored)
        self._stacks = []
        for entry, stack in zip(self._entries, values["stacks"], strict=True):
            if entry.kind == "tensor":
                stack = next(left).to(self.device)
            elif entry.kind == "array":
                stack = next(left).numpy()
            self._stacks.append(stack)

    def _leaves(self, batch: Any) -> list[Any]:
        """The leaves of a batch with the structure of the first one."""
        lists = {id(_entry_at(batch, entry.path)) for entry in self._entries if entry.kind == "list"}
        leaves: list[Any] = pytree.tree_leaves(batch, is_leaf=lambda value: id(value) in lists or value is None)
        return leaves

    def _read(self, batch: Any) -> tuple[list[_Entry], list[Any], Any]:
        """The entries of a batch, their leaves and its structure, checked against the first batch."""
        model_input = input_of(batch, self.key)
        count = len(model_input)
        if self._spec is None:

            def is_leaf(value: Any) -> bool:
                return value is None or (value is not batch and _is_list_of_samples(value, count))
        else:
            lists = {id(_entry_at(batch, entry.path)) for entry in self._entries if entry.kind == "list"}

            def is_leaf(value: Any) -> bool:
                return value is None or id(value) in lists

        pairs, spec = pytree.tree_flatten_with_path(batch, is_leaf=is_leaf)
        if self._spec is not None and spec != self._spec:
            raise ValueError(f"DropScheduler: all batches must have the same structure, got {spec} after {self._spec}")
        place = _input_place(pairs, model_input, self.key)
        entries = []
        for i, (path, leaf) in enumerate(pairs):
            entry = _entry(path, leaf, count, is_input=i == place)
            if self._entries and entry.form != self._entries[i].form:
                raise ValueError(
                    f"DropScheduler: entries of all batches must be alike, wanted {self._entries[i].form} as in the "
                    f"first, got {entry.form} at {entry.name}"
                )
            if self._entries and entry.kind == "constant" and not _equal(leaf, self._stacks[i]):
                raise ValueError(
                    "DropScheduler: every entry of a batch must be per sample or the same in all batches, got "
                    f"{leaf!r} after {self._stacks[i]!r} at {entry.name}"
                )
            entries.append(entry)
        return entries, [leaf for _, leaf in pairs], spec

    def _new_stack(self, entry: _Entry, leaf: Any) -> Any:
        if entry.kind == "tensor":
            return torch.empty((0, *leaf.shape[1:]), dtype=leaf.dtype, device=self.device)
        if entry.kind == "array":
            return np.empty((0, *leaf.shape[1:]), dtype=leaf.dtype)
        return [] if entry.kind == "list" else leaf if entry.kind == "constant" else None


def _input_place(pairs: Sequence[tuple[Any, Any]], model_input: torch.Tensor, key: InputKey) -> int:
    """Return which leaf is the model's input, -1 for none. If a batch holds the tensor twice, it is the one at `key`."""
    places = [i for i, (_, leaf) in enumerate(pairs) if leaf is model_input]
    named = [i for i in places if [getattr(step, "key", getattr(step, "idx", None)) for step in pairs[i][0]] == [key]]
    return (named or places or [-1])[0]


def _entry(path: tuple[Any, ...], leaf: Any, count: int, *, is_input: bool) -> _Entry:
    if is_input:
        return _Entry(path, "input", "the model's input")
    if isinstance(leaf, torch.Tensor | np.ndarray) and leaf.ndim > 0 and len(leaf) == count:
        kind = "tensor" if isinstance(leaf, torch.Tensor) else "array"
        return _Entry(path, kind, f"{leaf.dtype} rows {list(leaf.shape[1:])}")
    if isinstance(leaf, list | tuple) and len(leaf) == count:
        return _Entry(path, "list", f"a {type(leaf).__name__} of values")
    if leaf is None or isinstance(leaf, str | bytes | int | float | np.generic):
        return _Entry(path, "constant", f"a {type(leaf).__name__}")
    raise ValueError(
        f"DropScheduler: every entry of a batch must be a tensor of {count} rows or a list of {count} values, one per "
        f"sample, or a value that is the same in all batches, got {_describe(leaf)} at batch{pytree.keystr(path)}"
    )


def _is_list_of_samples(value: Any, count: int) -> bool:
    """Whether a container holds one value per sample and is not part of the batch's structure."""
    if not isinstance(value, list | tuple) or hasattr(value, "_fields") or len(value) != count or count == 0:
        return False
    return not _is_square(value, count)


def _is_square(value: Any, count: int) -> bool:
    """Whether a container holds `count` tensors of `count` rows."""
    return (
        isinstance(value, list | tuple)
        and len(value) == count
        and all(isinstance(v, torch.Tensor | np.ndarray) and v.ndim > 0 and len(v) == count for v in value)
    )


def _put_rows(stack: Any, at: torch.Tensor, rows: Any) -> Any:
    """The stack with rows [n, ...] at places [n]. Its memory grows in steps."""
    wanted = int(at.max()) + 1 if len(at) else 0
    if wanted > len(stack):
        size = max(wanted, len(stack) + len(stack) // 2)
        if isinstance(stack, torch.Tensor):
            stack = torch.cat([stack, stack.new_zeros((size - len(stack), *stack.shape[1:]))])
        else:
            stack = np.concatenate([stack, np.zeros((size - len(stack), *stack.shape[1:]), dtype=stack.dtype)])
    if isinstance(stack, torch.Tensor):
        stack[at.to(stack.device)] = rows.to(stack.device)
    else:
        stack[at.numpy()] = rows
    return stack


def _own(value: Any) -> Any:
    """A copy that the training loop may change in place, as it may scale boxes."""
    return value if isinstance(value, str | bytes | int | float | None) else copy.deepcopy(value)


def _equal(one: Any, other: Any) -> bool:
    if isinstance(one, torch.Tensor) and isinstance(other, torch.Tensor):
        same = one.shape == other.shape and one.dtype == other.dtype
        return same and bool(((one == other.to(one.device)) | ((one != one) & (other != other).to(one.device))).all())
    if isinstance(one, np.ndarray) and isinstance(other, np.ndarray):
        return one.shape == other.shape and bool(np.all((one == other) | ((one != one) & (other != other))))
    if isinstance(one, list | tuple) and isinstance(other, list | tuple):
        return len(one) == len(other) and all(map(_equal, one, other))
    if isinstance(one, dict) and isinstance(other, dict):
        return one.keys() == other.keys() and all(_equal(one[key], other[key]) for key in one)
    return type(one) is type(other) and bool(one == other or (one != one and other != other))


def _entry_at(batch: Any, path: tuple[Any, ...]) -> Any:
    """The value at a path, or None if the batch has no such path."""
    try:
        for step in path:
            batch = step.get(batch)
    except (KeyError, IndexError, TypeError, AttributeError):
        return None
    return batch


def _plain_path(path: tuple[Any, ...]) -> list[Any]:
    """A path as plain values: the kind and key of each step."""
    steps = []
    for step in path:
        if isinstance(step, pytree.SequenceKey):
            steps.append(["sequence", step.idx])
        elif isinstance(step, pytree.MappingKey) and isinstance(step.key, str | int):
            steps.append(["mapping", step.key])
        else:
            raise TypeError(f"BatchExtras.state: batches must be of plain containers, got {step!r}")
    return steps


def _path_of(steps: Sequence[Sequence[Any]]) -> tuple[Any, ...]:
    kinds = {"sequence": pytree.SequenceKey, "mapping": pytree.MappingKey}
    return tuple(kinds[kind](key) for kind, key in steps)


def _describe(leaf: Any) -> str:
    if isinstance(leaf, torch.Tensor | np.ndarray):
        return f"a {'tensor' if isinstance(leaf, torch.Tensor) else 'numpy array'} {list(leaf.shape)}"
    return f"{len(leaf)} values" if isinstance(leaf, list | tuple) else f"a {type(leaf).__name__}"
