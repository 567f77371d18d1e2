"""A pool of host memory for batches, reused once nothing refers to it.

A large new tensor causes page faults: the operating system maps and zeroes each of its pages, and unmaps them when it is
freed. On two cores a gather of 128 x 100,352 fp32 values took 4.5 ms into reused memory and 12.3 ms into a new tensor.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from sys import getrefcount
from typing import Any

import torch

#: The C library reuses smaller blocks itself, and returns larger ones to the operating system.
MIN_POOLED_BYTES = 1 << 20
#: Up to three batches are alive in a loop: the last one, the one being trained on and the one being written.
MAX_POOLED = 3


class OutputPool:
    """Lends memory for batches, and lends it again when no tensor, view, array or graph refers to it.

    Only CPU memory is pooled; the GPU allocator has its own pool.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._pooled: list[tuple[torch.UntypedStorage, int]] = []  # and its address, the one that was lent last behind

    def take(self, shape: Sequence[int], strides: Sequence[int], dtype: torch.dtype) -> torch.Tensor:
        """Return a tensor without gaps with undefined values, as `torch.empty_strided` does."""
        nbytes = math.prod(shape) * dtype.itemsize
        if nbytes < MIN_POOLED_BYTES or self._device.type != "cpu":
            return torch.empty_strided(tuple(shape), tuple(strides), dtype=dtype, device=self._device)
        i = next((i for i in range(len(self._pooled)) if self._is_free(i, nbytes)), None)
        if i is None:
            storage = torch.UntypedStorage(nbytes)
            self._pooled = [*self._pooled[1 - MAX_POOLED :], (storage, storage.data_ptr())]
        else:
            self._pooled.append(self._pooled.pop(i))
        return torch.empty(0, dtype=dtype).set_(self._pooled[-1][0], 0, tuple(shape), tuple(strides))

    def _is_free(self, i: int, nbytes: int) -> bool:
        """Whether a storage is large enough, and held by the pool alone: in C++ and in Python. One that was shared with
        another process has left its memory."""
        storage, at = self._pooled[i]
        held_once = torch._C._storage_Use_Count(storage._cdata) == 1 and storage.data_ptr() == at
        del storage
        return held_once and _references(self._pooled, i) == ALONE and self._pooled[i][0].nbytes() >= nbytes


def _references(pooled: list[tuple[Any, int]], i: int) -> int:
    return getrefcount(pooled[i][0])


#: References to a storage that the pool alone has.
ALONE = _references([(object(), 0)], 0)
