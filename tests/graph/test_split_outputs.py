"""A chain gives the structure that its model gives."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import pytest
import torch
from made_networks import Net, abc
from torch import Tensor

from learndrop_ext.graph.chain import split_layers
from learndrop_ext.graph.state import flatten


class Logits(NamedTuple):
    main: Tensor
    side: Tensor


def test_split_layers_gives_back_the_structure_that_the_model_gives() -> None:
    def several(net: Any, x: Tensor) -> Any:
        x = net.b(net.a(x))
        return {"logits": Logits(net.c(x), x.mean()), "features": [x]}

    model = Net(several, **abc())
    x = torch.rand(2, 3, 8, 8)
    chain = split_layers(model, x)
    assert chain.names == ("a", "b", "c")[: len(chain)]
    output = chain(x)
    assert isinstance(output["logits"], Logits)
    assert torch.equal(output["logits"].main, model(x)["logits"].main)
    assert chain.layer(len(chain) - 1).shape is None


@dataclass
class Answer:
    logits: Tensor
    features: tuple[Tensor, ...]
    loss: Tensor | None = None


@dataclass
class Output(OrderedDict):  # type: ignore[type-arg]
    """A dataclass that is a dict too, as model libraries return."""

    logits: Tensor | None = None
    hidden: Tensor | None = None

    def __post_init__(self) -> None:
        for name in ("logits", "hidden"):
            if getattr(self, name) is not None:
                self[name] = getattr(self, name)


@pytest.mark.parametrize(
    "pack",
    [
        lambda x, y: (x, [y, y]),
        lambda x, y: {"logits": x, "more": {"features": y}},
        lambda x, y: Answer(x, (y,)),
        lambda x, y: Output(logits=x, hidden=y),
    ],
    ids=["tuple", "dict", "dataclass", "dict dataclass"],
)
def test_chain_gives_what_the_model_gives(pack: Callable[[Tensor, Tensor], Any]) -> None:
    model = Net(lambda net, x: pack(net.c(x := net.b(net.a(x))), x), **abc())
    x = torch.rand(3, 3, 8, 8)
    chain = split_layers(model, x)
    assert len(chain) >= 2
    wanted, got = model(x), chain(x)
    assert type(got) is type(wanted)
    leaves = [dict(flatten(value)) for value in (wanted, got)]
    assert leaves[0].keys() == leaves[1].keys()
    torch.testing.assert_close(leaves[1], leaves[0], rtol=0, atol=0)
    if isinstance(wanted, Output):
        assert torch.equal(got.logits, wanted["logits"])
