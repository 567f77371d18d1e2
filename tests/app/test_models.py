from __future__ import annotations

import importlib.util
from types import ModuleType

import pytest
import torch
from torch import fx, nn

from learndrop_ext.app import models
from learndrop_ext.app.models import BASIC, MODELS, VGG, Block, ResNet, build_model

# name, torchvision's name, parameters (imagenet form, 1000 classes), convolutions and linears (small form)
NETWORKS = [
    ("vgg11", "vgg11_bn", 132_868_840, 8 + 1),
    ("vgg13", "vgg13_bn", 133_053_736, 10 + 1),
    ("vgg16", "vgg16_bn", 138_365_992, 13 + 1),
    ("vgg19", "vgg19_bn", 143_678_248, 16 + 1),
    ("resnet18", "resnet18", 11_689_512, 17 + 3 + 1),
    ("resnet34", "resnet34", 21_797_672, 33 + 3 + 1),
    ("resnet50", "resnet50", 25_557_032, 49 + 4 + 1),
    ("resnet101", "resnet101", 44_549_160, 100 + 4 + 1),
    ("resnet152", "resnet152", 60_192_808, 151 + 4 + 1),
]
NAMES = [case[0] for case in NETWORKS]


@pytest.fixture(scope="module")
def torchvision_models(torchvision_stub: ModuleType) -> ModuleType:
    return importlib.import_module(f"{torchvision_stub.__name__}.models")


def test_models_lists_every_network() -> None:
    assert set(MODELS) == {*NAMES, "resnet10"}


@pytest.mark.parametrize(("name", "peer", "count", "_"), NETWORKS, ids=NAMES)
def test_build_model_imagenet_has_torchvision_keys_and_shapes(
    torchvision_models: ModuleType, name: str, peer: str, count: int, _: int
) -> None:
    with torch.device("meta"):
        ours = build_model(name, num_classes=1000, stem="imagenet")
        theirs = getattr(torchvision_models, peer)(weights=None)
    shapes = {key: tuple(value.shape) for key, value in ours.state_dict().items()}
    assert list(shapes.items()) == [(key, tuple(value.shape)) for key, value in theirs.state_dict().items()]
    assert sum(p.numel() for p in ours.parameters()) == count


@pytest.mark.parametrize("name", ["vgg11", "resnet18", "resnet50"])
def test_build_model_imagenet_equals_torchvision_on_equal_weights(torchvision_models: ModuleType, name: str) -> None:
    generator = torch.Generator().manual_seed(0)
    ours = build_model(name, num_classes=7, stem="imagenet", seed=1).eval()
    for key, buffer in ours.named_buffers():
        if key.endswith(("running_mean", "running_var")):
            buffer.copy_(torch.rand(buffer.shape, generator=generator) + 0.5)
    with torch.device("meta"):
        theirs = getattr(torchvision_models, dict(case[:2] for case in NETWORKS)[name])(num_classes=7)
    theirs.load_state_dict(ours.state_dict(), assign=True)
    theirs.eval()
    x = torch.randn(2, 3, 64, 64, generator=generator)
    with torch.inference_mode():
        got = ours(x)
        assert got.shape == (2, 7)
        assert torch.equal(got, theirs(x))


@pytest.mark.parametrize(("name", "_", "__", "layers"), NETWORKS, ids=NAMES)
def test_build_model_small_layer_count(name: str, _: str, __: int, layers: int) -> None:
    with torch.device("meta"):
        model = build_model(name, num_classes=10)
    assert sum(isinstance(m, nn.Conv2d | nn.Linear) for m in model.modules()) == layers


@pytest.mark.parametrize(
    ("name", "pixels", "shapes"),
    [
        ("resnet18", 32, [(64, 32), (64, 32), (128, 16), (256, 8), (512, 4)]),
        ("resnet50", 28, [(64, 28), (256, 28), (512, 14), (1024, 7), (2048, 4)]),
        ("resnet10", 8, [(64, 8), (64, 8), (128, 4), (256, 2), (512, 1)]),
    ],
)
def test_resnet_small_stage_shapes(name: str, pixels: int, shapes: list[tuple[int, int]]) -> None:
    seen: list[tuple[int, int]] = []
    with torch.device("meta"):
        model = build_model(name, num_classes=10, in_channels=1)
        for stage in ("relu", "layer1", "layer2", "layer3", "layer4"):
            model.get_submodule(stage).register_forward_hook(
                lambda _module, _args, out: seen.append((out.shape[1], out.shape[2]))
            )
        assert model(torch.empty(2, 1, pixels, pixels)).shape == (2, 10)
    assert seen == shapes


