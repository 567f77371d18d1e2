from __future__ import annotations

import copy
import io
import pickle
from collections.abc import Callable

import pytest
import torch
from three_layers import add, copied, frozen, images, network, split
from torch import nn

from learndrop_ext.app.models import build_model
from learndrop_ext.graph.chain import Chain
from learndrop_ext.graph.freeze import FrozenPrefix, check_optimizer, device_of, prefix_modules

CPU = torch.device("cpu")


def step(model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    model.train()
    optimizer.zero_grad()
    model(images()).square().sum().backward()
    optimizer.step()


def suffix_step(model: nn.Module, chain: Chain, k: int, optimizer: torch.optim.Optimizer) -> None:
    optimizer.zero_grad()
    with torch.no_grad():
        rows = chain.prefix(k).eval()(images())
    chain.suffix(k)(rows).square().sum().backward()
    optimizer.step()


def test_frozen_modules_are_held_in_eval_mode() -> None:
    model = build_model("resnet18", num_classes=5, width=4, seed=0)
    held = frozen(model, 3)
    for mode in (True, False, True):
        assert model.train(mode) is model
        held.hold_eval()
        for name, module in model.named_modules():
            inside = name.startswith(("conv1", "bn1", "layer1"))
            shared = name in ("relu", "maxpool", "")
            assert shared or module.training is (mode and not inside), name


def test_freezing_takes_gradients_from_the_prefix_alone() -> None:
    model = network()
    model(images()).sum().backward()
    kept = model[7].weight.grad
    frozen(model, 1)
    assert [p.grad is None for p in model.parameters()] == [True] * 4 + [False] * 6
    assert model[7].weight.grad is kept
    assert all(p.requires_grad for p in model.parameters())


@pytest.mark.parametrize("kind", [torch.optim.SGD, torch.optim.AdamW])
def test_the_optimizer_passes_the_prefix_by(kind: Callable[..., torch.optim.Optimizer]) -> None:
    model = network()
    chain = split(model)
    options = {"momentum": 0.9} if kind is torch.optim.SGD else {}
    optimizer = kind(model.parameters(), lr=0.1, weight_decay=0.1, **options)
    step(model, optimizer)
    before = copied(optimizer.state_dict())
    held = FrozenPrefix(model, chain, 1, optimizer)
    torch.testing.assert_close(optimizer.state_dict(), before, rtol=0, atol=0)
    weights = {name: p.detach().clone() for name, p in model.named_parameters()}
    suffix_step(model, chain, 1, optimizer)
    state = optimizer.state_dict()["state"]
    for i, (name, parameter) in enumerate(model.named_parameters()):
        # Neither momentum nor weight decay moves what has no gradient, and its state waits unchanged.
        assert torch.equal(parameter, weights[name]) is (i < 4), name
        for key, value in before["state"][i].items():
            assert torch.equal(state[i][key], value) is (i < 4), (i, key)
    assert held.first_change() is None


def test_release_leaves_the_model_as_it_was() -> None:
    model = network()
    model[4].eval()
    before = [set(m.__dict__) for m in model.modules()]
    modes = [m.training for m in model.modules()]
    first = frozen(model, 1)
    second = frozen(model, 2, before=first)
    assert not any(m.training for m in model[:6])
    second.release()
    # A module that the caller had in eval mode stays so.
    assert [m.training for m in model.modules()] == modes
    assert [set(m.__dict__) for m in model.modules()] == before


def test_release_follows_a_mode_that_has_changed() -> None:
    model = network()
    held = frozen(model, 2)
    model.eval()
    held.release()
    assert not any(m.training for m in model.modules())


def test_a_copy_of_a_frozen_model_is_an_ordinary_model() -> None:
    model = network()
    frozen(model, 2)
    saved = io.BytesIO()
    torch.save(model, saved)
    saved.seek(0)
    copies = [copy.deepcopy(model), pickle.loads(pickle.dumps(model)), torch.load(saved, weights_only=False)]
    for other in copies:
        assert torch.equal(other.eval()(images()), model.eval()(images()))
        other.train()
        assert all(m.training for m in other.modules())
        assert all(p.requires_grad for p in other.parameters())
        statistics = other[1].running_mean.clone()
        other(images())
        assert not torch.equal(other[1].running_mean, statistics)
    assert list(model.state_dict()) == list(network().state_dict())


def replace(model: nn.Module) -> None:
    model[3].weight = nn.Parameter(model[3].weight.detach() + 1)


def assign(model: nn.Module) -> None:
    model.load_state_dict({k: v.clone() + 1 for k, v in model.state_dict().items()}, assign=True)


def move_statistics(model: nn.Module) -> None:
    model.train()(images())


def data_only(model: nn.Module) -> None:
    model[3].weight.data.add_(1)


# what is done, the layer named, whether it is seen without a look at the values
CHANGES = [
    (replace, "3", True),
    (assign, "0", True),
    (add, "3", True),
    (move_statistics, "0", True),
    (data_only, "3", False),
]


@pytest.mark.parametrize(("change", "layer", "cheaply"), CHANGES, ids=[c[0].__name__ for c in CHANGES])
def test_changed_weights_and_buffers_are_named(change: Callable[[nn.Module], None], layer: str, cheaply: bool) -> None:
    model = network()
    held = frozen(model, 2)
    assert held.first_change() is held.first_changed_value() is None
    change(model)
    assert (held.first_change() is not None) is cheaply
    assert held.first_changed_value() == layer
    held.accept()
    assert held.first_change() is held.first_changed_value() is None


def test_what_lies_behind_the_prefix_may_change() -> None:
    model = network()
    held = frozen(model, 2)
    with torch.no_grad():
        model[7].weight.add_(1)
    assert held.first_change() is held.first_changed_value() is None


def test_the_same_values_written_again_are_no_change() -> None:
    model = network()
    held = frozen(model, 2)
    model.load_state_dict(copied(model.state_dict()))
    assert held.first_change() == "0"
    assert held.first_changed_value() is None
    assert held.first_change() is None


def test_a_layer_that_is_asked_to_train_is_named() -> None:
    model = network()
    model[0].requires_grad_(False)
    model[3].weight.requires_grad_(False)
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
    held = frozen(model, 2, optimizer)
    assert held.first_woken() is None
    model[3].weight.requires_grad_(True)  # whatever optimizer it is for
    assert held.first_woken() == "3"
    model[0].requires_grad_(True)
    assert held.first_woken() == "0"


def test_a_layer_that_is_given_to_the_optimizer_is_named() -> None:
    model = network()
    optimizer = torch.optim.SGD([*model[0].parameters(), *model[6].parameters()], lr=0.1)
    held = frozen(model, 2, optimizer)
    assert held.first_woken() is None
    optimizer.add_param_group({"params": list(model[3].parameters())})
    assert held.first_woken() == "3"


def test_prefix_modules_holds_nothing_that_the_suffix_uses() -> None:
    model = build_model("resnet18", num_classes=5, width=4, seed=0)
    chain = split(model)
    found = prefix_modules(model, chain, 3)
    names = {name for name, module in model.named_modules() if module in found}
    assert {"conv1", "bn1", "layer1", "layer1.0", "layer1.1", "layer1.0.conv2"} <= names
    assert not {"", "layer2", "fc", "avgpool"} & names
    assert {chain.layer(i) for i in range(3)} <= set(found)
    assert prefix_modules(model, chain, 0) == []


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
