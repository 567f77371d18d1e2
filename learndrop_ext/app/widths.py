"""Narrowing on the command line: l1:0.5, random:0.2, ..."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import nn

from learndrop_ext.width import CRITERIA, WidthScheduler


@dataclass(frozen=True)
class NarrowSpec:
    """The criterion, a key of `CRITERIA`, and the share of the channels that is left in the end."""

    criterion: str
    keep: float

    def build(
        self, model: nn.Module, optimizer: torch.optim.Optimizer, example: torch.Tensor, *, epochs: int, seed: int
    ) -> WidthScheduler:
        """Build the scheduler of a run: one threshold over all layers, from the first epoch to the last."""
        if example.device.type == "cpu":
            # The backward pass of torch 2.13 corrupts memory on a CPU for a 1x1 convolution with stride 2 over fewer than 8
            # channels in the channels-last format, and a narrow ResNet has some.
            model.to(memory_format=torch.contiguous_format)  # type: ignore[call-overload]
        options = {"criterion": self.criterion, "keep": self.keep, "epochs": epochs, "seed": seed}
        return WidthScheduler(model, optimizer, example, scope="global", **options)  # type: ignore[arg-type]


def parse_narrow(text: str) -> NarrowSpec:
    """Parse "CRITERION:KEEP". Raises ValueError for another form, an unknown criterion, or a share not within 0..1."""
    criterion, _, share = text.partition(":")
    try:
        keep = float(share)
    except ValueError:
        keep = 0.0
    if criterion not in CRITERIA or not 0 < keep <= 1:
        forms = f"CRITERION:KEEP with one of {', '.join(CRITERIA)} and a share above 0 and at most 1"
        raise ValueError(f"--narrow must be {forms}, got {text!r}")
    return NarrowSpec(criterion, keep)
