"""Networks made of named parts and a function, and what a chain must do as its model does."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from learndrop_ext.graph.chain import Chain


def assert_equal_in_both_modes(model: nn.Module, chain: Chain, x: Tensor) -> None:
    start = {key: value.clone() for key, value in model.state_dict().items()}
    for training in (True, False):
        results = []
        for module in (model, chain):
            model.load_state_dict(start)
            module.train(training)
            torch.manual_seed(7)
            output = module(x.clone())
            results.append((output, {key: value.clone() for key, value in model.state_dict().items()}))
        torch.testing.assert_close(results[0], results[1], rtol=0, atol=0, equal_nan=True)
    model.load_state_dict(start)


class Net(nn.Module):
    """A module made of named parts and a function of the module and its input."""

    def __init__(self, forward: Callable[[Any, Tensor], Any], **parts: nn.Module) -> None:
        super().__init__()
        for name, part in parts.items():
            self.add_module(name, part)
        self.function = forward

    def forward(self, x: Tensor) -> Any:
        return self.function(self, x)


def conv(inputs: int = 3, outputs: int = 3) -> nn.Conv2d:
    return nn.Conv2d(inputs, outputs, 3, padding=1)


def abc(**more: nn.Module) -> dict[str, nn.Module]:
    return {"a": conv(), "b": conv(), "c": conv(), **more}
