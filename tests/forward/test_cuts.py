"""The layers of networks: names, shapes, and that the model goes on from each of its cuts."""

from __future__ import annotations

import warnings
from types import ModuleType
from typing import Any

import pytest
import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor, nn

from learndrop_ext import split_layers
from learndrop_ext.app.models import build_model

VGG_FEATURES = {
    "vgg11": (0, 4, 8, 11, 15, 18, 22, 25),
    "vgg13": (0, 3, 7, 10, 14, 17, 21, 24, 28, 31),
    "vgg16": (0, 3, 7, 10, 14, 17, 20, 24, 27, 30, 34, 37, 40),
    "vgg19": (0, 3, 7, 10, 14, 17, 20, 23, 27, 30, 33, 36, 40, 43, 46, 49),
}
RESNET_BLOCKS = {
    "resnet18": (2, 2, 2, 2),
    "resnet34": (3, 4, 6, 3),
    "resnet50": (3, 4, 6, 3),
    "resnet101": (3, 4, 23, 3),
    "resnet152": (3, 8, 36, 3),
}
LENGTHS = {
    ("vgg11", "small"): 9,
    ("vgg11", "imagenet"): 11,
    ("vgg13", "small"): 11,
    ("vgg13", "imagenet"): 13,
    ("vgg16", "small"): 14,
    ("vgg16", "imagenet"): 16,
    ("vgg19", "small"): 17,
    ("vgg19", "imagenet"): 19,
    ("resnet18", "small"): 10,
    ("resnet18", "imagenet"): 10,
    ("resnet34", "small"): 18,
    ("resnet50", "small"): 18,
    ("resnet152", "small"): 52,
}


@pytest.mark.parametrize(("name", "stem"), LENGTHS, ids=map("-".join, LENGTHS))
def test_the_packages_own_networks(name: str, stem: str) -> None:
    model = build_model(name, num_classes=5, stem=stem, width=4, seed=0)
    x = torch.randn(2, 3, 16 if stem == "small" else 32, 16 if stem == "small" else 32)
    chain = split_layers(model, x)
    if name in VGG_FEATURES:
        names = [f"features.{i}" for i in VGG_FEATURES[name]]
        names += ["classifier"] if stem == "small" else ["classifier.0", "classifier.3", "classifier.6"]
    else:
        blocks = enumerate(RESNET_BLOCKS[name], start=1)
        names = ["conv1", *(f"layer{stage}.{i}" for stage, depth in blocks for i in range(depth)), "fc"]
    assert chain.names == tuple(names)
    assert len(chain) == LENGTHS[name, stem]
    assert_goes_on(model, x)


def assert_goes_on(model: nn.Module, x: Tensor, every: int = 3) -> None:
    """From the rows of its cuts the model computes, to the bit, what it does on images; it is left as it was."""
    modes = [module.training for module in model.modules()]
    before = {name: value.clone() for name, value in model.state_dict().items()}
    chain = split_layers(model, x)
    assert [module.training for module in model.modules()] == modes
    model.eval()
    with torch.no_grad():
        wanted = model(x.clone())
        for k in range(1, len(chain), every):
            row = chain.prefix(k)(x.clone())
            assert row.shape[1:] == chain[k - 1].shape
            assert torch.equal(chain.suffix(k)(row.clone()), wanted), k
    assert {p for layer in chain for p in layer.tensors} == {name for name, _ in model.named_parameters()}
    assert all("forward" not in vars(module) for module in model.modules())
    for name, value in model.state_dict().items():
        assert torch.equal(value, before[name]), name


SHAPES = [
    (
        "vgg11",
        "small",
        16,
        [(4, 8, 8), (8, 4, 4), (16, 4, 4), (16, 2, 2), (32, 2, 2), (32, 1, 1), (32, 1, 1), (32, 1, 1), None],
    ),
    (
        "resnet18",
        "imagenet",
        32,
        [(4, 8, 8), (4, 8, 8), (4, 8, 8), (8, 4, 4), (8, 4, 4), (16, 2, 2), (16, 2, 2), (32, 1, 1), (32, 1, 1), None],
    ),
]


