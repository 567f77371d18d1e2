from __future__ import annotations

import timeit
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from learndrop_ext.app.models import build_model
from learndrop_ext.graph.chain import split_layers

X = torch.rand(2, 3, 8, 8, generator=torch.Generator().manual_seed(0))


class Attention(nn.Module):
    scale = 2.0

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 3, 1)
        self.temperature = 1.0
        self.sizes = [1, 2]
        self.shift = torch.zeros(3, 1, 1)
        self.order = torch.tensor([2, 0, 1])
        self.act = torch.relu
        self.unread = 5
        self.weight = nn.Parameter(torch.ones(()))

    def forward(self, x: Tensor) -> Tensor:
        x = x[:, self.order.tolist()]
        return self.act(self.conv(x) * self.weight / self.temperature * self.sizes[0] + self.shift) * self.scale


def build() -> nn.Sequential:
    blocks = nn.Sequential(Attention(), Attention())
    return nn.Sequential(nn.Conv2d(3, 3, 1), blocks, nn.Conv2d(3, 3, 1))


def replace_convolution(model: Any) -> None:
    model[1][0].conv = nn.Conv2d(3, 3, 1)


def replace_parameter(model: Any) -> None:
    model[1][1].weight = nn.Parameter(torch.ones(()))


CHANGES: list[tuple[Callable[[Any], Any], str]] = [
    (lambda m: setattr(m[1][1], "temperature", 0.5), "temperature of 1.1 was 1.0 when the model was split, and is 0.5"),
    (lambda m: m[1][0].sizes.__setitem__(0, 3), "sizes of 1.0 was [1, 2] when the model was split, and is [3, 2]"),
    (lambda m: setattr(m[1][0], "shift", torch.ones(3, 1, 1)), "1.0.shift was replaced after the model was split"),
    (lambda m: m[1][0].order.add_(1), "order of 1.0 has changed since the model was split"),
    (lambda m: setattr(m[1][0], "act", torch.tanh), "act of 1.0 has changed since the model was split"),
    (lambda m: setattr(m[1][1], "scale", 3.0), "scale of 1.1 was 2.0 when the model was split, and is 3.0"),
    (lambda m: delattr(m[1][1], "temperature"), "temperature of 1.1 was removed after the model was split"),
    (replace_convolution, "1.0.conv was replaced after the model was split"),
    (replace_parameter, "1.1.weight was replaced after the model was split"),
    (lambda m: m[1].register_forward_hook(lambda *_: None), "a hook was added to 1 after the model was split"),
    (
        lambda m: m.register_forward_pre_hook(lambda *_: None),
        "a hook was added to Sequential after the model was split",
    ),
    (lambda m: setattr(m[1][0], "forward", lambda x: x), "forward of 1.0 was replaced after the model was split"),
]


@pytest.mark.parametrize(("change", "message"), CHANGES, ids=[case[1].split(" when")[0] for case in CHANGES])
def test_chain_tells_what_it_holds_as_a_constant_and_has_moved(change: Callable[[Any], Any], message: str) -> None:
    model = build()
    chain = split_layers(model, X)
    assert chain.kept_whole == {}
    assert chain.stale() is None
    change(model)
    assert chain.stale() == message


def test_chain_is_not_stale_after_training() -> None:
    model = build()
    chain = split_layers(model, X)
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    chain.train()(X).sum().backward()
    optimizer.step()
    model[1][0].shift.add_(1)  # shared with the chain
    model.load_state_dict(build().state_dict())
    model[1][0].unread = 6
    model[1][0].conv.register_forward_hook(lambda *_: None)  # the chain calls the convolution itself
    model.eval()
    assert chain.stale() is None
    assert torch.equal(chain.eval()(X), model(X))


def test_stale_is_quick() -> None:
    chain = split_layers(build_model("resnet18", num_classes=5, width=4, seed=0), torch.rand(2, 3, 16, 16))
    assert min(timeit.repeat(chain.stale, number=1, repeat=50)) < 5e-4
