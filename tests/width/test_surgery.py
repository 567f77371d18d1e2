"""What a step cuts from the model and from the optimizer, and that nothing else changes."""

from __future__ import annotations

import copy
import re
from collections.abc import Callable
from typing import Any

import pytest
import torch
from narrow_models import EXAMPLE, MODELS, Shuffled, equal, everything, made, mlp, train
from torch import Tensor, nn
from torch.nn.utils import prune

from learndrop_ext.width import OneShot, Seen, WidthScheduler

OPTIMIZERS: dict[str, Callable[[nn.Module], torch.optim.Optimizer]] = {
    "momentum": lambda model: torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9, weight_decay=1e-3),
    "amsgrad": lambda model: torch.optim.AdamW(model.parameters(), lr=0.01, amsgrad=True),
    "single tensor": lambda model: torch.optim.Adam(model.parameters(), lr=0.01, foreach=False),
    "rmsprop": lambda model: torch.optim.RMSprop(model.parameters(), lr=0.01, momentum=0.9, centered=True),
}


def once(model: nn.Module, optimizer: torch.optim.Optimizer, **options: Any) -> WidthScheduler:
    """A scheduler whose first step cuts all."""
    settings: dict[str, Any] = {"example": EXAMPLE, "schedule": OneShot(1), "epochs": 2}
    return WidthScheduler(model, optimizer, **settings | options)


def last_half(seen: Seen, generator: torch.Generator) -> Tensor:
    """The last channels go."""
    return torch.arange(len(seen.norms), 0, -1, dtype=torch.float64)


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_the_optimizers_state_is_cut_by_the_same_channels(optimizer: str) -> None:
    model = made()
    made_optimizer = OPTIMIZERS[optimizer](model)
    train(model, made_optimizer, seed=0)
    before = everything(model, made_optimizer)
    parameters = list(model.parameters())
    once(model, made_optimizer, criterion=last_half).step()
    after = everything(model, made_optimizer)
    assert list(map(id, model.parameters())) == list(map(id, parameters))
    kept = {"conv1": (3, 3), "bn1": (3,), "conv2": (4, 3), "bn2": (4,), "fc1": (5, 16), "fc2": (4, 5)}
    for name, tensor in before["tensors"].items():
        size = kept[name.split(".")[0]][: tensor.dim()]
        where = tuple(slice(n) for n in size)
        assert torch.equal(after["tensors"][name], tensor[where]), name
        for key, value in before["optimizer"].get(name, {}).items():
            now = after["optimizer"][name][key]
            wanted = value[where] if isinstance(value, Tensor) and value.shape == tensor.shape else value
            assert equal(now, wanted), (name, key)
    assert [model.conv1.out_channels, model.bn1.num_features, model.conv2.in_channels] == [3, 3, 3]
    assert [model.fc1.in_features, model.fc1.out_features, model.fc2.in_features] == [16, 5, 5]
    train(model, made_optimizer, seed=1)


