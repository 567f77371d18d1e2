"""What a batch holds beside the model's input: labels, masks, ids, kept by sample and given back by batch."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch.utils import _pytree as pytree

InputKey = int | str

_TUPLE = "a tuple of values"


def _per_sample_list(value: Any) -> bool:
    plain = isinstance(value, list | tuple) and not hasattr(value, "_fields") and len(value) > 0
    return plain and all(isinstance(v, str | bytes | int | float | bool | None) for v in value)


def to_device(batch: Any, device: torch.device) -> Any:
    """The batch with every tensor on the device; the copies do not block the host."""
    return pytree.tree_map_only(torch.Tensor, lambda t: t.to(device, non_blocking=True), batch)


def _flatten(batch: Any) -> tuple[list[tuple[str, Any]], Any]:
    pairs, spec = pytree.tree_flatten_with_path(batch, is_leaf=_per_sample_list)
    return [(pytree.keystr(path), leaf) for path, leaf in pairs], spec


def input_of(batch: Any, key: InputKey) -> torch.Tensor:
    """The model's input of a batch: the batch itself if it is a tensor, else the entry at `key`.

    Raises ValueError when there is no such entry or it is no tensor.
    """
    if isinstance(batch, torch.Tensor):
        return batch
    try:
        found = batch[key]
    except (KeyError, IndexError, TypeError):
        has = list(batch) if isinstance(batch, dict) else f"{len(batch)} entries" if hasattr(batch, "__len__") else ""
        raise ValueError(
            f"DropScheduler: input must be the place of the model's input in a batch, got {key!r}; "
            f"the batch is a {type(batch).__name__} with {has}"
        ) from None
    if not isinstance(found, torch.Tensor):
        raise ValueError(
            f"DropScheduler: input must be the place of a tensor in a batch, got {key!r}, a {type(found).__name__}"
        )
    return found


class BatchExtras:
    """All of a batch but the model's input, kept by slot as `collate_fn` made it.

    Tensors of B rows are stacked to [R, ...] on the device, lists of B plain values are kept as they are. R: slots.
    """

    def __init__(self, slots: int, *, key: InputKey, device: torch.device) -> None:
        self.slots = slots
        self.key = key
        self.device = device
        self.spec: Any = None
        self.stacks: list[Any] = []
        self.kinds: list[str] = []  # of the leaves: what one sample's value is
        self.place = -1  # of the input among the leaves

    def put(self, batch: Any, slots: torch.Tensor) -> None:
        """Keep the rest of a batch of B samples at `slots` [B] int64 (CPU). Raises ValueError for an entry that is not
        per sample, or a batch of another structure, or with entries of another shape or dtype, than the first."""
        count = len(slots)
        model_input = input_of(batch, self.key)
        leaves, spec = _flatten(batch)
        for path, leaf in leaves:
            rows = len(leaf) if isinstance(leaf, list | tuple) else leaf.shape[0] if _has_rows(leaf) else None
            if rows != count:
                raise ValueError(
                    f"DropScheduler: every entry of a batch must be a tensor of {count} rows or a list of {count} "
                    f"values, one a sample, got {_describe(leaf)} at batch{path}"
                )
        if self.spec is not None and spec != self.spec:
            raise ValueError(f"DropScheduler: all batches must have one structure, got {spec} after {self.spec}")
        kinds = [_kind(leaf) for _, leaf in leaves]
        for i, (path, _) in enumerate(leaves):
            if self.kinds and i != self.place and kinds[i] != self.kinds[i]:
                raise ValueError(
                    f"DropScheduler: entries of all batches must be alike, wanted {self.kinds[i]} as in the first, "
                    f"got {kinds[i]} at batch{path}"
                )
        if self.spec is None:
            self.spec = spec
            self.kinds = kinds
            self.place = next(i for i, (_, leaf) in enumerate(leaves) if leaf is model_input)
            self.stacks = [
                [None] * self.slots
                if isinstance(leaf, list | tuple)
                else leaf.new_zeros((0 if i == self.place else self.slots, *leaf.shape[1:]), device=self.device)
                for i, (_, leaf) in enumerate(leaves)
            ]
        where = slots.to(self.device)
        for i, (_, leaf) in enumerate(leaves):
            if i == self.place:
                continue
            if isinstance(leaf, list | tuple):
                for slot, value in zip(slots.tolist(), leaf, strict=True):
                    self.stacks[i][slot] = value
            else:
                self.stacks[i][where] = leaf.to(self.device)

    def grow(self, slots: int) -> None:
        """Make room for `slots` samples in all; those that there are stay."""
        more = slots - self.slots
        for i, stack in enumerate(self.stacks):
            if isinstance(stack, list):
                stack.extend([None] * more)
            elif i != self.place:
                self.stacks[i] = torch.cat([stack, stack.new_zeros((more, *stack.shape[1:]))])
        self.slots = slots

    def state(self) -> tuple[dict[str, Any], list[torch.Tensor]]:
        """All that is kept, as plain values and tensors on the CPU. Raises TypeError where a batch's structure has no
        such form."""
        try:
            spec = pytree.treespec_dumps(self.spec)
        except NotImplementedError as error:
            raise TypeError(f"BatchExtras.state: batches must be of plain containers, got {error}") from None
        stacks = [stack if isinstance(stack, list) else None for stack in self.stacks]
        values = {"spec": spec, "kinds": self.kinds, "place": self.place, "slots": self.slots, "stacks": stacks}
        return values, [stack.cpu() for stack in self.stacks if not isinstance(stack, list)]

    @classmethod
    def of_state(
        cls, values: dict[str, Any], tensors: Sequence[torch.Tensor], *, key: InputKey, device: torch.device
    ) -> BatchExtras:
        """What `state` was taken of, on a device."""
        rest = cls(values["slots"], key=key, device=device)
        rest.spec = pytree.treespec_loads(values["spec"])
        rest.kinds, rest.place = list(values["kinds"]), values["place"]
        left = iter(tensors)
        rest.stacks = [next(left).to(device) if stack is None else stack for stack in values["stacks"]]
        return rest

    def get(self, slots: torch.Tensor, model_input: torch.Tensor) -> Any:
        """The batch at `slots` [B] int64 (CPU) with `model_input` in the place of the images."""
        where = slots if self.device.type == "cpu" else slots.to(self.device, non_blocking=True)
        leaves: list[Any] = []
        for i, stack in enumerate(self.stacks):
            if i == self.place:
                leaves.append(model_input)
            elif isinstance(stack, list):
                values = [stack[slot] for slot in slots.tolist()]
                leaves.append(tuple(values) if self.kinds[i] == _TUPLE else values)
            else:
                leaves.append(stack.index_select(0, where))
        return pytree.tree_unflatten(leaves, self.spec)


def _kind(leaf: Any) -> str:
    if isinstance(leaf, torch.Tensor):
        return f"{leaf.dtype} rows {list(leaf.shape[1:])}"
    return _TUPLE if isinstance(leaf, tuple) else "a list of values"


def _has_rows(leaf: Any) -> bool:
    return isinstance(leaf, torch.Tensor) and leaf.dim() > 0


def _describe(leaf: Any) -> str:
    if isinstance(leaf, torch.Tensor):
        return f"a tensor {list(leaf.shape)}"
    return f"{len(leaf)} values" if isinstance(leaf, list | tuple) else f"a {type(leaf).__name__}"
