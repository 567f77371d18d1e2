"""The kernels in plain torch. P parameter tensors, L layers, K columns (6, or 8 with persistence)."""

from __future__ import annotations

import torch
from torch import Tensor

from .chunks import DeltaTable, anchor_of


def delta_norms(table: DeltaTable, *, refresh: bool, out: Tensor | None = None) -> Tensor:
    """Return sums over each layer's parameters w of their change since the anchors.

    delta = w - anchor, in float64 for fp64 parameters, else rounded once to float32. The previous delta is the difference
    of the two anchors. An element is counted as not finite if its delta is NaN or infinite: w or the anchor is, or their
    difference overflows. It is part of the other columns too, which follow IEEE arithmetic: NaN if any term is NaN.

    Args:
        table: a table that is not stale, as `ops.delta_norms` ensures.
        refresh: make w the anchor. With persistence the older anchor is overwritten, and the two swap roles.
        out: [L, K] float64, contiguous, on the table's device, to write to. Default: a new tensor

    Returns:
        [L, K] float64, for this rank's shards: l1(delta), l2(delta)^2, max |delta|, l1(w), l2(w)^2, number of elements
        not finite; with persistence also dot(delta, previous delta) and l2(previous delta)^2.

    Raises:
        ValueError: if `out` has another form.
    """
    check_out(table, out)
    sums = torch.zeros(len(table), table.columns, dtype=torch.float64, device=table.device)
    role = table.role
    newer = table.anchors[role]
    older = table.anchors[1 - role] if table.persistence else newer
    for entry, counted in zip(table.entries, table.counted, strict=True):
        row = sums[entry.layer]
        weight, anchor = entry.weight, anchor_of(newer, entry)
        if counted and weight.numel():
            dtype = torch.promote_types(weight.dtype, torch.float32)
            w = weight.to(dtype)
            delta = (w - anchor.to(dtype)).double()
            w = w.double()
            row[0] += delta.abs().sum()
            row[1] += delta.square().sum()
            row[2] = torch.maximum(row[2], delta.abs().amax())
            row[3] += w.abs().sum()
            row[4] += w.square().sum()
            row[5] += delta.isfinite().logical_not().sum()
            if table.persistence:
                previous = (anchor.to(dtype) - anchor_of(older, entry).to(dtype)).double()
                row[6] += (delta * previous).sum()
                row[7] += previous.square().sum()
        if refresh:
            anchor_of(older, entry).copy_(weight)
    if refresh and table.persistence:
        table.counters[-1] = 1 - role
    return sums if out is None else out.copy_(sums)


def check_out(table: DeltaTable, out: Tensor | None) -> None:
    """Raise ValueError unless `out` is None or a contiguous [L, K] float64 tensor on the table's device."""
    if out is None:
        return
    wanted = (len(table), table.columns)
    if out.shape != wanted or out.dtype != torch.float64 or out.device != table.device or not out.is_contiguous():
        raise ValueError(
            f"delta_norms: out must be a contiguous {list(wanted)} float64 tensor on {table.device}, "
            f"got {list(out.shape)} {out.dtype} with strides {out.stride()} on {out.device}"
        )