@pytest.mark.parametrize(("name", "stem", "size", "shapes"), SHAPES)
def test_shapes_of_rows(name: str, stem: str, size: int, shapes: list[tuple[int, ...] | None]) -> None:
    model = build_model(name, num_classes=5, stem=stem, width=4, seed=0)
    assert [layer.shape for layer in split_layers(model, torch.randn(3, 3, size, size))] == shapes


# constructor, arguments, image size, layers
TORCHVISION: list[tuple[str, dict[str, Any], int, int]] = [
    ("alexnet", {}, 64, 8),
    ("googlenet", {"init_weights": False}, 64, 7),
    ("DenseNet", {"growth_rate": 4, "block_config": (2, 2), "num_init_features": 8}, 32, 5),
    ("mobilenet_v3_small", {}, 32, 28),
    ("efficientnet_b0", {}, 32, 39),
    ("regnet_y_400mf", {}, 32, 18),
    ("squeezenet1_1", {}, 64, 18),
    ("shufflenet_v2_x0_5", {}, 32, 19),
    # Between the two halves of a transformer's block there is no module.
    (
        "VisionTransformer",
        {"image_size": 16, "patch_size": 8, "num_layers": 2, "num_heads": 2, "hidden_dim": 8, "mlp_dim": 16},
        16,
        5,
    ),
    (
        "SwinTransformer",
        {"patch_size": [4, 4], "embed_dim": 8, "depths": [1, 1], "num_heads": [2, 2], "window_size": [4, 4]},
        32,
        5,
    ),
]


@pytest.mark.parametrize(("name", "arguments", "size", "length"), TORCHVISION, ids=[case[0] for case in TORCHVISION])
def test_networks_of_torchvision(
    torchvision_stub: ModuleType, name: str, arguments: dict[str, Any], size: int, length: int
) -> None:
    torch.manual_seed(0)
    weights = {"weights": None} if name.islower() else {}
    model = getattr(torchvision_stub.models, name)(num_classes=5, **weights, **arguments)
    x = torch.randn(2, 3, size, size)
    assert len(split_layers(model, x)) == length
    assert_goes_on(model, x, every=5)


TIMM: list[tuple[str, int]] = [
    ("tf_efficientnet_lite0", 32),
    ("resnet18", 10),
    ("resnet26d", 12),
    ("tf_mobilenetv3_small_075", 28),
    ("convnext_atto", 17),
    ("regnetx_002", 15),
    ("tf_mixnet_s", 33),
]


@pytest.mark.parametrize(("name", "length"), TIMM, ids=[case[0] for case in TIMM])
def test_networks_of_timm(timm: ModuleType, name: str, length: int) -> None:
    torch.manual_seed(0)
    model = timm.create_model(name, num_classes=5)
    x = torch.randn(2, 3, 64, 64)
    assert len(split_layers(model, x)) == length
    assert_goes_on(model, x, every=6)


