"""What is trained now: the whole model, or after a drop the suffix."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from learndrop_ext.graph.chain import Chain, Segment

Wrap = Callable[[nn.Module], nn.Module]


class _BehindFrozen(nn.Module):
    """The suffix behind frozen layers that are run again at each step, in eval mode and without gradients."""

    def __init__(self, frozen: Segment, suffix: nn.Module) -> None:
        super().__init__()
        self.frozen = frozen
        self.suffix = suffix

    def forward(self, x: torch.Tensor) -> Any:
        # A dropout module that the suffix uses too follows model.train().
        shared = [m for m in self.frozen.modules() if m.training]
        for module in shared:
            module.training = False
        try:
            with torch.no_grad():
                x = self.frozen(x)
        finally:
            for module in shared:
                module.training = True
        return self.suffix(x)


class LiveModel(nn.Module):
    """What is trained now, as one module that stays the same object: at first the whole model, after a drop the suffix.

    It notes whether it was called with the batch's own input and under which autocast, which a fill has to repeat.
    """

    def __init__(self, body: nn.Module, device: torch.device) -> None:
        super().__init__()
        self.body = body
        self.device = device
        self.row_shape: tuple[int, ...] | None = None
        self.calls = 0
        self.foreign: torch.Size | None = None
        self.autocast: torch.dtype | None = None
        self._expected: torch.Tensor | None = None

    def forward(self, x: torch.Tensor) -> Any:
        if self.row_shape is not None and tuple(x.shape[1:]) != self.row_shape:
            raise ValueError(
                f"drop.model: x must be cached rows [B, {', '.join(map(str, self.row_shape))}] from drop.loader, "
                f"got {list(x.shape)}; to evaluate on images, call the whole model"
            )
        if self.training:
            self._note(x)
        return self.body(x)

    def expect(self, x: torch.Tensor) -> None:
        """The next training call should get this batch input, or the first rows of it."""
        self._expected = x

    def _note(self, x: torch.Tensor) -> None:
        self.calls += 1
        kind = self.device.type
        self.autocast = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else None
        if self._expected is None:
            return
        wanted, self._expected = self._expected, None
        if x is wanted:
            return
        same = x.shape[1:] == wanted.shape[1:] and len(x) <= len(wanted)
        if not (same and torch.allclose(x.float(), wanted[: len(x)].float(), rtol=1e-2, atol=1e-2)):
            self.foreign = x.shape


def live_body(model: nn.Module, chain: Chain, cut: int, prefix: int, wrap: Wrap | None) -> nn.Module:
    """What is trained when `prefix` layers are frozen and the rows are those after `cut` of them, wrapped."""
    live: nn.Module = model if prefix == 0 else chain.suffix(prefix)
    if wrap is not None:
        live = wrap(live)
        if not isinstance(live, nn.Module):
            raise TypeError(f"DropScheduler: wrap must return a torch.nn.Module, got {type(live).__name__}")
    return _BehindFrozen(chain.segment(cut, prefix), live) if cut < prefix else live
