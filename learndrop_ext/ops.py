"""The package's only door to its compiled extension and to its Triton kernels."""

from __future__ import annotations

from torch import Tensor

from .kernels import reference
from .kernels.chunks import DeltaTable


def delta_norms(table: DeltaTable, *, refresh: bool, out: Tensor | None = None) -> Tensor:
    """Sums over each layer's parameters of how far they are from their anchors: [L, 6] or [L, 8] float64.

    Columns, `refresh`, `out` and what it raises: `kernels.reference.delta_norms`. A table whose parameters
    have moved is built anew first. A CUDA table takes one launch of the Triton kernel on the current stream
    and no synchronisation; a CPU table the reference.
    """
    table.refresh_pointers()
    if table.device.type == "cuda":
        from .kernels import delta_norms as triton_form

        return triton_form.delta_norms(table, refresh=refresh, out=out)
    return reference.delta_norms(table, refresh=refresh, out=out)