@pytest.mark.parametrize(("pixels", "last"), [(8, 1), (28, 1), (32, 1), (64, 2)])
def test_vgg_small_takes_any_size(pixels: int, last: int) -> None:
    with torch.device("meta"):
        model = build_model("vgg13", num_classes=10, in_channels=1)
        assert isinstance(model, VGG)
        x = torch.empty(2, 1, pixels, pixels)
        assert model.features(x).shape == (2, 512, last, last)
        assert model(x).shape == (2, 10)


@pytest.mark.parametrize("stem", models.STEMS)
@pytest.mark.parametrize("name", ["vgg19", "resnet10", "resnet50"])
def test_build_model_is_traceable(name: str, stem: str) -> None:
    with torch.device("meta"):
        model = build_model(name, num_classes=10, stem=stem, width=8)
        traced = fx.symbolic_trace(model)
        assert traced(torch.empty(2, 3, 64, 64)).shape == (2, 10)


def test_build_model_traced_equals_eager() -> None:
    model = build_model("resnet10", num_classes=10, in_channels=1, width=8, seed=0).eval()
    x = torch.rand(3, 1, 8, 8, generator=torch.Generator().manual_seed(0))
    assert torch.equal(fx.symbolic_trace(model)(x), model(x))


def test_build_model_width_scales_the_channels() -> None:
    model = build_model("resnet10", num_classes=10, in_channels=1, width=16)
    assert isinstance(model, ResNet)
    assert model.conv1.weight.shape == (16, 1, 3, 3)
    assert model.fc.weight.shape == (10, 128)
    vgg = build_model("vgg11", num_classes=4, width=8, stem="imagenet")
    assert {k: tuple(v.shape) for k, v in vgg.named_parameters() if k.startswith("classifier.0")} == {
        "classifier.0.weight": (512, 64 * 49),
        "classifier.0.bias": (512,),
    }


def test_build_model_initial_weights() -> None:
    model = build_model("resnet18", num_classes=10, seed=3)
    assert isinstance(model, ResNet)
    # sqrt(2 / (3 * 3 * 512)) = 0.02083; 2,359,296 samples put the estimate within 0.2 % at four sigma
    assert model.layer4[1].conv2.weight.std().item() == pytest.approx(0.020833, rel=2e-3)
    assert torch.equal(model.bn1.weight, torch.ones(64))
    vgg = build_model("vgg11", num_classes=10, seed=3)
    assert torch.equal(vgg.features[0].bias, torch.zeros(64))
    assert torch.equal(vgg.classifier.bias, torch.zeros(10))
    assert vgg.classifier.weight.std().item() == pytest.approx(0.01, rel=0.05)


def test_build_model_seed_repeats_and_leaves_the_global_state() -> None:
    before = torch.get_rng_state()
    first = build_model("resnet10", num_classes=10, width=8, seed=5)
    assert torch.equal(torch.get_rng_state(), before)
    second = build_model("resnet10", num_classes=10, width=8, seed=5)
    other = build_model("resnet10", num_classes=10, width=8, seed=6)
    assert all(torch.equal(a, b) for a, b in zip(first.parameters(), second.parameters(), strict=True))
    assert not torch.equal(first.conv1.weight, other.conv1.weight)


def test_build_model_accepts_torchvision_spelling_of_vgg() -> None:
    with torch.device("meta"):
        assert list(build_model("vgg11_bn", num_classes=2).state_dict()) == list(
            build_model("vgg11", num_classes=2).state_dict()
        )


def test_block_keeps_its_input() -> None:
    block = Block(8, 8, *BASIC, stride=1).eval()
    x = torch.randn(2, 8, 4, 4, generator=torch.Generator().manual_seed(0))
    kept = x.clone()
    block(x)
    assert torch.equal(x, kept)


@pytest.mark.parametrize(
    ("name", "arguments", "message"),
    [
        (
            "resnet20",
            {},
            r"build_model: name must be one of vgg11, .*resnet152, got 'resnet20'",
        ),
        ("resnet18_bn", {}, r"build_model: name must be one of .*, got 'resnet18_bn'"),
        ("resnet18", {"stem": "cifar"}, r"ResNet: stem must be 'small' or 'imagenet', got 'cifar'"),
        ("vgg11", {"stem": "cifar"}, r"VGG: stem must be 'small' or 'imagenet', got 'cifar'"),
        ("vgg11", {"in_channels": 0}, r"VGG: in_channels must be a positive integer, got 0"),
        ("resnet18", {"width": 0.5}, r"ResNet: width must be a positive integer, got 0\.5"),
        ("resnet18", {"num_classes": True}, r"ResNet: num_classes must be a positive integer, got True"),
    ],
)
def test_build_model_refuses(name: str, arguments: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        build_model(name, **{"num_classes": 10, **arguments})
