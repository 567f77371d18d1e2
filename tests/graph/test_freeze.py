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
from learndrop_ext.graph.freeze import FrozenPrefix, check_optimizer, device_of, prefix_modules
from learndrop_ext.graph.live import FULLY_COMPARED, LiveModel, live_body

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


def frozen(model: nn.Module, k: int, optimizer: torch.optim.Optimizer | None = None, **options: Any) -> FrozenPrefix:
    return FrozenPrefix(model, split(model), k, optimizer or torch.optim.SGD(model.parameters(), lr=0.1), **options)


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


def add(model: nn.Module) -> None:
    with torch.no_grad():
        model[3].weight.add_(1)


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
    # Not in the optimizer yet.
    model[0].requires_grad_(True)
    assert held.first_woken() is None
    model[3].weight.requires_grad_(True)
    optimizer.add_param_group({"params": [model[3].weight]})
    assert held.first_woken() == "3"
    optimizer.add_param_group({"params": list(model[0].parameters())})
    assert held.first_woken() == "0"


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
    FrozenPrefix(model, chain, 2, torch.optim.SGD(model.parameters(), lr=0.1))
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
    FrozenPrefix(model, chain, 2, torch.optim.SGD(model.parameters(), lr=0.1))
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
    live = LiveModel(nn.Flatten(), nn.Identity(), "x")
    live.row_shape = (4, 8, 8)
    assert live(torch.zeros(2, 4, 8, 8)).shape == (2, 256)
    with pytest.raises(
        ValueError, match=r"drop.model: x must be cached rows \[B, 4, 8, 8\] .*, got \[2, 3, 8, 8\]; to"
    ):
        live(images(2))


# autocast of the call, what a fill has to repeat
@pytest.mark.parametrize("dtype", [None, torch.bfloat16, torch.float16])
def test_live_model_notes_the_autocast_of_training(dtype: torch.dtype | None) -> None:
    live = LiveModel(nn.Identity(), nn.Identity(), "x")
    with torch.autocast("cpu", dtype=dtype or torch.bfloat16, enabled=dtype is not None):
        live(images())
    with torch.autocast("cpu", dtype=torch.bfloat16):
        live.eval()(images())
    assert live.autocast == dtype
    assert live.calls == 1


OWN = images(4)
# what the training step gives to the model, what is said of it
GIVEN = [
    (OWN, None),
    (OWN[:2], None),
    (OWN[2:], None),
    (OWN.contiguous(memory_format=torch.channels_last), None),
    (OWN.half(), None),
    (OWN.clone()[:3], None),
    (OWN.flip(0), "[4, 3, 8, 8]"),
    (OWN + 0.5, "[4, 3, 8, 8]"),
    (torch.cat([OWN, OWN]), "[8, 3, 8, 8]"),
    (OWN[:, :, ::2], "[4, 3, 4, 8]"),
    (OWN.flatten(1), "[4, 192]"),
]


@pytest.mark.parametrize("later", [False, True])
@pytest.mark.parametrize(("given", "foreign"), GIVEN)
def test_live_model_notes_inputs_that_are_not_the_batchs_own(given: Tensor, foreign: str | None, later: bool) -> None:
    live = LiveModel(nn.Identity(), nn.Identity(), "x")
    for _ in range(2 * FULLY_COMPARED if later else 0):
        live.expect(OWN)
        live(OWN.clone())
    live.expect(OWN)
    # A second call in the step is looked at as the first is.
    live(OWN)
    live(given)
    assert live.take_foreign() == foreign
    assert live.take_foreign() is None


@pytest.mark.parametrize(
    "call", [lambda x: x.sub_(1), lambda x: x[1].copy_(x[1].flip(-1)), lambda x: x[0, :, :2].zero_()]
)
def test_live_model_notes_a_batch_that_is_changed_in_place(call: Callable[[Tensor], Any]) -> None:
    live = LiveModel(nn.Identity(), nn.Identity(), "x")
    x = images(4)
    live.expect(x)
    live(x)
    call(x)
    live(x)
    assert live.take_foreign() == "one that was changed in place"


def test_live_model_looks_at_one_sample_of_later_batches_another_each_time() -> None:
    live = LiveModel(nn.Identity(), nn.Identity(), "x")
    changed = OWN.clone()
    changed[2] += 1
    for _ in range(FULLY_COMPARED):
        live.expect(OWN)
        live(OWN.clone())
    seen = []
    for _ in range(8):
        live.expect(OWN)
        live(changed)
        seen.append(live.take_foreign() is not None)
    assert seen == [False, False, True, False, False, False, True, False]


def test_live_model_does_not_look_where_it_was_told_not_to() -> None:
    live = LiveModel(nn.Identity(), nn.Identity(), "x")
    live.check_input = False
    live.expect(OWN)
    live(OWN + 1)
    assert live.take_foreign() is None


def test_live_model_refuses_a_call_with_frozen_weights_that_have_changed() -> None:
    model = network()
    live = LiveModel(nn.Identity(), nn.Identity(), "x")
    live.frozen = frozen(model, 2)
    live(OWN)
    add(model)
    with pytest.raises(RuntimeError, match=r"of the dropped layers must stay .* those of 3 have changed"):
        live(OWN)


@pytest.mark.parametrize(
    ("args", "kwargs", "got"),
    [
        ((), {}, r"got \(\)"),
        ((OWN, OWN), {}, r"got \(Tensor, Tensor\)"),
        ((OWN,), {"labels": OWN}, r"got \(Tensor, labels=Tensor\)"),
        ((), {"image": OWN}, r"got \(image=Tensor\)"),
        (({"x": OWN},), {}, r"got \(dict\)"),
    ],
)
def test_live_model_refuses_anything_but_one_tensor(args: Any, kwargs: Any, got: str) -> None:
    live = LiveModel(nn.Identity(), nn.Identity(), "pixels")
    assert live(OWN) is live(pixels=OWN) is OWN
    with pytest.raises(TypeError, match=f"drop.model: wanted one tensor, pixels, .* {got}"):
        live(*args, **kwargs)


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
