"""Chunk tables: the pieces of parameters that a delta-norm kernel reads, and the parameters' anchors.

P parameter tensors, L layers, C chunks, G groups of chunks, S bytes of an anchor row, K columns of the sums. Offsets and
lengths are in elements; names that end in `_bytes` are in bytes.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from .shards import common_mesh, counts_here, local_part

# The flags column: the dtype in the low bits, then one bit for "address is a multiple of 16 bytes".
DTYPE_CODES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2, torch.float64: 3}
DTYPE_MASK = 3
ALIGNED = 4
# Columns of the chunk table.
ADDRESS, ANCHOR_BYTES, LENGTH, LAYER, FLAGS = range(5)

ALIGN_BYTES = 16

# One Triton program reduces one chunk (tiles and multiprocessors: delta_norms.py). Small chunks balance the work; large
# ones need fewer table rows (40 bytes each), partial sums (64) and counter updates. 32 KiB of parameters are 96 KiB of
# traffic with refresh, to which these add 0.1 %. ResNet-50 in fp32, 102 MB, is 3,120 chunks, 23.6 for each of an H200's
# 132 multiprocessors: 24 on the busiest, 2 % over the mean. With 64 KiB there would be 12 where the mean is 11.8, in little
# more than one wave.
CHUNK_BYTES = 32 * 1024

# Chunks whose partial sums one program adds in one step, before a layer's last program adds those of its groups. Reading
# them is a round trip to device memory of about 1 us, and the last two of a launch are not hidden. With a single level, the
# 15,100 chunks of VGG-16's classifier would be 118 such steps in a row, a third of its 386 us.
GROUP_CHUNKS = 128

Position = tuple[int, int]
Anchors = Mapping[Position, tuple[Tensor, ...]]


@dataclass(frozen=True)
class Entry:
    """One counted parameter: this rank's memory of it, its layer, and the offset of its anchors."""

    # Detached. Kept, so that its address is not reused while the table exists.
    weight: Tensor
    layer: int
    anchor_bytes: int


