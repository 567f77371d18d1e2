"""`filter_norms`: the sums of each filter's weights, in Triton on a GPU and in torch on a CPU."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from learndrop_ext.kernels import reference
from learndrop_ext.kernels.filter_table import build_filter_table


def filter_norms(weights: Sequence[Tensor], *, share: float) -> Tensor:
    """Return the sums of each filter of some weights, [F, 4] float64, on their device.

    Columns: l1(w), l2(w)^2, max |w|, and how many |w| are at most `share` times the largest of their weight tensor. Weights
    are [F_l, ...] each, on one device in fp32, bf16, fp16 or fp64; F is the sum of all F_l. Raises TypeError or ValueError
    as `kernels.filter_table.build_filter_table`, and ValueError if `share` is not within 0..1.
    """
    if not 0 <= share <= 1:
        raise ValueError(f"filter_norms: share must be within 0..1, got {share!r}")
    table = build_filter_table(weights)
    if table.segments.device.type == "cuda":
        from learndrop_ext.kernels import filter_norms as triton_form

        return triton_form.filter_norms(table, share=share)
    # Not in C++: it runs once an epoch, and takes one thread 0.26 s for ResNet-18 and 0.85 s for ResNet-50 (11 and 23
    # million weights, bench/bench_filter_norms.py on a busy machine).
    return reference.filter_norms(table, share=share)
