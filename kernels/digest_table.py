"""Digest tables: the chunks of many tensors' memory that a digest kernel reads, and the seed of each tensor's digest.

n tensors, C chunks. Names that end in `_bytes` are in bytes. The definition of a digest is in `reference.digests`.
"""

from __future__ import annotations

from array import array
from collections.abc import Iterable, Sequence
from functools import lru_cache

import torch
from torch import Tensor

from .chunks import is_dense
from .shards import as_sharded, local_part

WORD_BYTES = 4
# Words of a block: their keys are the same in every block, so that a program of the kernel or a core makes them once.
# All differ, because MurmurHash3's finaliser gives no two of the first 4,096 numbers odd keys that agree.
BLOCK_WORDS = 4096
# As in chunks.py: enough chunks to balance a GPU's multiprocessors, and few enough for their table.
CHUNK_BLOCKS = 2
CHUNK_BYTES = CHUNK_BLOCKS * BLOCK_WORDS * WORD_BYTES

MASK_64 = (1 << 64) - 1
# What `seed_of` is told of a tensor in row-major order.
ROW_MAJOR: tuple[int, ...] = ()


class DigestTable:
    """Tensors of one device, and the chunk table that kernels read.

    Attributes:
        device: device of the tensors; the CPU if there are none.
        builds: number of times the table was built.
        memory: the n tensors whose memory is read: those that were given, detached, or copies of those with gaps.
        chunks: [C, 4] int64, in the order of the tensors: address, length in bytes, number of the first block, number of the
            tensor.
        seeds: [n] int64, what is added to the sum of each tensor's words.
    """

    device: torch.device
    memory: tuple[Tensor, ...]
    chunks: Tensor
    seeds: Tensor

    def __init__(self, tensors: Iterable[Tensor]) -> None:
        self.builds = 0
        self._tensors = checked(tensors)
        self._build()

    def __len__(self) -> int:
        """n, the number of tensors."""
        return len(self._tensors)

    def stale(self) -> bool:
        """Return whether a tensor's memory, shape, strides or dtype has changed since the build. Needs no device."""
        return layouts(self._locals()) != self._layouts

    def refresh(self) -> None:
        """Prepare a digest of what the tensors hold now.

        Tensors with gaps or overlap are copied, the others are read where they are.
        """
        if self.stale():
            self._build()
        elif self._copies:
            sources = self._locals()
            # The copies were made in this mode: here they can be written to under any mode of the caller.
            with torch.inference_mode():
                for i, copy in self._copies:
                    copy.copy_(sources[i])

    def _locals(self) -> Sequence[Tensor]:
        return [local_part(tensor) for tensor in self._tensors] if self._sharded else self._tensors

    def _build(self) -> None:
        self._sharded = any(as_sharded(tensor) is not None for tensor in self._tensors)
        found = self._locals()
        device = found[0].device if found else torch.device("cpu")
        memory: list[Tensor] = []
        seeds: list[int] = []
        copies: list[tuple[int, Tensor]] = []
        for i, tensor in enumerate(found):
            layout = ROW_MAJOR
            check_tensor(tensor, f"tensors[{i}]", device)
            # The memory of a lazy conjugate or negative has other values than the tensor.
            if tensor.is_conj() or tensor.is_neg() or not (tensor.is_contiguous() or is_dense(tensor)):
                with torch.inference_mode():
                    tensor = tensor.clone(memory_format=torch.contiguous_format).resolve_conj().resolve_neg()
                copies.append((i, tensor))
            elif not tensor.is_contiguous():
                layout = order(tensor)
            memory.append(tensor.detach())
            seeds.append(seed_of(tensor.numel() * tensor.element_size(), layout))
        self.device = device
        self.memory = tuple(memory)
        self.chunks = cut(memory).to(device)
        self.seeds = torch.tensor(seeds, dtype=torch.int64).to(device)
        self.builds += 1
        self._copies = copies
        self._layouts = layouts(found)


