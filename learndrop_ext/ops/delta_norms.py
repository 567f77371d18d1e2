"""`delta_norms`: the sums of each layer's change in one pass, in Triton on a GPU and in C++ on a CPU."""

from __future__ import annotations

import torch
from torch import Tensor

from learndrop_ext import _C
from learndrop_ext.kernels.chunks import DeltaTable
from learndrop_ext.kernels.reference import check_out


def delta_norms(table: DeltaTable, *, refresh: bool, out: Tensor | None = None) -> Tensor:
    """Compute the same as `kernels.reference.delta_norms`, with its arguments, result and errors. Updates a stale table.

    On CUDA this is one launch of the Triton kernel on the current stream, without synchronisation. On a CPU it is one pass
    over memory in C++ with torch's number of threads, on which the result does not depend.
    """
    table.refresh_pointers()
    if table.device.type == "cuda":
        from learndrop_ext.kernels import delta_norms as triton_form

        return triton_form.delta_norms(table, refresh=refresh, out=out)
    check_out(table, out)
    sums = torch.empty(len(table), table.columns, dtype=torch.float64) if out is None else out
    _C.delta_norms(
        chunks=table.chunks.data_ptr(),
        chunk_count=len(table.chunks),
        starts=table.starts.data_ptr(),
        layers=len(table),
        anchors=table.anchors.data_ptr(),
        row_bytes=table.anchors.shape[1],
        role=table.counters[-1:].data_ptr(),
        partials=table.partials.data_ptr(),
        out=sums.data_ptr(),
        persistence=table.persistence,
        refresh=refresh,
        threads=torch.get_num_threads(),
    )
    return sums
