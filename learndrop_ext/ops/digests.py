"""`digests`: a 64-bit digest of each of many tensors in one pass, in Triton on a GPU and in C++ on a CPU."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor

from learndrop_ext import _C
from learndrop_ext.kernels.digest_table import DigestTable


class TensorDigests:
    """Digests of the same tensors again and again.

    Keeps n tensors of any dtype and size, on one CPU or CUDA device, and the table of their memory. The table is built again
    if a tensor's memory, shape, strides or dtype has changed, as `tensor.data = ...` does. Of a DTensor this rank's shard is
    digested. A tensor whose memory has gaps or overlap takes a copy, which is kept.

    Raises TypeError if `tensors` or one of them is something else, or quantized; ValueError if a tensor is sparse, has no
    memory, or lies on another device than the first one, here or later.
    """

    def __init__(self, tensors: Iterable[Tensor]) -> None:
        self._table = DigestTable(tensors)

    def __len__(self) -> int:
        """n, the number of tensors."""
        return len(self._table)

    def measure(self) -> Tensor:
        """Compute the same as `kernels.reference.digests`, where a digest and what it can miss are defined.

        Return a new tensor [n] int64 on the tensors' device. On CUDA this is a copy of n numbers and one launch of the
        Triton kernel on the current stream, without synchronisation. On a CPU it is one pass over memory in C++ with torch's
        number of threads. The result depends on neither, nor on the device.
        """
        table = self._table
        table.refresh()
        if table.device.type == "cuda":
            from learndrop_ext.kernels import digests as triton_form

            return triton_form.digests(table)
        out = torch.empty(len(table), dtype=torch.int64)
        _C.digests(
            chunks=table.chunks.data_ptr(),
            chunk_count=len(table.chunks),
            seeds=table.seeds.data_ptr(),
            out=out.data_ptr(),
            tensors=len(table),
            threads=torch.get_num_threads(),
        )
        return out


def digests(tensors: Iterable[Tensor]) -> Tensor:
    """Return `TensorDigests(tensors).measure()`, for tensors that are digested once."""
    return TensorDigests(tensors).measure()