@pytest.mark.parametrize(("kind", "least"), [("ResNet", 10), ("ConvNext", 13), ("ViT", 4)])
def test_networks_of_transformers(transformers: ModuleType, kind: str, least: int) -> None:
    small: dict[str, dict[str, Any]] = {
        "ResNet": {"embedding_size": 8, "hidden_sizes": [8, 16, 24, 32], "depths": [2, 2, 2, 2]},
        "ConvNext": {"hidden_sizes": [8, 16, 24, 32], "depths": [2, 2, 2, 2]},
        "ViT": {
            **{"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 16},
            **{"image_size": 32, "patch_size": 8},
        },
    }
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        config = getattr(transformers, f"{kind}Config")(num_labels=4, **small[kind])
        model = getattr(transformers, f"{kind}ForImageClassification")(config).eval()
    x = torch.randn(2, 3, 32, 32)
    chain = split_layers(model, x, call=lambda: model(pixel_values=x))
    assert len(chain) >= least
    with torch.no_grad():
        wanted = model(pixel_values=x).logits
        for k in range(1, len(chain)):
            assert torch.equal(chain.suffix(k)(chain.prefix(k)(pixel_values=x)).logits, wanted)


class Made(nn.Module):
    """A module made of named parts and a function of the module and its input."""

    def __init__(self, forward: Any, **parts: nn.Module) -> None:
        super().__init__()
        for name, part in parts.items():
            self.add_module(name, part)
        self.function = forward

    def forward(self, x: Tensor) -> Any:
        return self.function(self, x)


def conv(inputs: int = 3, outputs: int = 3) -> nn.Conv2d:
    return nn.Conv2d(inputs, outputs, 3, padding=1)


def four(**more: nn.Module) -> dict[str, nn.Module]:
    return {"a": conv(), "b": conv(), "c": conv(), "d": conv(), **more}


def tied() -> dict[str, nn.Module]:
    parts = four()
    parts["c"].weight = parts["a"].weight
    return parts


def extra_weights_in_training(net: Any, x: Tensor) -> Tensor:
    x = net.a(x)
    if net.training:
        x = x + net.b(x)
    return net.d(net.c(x))


#: what the forward does, its parts, and the names of its layers
MADE: dict[str, tuple[Any, Any, tuple[str, ...]]] = {
    "a chain": (lambda net, x: net.d(net.c(net.b(net.a(x)))), four, ("a", "b", "c", "d")),
    "a long skip": (lambda net, x: net.d(net.c(net.b(a := net.a(x))) + a), four, ("a", "b", "d")),
    "a module called twice": (lambda net, x: net.d(net.b(net.c(net.b(net.a(x))))), four, ("a", "b", "d")),
    "tied weights": (lambda net, x: net.d(net.c(net.b(net.a(x)))), tied, ("a", "d")),
    "dropout between": (
        lambda net, x: net.d(net.c(net.drop(net.b(net.a(x))))),
        lambda: four(drop=nn.Dropout()),
        ("a", "b", "c", "d"),
    ),
    "functional dropout": (
        lambda net, x: net.d(net.c(F.dropout(net.b(net.a(x)), 0.5, net.training))),
        four,
        ("a", "b", "c", "d"),
    ),
    "an activation in place": (lambda net, x: net.d(net.c(F.relu_(net.b(net.a(x))))), four, ("a", "b", "c", "d")),
    "weights used in training alone": (extra_weights_in_training, four, ("a", "c", "d")),
}


@pytest.mark.parametrize(("forward", "parts", "names"), MADE.values(), ids=MADE)
def test_forwards_of_all_kinds(forward: Any, parts: Any, names: tuple[str, ...]) -> None:
    torch.manual_seed(0)
    model = Made(forward, **parts())
    chain = split_layers(model, torch.rand(3, 3, 8, 8))
    assert chain.names == names
    assert_goes_on(model, torch.rand(3, 3, 8, 8), every=1)


def test_dropout_stays_fresh_behind_a_cut() -> None:
    model = nn.Sequential(conv(), nn.ReLU(inplace=True), nn.Dropout(), nn.MaxPool2d(2), conv(), nn.Dropout2d())
    x = torch.rand(2, 3, 8, 8)
    chain = split_layers(model, x)
    assert chain.names == ("0", "4")
    assert chain[0].shape == (3, 8, 8)
    model.train()
    assert torch.equal(chain.prefix(1)(x), chain.prefix(1)(x))
    row = chain.prefix(1)(x).detach()
    assert not torch.equal(chain.suffix(1)(row), chain.suffix(1)(row))


@pytest.mark.parametrize(
    ("model", "example", "error", "message"),
    [
        ("net", torch.rand(2, 3), TypeError, "model must be a torch.nn.Module, got str"),
        (nn.Linear(3, 3), [1.0], TypeError, r"example must be a tensor \[B, ...\], got list"),
        (nn.Linear(3, 3), torch.rand(3), ValueError, r"example must be \[B, ...\] with B >= 1, got \[3\]"),
        (nn.LazyLinear(3), torch.rand(2, 3), ValueError, "model must have its parameters, got lazy ones"),
        (nn.Linear(3, 3), torch.rand(2, 3), ValueError, "model must have a cut, .* Linear has none"),
        (nn.DataParallel(nn.Linear(3, 3)), torch.rand(2, 3), TypeError, "must be the plain module, got a DataParallel"),
    ],
)
def test_split_layers_refuses(model: Any, example: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        split_layers(model, example)
