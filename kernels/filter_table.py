"""Filter tables: the rows of weights, one for each filter or neuron, that the filter-norm kernel reads.

L weights, F filters of all of them. Lengths are in elements.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from .chunks import DTYPE_CODES, Entry, check_parameter


@dataclass(frozen=True)
class FilterTable:
    """Made by `build_filter_table`. A table is for one launch at a time.

    Args:
        weights: the L weights, [F_l, ...] each, detached.
        segments: [F, 4] int64: address of the filter, length, weight, code of its dtype.
        starts: [L + 1] int64, the first filter of each weight.
        maxima: [L] int64, for the kernel: bits of the largest absolute value so far. 0 between launches.
        counters: [L, 2] int32, for the kernel: filters summed, filters counted. 0 between launches.
    """

    weights: tuple[Tensor, ...]
    segments: Tensor
    starts: Tensor
    maxima: Tensor
    counters: Tensor

    def __len__(self) -> int:
        """F, the number of filters."""
        return len(self.segments)


def build_filter_table(
    weights: Sequence[Tensor],  # L weights, [F_l, ...] each
) -> FilterTable:
    """Return the table of all filters of some weights.

    Args:
        weights: on one device in fp32, bf16, fp16 or fp64, each filter without gaps in memory, in any order of dimensions.

    Raises:
        TypeError: if a weight has another dtype.
        ValueError: if a weight is sparse, freed or misaligned, has no dimension, or has filters with gaps, or if weights are
            on several devices.
    """
    rows, starts = [torch.empty(0, 4, dtype=torch.int64)], [0]
    detached = tuple(weight.detach() for weight in weights)
    for i, weight in enumerate(detached):
        name = f"weights[{i}]"
        check_parameter(weight, name, Entry(detached[0], 0, 0))
        filters = weight.shape[0] if weight.dim() else 0
        length = weight.numel() // filters if filters else 0
        if not weight.dim() or (filters > 1 and length and weight.stride(0) != length):
            raise ValueError(
                f"build_filter_table: {name} must hold one filter after the other, got shape {list(weight.shape)} with "
                f"strides {weight.stride()}"
            )
        row = torch.empty(filters, 4, dtype=torch.int64)
        row[:, 0] = weight.data_ptr() + torch.arange(filters) * (length * weight.element_size())
        row[:, 1], row[:, 2], row[:, 3] = length, i, DTYPE_CODES[weight.dtype]
        rows.append(row)
        starts.append(starts[-1] + filters)
    device = detached[0].device if detached else torch.device("cpu")
    return FilterTable(
        detached,
        torch.cat(rows).to(device),
        torch.tensor(starts, device=device),
        torch.zeros(len(detached), dtype=torch.int64, device=device),
        torch.zeros(len(detached), 2, dtype=torch.int32, device=device),
    )
