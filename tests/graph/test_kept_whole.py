"""Modules whose meaning a traced graph cannot hold are called as they are, or refused by name: never a wrong result."""

from __future__ import annotations

import copy
import pickle
import random
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor, nn

from learndrop_ext.graph.chain import Chain, split_layers

X = torch.rand(2, 3, 8, 8, generator=torch.Generator().manual_seed(0))


class Reversed(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        return -gradient


class ReversedIdentity(Reversed):
    """No operation at all in forward: only the gradient tells."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x


class Block(nn.Module):
    """A convolution and a function of the block and its input; `held` becomes attributes, tensors become buffers."""

    def __init__(self, function: Callable[[Any, Tensor], Any], **held: Any) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 3, 3, padding=1)
        self.function = function
        for name, value in held.items():
            if isinstance(value, Tensor):
                self.register_buffer(name, value)
            else:
                setattr(self, name, value)

    def forward(self, x: Tensor) -> Any:
        return self.function(self, x)


def network(function: Callable[[Any, Tensor], Any], **held: Any) -> nn.Sequential:
    torch.manual_seed(0)
    plain = Block(lambda block, x: block.conv(x).relu())
    return nn.Sequential(nn.Conv2d(3, 3, 3, padding=1), Block(function, **held), plain, nn.Conv2d(3, 3, 3, padding=1))


def under_no_grad(block: Any, x: Tensor) -> Tensor:
    with torch.no_grad():
        y = block.conv(x)
    return x + y


def under_enable_grad(block: Any, x: Tensor) -> Tensor:
    with torch.enable_grad():
        return x + block.conv(x)


def without_autocast(block: Any, x: Tensor) -> Tensor:
    with torch.autocast("cpu", enabled=False):
        return block.conv(x)


def stores_features(block: Any, x: Tensor) -> Tensor:
    block.features = block.conv(x)
    return block.features


def collects_features(block: Any, x: Tensor) -> Tensor:
    block.features.append(x.mean())
    return block.conv(x)


def assigns_buffer(block: Any, x: Tensor) -> Tensor:
    block.mean = 0.9 * block.mean + 0.1 * x.mean().detach()
    return block.conv(x) * block.mean


def reads_raw_buffer(block: Any, x: Tensor) -> Tensor:
    return block.conv(x) * block._buffers["tau"].exp()


WHOLE: list[tuple[str, Callable[[Any, Tensor], Any], dict[str, Any], str]] = [
    ("gradient reversal", lambda b, x: Reversed.apply(b.conv(x)), {}, "autograd state"),
    (
        "gradient reversal without an operation",
        lambda b, x: ReversedIdentity.apply(b.conv(x)),
        {},
        "its trace does not",
    ),
    ("no_grad", under_no_grad, {}, "autograd state"),
    ("enable_grad", under_enable_grad, {}, "autograd state"),
    ("autocast", without_autocast, {}, "enters autocast"),
    ("random", lambda b, x: b.conv(x) * (random.random() > 0.5), {}, "draws random numbers"),
    ("numpy", lambda b, x: b.conv(x) * np.random.rand(), {}, "draws random numbers"),
    ("torch item", lambda b, x: x if torch.rand(1).item() < 0.1 else b.conv(x), {}, "draws random numbers"),
    ("own generator", lambda b, x: b.conv(x) * b.g.random(), {"g": np.random.default_rng(0)}, "changes g"),
    ("noise of the batch", lambda b, x: b.conv(x) * torch.rand(x.size(0), 1, 1, 1), {}, "stopped the tracer: rand"),
    ("stored features", stores_features, {}, "sets 1.features"),
    ("collected features", collects_features, {"features": []}, "changes features"),
    ("assigned buffer", assigns_buffer, {"mean": torch.tensor(1.0)}, "sets 1.mean"),
    ("raw buffer", reads_raw_buffer, {"tau": torch.tensor(2.0)}, "its trace does not"),
    ("values", lambda b, x: b.conv(x) if x.mean() > 0 else x, {}, "stopped the tracer: symbolically traced"),
]


def assert_trains_alike(model: nn.Module, chain: Chain, x: Tensor) -> None:
    """Two steps of training give the same outputs, gradients and buffers from the same state."""
    start = copy.deepcopy(model.state_dict())
    results = []
    generators = [copy.deepcopy(getattr(m, "g", None)) for m in model.modules()]
    for module in (model, chain):
        model.load_state_dict(start)
        for owner, generator in zip(model.modules(), generators, strict=True):
            if generator is not None:
                owner.g = copy.deepcopy(generator)
        module.train()
        model.train()
        random.seed(1)
        np.random.seed(1)
        torch.manual_seed(1)
        found: list[Any] = []
        for _ in range(2):
            entering = x.clone().requires_grad_()
            output = module(entering)
            model.zero_grad()
            output.square().sum().backward()
            found += [
                output.detach(),
                entering.grad,
                [None if p.grad is None else p.grad.clone() for p in model.parameters()],
            ]
        results.append((found, copy.deepcopy(model.state_dict())))
    torch.testing.assert_close(results[0], results[1], rtol=0, atol=0)
    model.load_state_dict(start)


@pytest.mark.parametrize(("function", "held", "reason"), [case[1:] for case in WHOLE], ids=[case[0] for case in WHOLE])
def test_split_layers_keeps_whole_what_the_trace_cannot_hold(
    function: Callable[[Any, Tensor], Any], held: dict[str, Any], reason: str
) -> None:
    model = network(function, **held)
    attributes = [dict(vars(m)) for m in model.modules()]
    buffers = {name: (b, b.clone()) for name, b in model.named_buffers()}
    chain = split_layers(model, X)
    assert chain.names == ("0", "1", "2.conv", "3")
    assert chain.kept_whole.keys() == {"1"}
    assert reason in chain.kept_whole["1"]
    for module, before in zip(model.modules(), attributes, strict=True):
        assert vars(module).keys() == before.keys()
        assert all(vars(module)[name] is value for name, value in before.items())
    for name, buffer in model.named_buffers():
        assert buffer is buffers[name][0]
        assert torch.equal(buffer, buffers[name][1])
    assert held.get("features", []) == []
    assert_trains_alike(model, chain, X)


@pytest.mark.parametrize(
    ("function", "held"),
    [
        (lambda b, x: (y := b.conv(x)) + (y.round() - y).detach(), {}),
        (lambda b, x: b.conv(x) / b.tau.clamp(min=0.1), {"tau": torch.tensor(2.0)}),
        (lambda b, x: b.conv(x) * b.conv.weight.data.mean().item(), {}),
    ],
    ids=["straight-through", "clamped buffer", "weight by item"],
)
def test_split_layers_traces_through_what_the_graph_can_hold(
    function: Callable[[Any, Tensor], Any], held: dict[str, Any]
) -> None:
    model = network(function, **held)
    chain = split_layers(model, X)
    assert chain.kept_whole == {}
    assert chain.names == ("0", "1.conv", "2.conv", "3")
    assert_trains_alike(model, chain, X)
    with torch.no_grad():
        for tensor in (*model.parameters(), *model.buffers()):
            tensor.mul_(0.5)
    assert torch.equal(chain.eval()(X), model.eval()(X))


@pytest.mark.parametrize("register", ["register_forward_hook", "register_forward_pre_hook"])
def test_split_layers_keeps_modules_with_hooks_whole(register: str) -> None:
    model = nn.Sequential(nn.Conv2d(3, 3, 1), nn.Sequential(nn.Conv2d(3, 3, 1), nn.Conv2d(3, 3, 1)), nn.Conv2d(3, 3, 1))
    seen: list[nn.Module] = []
    getattr(model[1], register)(lambda module, *_: seen.append(module))
    chain = split_layers(model, X)
    assert chain.kept_whole == {"1": "it has hooks"}
    assert chain.names == ("0", "1", "2")
    seen.clear()
    chain(X)
    assert seen == [model[1]]


class Depth(nn.Module):
    """Stochastic depth by Python's random, in training only."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Conv2d(3, 3, 1), nn.Conv2d(3, 3, 1)

    def forward(self, x: Tensor) -> Tensor:
        if self.training and random.random() < 0.5:
            return x
        return x + self.b(self.a(x).relu())


def test_stochastic_depth_runs_in_the_chain_as_in_the_model() -> None:
    model = nn.Sequential(nn.Conv2d(3, 3, 1), Depth(), Depth(), nn.Conv2d(3, 3, 1))
    chain = split_layers(model, X).train()
    assert chain.names == ("0", "1", "2", "3")
    random.seed(0)
    assert len({chain(X).sum().item() for _ in range(20)}) > 2
    assert_trains_alike(model, chain, X)


class Root(nn.Module):
    def __init__(self, function: Callable[[Any, Tensor], Any]) -> None:
        super().__init__()
        self.a, self.b, self.function = nn.Conv2d(3, 3, 1), nn.Conv2d(3, 3, 1), function

    def forward(self, x: Tensor) -> Any:
        return self.function(self, x)


def head_under_no_grad(net: Any, x: Tensor) -> Tensor:
    with torch.no_grad():
        x = net.a(x)
    return net.b(x)


def kept_features(net: Any, x: Tensor) -> Tensor:
    net.features = net.a(x)
    return net.b(net.features)


def set_on_a_child(net: Any, x: Tensor) -> Tensor:
    net.a.calls = 1
    return net.b(net.a(x))


@pytest.mark.parametrize(
    ("function", "message"),
    [
        (head_under_no_grad, "autograd state"),
        (kept_features, "its forward sets features"),
        (set_on_a_child, "its forward sets a.calls"),
        (lambda net, x: net.b(net.a(x) * random.random()), "draws random numbers"),
        (lambda net, x: net.b(net.a(x) if x.sum() > 0 else x), "stopped the tracer"),
        (lambda net, x: net.b(ReversedIdentity.apply(net.a(x))), "does not in eval mode: the gradient of a.weight"),
    ],
)
def test_split_layers_refuses_a_model_whose_own_forward_cannot_be_traced(
    function: Callable[[Any, Tensor], Any], message: str
) -> None:
    model = Root(function)
    names = vars(model).keys(), vars(model.a).keys()
    with pytest.raises((ValueError, RuntimeError), match=rf"split_layers: .*Root.*{message}"):
        split_layers(model, X)
    assert (vars(model).keys(), vars(model.a).keys()) == names


def test_split_layers_names_the_modules_kept_whole_where_no_cut_point_is_left() -> None:
    model = nn.Sequential(Block(under_no_grad), nn.ReLU())
    with pytest.raises(
        ValueError, match=r"must have a cut point.*; kept whole: 0 \(Block\): its forward changes the autog"
    ):
        split_layers(model, X)


def test_split_layers_keeps_the_random_state_of_python_numpy_and_torch() -> None:
    model = network(lambda b, x: b.conv(x) * random.random() * np.random.rand() * torch.rand(1).item())
    random.seed(5)
    np.random.seed(5)
    torch.manual_seed(5)
    wanted = random.random(), np.random.rand(), torch.rand(1).item()
    random.seed(5)
    np.random.seed(5)
    torch.manual_seed(5)
    split_layers(model, X)
    assert (random.random(), np.random.rand(), torch.rand(1).item()) == wanted


class Switched(nn.Module):
    """Functional dropout by the block's own training flag."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norm = nn.Conv2d(3, 3, 1), nn.BatchNorm2d(3)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.conv(F.dropout(self.norm(x), 0.5, self.training))


def test_layers_follow_the_training_flag_of_the_modules_they_replace() -> None:
    model = nn.Sequential(nn.Conv2d(3, 3, 1), Switched(), nn.Conv2d(3, 3, 1)).train()
    chain = split_layers(model, X).train()
    model[1].eval()
    torch.manual_seed(0)
    wanted = model(X)
    assert torch.equal(wanted, model(X))
    assert torch.equal(chain(X), wanted)
    model[1].train()
    assert not torch.equal(chain(X), chain(X))
    model.eval()
    chain.train()
    assert model[1].training
    assert not torch.equal(chain(X), chain(X))
    chain.eval()
    assert torch.equal(chain(X), chain(X))


class Twice(nn.Module):
    """Two branches in one layer."""

    def __init__(self, a: nn.Module, b: nn.Module) -> None:
        super().__init__()
        self.a, self.b = a, b

    def forward(self, x: Tensor) -> Tensor:
        return self.a(x) + self.b(x)


def test_a_layer_refuses_modules_in_two_modes() -> None:
    model = nn.Sequential(nn.Conv2d(3, 3, 1), Twice(Switched(), Switched()), nn.Conv2d(3, 3, 1))
    chain = split_layers(model, X).train()
    model[1].b.eval()
    with pytest.raises(
        RuntimeError, match=r"layer 1 must be in one mode, got some in train and some in eval .*Switched"
    ):
        chain(X)


def test_chain_can_be_copied_and_pickled() -> None:
    model = nn.Sequential(nn.Conv2d(3, 3, 1), Switched(), nn.Conv2d(3, 3, 1))
    chain = split_layers(model, X).eval()
    wanted = chain(X)
    for twin in (copy.deepcopy(chain), pickle.loads(pickle.dumps(chain)), copy.deepcopy(chain.prefix(3))):
        assert torch.equal(twin(X), wanted)
        assert not {id(p) for p in twin.parameters()} & {id(p) for p in model.parameters()}
    with torch.no_grad():
        model[0].weight.zero_()
    assert torch.equal(copy.deepcopy(chain).eval()(X), model.eval()(X))
    assert copy.deepcopy(chain).stale() is None
