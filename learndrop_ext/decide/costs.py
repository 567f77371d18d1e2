"""The costs of each layer (FLOPs, seconds, bytes), and the best cut for rows. All costs are per sample."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import nn
from torch.utils import _pytree as pytree
from torch.utils.flop_counter import FlopCounterMode

from learndrop_ext import ops
from learndrop_ext.cudnn import without_benchmark
from learndrop_ext.decide.probes import StepSeconds, shortest_laps
from learndrop_ext.decide.probes import TierCost as TierCost
from learndrop_ext.graph.chain import Chain, Layer
from learndrop_ext.graph.layers import built_of
from learndrop_ext.graph.state import ModelState
from learndrop_ext.rng import fork_rng


@dataclass(frozen=True)
class LayerCost:
    """One layer's costs per sample.

    Args:
        name: the layer's name in the chain.
        flops: forward FLOPs.
        seconds: seconds of forward in eval mode without gradients, as in a frozen layer.
        train_seconds: seconds of forward and backward in train mode, as in a live layer behind another live one.
        shape: shape of its output without the batch dimension; None if it is not a single tensor.
        first_seconds: like train_seconds, without the gradient of the input, which the first live layer does not need.
            None: the same as train_seconds.
        parameters: number of elements that the optimizer updates.
    """

    name: str
    flops: int
    seconds: float
    train_seconds: float
    shape: tuple[int, ...] | None
    first_seconds: float | None = None
    parameters: int = 0

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


def measure_layers(
    chain: Chain,
    example: torch.Tensor,
    *,
    others: Sequence[torch.Tensor] = (),
    repeats: int = 2,
    autocast: torch.dtype | None = None,
) -> tuple[LayerCost, ...]:
    """Measure each layer on a batch: FLOPs, seconds frozen, and seconds in training.

    Training flags, buffers, gradients and the random state are restored, even after an error.

    Args:
        chain: the layers.
        example: [B, ...], a batch of the model's inputs on its device. A single sample is used twice, since batch
            statistics need two values.
        others: the model's other tensor inputs for these samples (for two if the example has one).
        repeats: number of timed passes of each kind; the shortest is taken, because one layer that seems slow distorts
            every forecast.
        autocast: autocast dtype of the training step; None for no autocast.

    Returns:
        One LayerCost per layer, per sample.
    """
    x = torch.cat([example, example]) if len(example) == 1 else example
    batch, device = len(x), x.device
    costs: list[LayerCost] = []
    seen: dict[Any, LayerCost] = {}
    as_trained = torch.autocast(device.type, dtype=autocast, enabled=autocast is not None)
    with _preserved(chain), without_benchmark(device), as_trained:
        for i in range(len(chain)):
            layer = chain.layer(i)
            inputs = (x, *(others if layer.others else ()))
            # Layers of the same structure take the same time, except the first, which needs no gradient of its input.
            built = (i == 0, built_of(layer), *((t.shape, t.stride(), t.dtype) for t in inputs))
            _set_training(layer, False)
            with torch.no_grad():
                if built in seen:
                    x = layer(*_clones(*inputs))
                    costs.append(replace(seen[built], name=layer.name))
                    continue
                # A layer may work in place.
                with FlopCounterMode(display=False) as counter:
                    x = layer(*_clones(*inputs))
                frozen = _frozen_seconds(layer, inputs, repeats)
            _set_training(layer, True)
            forward, first, inner = _train_seconds(layer, inputs, repeats, inner=i > 0)
            seen[built] = LayerCost(
                name=layer.name,
                flops=counter.get_total_flops() // batch,
                seconds=frozen / batch,
                train_seconds=(forward + (inner if i else first)) / batch,
                shape=layer.shape,
                first_seconds=(forward + first) / batch,
                parameters=sum(p.numel() for p in layer.parameters() if p.requires_grad),
            )
            costs.append(seen[built])
    return tuple(costs)


def fit_to_step(
    layers: Sequence[LayerCost], step: StepSeconds, *, batch: int
) -> tuple[tuple[LayerCost, ...], float, float]:
    """Scale the costs of the layers so that everything adds up to the time of a whole training step.

    Timed one by one, layers find other data in the CPU's caches than in a step. Only their ratios are used: the layers get
    what the loss and the optimizer leave of the step.

    Args:
        layers: layers timed one by one.
        step: seconds of a step of the whole model.
        batch: number of samples in that step.

    Returns:
        The scaled layers, the seconds of a step outside of layers and optimizer, and those of the optimizer, per sample.
    """
    optimizer = min(step.optimizer, step.step) / batch
    passes = step.step / batch - optimizer
    layers = tuple(layers)
    train = live_seconds(layers)
    if train <= 0:
        return layers, passes, optimizer
    other = min(step.loss / batch, passes)
    share = (passes - other) / train
    scaled = (
        replace(
            layer,
            seconds=layer.seconds * share,
            train_seconds=layer.train_seconds * share,
            first_seconds=layer.first_live_seconds * share,
        )
        for layer in layers
    )
    return tuple(scaled), other, optimizer


def live_seconds(layers: Sequence[LayerCost]) -> float:
    """Return the seconds of training these layers on one sample, with no live layer before them."""
    return sum((layer.train_seconds for layer in layers[1:]), layers[0].first_live_seconds if layers else 0.0)


def forward_flops(layers: Sequence[LayerCost]) -> int:
    """Return the forward FLOPs of one sample through the given layers."""
    return sum(layer.flops for layer in layers)


def rows_in_tiers(rows: int, stride: int, tiers: Sequence[TierCost]) -> tuple[int, ...] | None:
    """How many of `rows` rows of `stride` bytes lie in each tier, the first tier first; None where they do not fit."""
    counts = []
    for tier in tiers:
        counts.append(min(rows, tier.budget_bytes // stride))
        rows -= counts[-1]
    return None if rows else tuple(counts)


def row_seconds(shape: Sequence[int], rows: int, codec: str, tiers: Sequence[TierCost]) -> float | None:
    """Return the mean seconds to gather one of `rows` rows of a shape; None if the tiers do not hold them.

    Every row is gathered on the device, the first tier, which reads its bytes and writes its fp32 values. Rows that are not
    there are first read from the next tiers. Storing a row moves the same bytes and takes as long.
    """
    stride = ops.row_stride(shape, codec)
    counts = rows_in_tiers(rows, stride, tiers)
    if counts is None:
        return None
    seconds = (stride + 4 * math.prod(shape)) / tiers[0].bytes_per_second
    slower = zip(counts[1:], tiers[1:], strict=True)
    return seconds + sum(count / rows * stride / tier.bytes_per_second for count, tier in slower if count)


def smallest_row(chain: Chain, codec: str) -> int:
    """Return the bytes of the smallest row that can be kept of a chain's layers."""
    shapes = [chain.layer(i).shape for i in range(len(chain) - 1)]
    return min(ops.row_stride(shape, codec) for shape in shapes if shape is not None)


