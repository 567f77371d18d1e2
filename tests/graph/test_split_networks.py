from __future__ import annotations

from types import ModuleType
from typing import Any

import pytest
import torch

from learndrop_ext.app.models import build_model
from learndrop_ext.graph.chain import split_layers

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
    ("resnet34", "imagenet"): 18,
    ("resnet50", "small"): 18,
    ("resnet50", "imagenet"): 18,
    ("resnet101", "small"): 35,
    ("resnet101", "imagenet"): 35,
    ("resnet152", "small"): 52,
    ("resnet152", "imagenet"): 52,
}


@pytest.mark.parametrize(("name", "stem"), LENGTHS, ids=map("-".join, LENGTHS))
def test_split_layers_of_the_packages_own_networks(name: str, stem: str) -> None:
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
    model.eval()
    assert torch.equal(chain.eval()(x), model(x))


SHAPES = [
    (
        "vgg11",
        "small",
        16,
        [(4, 8, 8), (8, 4, 4), (16, 4, 4), (16, 2, 2), (32, 2, 2), (32, 1, 1), (32, 1, 1), (32,), (5,)],
    ),
    (
        "resnet18",
        "imagenet",
        32,
        [(4, 8, 8), (4, 8, 8), (4, 8, 8), (8, 4, 4), (8, 4, 4), (16, 2, 2), (16, 2, 2), (32, 1, 1), (32,), (5,)],
    ),
]


@pytest.mark.parametrize(("name", "stem", "size", "shapes"), SHAPES)
def test_split_layers_gives_the_shape_of_each_row(
    name: str, stem: str, size: int, shapes: list[tuple[int, ...]]
) -> None:
    model = build_model(name, num_classes=5, stem=stem, width=4, seed=0)
    x = torch.randn(3, 3, size, size)
    chain = split_layers(model, x)
    assert [chain.layer(i).shape for i in range(len(chain))] == shapes
    for i, shape in enumerate(shapes):
        assert chain.prefix(i + 1)(x).shape == (3, *shape)


# constructor, arguments, image size, layers, first three names, last name
TORCHVISION: list[tuple[str, dict[str, Any], int, int, tuple[str, str, str], str]] = [
    ("alexnet", {}, 64, 8, ("features.0", "features.3", "features.6"), "classifier.6"),
    # Main head and auxiliary heads are one layer: between them several tensors are live.
    ("googlenet", {"init_weights": False}, 64, 7, ("conv1.conv", "conv2.conv", "conv3.conv"), "aux1.conv.conv"),
    (
        "DenseNet",
        {"growth_rate": 4, "block_config": (2, 2), "num_init_features": 8},
        32,
        5,
        ("features.conv0", "features.denseblock1", "features.transition1.conv"),
        "classifier",
    ),
    (
        "VisionTransformer",
        {"image_size": 16, "patch_size": 8, "num_layers": 2, "num_heads": 2, "hidden_dim": 8, "mlp_dim": 16},
        16,
        8,
        ("conv_proj", "layer", "encoder"),
        "heads.head",
    ),
    (
        "SwinTransformer",
        {"patch_size": [4, 4], "embed_dim": 8, "depths": [1, 1], "num_heads": [2, 2], "window_size": [4, 4]},
        32,
        7,
        ("features.0.0", "features.1.0.attn", "features.1.0.mlp"),
        "head",
    ),
    (
        "mobilenet_v3_small",
        {},
        32,
        28,
        ("features.0.0", "features.1.block.0.0", "features.1.block.1"),
        "classifier.3",
    ),
    (
        "efficientnet_b0",
        {},
        32,
        39,
        ("features.0.0", "features.1.0.block.0.0", "features.1.0.block.1"),
        "classifier.1",
    ),
    (
        "regnet_y_400mf",
        {},
        32,
        18,
        ("stem.0", "trunk_output.block1.block1-0", "trunk_output.block2.block2-0"),
        "fc",
    ),
    ("squeezenet1_1", {}, 64, 18, ("features.0", "features.3.squeeze", "features.3"), "classifier.1"),
    ("shufflenet_v2_x0_5", {}, 32, 19, ("conv1.0", "stage2.0", "stage2.1.branch2"), "fc"),
]


@pytest.mark.parametrize(
    ("name", "arguments", "size", "length", "first", "last"), TORCHVISION, ids=[case[0] for case in TORCHVISION]
)
def test_split_layers_of_torchvision_networks(
    torchvision_stub: ModuleType,
    name: str,
    arguments: dict[str, Any],
    size: int,
    length: int,
    first: tuple[str, ...],
    last: str,
) -> None:
    weights = {"weights": None} if name.islower() else {}
    model = getattr(torchvision_stub.models, name)(num_classes=5, **weights, **arguments)
    chain = split_layers(model, torch.randn(2, 3, size, size))
    assert (len(chain), chain.names[:3], chain.names[-1]) == (length, first, last)
    assert {id(p) for p in chain.parameters()} == {id(p) for p in model.parameters()}


def test_chain_of_a_network_with_auxiliary_heads_gives_them_in_train_mode_only(torchvision_stub: ModuleType) -> None:
    model = torchvision_stub.models.googlenet(weights=None, num_classes=5, init_weights=False)
    x = torch.randn(2, 3, 64, 64)
    chain = split_layers(model, x)
    heads = chain.train()(x)
    assert type(heads).__name__ == "GoogLeNetOutputs"
    assert [head.shape for head in heads] == [(2, 5), (2, 5), (2, 5)]
    assert chain.eval()(x).shape == (2, 5)


# name, layers, some of their names
TIMM: list[tuple[str, int, tuple[str, ...]]] = [
    ("tf_efficientnet_lite0", 32, ("conv_stem", "blocks.1.0.conv_dw", "blocks.2.1", "blocks.5.3", "classifier")),
    ("resnet18", 10, ("conv1", "layer1.0", "layer4.1", "fc")),
    ("tf_mobilenetv3_small_075", 28, ("conv_stem", "blocks.0.0.se", "blocks.2.1", "blocks.4.2", "conv_head")),
    ("convnext_atto", 17, ("stem.0", "stages.0.blocks.0", "stages.2.blocks.5", "head.fc")),
    ("regnetx_002", 15, ("stem.conv", "s1.b1", "s4.b7", "head.fc")),
]


@pytest.mark.parametrize(("name", "length", "names"), TIMM, ids=[case[0] for case in TIMM])
def test_split_layers_of_timm_networks(timm: ModuleType, name: str, length: int, names: tuple[str, ...]) -> None:
    torch.manual_seed(0)
    model = timm.create_model(name, num_classes=5)
    chain = split_layers(model, torch.randn(2, 3, 64, 64))
    assert len(chain) == length
    assert set(names) <= set(chain.names)
    assert {id(p) for p in chain.parameters()} == {id(p) for p in model.parameters()}
    x = torch.randn(3, 3, 48, 48)  # padding follows the input, so other sizes work too
    model.eval()
    assert torch.equal(chain.eval()(x), model(x))
    assert chain.stale() is None


def test_chain_of_a_timm_network_is_stale_when_its_depth_schedule_moves(timm: ModuleType) -> None:
    model = timm.create_model("resnet18", num_classes=5, drop_rate=0.1)
    chain = split_layers(model, torch.randn(2, 3, 32, 32))
    model.drop_rate = 0.2
    assert chain.stale() == f"drop_rate of {type(model).__name__} was 0.1 when the model was split, and is 0.2"
