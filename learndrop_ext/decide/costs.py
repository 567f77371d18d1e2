"""What a layer costs and what a drop saves: FLOPs, seconds, bytes.

All costs are per sample; a training step of a layer is taken as three forward passes (forward, gradient of the input,
gradient of the weights), the usual count for convolutions and linear maps.
"""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch.utils.flop_counter import FlopCounterMode

from learndrop_ext import ops
from learndrop_ext.graph.chain import Chain


@dataclass(frozen=True)
class LayerCost:
    """One layer's costs per sample: forward FLOPs, forward seconds, and the shape of the row that leaves it."""

    name: str
    flops: int
    seconds: float
    shape: tuple[int, ...] | None


@dataclass(frozen=True)
class CutChoice:
    """Where the rows are kept: after `cut` layers (0: no rows, images go through all layers), with the reason."""

    cut: int
    row_bytes: int
    reason: str


def measure_layers(chain: Chain, example: torch.Tensor, *, repeats: int = 3) -> tuple[LayerCost, ...]:
    """Forward FLOPs and seconds of each layer on a batch [B, ...], in eval mode and without gradients.

    The seconds are the median of `repeats` passes after one to warm up; buffers and training flags stay as they are.
    """
    flags = [(m, m.training) for m in chain.modules()]
    costs = []
    batch = example.shape[0]
    chain.eval()
    try:
        with torch.no_grad():
            x = example
            for i in range(len(chain)):
                layer = chain.layer(i)
                with FlopCounterMode(display=False) as counter:
                    y = layer(x)
                times = []
                for _ in range(repeats):
                    wait_for(x)
                    begin = time.perf_counter()
                    layer(x)
                    wait_for(x)
                    times.append(time.perf_counter() - begin)
                seconds = statistics.median(times) / batch
                costs.append(LayerCost(layer.name, counter.get_total_flops() // batch, seconds, layer.shape))
                x = y
    finally:
        for module, training in flags:
            module.training = training
    return tuple(costs)


def forward_flops(layers: Sequence[LayerCost]) -> int:
    """Forward FLOPs of one sample through the given layers."""
    return sum(layer.flops for layer in layers)


@dataclass(frozen=True)
class TierCost:
    """One tier of the cache: the most bytes of rows in it, and how many bytes a second come from it."""

    budget_bytes: int
    bytes_per_second: float


def row_seconds(shape: Sequence[int], rows: int, codec: str, tiers: Sequence[TierCost]) -> float | None:
    """Seconds to bring one of `rows` rows of a shape to the step, on average; None where the tiers do not hold them.

    Every row is gathered on the device, the first tier: its bytes read, its decoded fp32 values written. The rows that
    do not fit there come from the next tiers before.
    """
    stride = ops.row_stride(shape, codec)
    seconds = (stride + 4 * math.prod(shape)) / tiers[0].bytes_per_second
    left = rows
    for i, tier in enumerate(tiers):
        here = min(left, tier.budget_bytes // stride)
        left -= here
        if i and here:
            seconds += here / rows * stride / tier.bytes_per_second
    return None if left else seconds


def choose_cut(
    layers: Sequence[LayerCost],
    prefix: int,
    *,
    kept: int,
    rows: int,
    codec: str,
    tiers: Sequence[TierCost],
    augmented: bool = False,
) -> CutChoice:
    """The cut within a prefix whose cached rows make the step shortest and fit into the tiers, the fastest first.

    Rows after `c` layers cost what `row_seconds` says and the forward pass of the frozen layers c..prefix-1. kept: the
    cut of the rows that there are already (0: none), which stay where no later cut is better. rows: how many are kept
    (samples x views). augmented: only [C, H, W] rows, to be flipped or shifted, will do.
    """

    def run_again(cut: int) -> float:
        return sum(layer.seconds for layer in layers[cut:prefix])

    best = CutChoice(kept, 0, f"rows stay after {layers[kept - 1].name}" if kept else "")
    shortest = math.inf
    shape = layers[kept - 1].shape if kept else None
    if shape is not None:
        # What is free now need not hold rows that are there already.
        enough = [TierCost(rows * ops.row_stride(shape, codec), tiers[0].bytes_per_second)]
        read = row_seconds(shape, rows, codec, tiers) or row_seconds(shape, rows, codec, enough)
        shortest = (read or 0.0) + run_again(kept)
    smallest: int | None = None
    for cut in range(kept + 1, prefix + 1):
        shape = layers[cut - 1].shape
        if shape is None or (augmented and len(shape) != 3):
            continue
        row = ops.row_stride(shape, codec)
        smallest = row if smallest is None else min(smallest, row)
        read = row_seconds(shape, rows, codec, tiers)
        if read is not None and read + run_again(cut) <= shortest:
            shortest = read + run_again(cut)
            best = CutChoice(cut, row, f"rows after {layers[cut - 1].name}")
    if best.cut == 0 and prefix > 0:
        if smallest is None:
            return CutChoice(0, 0, "no rows: no cut within the prefix has rows that can be kept as asked")
        wanted, held = smallest * rows / 1e6, sum(tier.budget_bytes for tier in tiers) / 1e6
        return CutChoice(0, 0, f"no rows: the smallest take {wanted:,.0f} MB and the budget is {held:,.0f} MB")
    return best


@dataclass(frozen=True)
class Estimate:
    """What a drop would cost once and save each epoch, in seconds."""

    fill_seconds: float
    saved_seconds: float


def estimate(
    layers: Sequence[LayerCost],
    *,
    before: tuple[int, int],
    after: tuple[int, int],
    epoch_seconds: float,
    samples: int,
    rows: int,
    read_seconds: tuple[float, float] = (0.0, 0.0),
) -> Estimate:
    """Fill and saving of a drop, from the seconds of the last epoch.

    before, after: (prefix, cut). read_seconds: of one row before and after. An epoch's seconds, less those of its rows,
    are shared out by forward seconds: a live layer counts three times (forward and two gradients), a frozen one behind
    the cut once, one before the cut not at all. The fill is one forward pass of the layers between the two cuts for
    each of the `rows`, which are written as fast as they are read.
    """

    def work(prefix: int, cut: int) -> float:
        return sum(s.seconds for s in layers[cut:prefix]) + 3 * sum(s.seconds for s in layers[prefix:])

    now = work(*before)
    if now <= 0 or samples <= 0:
        return Estimate(0.0, 0.0)
    unit = max(0.0, epoch_seconds - samples * read_seconds[0]) / now
    filled = unit * sum(s.seconds for s in layers[before[1] : after[1]]) * rows / samples
    if after[1] > before[1]:
        filled += read_seconds[1] * rows
    return Estimate(filled, epoch_seconds - unit * work(*after) - samples * read_seconds[1])


def wait_for(x: torch.Tensor) -> None:
    if x.device.type == "cuda":
        torch.cuda.synchronize(x.device)