def checked(tensors: Iterable[Tensor]) -> tuple[Tensor, ...]:
    """Return the tensors as a tuple, or raise TypeError if they are something else."""
    if isinstance(tensors, Tensor) or not isinstance(tensors, Iterable):
        raise TypeError(f"digests: tensors must be an iterable of tensors, got {type(tensors).__name__}")
    found = tuple(tensors)
    for i, tensor in enumerate(found):
        if not isinstance(tensor, Tensor):
            raise TypeError(f"digests: tensors[{i}] must be a tensor, got {type(tensor).__name__}")
    return found


def check_tensor(tensor: Tensor, name: str, device: torch.device) -> None:
    """Raise TypeError or ValueError for a tensor that the kernels cannot read."""
    if tensor.layout != torch.strided:
        raise ValueError(f"digests: {name} must be a dense tensor, got layout {tensor.layout}")
    if tensor.is_quantized:
        raise TypeError(f"digests: {name} must have a dtype without a scale of its own, got {tensor.dtype}")
    if tensor.device.type not in ("cpu", "cuda"):
        raise ValueError(f"digests: {name} must lie on a CPU or a CUDA device, got {tensor.device}")
    if tensor.device != device:
        raise ValueError(f"digests: {name} must lie on the device of the others, {device}, got {tensor.device}")
    if tensor.numel() and tensor.data_ptr() == 0:
        raise ValueError(f"digests: {name} must have memory, got {tensor.numel()} elements with none")


def layouts(tensors: Sequence[Tensor]) -> tuple[list[object], ...]:
    """Return all that a table depends on, in lists that Python compares quickly."""
    return (
        list(map(Tensor.data_ptr, tensors)),
        list(map(Tensor.size, tensors)),
        list(map(Tensor.stride, tensors)),
        [tensor.dtype for tensor in tensors],
        list(map(Tensor.is_conj, tensors)),
        list(map(Tensor.is_neg, tensors)),
    )


def order(tensor: Tensor) -> tuple[int, ...]:
    """Return element size, sizes and strides of a tensor, dimensions of one element aside."""
    kept = [(size, stride) for size, stride in zip(tensor.shape, tensor.stride(), strict=True) if size != 1]
    return (tensor.element_size(), *(size for size, _ in kept), *(stride for _, stride in kept))


def mix64(x: int) -> int:
    """Return SplitMix64's finaliser of x, a bijection of the numbers of 64 bits."""
    x = (x + 0x9E3779B97F4A7C15) & MASK_64
    x = (x ^ x >> 30) * 0xBF58476D1CE4E5B9 & MASK_64
    x = (x ^ x >> 27) * 0x94D049BB133111EB & MASK_64
    return x ^ x >> 31


@lru_cache(maxsize=4096)
def seed_of(size_bytes: int, layout: tuple[int, ...]) -> int:
    """Return the seed of a tensor of this size as a signed number; `layout` is ROW_MAJOR, or what `order` gives."""
    seed = mix64(size_bytes)
    for value in layout:
        seed = mix64(seed ^ value)
    return seed - (seed >> 63 << 64)


def cut(tensors: Sequence[Tensor]) -> Tensor:
    """Return the chunk table [C, 4] int64 of dense tensors, on the CPU. A tensor without elements has no chunk.

    Not with torch's indexing, which wakes all its threads for a few thousand rows, on a busy machine for 15 ms.
    """
    address, length, block, owner = columns = [array("q") for _ in range(4)]
    for i, tensor in enumerate(tensors):
        start, size = tensor.data_ptr(), tensor.numel() * tensor.element_size()
        count = -(-size // CHUNK_BYTES)
        if count:
            address.extend(range(start, start + size, CHUNK_BYTES))
            length.extend([CHUNK_BYTES] * (count - 1))
            length.append(size - (count - 1) * CHUNK_BYTES)
            block.extend(range(0, count * CHUNK_BLOCKS, CHUNK_BLOCKS))
            owner.extend([i] * count)
    rows = torch.empty(len(owner), 4, dtype=torch.int64)
    if owner:
        for i, column in enumerate(columns):
            rows[:, i] = torch.frombuffer(column, dtype=torch.int64)
    return rows
