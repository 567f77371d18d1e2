from __future__ import annotations

import os
import re
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from learndrop_ext.app.models import build_model
from learndrop_ext.app.weights import fit_weights, read_weights

CLASSIFIER = ("fc.weight", "fc.bias")


def state(classes: int = 4, *, seed: int = 0, width: int = 8) -> dict[str, Tensor]:
    return build_model("resnet10", num_classes=classes, width=width, seed=seed).state_dict()


@pytest.mark.parametrize("nested", [None, "state_dict", "model"])
def test_read_weights_of_torch_save(tmp_path: Path, nested: str | None) -> None:
    wanted = state()
    torch.save({nested: wanted, "epoch": 3} if nested else wanted, tmp_path / "w.pt")
    got = read_weights(tmp_path / "w.pt")
    assert list(got) == list(wanted)
    assert all(torch.equal(got[key], value) for key, value in wanted.items())


def test_read_weights_of_safetensors(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "w.safetensors"
    save_file({f"module.{key}": value for key, value in state().items()}, path)
    got = read_weights(path)
    assert torch.equal(got["fc.weight"], state()["fc.weight"])
    path.write_bytes(path.read_bytes()[:-8])
    with pytest.raises(ValueError, match=f"^{re.escape(f'weights: {path} must be a whole safetensors file, got: ')}"):
        read_weights(path)
    monkeypatch.setitem(sys.modules, "safetensors.torch", None)
    with pytest.raises(ImportError, match=re.escape('pip install "learndrop_ext[pretrained]"')):
        read_weights(path)


class Code:
    """A pickle that makes a file when it is read as any pickle is."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (str(self.path),)


def test_read_weights_runs_no_code(tmp_path: Path) -> None:
    path, made = tmp_path / "w.pt", tmp_path / "made"
    torch.save({"fc.weight": torch.zeros(1), "more": Code(made)}, path)
    message = f"weights: {path} must hold tensors only, got a pickle that asks for posix.mkdir; it was not run"
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        read_weights(path)
    assert not made.exists()


@pytest.mark.parametrize(
    ("content", "problem"),
    [
        ([1, 2], "must hold a state_dict, got list"),
        ({}, "must hold a state_dict, got dict"),
        ({"a": torch.zeros(1), "epoch": 3}, "must hold tensors only, got int at 'epoch'"),
    ],
)
def test_read_weights_refuses_what_is_no_state_dict(tmp_path: Path, content: object, problem: str) -> None:
    path = tmp_path / "w.pt"
    torch.save(content, path)
    with pytest.raises(ValueError, match=f"^{re.escape(f'weights: {path} {problem}')}$"):
        read_weights(path)


def test_read_weights_refuses_what_cannot_be_read(tmp_path: Path) -> None:
    path = tmp_path / "w.pt"
    with pytest.raises(ValueError, match=re.escape(f"weights must be a file, got {path}, which is not there")):
        read_weights(path)
    with pytest.raises(ValueError, match=re.escape(f"weights must be a file, got {tmp_path}, which is a folder")):
        read_weights(tmp_path)
    torch.save(state(), path)
    whole = path.read_bytes()
    for content in (b"", b"hello", whole[: len(whole) // 2]):
        path.write_bytes(content)
        with pytest.raises(ValueError, match=re.escape(f"weights: {path} must be a file written by torch.save, got: ")):
            read_weights(path)


def test_fit_weights_by_name() -> None:
    tensors, note = fit_weights(state(seed=1), state(), classifier=CLASSIFIER, path="f")
    assert set(tensors) == set(state())
    assert torch.equal(tensors["fc.weight"], state(seed=1)["fc.weight"])
    assert note == "weights: 62 of 62 tensors from f"


def test_fit_weights_leaves_out_another_classifier() -> None:
    for weights in (state(7), {key: value for key, value in state().items() if key not in CLASSIFIER}):
        tensors, note = fit_weights(weights, state(), classifier=CLASSIFIER, path="f")
        assert not set(CLASSIFIER) & set(tensors)
        assert set(tensors) == {key for key in state() if key not in CLASSIFIER}
        assert note == ("weights: 60 of 62 tensors from f; fc.weight, fc.bias left out: the classifier is new")


def test_fit_weights_by_order() -> None:
    renamed = {f"_{i}": value for i, value in enumerate(state(7, seed=1).values()) if value.ndim}
    tensors, note = fit_weights(renamed, state(), classifier=CLASSIFIER, path="f")
    assert torch.equal(tensors["layer4.0.conv2.weight"], state(7, seed=1)["layer4.0.conv2.weight"])
    assert len(tensors) == 60
    assert "60 of 62 tensors from f; matched by order and shape, since the names differ; fc.weight" in note


def test_fit_weights_does_without_counters() -> None:
    weights = {key: value for key, value in state(seed=1).items() if not key.endswith("num_batches_tracked")}
    assert len(fit_weights(weights, state(), classifier=CLASSIFIER, path="f")[0]) == 62


def swapped(weights: dict[str, Tensor]) -> dict[str, Tensor]:
    """The same tensors under other names, two of unlike shapes in each other's place."""
    values = list(weights.values())
    values[0], values[1] = values[1], values[0]
    return {f"_{i}": value for i, value in enumerate(values)}


@pytest.mark.parametrize(
    ("weights", "problem"),
    [
        (swapped(state()), "of this network, got no 'conv1.weight' [8, 3, 3, 3]"),
        (state(width=16), "of this network, with 'conv1.weight' [8, 3, 3, 3], got [16, 3, 3, 3]"),
        (
            {key: value for key, value in state().items() if key != "layer2.0.bn1.bias"},
            "of this network, got no 'layer2.0.bn1.bias' [16]",
        ),
        (state() | {"head.bias": torch.zeros(3)}, "of this network, which has no 'head.bias' [3]"),
    ],
)
def test_fit_weights_names_the_first_key_that_differs(weights: dict[str, Tensor], problem: str) -> None:
    with pytest.raises(ValueError, match=f"^{re.escape(f'weights: f must be {problem}')}$"):
        fit_weights(weights, state(), classifier=CLASSIFIER, path="f")
