"""Models that split_layers refuses, and what it leaves behind."""

from __future__ import annotations

import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from made_networks import Net, abc, conv
from torch import Tensor, nn

from learndrop_ext.graph.chain import split_layers


class Branches(nn.Module):
    """Control flow on values in the model's own forward."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = conv(), conv()

    def forward(self, x: Tensor) -> Tensor:
        x = self.a(x)
        return self.b(x) if x.mean() > 0 else x


class TwoInputs(nn.Module):
    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        return x + y


class NoInput(nn.Module):
    def forward(self, *inputs: Tensor) -> Tensor:
        return inputs[0]


class Counting(nn.Module):
    """Each call gives another result."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.calls = conv(), conv(), 0

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        return self.b(self.a(x) + self.calls)


class PythonNoise(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = conv(), conv()

    def forward(self, x: Tensor) -> Tensor:
        return self.b(self.a(x) * random.random())


X = torch.ones(2, 3, 8, 8)

REFUSED: list[tuple[Callable[[], Any], Any, dict[str, Any], type[Exception], str]] = [
    (lambda: "resnet18", X, {}, TypeError, "model must be a torch.nn.Module, got str"),
    (conv, [X], {}, TypeError, r"example must be a tensor \[B, ...\], got list"),
    (conv, X[:0], {}, ValueError, r"example must be \[B, ...\] with B >= 1, got \[0, 3, 8, 8\]"),
    (conv, torch.ones(3), {}, ValueError, r"example must be \[B, ...\] with B >= 1, got \[3\]"),
    (TwoInputs, X, {}, ValueError, "model must have one input, got 2: x, y"),
    (NoInput, X, {}, ValueError, "model must have one input, got 0: none"),
    (conv, X, {}, ValueError, "model must have a cut point, .*; Conv2d has none"),
    (nn.ReLU, X, {}, ValueError, "model must have a cut point, .*; ReLU has none"),
    (
        lambda: Net(lambda net, x: torch.cat([net.c(net.b(net.a(x))), x], 1), **abc()),
        X,
        {},
        ValueError,
        "model must have a cut point, .*; Net has none",
    ),
    (lambda: nn.Sequential(*[(shared := conv()), conv(), shared]), X, {}, ValueError, "must have a cut"),
    (Branches, X, {}, ValueError, "forward of Branches itself is not: it stopped the tracer: symbolically traced"),
    (lambda: nn.Sequential(nn.LazyConv2d(3, 1), conv()), X, {}, ValueError, "must have its parameters, got lazy ones"),
    (lambda: nn.Sequential(conv(), conv()), X, {"layers": ["0", "7"]}, ValueError, "name modules .*, got '7'"),
    (lambda: nn.Sequential(conv(), conv()), X, {"layers": ["0"]}, ValueError, "must have a cut"),
    (lambda: torch.compile(conv(), backend="eager"), X, {}, TypeError, "got a OptimizedModule; give torch.compile"),
    (lambda: nn.DataParallel(conv()), X, {}, TypeError, "the plain module, got a DataParallel"),
    (Counting, X, {}, ValueError, "forward of Counting itself is not: its forward sets calls"),
    (PythonNoise, X, {}, ValueError, "forward of PythonNoise itself is not: its forward draws random numbers"),
]


@pytest.mark.parametrize(("build", "example", "options", "error", "message"), REFUSED)
def test_split_layers_refuses(
    build: Callable[[], Any], example: Any, options: dict[str, Any], error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=f"split_layers: .*{message}"):
        split_layers(build(), example, **options)


def test_split_layers_refuses_a_distributed_wrapper(tmp_path: Path) -> None:
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        model = nn.parallel.DistributedDataParallel(nn.Sequential(conv(), conv()))
        with pytest.raises(TypeError, match=r"plain module, got a DistributedDataParallel; .* as wrap="):
            split_layers(model, X)
    finally:
        torch.distributed.destroy_process_group()


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("broken", [False, True])
def test_split_layers_leaves_the_model_as_it_was(training: bool, broken: bool) -> None:
    model = nn.Sequential(conv(), nn.BatchNorm2d(3), nn.Dropout(), conv(), nn.BatchNorm2d(3), conv()).train(training)
    function = type(model).forward
    model[1].eval()
    x = torch.rand(4, 3, 8, 8)
    model(x).sum().backward()
    state = {key: value.clone() for key, value in model.state_dict().items()}
    gradients = [(p, p.grad, p.grad.clone(), p.requires_grad) for p in model.parameters() if p.grad is not None]
    flags = [m.training for m in model.modules()]
    noise = torch.get_rng_state()
    before = x.clone()
    if broken:
        # The forward fails after half of it has run.
        model.forward = lambda x: function(model, x) + next(iter([]))  # type: ignore[call-overload]
        with pytest.raises(ValueError, match="traceable"):
            split_layers(model, x)
        del model.forward
    else:
        chain = split_layers(model, x)
        assert chain.training is training
        assert [id(p) for p in chain.parameters()] == [id(p) for p in model.parameters()]
        assert [id(b) for b in chain.buffers()] == [id(b) for b in model.buffers()]
    assert torch.equal(torch.get_rng_state(), noise)
    assert [m.training for m in model.modules()] == flags
    torch.testing.assert_close(dict(model.state_dict()), state, rtol=0, atol=0)
    assert len(gradients) == len(list(model.parameters())) == 10
    for parameter, gradient, value, wanted in gradients:
        assert parameter.grad is gradient
        assert torch.equal(gradient, value)
        assert parameter.requires_grad is wanted
    assert torch.equal(x, before)