def choose_cut(
    layers: Sequence[LayerCost], prefix: int, *, kept: int, rows: int, codec: str, tiers: Sequence[TierCost]
) -> CutChoice:
    """Choose the cut within a prefix whose rows fit into the tiers and make the training step shortest.

    Rows after `c` layers cost `row_seconds` and the forward pass of the frozen layers c..prefix-1.

    Args:
        layers: all layers.
        prefix: number of layers dropped.
        kept: the cut of existing rows, 0 for none. They stay if no later cut is better; they are no use to a prefix that
            ends before them.
        rows: number of rows: samples x views.
        codec: codec of the rows.
        tiers: budgets and speeds, the fastest first.
    """
    kept = kept if kept <= prefix else 0

    def run_again(cut: int) -> float:
        return sum(layer.seconds for layer in layers[cut:prefix])

    best, shortest = CutChoice(0, 0, ""), math.inf
    shape = layers[kept - 1].shape if kept else None
    if shape is not None:
        best = CutChoice(kept, ops.row_stride(shape, codec), f"rows stay after {layers[kept - 1].name}")
        # Existing rows need no free memory.
        enough = [TierCost(rows * ops.row_stride(shape, codec), tiers[0].bytes_per_second)]
        read = row_seconds(shape, rows, codec, tiers) or row_seconds(shape, rows, codec, enough)
        shortest = (read or 0.0) + run_again(kept)
    smallest: int | None = None
    for cut in range(kept + 1, prefix + 1):
        shape = layers[cut - 1].shape
        if shape is None:
            continue
        row = ops.row_stride(shape, codec)
        smallest = row if smallest is None else min(smallest, row)
        read = row_seconds(shape, rows, codec, tiers)
        if read is not None and read + run_again(cut) <= shortest:
            shortest = read + run_again(cut)
            best = CutChoice(cut, row, f"rows after {layers[cut - 1].name}")
    if best.cut == 0 and prefix > 0:
        if smallest is None:
            return CutChoice(0, 0, "no rows: no cut within the prefix has rows that can be kept")
        wanted, held = smallest * rows, sum(tier.budget_bytes for tier in tiers)
        texts = format_bytes(wanted), format_bytes(held)
        if texts[0] == texts[1]:
            texts = f"{wanted:,} bytes", f"{held:,} bytes"
        return CutChoice(0, 0, f"no rows: the smallest take {texts[0]} and the budget is {texts[1]}")
    return best