class DeltaTable:
    """Parameters of one device, grouped in layers, with their anchors and the chunk table that kernels read.

    Made by `build_table`. A table is for one launch at a time: launches on two streams would share its partial sums and
    counters. A CUDA graph that captured a launch reads this table's memory, and must be captured again when `builds` has
    changed.

    Attributes:
        device: device of the parameters.
        persistence: whether there are two anchors.
        builds: number of times the table was built.
        entries: the counted parameters.
        counted: which of them are in this rank's sums.
        mesh: device mesh of sharded parameters, or None.
        chunks: [C, 5] int64, sorted by layer: address of w, offset in an anchor row in bytes, length, layer, flags.
        starts: [L + 1, 2] int64, the first chunk and the first group of each layer.
        anchors: [1 or 2, S] uint8, parameters in their own dtype and storage order, each at a multiple of 16 bytes.
        partials: [C + G, 8] float64, the sums of chunks, then those of groups.
        counters: [G + L + 2] int32: chunks done of each group, groups done of each layer, layers done, and last the
            role, which says which row of `anchors` is the newer one.
    """

    device: torch.device
    entries: tuple[Entry, ...]
    chunks: Tensor
    starts: Tensor
    anchors: Tensor
    partials: Tensor
    counters: Tensor

    def __init__(
        self,
        layers: Sequence[Sequence[Tensor]],
        *,
        persistence: bool = False,
        anchors: Anchors | None = None,
    ) -> None:
        self.persistence = persistence
        self.builds = 0
        self._layers = tuple(tuple(layer) for layer in layers)
        self._build(anchors or {})

    @property
    def columns(self) -> int:
        """K, the number of sums per layer: 6, or 8 with persistence."""
        return 8 if self.persistence else 6

    @property
    def role(self) -> int:
        """The row of `anchors` that holds the newer anchor. Reading it waits for the device."""
        return int(self.counters[-1])

    def __len__(self) -> int:
        """L, the number of layers."""
        return len(self._layers)

    def stale(self) -> bool:
        """Return whether a parameter's memory has moved or changed its size since the build. Needs no device."""
        locals_ = [local_part(tensor) for tensor in self._flat] if self.mesh is not None else self._flat
        return list(map(Tensor.data_ptr, locals_)) != self._pointers or list(map(Tensor.numel, locals_)) != self._numels

    def refresh_pointers(self) -> bool:
        """Rebuild the table if it is stale, and return whether it was.

        A parameter keeps its anchors if its shape and dtype are the same; otherwise its current value becomes the anchor.
        """
        if not self.stale():
            return False
        self._build(self.anchor_values())
        return True

    def anchor_values(self) -> dict[Position, tuple[Tensor, ...]]:
        """Return the anchors by (layer, position in the layer), in their parameters' shapes, sharing the table's memory.

        The newer one comes first, with persistence followed by the older one. A shared parameter's anchors are listed under
        each of its positions.
        """
        role = self.role if self.persistence else 0
        rows = [self.anchors[role], self.anchors[1 - role]] if self.persistence else [self.anchors[0]]
        return {
            position: tuple(anchor_of(row, self.entries[i]) for row in rows) for position, i in self._entry_at.items()
        }

    def _build(self, anchors: Anchors) -> None:
        flat = [tensor for layer in self._layers for tensor in layer]
        mesh = common_mesh(flat)
        entries: list[Entry] = []
        entry_at: dict[Position, int] = {}
        counted: list[bool] = []
        seen: dict[tuple[object, ...], int] = {}
        offset_bytes = 0
        for i_layer, layer in enumerate(self._layers):
            for i, tensor in enumerate(layer):
                weight = local_part(tensor).detach()
                check_parameter(weight, f"layers[{i_layer}][{i}]", entries[0] if entries else None)
                key = (
                    (weight.data_ptr(), weight.dtype, weight.shape, weight.stride())
                    if weight.numel()
                    else (id(tensor),)
                )
                if key not in seen:
                    seen[key] = len(entries)
                    entries.append(Entry(weight, i_layer, offset_bytes))
                    counted.append(counts_here(tensor, mesh))
                    offset_bytes += -(-weight.nbytes // ALIGN_BYTES) * ALIGN_BYTES
                entry_at[i_layer, i] = seen[key]
        device = entries[0].weight.device if entries else torch.device("cpu")
        memory = torch.zeros(2 if self.persistence else 1, offset_bytes, dtype=torch.uint8, device=device)
        for position, i in entry_at.items():
            fill_anchors(memory, entries[i], anchors.get(position, ()))

        self.mesh = mesh
        self.device = device
        self.entries = tuple(entries)
        self.anchors = memory
        chunks, starts = cut([e for e, here in zip(entries, counted, strict=True) if here], len(self._layers))
        groups = int(starts[-1, 1])
        self.chunks = chunks.to(device)
        self.starts = starts.to(device)
        self.partials = torch.empty(len(chunks) + groups, 8, dtype=torch.float64, device=device)
        self.counters = torch.zeros(groups + len(self._layers) + 2, dtype=torch.int32, device=device)
        self.counted = tuple(counted)
        self.builds += 1
        self._entry_at = entry_at
        self._flat = flat
        self._pointers = [local_part(tensor).data_ptr() for tensor in flat]
        self._numels = [local_part(tensor).numel() for tensor in flat]


def build_table(
    layers: Sequence[Sequence[Tensor]],  # L layers, P parameters in all, each of any shape
    *,
    persistence: bool = False,
    anchors: Anchors | None = None,
) -> DeltaTable:
    """Return the chunk table and the anchors of parameters, grouped in layers.

    Args:
        layers: parameters on one device in fp32, bf16, fp16 or fp64, dense in memory in any order of dimensions. One that
            occurs twice is counted once, in its first layer. A DTensor is measured on this rank's shard.
        persistence: also keep the previous anchor. Default: False
        anchors: initial values of the anchors by (layer, position), used if shape and dtype agree. Default: the parameters

    Raises:
        TypeError: if a parameter has another dtype.
        ValueError: if a parameter is sparse, freed or misaligned, or has gaps or overlap; if parameters are on several
            devices, or shards on several meshes.
    """
    return DeltaTable(layers, persistence=persistence, anchors=anchors)


def anchor_of(
    row: Tensor,  # [S] uint8, one row of DeltaTable.anchors
    entry: Entry,
) -> Tensor:
    """Return the anchor of one parameter in its shape and strides, sharing the row's memory."""
    weight = entry.weight
    memory = row[entry.anchor_bytes : entry.anchor_bytes + weight.nbytes].view(weight.dtype)
    return memory.as_strided(weight.shape, weight.stride())


def fill_anchors(
    memory: Tensor,  # [1 or 2, S] uint8
    entry: Entry,
    kept: tuple[Tensor, ...],
) -> None:
    """Set a parameter's anchors to the kept values, newest first, or to the parameter if those do not fit."""
    for i, row in enumerate(memory):
        values = kept[i] if i < len(kept) else kept[0] if kept else entry.weight
        fits = values.shape == entry.weight.shape and values.dtype == entry.weight.dtype
        anchor_of(row, entry).copy_(values if fits else entry.weight)


def check_parameter(weight: Tensor, name: str, first: Entry | None) -> None:
    """Raise TypeError or ValueError for a parameter that the kernels cannot read."""
    if weight.layout != torch.strided:
        raise ValueError(f"build_table: {name} must be a dense tensor, got layout {weight.layout}")
    if weight.dtype not in DTYPE_CODES:
        names = ", ".join(str(dtype).removeprefix("torch.") for dtype in DTYPE_CODES)
        raise TypeError(f"build_table: {name} must be one of {names}, got {weight.dtype}")
    if weight.device.type not in ("cpu", "cuda"):
        raise ValueError(f"build_table: {name} must lie on a CPU or a CUDA device, got {weight.device}")
    if first is not None and weight.device != first.weight.device:
        raise ValueError(
            f"build_table: {name} must lie on the device of the others, {first.weight.device}, got {weight.device}"
        )
    if not is_dense(weight):
        raise ValueError(
            f"build_table: {name} must fill its memory without gaps or overlap, "
            f"got shape {tuple(weight.shape)} with strides {weight.stride()}"
        )
    if weight.numel() and weight.data_ptr() == 0:
        raise ValueError(f"build_table: {name} must have memory, got {weight.numel()} elements with none")
    if weight.data_ptr() % weight.element_size():
        raise ValueError(
            f"build_table: {name} must lie at a multiple of {weight.element_size()} bytes, "
            f"got address {weight.data_ptr():#x}"
        )


def is_dense(tensor: Tensor) -> bool:
    """Return whether the elements fill their memory without gaps or overlap, in any order of dimensions."""
    if tensor.numel() == 0:
        return True
    expected = 1
    for stride, size in sorted(zip(tensor.stride(), tensor.shape, strict=True)):
        if size == 1:
            continue
        if stride != expected:
            return False
        expected *= size
    return True


def cut(entries: Sequence[Entry], layers: int) -> tuple[Tensor, Tensor]:
    """Return the chunk table [C, 5] int64 and the first chunk and group of each layer [L + 1, 2] int64, on the CPU.

    A chunk lies in one parameter, a group in one layer. A layer without elements has one chunk of length 0,
    so that every layer's sums are written by a program.
    """
    rows: list[Tensor] = []
    starts = [(0, 0)]
    for i_layer in range(layers):
        members = [e for e in entries if e.layer == i_layer and e.weight.numel()]
        cuts = [cut_entry(entry) for entry in members] or [torch.tensor([[0, 0, 0, i_layer, ALIGNED]])]
        rows += cuts
        count = sum(map(len, cuts))
        chunk, group = starts[-1]
        starts.append((chunk + count, group + -(-count // GROUP_CHUNKS)))
    chunks = torch.cat(rows) if rows else torch.empty(0, 5, dtype=torch.int64)
    return chunks, torch.tensor(starts)


def cut_entry(entry: Entry) -> Tensor:
    """Return the rows of the chunk table for one parameter, which has elements, on the CPU."""
    weight = entry.weight
    item_bytes = weight.element_size()
    length = CHUNK_BYTES // item_bytes
    first = torch.arange(0, weight.numel(), length, dtype=torch.int64)
    aligned = weight.data_ptr() % ALIGN_BYTES == 0
    rows = torch.empty(len(first), 5, dtype=torch.int64)
    rows[:, ADDRESS] = weight.data_ptr() + first * item_bytes
    rows[:, ANCHOR_BYTES] = entry.anchor_bytes + first * item_bytes
    rows[:, LENGTH] = (weight.numel() - first).clamp(max=length)
    rows[:, LAYER] = entry.layer
    rows[:, FLAGS] = DTYPE_CODES[weight.dtype] | (ALIGNED if aligned else 0)
    return rows
