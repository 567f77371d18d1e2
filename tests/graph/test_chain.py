from __future__ import annotations

import pytest
import torch
from torch import nn

from learndrop_ext.app.models import build_model
from learndrop_ext.graph.chain import Segment, split_layers


def test_chain_trains_the_models_own_parameters() -> None:
    model = nn.Sequential(
        nn.Conv2d(3, 3, 3, padding=1),
        nn.BatchNorm2d(3),
        nn.ReLU(inplace=True),
        nn.Conv2d(3, 3, 3, padding=1),
        nn.Flatten(),
        nn.Linear(192, 2),
    )
    x = torch.rand(4, 3, 8, 8)
    chain = split_layers(model, x)
    start = {key: value.clone() for key, value in model.state_dict().items()}
    model(x).sum().backward()
    wanted = [p.grad.clone() for p in model.parameters() if p.grad is not None]
    model.zero_grad()
    model.load_state_dict(start)
    chain(x).sum().backward()
    got = [p.grad for p in model.parameters()]
    assert len(wanted) == len(got) == 8
    torch.testing.assert_close(got, wanted, rtol=0, atol=0)


def test_chain_prefix_and_suffix_compose_to_the_model() -> None:
    model = build_model("resnet18", num_classes=5, width=4, seed=0).eval()
    x = torch.randn(2, 3, 16, 16)
    chain = split_layers(model, x)
    wanted = model(x)
    for k in range(len(chain) + 1):
        assert torch.equal(chain.suffix(k)(chain.prefix(k)(x)), wanted)
    assert torch.equal(chain.suffix(7)(chain.segment(3, 7)(chain.prefix(3)(x))), wanted)
    assert chain.prefix(0)(x) is x
    assert Segment([])(x) is x


@pytest.mark.parametrize(("start", "stop"), [(-1, 1), (0, 3), (2, 1)])
def test_chain_segment_refuses_layers_outside_the_chain(start: int, stop: int) -> None:
    chain = split_layers(nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4)), torch.ones(2, 4))
    with pytest.raises(IndexError, match=rf"Chain: layers must be within 0..2 and in order, got {start}..{stop}"):
        chain.segment(start, stop)


def test_chain_starts_with_what_stands_before_the_first_weights() -> None:
    model = nn.Sequential(nn.Dropout(0.5), nn.MaxPool2d(2), nn.Conv2d(3, 3, 1), nn.ReLU(), nn.Conv2d(3, 3, 1))
    chain = split_layers(model, torch.rand(2, 3, 8, 8))
    assert chain.names == ("2", "4")
    assert [chain.layer(i).shape for i in range(2)] == [(3, 4, 4), (3, 4, 4)]