#: If the last half of each group's channels goes: which inputs of each layer that reads them.
GONE = {
    "Plain": {"conv2": [3, 4, 5], "fc1": list(range(16, 32)), "fc2": [5, 6, 7, 8, 9]},
    "Residual": {"inner": [3, 4, 5], "fc": [3, 4, 5], "outer": [4, 5, 6, 7]},
    "Depthwise": {"narrow": [4, 5, 6, 7], "fc": [3, 4, 5]},
    "Concat": {"both": [2, 3, 7, 8, 9], "fc": [3, 4]},
    "Volume": {"conv1": [3, 4, 5], "fc": [4, 5, 6, 7]},
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("name", MODELS)
def test_a_narrow_model_computes_what_the_wide_one_does_without_those_channels(name: str, dtype: torch.dtype) -> None:
    model = made(name).to(dtype)
    optimizer = OPTIMIZERS["momentum"](model)
    train(model, optimizer, seed=0)
    wide = copy.deepcopy(model)
    scheduler = once(model, optimizer, example=EXAMPLE.to(dtype), criterion=last_half)
    assert list(scheduler.refused) == [list(model._modules)[-1]]
    record = scheduler.step()
    assert record.removed == sum(
        before - now for before, now in zip(scheduler._widths.values(), record.widths.values(), strict=True)
    )
    for layer, gone in GONE[name].items():
        wide.get_submodule(layer).weight.data[:, gone] = 0
    x = torch.randn(5, 3, 8, 8, generator=torch.Generator().manual_seed(3)).to(dtype)
    torch.testing.assert_close(model.eval()(x), wide.eval()(x))
    assert sum(p.numel() for p in model.parameters()) < 0.6 * sum(p.numel() for p in wide.parameters())


@pytest.mark.parametrize("name", ["Plain", "Depthwise", "Volume"])
@pytest.mark.parametrize("last", [True, False])
def test_dtype_and_memory_format_stay(name: str, last: bool) -> None:
    formats = {4: torch.channels_last, 5: torch.channels_last_3d}
    model = made(name).to(torch.bfloat16)
    for p in model.parameters():
        p.data = p.data.contiguous(memory_format=formats[p.dim()]) if last and p.dim() in formats else p.data
    optimizer = OPTIMIZERS["momentum"](model)
    train(model, optimizer, seed=0)

    def order() -> list[object]:
        """In which order the dimensions of each tensor lie in memory."""
        tensors = [t for p in model.parameters() for t in (p, optimizer.state[p]["momentum_buffer"])]
        by_stride = [sorted(range(t.dim()), key=lambda i, t=t: (-t.stride(i), t.shape[i] == 1)) for t in tensors]
        return [(t.dtype, order) for t, order in zip(tensors, by_stride, strict=True)]

    before = order()
    once(model, optimizer, example=EXAMPLE.bfloat16()).step()
    assert order() == before


def test_parameter_groups_and_the_learning_rate_schedule_go_on() -> None:
    model = made()
    slow, fast = [*model.conv1.parameters(), *model.bn1.parameters()], [model.fc1.weight]
    optimizer = torch.optim.SGD([{"params": slow, "lr": 0.01}, {"params": fast, "lr": 0.1}], momentum=0.9)
    schedule = torch.optim.lr_scheduler.StepLR(optimizer, 1, gamma=0.5)
    train(model, optimizer, seed=0)
    once(model, optimizer).step()
    schedule.step()
    train(model, optimizer, seed=1)
    assert [group["lr"] for group in optimizer.param_groups] == [0.005, 0.05]
    assert [list(map(id, group["params"])) for group in optimizer.param_groups] == [
        list(map(id, slow)),
        list(map(id, fast)),
    ]
    assert optimizer.state[model.fc1.weight]["momentum_buffer"].shape == model.fc1.weight.shape == (5, 16)


def test_a_graph_that_is_still_alive_does_not_keep_the_old_shapes() -> None:
    model = made()
    optimizer = OPTIMIZERS["amsgrad"](model)
    loss = model(EXAMPLE).square().sum()
    loss.backward()
    once(model, optimizer).step()
    model(EXAMPLE).square().sum().backward()
    assert all(p.grad is not None and p.grad.shape == p.shape for p in model.parameters())
    assert loss.grad_fn is not None


def test_gradients_of_what_is_not_cut_stay() -> None:
    model = made()
    optimizer = OPTIMIZERS["momentum"](model)
    train(model, optimizer, seed=0)
    bias = model.fc2.bias.grad.clone()
    once(model, optimizer).step()
    assert torch.equal(model.fc2.bias.grad, bias)
    assert model.fc2.weight.grad is None


def tied() -> nn.Module:
    model = nn.Sequential(
        nn.Flatten(),
        nn.Linear(192, 8),
        nn.ReLU(),
        nn.Linear(8, 8),
        nn.ReLU(),
        nn.Linear(8, 8),
        nn.Linear(8, 6),
        nn.Linear(6, 4),
    )
    model[5].weight = model[3].weight
    return model


class Twice(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem, self.again, self.last, self.fc = (
            nn.Conv2d(3, 6, 1),
            nn.Conv2d(6, 6, 1),
            nn.Conv2d(6, 5, 1),
            nn.Linear(5, 4),
        )

    def forward(self, x: Tensor) -> Tensor:
        x = self.again(self.again(self.stem(x).relu()).relu()).relu()
        return self.fc(self.last(x).relu().mean((2, 3)))


class Scaled(nn.Module):
    """A parameter outside of a layer."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1, self.scale, self.conv2, self.fc = (
            nn.Conv2d(3, 6, 1),
            nn.Parameter(torch.ones(6)),
            nn.Conv2d(6, 5, 1),
            nn.Linear(5, 4),
        )

    def forward(self, x: Tensor) -> Tensor:
        x = self.conv1(x).permute(0, 2, 3, 1) * self.scale
        return self.fc(self.conv2(x.permute(0, 3, 1, 2)).relu().mean((2, 3)))


class TwoHeads(nn.Module):
    """Returns features that a head also reads."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.fc1, self.fc2 = nn.Conv2d(3, 6, 1), nn.Linear(6, 8), nn.Linear(8, 4)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        features = self.conv(x).relu().mean((2, 3))
        return self.fc2(self.fc1(features).relu()), features


def plain(*between: nn.Module) -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(3, 8, 1),
        *between,
        nn.Conv2d(8, 6, 1),
        nn.ReLU(),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(6, 4),
    )


def frozen() -> nn.Module:
    model = plain(nn.BatchNorm2d(8))
    model[1].weight.requires_grad_(False)
    return model


def masked() -> nn.Module:
    model = plain()
    prune.l1_unstructured(model[0], "weight", 0.5)
    return model


def normed() -> nn.Module:
    model = plain()
    nn.utils.parametrizations.weight_norm(model[0])
    return model


@pytest.mark.parametrize(
    ("make", "layer", "reason"),
    [
        (tied, "3", r"3 shares a parameter: 3\.weight and 5\.weight"),
        (Twice, "stem", "again is called 2 times in a forward"),
        (Scaled, "conv1", "its channels are those of a parameter outside of a layer"),
        (TwoHeads, "conv", "its channels are the model's output"),
        (lambda: plain(nn.GroupNorm(2, 8)), "0", "1 is a GroupNorm"),
        (lambda: plain(nn.PReLU(8)), "0", "1 is a PReLU"),
        (lambda: plain(nn.Conv2d(8, 8, 3, groups=2)), "0", "1 is a grouped convolution that is not depthwise"),
        (lambda: nn.Sequential(nn.ConvTranspose2d(3, 8, 1), plain()[1]), None, "0 is a ConvTranspose2d"),
        (frozen, "0", "1 does not train"),
        (masked, "0", "weight of 0 is parametrized or masked, not a parameter of its own"),
        (normed, "0", "weight of 0 is parametrized or masked, not a parameter of its own"),
    ],
)
def test_a_layer_that_cannot_be_cut_is_named(make: Callable[[], nn.Module], layer: str | None, reason: str) -> None:
    torch.manual_seed(0)
    model = make()
    optimizer = OPTIMIZERS["momentum"](model)
    if layer is None:
        with pytest.raises(
            ValueError, match=r"WidthScheduler: model must have layers that can be narrowed, got none: "
        ):
            once(model, optimizer)
        return
    scheduler = once(model, optimizer)
    assert re.fullmatch(reason, scheduler.refused[layer])
    shape = model.get_submodule(layer).weight.shape
    assert scheduler.step().removed > 0
    assert model.get_submodule(layer).weight.shape[0] == shape[0]
    out = model(EXAMPLE)
    nn.functional.mse_loss(out[0] if isinstance(out, tuple) else out, torch.zeros(2, 4)).backward()


def test_a_layer_without_parameters_does_not_keep_its_group() -> None:
    model = plain(nn.ReLU6(), nn.MaxPool2d(2), nn.Dropout(), nn.PReLU())
    assert set(once(model, OPTIMIZERS["momentum"](model)).refused) == {"9"}


def failing_state() -> tuple[nn.Module, torch.optim.Optimizer, type[Exception], str]:
    model = made()
    return (
        model,
        torch.optim.Adafactor(model.parameters()),
        ValueError,
        r"width\.step: optimizer must hold numbers or tensors of the",
    )


def failing_order() -> tuple[nn.Module, torch.optim.Optimizer, type[Exception], str]:
    torch.manual_seed(0)
    model = Shuffled()
    return (
        model,
        OPTIMIZERS["amsgrad"](model),
        RuntimeError,
        r"width\.step: a cut must leave .* got other outputs; cut were conv1",
    )


def failing_weights() -> tuple[nn.Module, torch.optim.Optimizer, type[Exception], str]:
    model = made()
    optimizer = OPTIMIZERS["momentum"](model)
    train(model, optimizer, seed=0)
    model.conv2.weight.data[2, 0, 0, 0] = torch.nan
    return model, optimizer, ValueError, r"width\.step: scores must be finite, got NaN or infinity in conv2"


@pytest.mark.parametrize("make", [failing_state, failing_order, failing_weights])
def test_a_failed_step_leaves_everything_as_it_was(
    make: Callable[[], tuple[nn.Module, torch.optim.Optimizer, type[Exception], str]],
) -> None:
    model, optimizer, error, message = make()
    if make is not failing_weights:
        train(model, optimizer, seed=0)
    scheduler = once(model, optimizer, untouched=())
    before, state = everything(model, optimizer), scheduler.state_dict()
    with pytest.raises(error, match=message):
        scheduler.step()
    assert equal(everything(model, optimizer), before)
    assert equal(scheduler.state_dict(), state)
    assert scheduler.history == ()


def test_the_guilty_layer_can_be_left_alone() -> None:
    torch.manual_seed(0)
    model = Shuffled()
    scheduler = once(model, OPTIMIZERS["momentum"](model), untouched=["conv1"])
    assert scheduler.refused["conv1"] == "conv1 is untouched"
    assert scheduler.step().widths == {"conv2": 3}


def test_making_a_scheduler_changes_nothing() -> None:
    model = made()
    optimizer = OPTIMIZERS["momentum"](model)
    train(model, optimizer, seed=0)
    before = everything(model, optimizer)
    once(model, optimizer)
    assert equal(everything(model, optimizer), before)


def test_a_linear_network_is_cut_too() -> None:
    torch.manual_seed(0)
    model = mlp()
    record = once(model, OPTIMIZERS["momentum"](model), keep=0.25).step()
    assert record.widths == {"1": 4, "3": 3}
    assert record.parameters == 193 * 4 + 5 * 3 + 4 * 4
