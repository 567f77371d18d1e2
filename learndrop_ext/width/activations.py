"""Mean activations of the training batches, by hooks on the layers that read them."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn

from learndrop_ext.forward.cuts import Hook
from learndrop_ext.width.groups import Group


class Activations:
    """Adds up the absolute values that layers get in train mode.

    Attributes:
        sums: {layer: (sum of each input channel [n] float64, number of values in it)}.
    """

    def __init__(self) -> None:
        self.sums: dict[str, tuple[Tensor, int]] = {}
        self._hooks: list[Any] = []

    def start(self, groups: Iterable[Group]) -> None:
        """Begin anew with the layers that read the groups' channels."""
        self.stop()
        for name, module in {p.name: p.module for group in groups for p in group.parts if p.side == "in"}.items():
            hook = Hook(lambda module, args, name=name: self._add(name, module, args[0]))
            self._hooks.append(module.register_forward_pre_hook(hook))

    def stop(self) -> None:
        """Take the hooks off and forget the sums."""
        for hook in self._hooks:
            hook.remove()
        self._hooks, self.sums = [], {}

    def means(self, group: Group) -> Tensor | None:
        """Return each channel's mean over the layers that read it, [C] float64; None if one was not read."""
        values = {name: (sums / count).cpu()[:, None] for name, (sums, count) in self.sums.items()}
        means = group.mean("in", values)[:, 0]
        return means if bool(means.isfinite().all()) else None

    def _add(self, name: str, module: nn.Module, x: Tensor) -> None:
        if module.training:
            dim = x.dim() - 1 if isinstance(module, nn.Linear) else 1
            sums = x.detach().abs().sum([i for i in range(x.dim()) if i != dim], dtype=torch.float64)
            before, count = self.sums.get(name, (0.0, 0))
            self.sums[name] = before + sums, count + x.numel() // x.shape[dim]
