"""The costs of each layer (FLOPs, seconds, bytes), and where rows are kept. All costs are per sample."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field

from learndrop_ext import ops
from learndrop_ext.forward.chain import Chain
from learndrop_ext.rows.config import CacheConfig
from learndrop_ext.rows.plan import Budgets, TierPlan, plan_for


@dataclass(frozen=True)
class LayerCost:
    """One layer's costs per sample."""

    name: str  # in the chain
    flops: int  # forward FLOPs
    seconds: float  # of forward, as in a frozen layer
    train_seconds: float  # of forward and backward, as in a live layer behind another live one
    shape: tuple[int, ...] | None  # of its output without the batch dimension; None for the last layer
    first_seconds: float | None = None  # train_seconds without the gradient of the input; None: the same
    parameters: int = 0  # number of elements that the optimizer updates

    @property
    def first_live_seconds(self) -> float:
        """Seconds of training this layer if all layers before it are frozen."""
        return self.train_seconds if self.first_seconds is None else self.first_seconds


@dataclass(frozen=True)
class CutChoice:
    """Where rows are kept, and why: after `cut` layers, or nowhere (0: images go through all layers)."""

    cut: int
    row_bytes: int
    reason: str
    plan: TierPlan | None = field(default=None, compare=False, repr=False)  # where the rows lie
    budgets: Budgets | None = field(default=None, compare=False, repr=False)  # by which it was chosen


def live_seconds(layers: Sequence[LayerCost]) -> float:
    """Return the seconds of training these layers on one sample, with no live layer before them."""
    return sum((layer.train_seconds for layer in layers[1:]), layers[0].first_live_seconds if layers else 0.0)


def forward_flops(layers: Sequence[LayerCost]) -> int:
    """Return the forward FLOPs of one sample through the given layers."""
    return sum(layer.flops for layer in layers)


def row_seconds(shape: Sequence[int], codec: str, plan: TierPlan, speeds: tuple[float, float, float]) -> float:
    """Return the mean seconds to gather one of the rows of a shape that lie where `plan` says.

    Every row is gathered on the device, which reads its bytes and writes its fp32 values. Rows that are not there are first
    read from their tier. Storing a row moves the same bytes and takes as long.

    speeds: bytes per second of device, host and disk.
    """
    stride = ops.row_stride(shape, codec)
    on_device, host, disk = speeds
    seconds = (stride + 4 * math.prod(shape)) / on_device
    slower = ((plan.host, host), (plan.disk, disk))
    return seconds + sum(count / plan.slots * stride / speed for count, speed in slower if count)


def smallest_row(chain: Chain, config: CacheConfig) -> int:
    """Return the bytes of the smallest row of a chain's layers."""
    return min(ops.row_stride(layer.shape, config.codec) for layer in chain if layer.shape is not None)


def choose_cut(
    layers: Sequence[LayerCost], prefix: int, *, kept: int, rows: int, codec: str, budgets: Budgets
) -> CutChoice:
    """Choose where `rows` rows (samples x views) of a prefix are kept: at its end, if the budgets hold them.

    kept: the cut of existing rows, 0 for none. They need no free memory, and stay if the rows at the end do not fit.
    """
    if not prefix:
        return CutChoice(0, 0, "")

    def rows_after(cut: int) -> tuple[int, TierPlan | None]:
        """The bytes of a row, and where the rows lie: existing ones that fit into no free memory on the device."""
        shape = layers[cut - 1].shape
        assert shape is not None
        plan = plan_for(shape, codec, rows, budgets)
        return ops.row_stride(shape, codec), TierPlan(rows) if plan is None and cut == kept else plan

    row, plan = rows_after(prefix)
    if plan is not None:
        return CutChoice(prefix, row, f"rows after {layers[prefix - 1].name}", plan, budgets)
    wanted, budget = row * rows, (budgets.device or 0) + budgets.host + budgets.disk + budgets.beside
    texts = format_bytes(wanted), format_bytes(budget)
    if wanted <= budget - budgets.beside:
        texts = texts[0], f"{texts[1]}, less what reading ahead takes"
    elif wanted <= budget:
        texts = texts[0], f"{texts[1]}, less {format_bytes(budgets.beside)} for labels and what else is in a batch"
    elif texts[0] == texts[1]:
        texts = f"{wanted:,} bytes", f"{budget:,} bytes"
    why = f"no rows: they take {texts[0]} and the budget is {texts[1]}"
    if 0 < kept < prefix:
        row, plan = rows_after(kept)
        return CutChoice(kept, row, f"rows stay after {layers[kept - 1].name} ({why})", plan)
    return CutChoice(0, 0, why)


def format_bytes(count: int, *, decimals: int = 3) -> str:
    """Format a number of bytes with a unit, without trailing zeros: "10.24 kB"."""
    for unit, size in (("TB", 10**12), ("GB", 10**9), ("MB", 10**6), ("kB", 10**3)):
        if count >= size:
            text = f"{count / size:.{decimals}f}"
            return (text.rstrip("0").rstrip(".") if "." in text else text) + f" {unit}"
    return f"{count} bytes"
