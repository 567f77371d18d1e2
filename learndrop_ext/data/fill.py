"""The frozen pass that computes rows, and the check that a row depends on its sample alone."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
from torch import nn

from learndrop_ext.cache.cache import ActivationCache
from learndrop_ext.cache.config import CacheConfig
from learndrop_ext.cudnn import without_benchmark
from learndrop_ext.graph.chain import Layer, Segment
from learndrop_ext.rng import fork_rng


@contextlib.contextmanager
def frozen_pass(segment: Segment, autocast: torch.dtype | None, device: torch.device) -> Iterator[None]:
    """Eval mode, no gradients, and the autocast of the training step. Restores the training flags on leaving.

    A row is computed once, and compared in batches of a few samples: cuDNN's timing of its algorithms would not pay.
    """
    flags = [m for m in segment.modules() if m.training]
    for module in flags:
        module.training = False
    try:
        as_trained = torch.autocast(device.type, dtype=autocast, enabled=autocast is not None)
        with torch.no_grad(), without_benchmark(device), as_trained:
            yield
    finally:
        for module in flags:
            module.training = True


class Stages:
    """The frozen segments of successive drops, run in order up to the last cut.

    Rows are encoded and decoded between two segments, so that rows computed from images equal rows computed from cached
    rows.
    """

    def __init__(self, config: CacheConfig, device: torch.device) -> None:
        self.segments: list[Segment] = []
        self.autocast: torch.dtype | None = None
        self._config = config
        self._device = device

    def run(self, x: torch.Tensor, start: int) -> torch.Tensor:
        """Run inputs [B, ...] of segment `start` through it and all later ones."""
        for i, segment in enumerate(self.segments[start:], start):
            with frozen_pass(segment, self.autocast, self._device):
                x = segment(x)
            if i + 1 < len(self.segments):
                x = self._as_stored(x)
        return x

    def _as_stored(self, x: torch.Tensor) -> torch.Tensor:
        at = torch.arange(len(x))
        scratch = ActivationCache(len(x), x.shape[1:], codec=self._config.codec, device=self._device)
        scratch.append(at, x)
        stored = scratch.gather(at)
        scratch.close()
        return stored


def check_purity(segment: Segment, x: torch.Tensor, model: nn.Module, autocast: torch.dtype | None) -> None:
    """Check that the rows of a segment depend on their samples alone.

    The first half of a batch is run twice, together with the other half and together with itself, with two random seeds.
    The results must agree within `rounding` of the largest value.

    Args:
        segment: the frozen layers.
        x: [B, ...], a batch of the segment's inputs, B >= 1.
        model: the user's model; errors name its modules.
        autocast: dtype of the pass.

    Raises:
        ValueError: rows depend on the other samples of a batch or on the random state. Names the innermost module whose
            outputs differ for equal inputs.
    """
    if len(x) == 1:
        x = torch.cat([x, torch.zeros_like(x)])
    half = len(x) // 2
    others = torch.cat([x[:half], x[:half], x[2 * half :]])
    with frozen_pass(segment, autocast, x.device):
        first, second = (_seen_rows(segment, batch, half, seed) for seed, batch in enumerate((x, others)))
    layers = [m for m in segment.layers if isinstance(m, Layer)]
    names: dict[nn.Module, str] = {m: f"{name} ({type(m).__name__})" for name, m in model.named_modules()}
    names |= {part: f"layer {m.name}" for m in layers for part in (m, m.train_graph, m.eval_graph)}
    for module, (came, left) in first.items():
        came_again, left_again = second.get(module, (came, left))
        if rows_agree(came, came_again, autocast) and not rows_agree(left, left_again, autocast):
            raise ValueError(
                "DropScheduler: the rows of a dropped layer must be a function of the sample alone, and those of "
                f"{names.get(module, type(module).__name__)} change with the other samples of the "
                "batch or the random state, in eval mode too; drop only the layers before it"
            )


def rows_agree(wanted: torch.Tensor, got: torch.Tensor, autocast: torch.dtype | None, *, error: float = 0.0) -> bool:
    """Return whether two batches of rows agree within rounding: `rounding` plus `error`, as shares of the largest value."""
    if wanted.shape != got.shape:
        return False
    # Rows are usually equal to the bit, and this comparison is a tenth of the work.
    if torch.equal(wanted, got):
        return True
    if not wanted.is_floating_point():
        return False
    finite = wanted[wanted.isfinite()]
    largest = float(finite.abs().max()) if finite.numel() else 0.0
    bound = (rounding(wanted.dtype, wanted.device.type, autocast) + error) * largest
    return bool((((wanted - got).abs() <= bound) | (wanted == got) | (wanted.isnan() & got.isnan())).all())


def rounding(dtype: torch.dtype, device_type: str, autocast: torch.dtype | None) -> float:
    """Return how much rows may differ between batches of different sizes, as a share of the largest value.

    On a GPU the algorithm depends on the batch size, and some algorithms multiply fp32 in TF32, with the 10 bits of fp16;
    cuDNN's convolutions do so by default.
    """
    coarse = autocast is not None or dtype.itemsize == 2 or (device_type == "cuda" and dtype == torch.float32)
    return 2e-2 if coarse else 1e-3


def _seen_rows(
    segment: Segment, batch: torch.Tensor, half: int, seed: int
) -> dict[nn.Module, tuple[torch.Tensor, torch.Tensor]]:
    """The input and output of each module for the first half of a batch, innermost modules first."""
    came: dict[nn.Module, torch.Tensor] = {}
    seen: dict[nn.Module, tuple[torch.Tensor, torch.Tensor]] = {}

    def is_rows(value: Any) -> bool:
        return isinstance(value, torch.Tensor) and value.dim() > 0 and len(value) == len(batch)

    def enter(module: nn.Module, inputs: tuple[Any, ...]) -> None:
        if inputs and is_rows(inputs[0]):
            came[module] = inputs[0][:half].clone()

    def leave(module: nn.Module, _: Any, output: Any) -> None:
        if module in came and is_rows(output):
            seen[module] = came[module], output[:half].clone()

    hooks = [h for m in segment.modules() for h in (m.register_forward_pre_hook(enter), m.register_forward_hook(leave))]
    try:
        with fork_rng(seed):
            segment(batch)
    finally:
        for hook in hooks:
            hook.remove()
    return seen