def format_bytes(count: int, *, decimals: int = 3) -> str:
    """Format a number of bytes with a unit, without trailing zeros: "10.24 kB"."""
    for unit, size in (("TB", 10**12), ("GB", 10**9), ("MB", 10**6), ("kB", 10**3)):
        if count >= size:
            text = f"{count / size:.{decimals}f}"
            return (text.rstrip("0").rstrip(".") if "." in text else text) + f" {unit}"
    return f"{count} bytes"


def _frozen_seconds(layer: Layer, inputs: Sequence[torch.Tensor], repeats: int) -> float:
    """Seconds of a forward pass of a frozen layer."""

    def run(*given: torch.Tensor) -> Iterator[None]:
        layer(*given)
        yield

    return shortest_laps(run, inputs[0].device, repeats=repeats, prepare=partial(_clones, *inputs))[0]


def _train_seconds(
    layer: Layer, inputs: Sequence[torch.Tensor], repeats: int, *, inner: bool
) -> tuple[float, float, float]:
    """Seconds of a forward pass, of the backward pass to the parameters, and (inner) of the one to the input."""
    parameters = [p for p in layer.parameters() if p.requires_grad]

    def prepare() -> tuple[tuple[torch.Tensor, ...], list[torch.Tensor]]:
        leaf = inputs[0].detach().requires_grad_(inner and inputs[0].is_floating_point())
        # In training the input of a layer is not a leaf, so the layer may change it in place.
        return _clones(leaf, *inputs[1:]), [t for t in (leaf, *parameters) if t.requires_grad]

    def passes(given: tuple[torch.Tensor, ...], wanted: list[torch.Tensor]) -> Iterator[None]:
        outputs = [y for y in pytree.tree_leaves(layer(*given)) if isinstance(y, torch.Tensor) and y.requires_grad]
        # The gradients of the sum of all outputs.
        ones = [torch.ones_like(y) for y in outputs]
        yield
        # Not backward(), which would add to the parameters' gradients.
        if outputs and parameters:
            torch.autograd.grad(outputs, parameters, ones, allow_unused=True, retain_graph=inner)
        yield
        if outputs and wanted and inner:
            torch.autograd.grad(outputs, wanted, ones, allow_unused=True)
        yield

    with torch.enable_grad():
        forward, first, both = shortest_laps(passes, inputs[0].device, repeats=repeats, prepare=prepare)
        return forward, first, both


def _clones(*tensors: torch.Tensor) -> tuple[torch.Tensor, ...]:
    return tuple(t.clone() for t in tensors)


def _set_training(layer: nn.Module, training: bool) -> None:
    # Not with train(), which a frozen module ignores.
    for module in layer.modules():
        module.training = training


@contextlib.contextmanager
def _preserved(chain: Chain) -> Iterator[None]:
    """Restore training flags, buffers, attributes and the random state on leaving."""
    state = ModelState(chain)
    try:
        with fork_rng(0):
            yield
    finally:
        state.restore()
