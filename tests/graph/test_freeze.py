from __future__ import annotations

import copy
import io
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from learndrop_ext.app.models import build_model
from learndrop_ext.graph.chain import Chain, split_layers
from learndrop_ext.graph.freeze import check_optimizer, device_of, freeze, prefix_modules, unfreeze
from learndrop_ext.graph.live import LiveModel, live_body

CPU = torch.device("cpu")


def network() -> nn.Sequential:
    """Three layers, starting at 0, 3 and 7."""
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(3, 4, 3, padding=1),
        nn.BatchNorm2d(4),
        nn.ReLU(inplace=True),
        nn.Conv2d(4, 4, 3, padding=1),
        nn.BatchNorm2d(4),
        nn.ReLU(inplace=True),
        nn.Flatten(),
        nn.Linear(256, 5),
    )


def images(count: int = 4) -> Tensor:
    return torch.randn(count, 3, 8, 8, generator=torch.Generator().manual_seed(1))


def split(model: nn.Module) -> Chain:
    return split_layers(model, images(2))


def step(model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    model.train()
    optimizer.zero_grad()
    model(images()).square().sum().backward()
    optimizer.step()


def copied(state: dict[str, Any]) -> dict[str, Any]:
    return copy.deepcopy(state)


@pytest.mark.parametrize("k", [0, 1, 2, 3])
def test_freeze_keeps_the_first_k_layers_as_they_are(k: int) -> None:
    model = network()
    chain = split(model)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    step(model, optimizer)
    freeze(model, chain, k)
    before = copied(model.state_dict())
    for _ in range(2):
        if k < 3:
            step(model, optimizer)
        model.train()
        model(images())
    first = {0: 0, 1: 3, 2: 7, 3: 8}[k]
    for key, value in model.state_dict().items():
        frozen = int(key.split(".")[0]) < first
        assert torch.equal(value, before[key]) is frozen, key
    assert [m.training for m in model] == [i >= first for i in range(8)]


def test_freeze_keeps_eval_mode_whatever_train_says() -> None:
    model = build_model("resnet18", num_classes=5, width=4, seed=0)
    chain = split(model)
    freeze(model, chain, 3)
    for mode in (True, False, True):
        assert model.train(mode) is model
        chain.train(mode)
        assert model.training is mode
        for name, module in model.named_modules():
            inside = name.startswith(("conv1", "bn1", "layer1"))
            shared = name in ("relu", "maxpool", "")
            assert shared or module.training is (mode and not inside), name
        assert not chain.layer(0).training
        assert not chain.prefix(3).layers[2].training
        assert chain.layer(3).training is mode
    assert model.layer1.train(True) is model.layer1
    assert not model.layer1.training


def test_freeze_takes_gradients_from_the_prefix_alone() -> None:
    model = network()
    chain = split(model)
    model(images()).sum().backward()
    kept = model[7].weight.grad
    frozen = freeze(model, chain, 1)
    wanted = [model[0].weight, model[0].bias, model[1].weight, model[1].bias]
    assert list(map(id, frozen.parameters)) == list(map(id, wanted))
    assert [p.requires_grad for p in model.parameters()] == [False] * 4 + [True] * 6
    assert [p.grad is None for p in model.parameters()] == [True] * 4 + [False] * 6
    assert model[7].weight.grad is kept


def test_freeze_twice_goes_on_behind_the_first() -> None:
    model = network()
    chain = split(model)
    first = freeze(model, chain, 1)
    second = freeze(model, chain, 2)
    assert not set(map(id, first.parameters)) & set(map(id, second.parameters))
    assert not set(first.modules) & set(second.modules)
    assert list(map(id, second.parameters)) == [id(p) for m in (model[3], model[4]) for p in m.parameters()]
    assert freeze(model, chain, 2).parameters == freeze(model, chain, 2).modules == ()
    for frozen in (second, first):
        unfreeze(frozen, training=True)
    assert all(p.requires_grad for p in model.parameters())
    assert all(m.training for m in model.modules())


def test_unfreeze_restores_what_a_freeze_changed() -> None:
    model = network()
    model[0].bias.requires_grad_(False)
    chain = split(model)
    before = [set(m.__dict__) for m in model.modules()]
    frozen = freeze(model, chain, 2)
    unfreeze(frozen, training=True)
    # A parameter that the user froze stays so.
    assert [name for name, p in model.named_parameters() if not p.requires_grad] == ["0.bias"]
    assert [set(m.__dict__) for m in model.modules()] == before
    assert all(m.training for m in model.modules())
    assert not any(m.training for m in model.eval().modules())
    statistics = model[1].running_mean.clone()
    model.train()(images())
    assert not torch.equal(model[1].running_mean, statistics)


def test_unfreeze_puts_the_modules_into_the_mode_given() -> None:
    model = network().eval()
    frozen = freeze(model, split(model), 2)
    unfreeze(frozen, training=False)
    assert not any(m.training for m in model.modules())


@pytest.mark.parametrize("kind", [torch.optim.SGD, torch.optim.AdamW])
def test_freeze_leaves_the_optimizer_as_it_is(kind: Callable[..., torch.optim.Optimizer]) -> None:
    model = network()
    chain = split(model)
    options = {"momentum": 0.9} if kind is torch.optim.SGD else {}
    optimizer = kind(model.parameters(), lr=0.1, weight_decay=0.1, **options)
    step(model, optimizer)
    before = copied(optimizer.state_dict())
    frozen = freeze(model, chain, 1)
    torch.testing.assert_close(optimizer.state_dict(), before, rtol=0, atol=0)
    held = {name: p.detach().clone() for name, p in model.named_parameters()}
    step(model, optimizer)
    state = optimizer.state_dict()["state"]
    assert list(state) == list(range(10))
    for i, (name, parameter) in enumerate(model.named_parameters()):
        # Neither momentum nor weight decay moves what has no gradient, and its state waits unchanged.
        assert torch.equal(parameter, held[name]) is (i < 4), name
        for key, value in before["state"][i].items():
            assert torch.equal(state[i][key], value) is (i < 4), (i, key)
    unfreeze(frozen, training=True)
    step(model, optimizer)
    assert not torch.equal(model[0].weight, held["0.weight"])


def test_freeze_leaves_a_model_that_can_be_pickled_copied_and_saved() -> None:
    model = network()
    freeze(model, split(model), 2)
    wanted = model.eval()(images())
    saved = io.BytesIO()
    torch.save(model, saved)
    saved.seek(0)
    copies = [copy.deepcopy(model), pickle.loads(pickle.dumps(model)), torch.load(saved, weights_only=False)]
    for other in copies:
        other.train()
        model.eval()
        assert [m.training for m in other] == [False] * 7 + [True]
        assert torch.equal(other.eval()(images()), wanted)
        assert other[0].train() is other[0]
        assert [p.requires_grad for p in other.parameters()] == [False] * 8 + [True] * 2
    assert list(model.state_dict()) == list(network().state_dict())


def test_prefix_modules_holds_nothing_that_the_suffix_uses() -> None:
    model = build_model("resnet18", num_classes=5, width=4, seed=0)
    chain = split(model)
    found = prefix_modules(model, chain, 3)
    names = {name for name, module in model.named_modules() if module in found}
    assert {"conv1", "bn1", "layer1", "layer1.0", "layer1.1", "layer1.0.conv2"} <= names
    assert not {"", "layer2", "fc", "avgpool"} & names
    assert {chain.layer(i) for i in range(3)} <= set(found)
    assert prefix_modules(model, chain, 0) == []


class SharedDropout(nn.Module):
    """One dropout module for all layers."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c = (nn.Linear(6, 6) for _ in range(3))
        self.dropout = nn.Dropout(0.5)

    def forward(self, x: Tensor) -> Tensor:
        return self.dropout(self.c(self.dropout(self.b(self.dropout(self.a(x))))))


def test_live_body_runs_frozen_layers_in_eval_mode_even_where_the_suffix_shares_their_dropout() -> None:
    model = SharedDropout()
    x = torch.rand(3, 6)
    chain = split_layers(model, x)
    assert chain.names == ("a", "b", "c")
    freeze(model, chain, 2)
    wanted = model.b(model.a(x))
    seen: list[Tensor] = []
    model.b.register_forward_hook(lambda module, inputs, output: seen.append(output))
    model.dropout.p = 1.0
    rest = live_body(model, chain, 0, 2, None).train()
    # The dropouts before and behind c take all, that before b nothing.
    assert torch.equal(rest(x), torch.zeros(3, 6))
    assert torch.equal(seen[0], wanted)
    assert model.dropout.training


def test_live_body_is_the_model_then_the_suffix() -> None:
    model = network().eval()
    chain = split(model)
    x = images()
    wanted = model(x)
    assert live_body(model, chain, 0, 0, None) is model
    for cut in (0, 1, 2):
        body = live_body(model, chain, cut, 2, None).eval()
        assert torch.equal(body(chain.prefix(cut)(x)), wanted)


def test_live_body_runs_what_is_frozen_without_gradients() -> None:
    model = network()
    chain = split(model)
    freeze(model, chain, 2)
    statistics = copied(model.state_dict())
    body = live_body(model, chain, 1, 2, None).train()
    body(torch.randn(4, 4, 8, 8)).sum().backward()
    assert [name for name, p in model.named_parameters() if p.grad is not None] == ["7.weight", "7.bias"]
    torch.testing.assert_close(dict(model.state_dict()), dict(statistics), rtol=0, atol=0)


def test_live_body_wraps_what_is_trained() -> None:
    model = network()
    chain = split(model)
    wrapped: list[nn.Module] = []

    def wrap(module: nn.Module) -> nn.Module:
        wrapped.append(module)
        return nn.Sequential(module)

    assert isinstance(live_body(model, chain, 0, 0, wrap), nn.Sequential)
    live_body(model, chain, 1, 2, wrap)
    assert wrapped[0] is model
    # DistributedDataParallel must not see a parameter that gets no gradient.
    assert list(map(id, wrapped[1].parameters())) == list(map(id, model[7].parameters()))


def test_live_body_refuses_a_wrap_that_gives_no_module() -> None:
    model = network()
    with pytest.raises(TypeError, match=r"DropScheduler: wrap must return a torch.nn.Module, got function"):
        live_body(model, split(model), 0, 1, lambda module: lambda x: x)  # type: ignore[arg-type,return-value]


def test_live_model_refuses_images_where_rows_are_wanted() -> None:
    live = LiveModel(nn.Flatten(), CPU)
    live.row_shape = (4, 8, 8)
    assert live(torch.zeros(2, 4, 8, 8)).shape == (2, 256)
    with pytest.raises(
        ValueError, match=r"drop.model: x must be cached rows \[B, 4, 8, 8\] .*, got \[2, 3, 8, 8\]; to"
    ):
        live(images(2))


# autocast of the call, what a fill has to repeat
@pytest.mark.parametrize("dtype", [None, torch.bfloat16, torch.float16])
def test_live_model_notes_the_autocast_of_training(dtype: torch.dtype | None) -> None:
    live = LiveModel(nn.Identity(), CPU)
    with torch.autocast("cpu", dtype=dtype or torch.bfloat16, enabled=dtype is not None):
        live(images())
    with torch.autocast("cpu", dtype=torch.bfloat16):
        live.eval()(images())
    assert live.autocast == dtype
    assert live.calls == 1


OWN = images(4)
# what the training step gives to the model, is it foreign
GIVEN = [
    (OWN, False),
    (OWN[:2], False),
    (OWN.contiguous(memory_format=torch.channels_last), False),
    (OWN.half(), False),
    (OWN.flip(0), True),
    (OWN + 0.5, True),
    (torch.cat([OWN, OWN]), True),
    (OWN[:, :, ::2], True),
    (OWN.flatten(1), True),
]


@pytest.mark.parametrize(("given", "foreign"), GIVEN)
def test_live_model_notes_inputs_that_are_not_the_batchs_own(given: Tensor, foreign: bool) -> None:
    live = LiveModel(nn.Identity(), CPU)
    live.expect(OWN)
    live(given)
    assert live.foreign == (given.shape if foreign else None)
    # Only the first call after a batch is looked at: a second pass may be over anything.
    live(torch.zeros(1, 1))
    assert live.foreign == (given.shape if foreign else None)


def test_device_of() -> None:
    assert device_of(network()) == CPU
    with pytest.raises(TypeError, match=r"DropScheduler: model must be a torch.nn.Module, got int"):
        device_of(5)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="model must have its parameters on one device, got no parameters"):
        device_of(nn.ReLU())
    mixed = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2, device="meta"))
    with pytest.raises(ValueError, match="model must have its parameters on one device, got cpu, meta"):
        device_of(mixed)


def test_check_optimizer() -> None:
    model = network()
    check_optimizer(torch.optim.SGD(model[7].parameters(), lr=0.1), model)
    with pytest.raises(ValueError, match="optimizer must hold the model's parameters, got none of its 10"):
        check_optimizer(torch.optim.SGD(network().parameters(), lr=0.1), model)
    with pytest.raises(TypeError, match=r"optimizer must be a torch.optim.Optimizer, got generator"):
        check_optimizer(model.parameters(), model)  # type: ignore[arg-type]
