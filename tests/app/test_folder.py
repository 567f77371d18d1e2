from __future__ import annotations

import re
import sys
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from learndrop_ext.app.datasets import IMAGENET_MEAN, IMAGENET_STD, load_folder
from learndrop_ext.app.image_files import IntegrityError


def write_photos(folder: Path, counts: Mapping[str, int]) -> None:
    """Grey photos, 50 a class and 10 a file."""
    for c, (name, n) in enumerate(counts.items()):
        (folder / name).mkdir(parents=True)
        for i in range(n):
            Image.fromarray(np.full((16, 20, 3), 50 * c + 10 * i, np.uint8)).save(folder / name / f"{i}.png")


@pytest.mark.parametrize("part", ["test", "val", "validation"])
def test_load_folder_of_two_parts(tmp_path: Path, part: str) -> None:
    write_photos(tmp_path / "train", {"a": 3, "b": 1})
    write_photos(tmp_path / part, {"a": 1, "b": 2})
    split = load_folder(tmp_path, size=16)
    assert split.classes == ("a", "b")
    assert (split.channels, split.size, split.validation) == (3, 16, None)
    assert (split.train.mean, split.train.std) == (IMAGENET_MEAN, IMAGENET_STD)
    assert split.train.labels.tolist() == [0, 1, 0, 0]
    assert split.test.labels.tolist() == [0, 1, 1]
    assert (split.train.bytes_decoded, split.test.bytes_decoded) == (4 * 3 * 16 * 16, 3 * 3 * 16 * 16)
    decoded = split.map(lambda images: images.decoded())
    assert decoded.train.images[:, 0, 8, 8].tolist() == [0, 50, 10, 20]
    assert decoded.test.images[:, 0, 8, 8].tolist() == [0, 50, 60]
    assert load_folder(tmp_path, limit=2).train.labels.tolist() == [0, 1]
    assert load_folder(tmp_path).size == 128


@pytest.mark.parametrize("validation", ["val", "validation"])
def test_load_folder_of_three_parts(tmp_path: Path, validation: str) -> None:
    for n, part in ((4, "train"), (2, "test"), (1, validation)):
        write_photos(tmp_path / part, {"a": n, "b": n})
    split = load_folder(tmp_path, size=16, limit=3)
    assert split.validation is not None
    assert (len(split.train), len(split.test), len(split.validation)) == (3, 3, 2)
    smaller = split.map(lambda images: images.decoded().resized(8).normalized((0.5,) * 3, (0.25,) * 3))
    assert smaller.validation is not None
    assert (smaller.size, smaller.validation.size) == (8, 8)
    assert (smaller.train.mean, smaller.validation.std) == ((0.5,) * 3, (0.25,) * 3)


@pytest.mark.parametrize("below", ["", "train"])
def test_load_folder_splits_each_class(tmp_path: Path, below: str) -> None:
    write_photos(tmp_path / below, {"a": 10, "b": 5, "c": 2})
    split = load_folder(tmp_path, size=8)
    # a fifth of 10, of 5, and of 2 at least one
    assert split.test.labels.bincount().tolist() == [2, 1, 1]
    assert split.train.labels.bincount().tolist() == [8, 4, 1]
    again = load_folder(tmp_path, size=8)
    assert again.train.images == split.train.images
    assert not set(split.train.images) & set(split.test.images)
    half = load_folder(tmp_path, size=8, test_share=0.5)
    assert half.test.labels.bincount().tolist() == [5, 2, 1]
    most = load_folder(tmp_path, size=8, test_share=0.99)
    assert most.train.labels.bincount().tolist() == [1, 1, 1]


@pytest.mark.parametrize(
    ("parts", "arguments", "problem"),
    [
        ({"train": {"a": 1}, "test": {"a": 1}}, {}, "{root}: must hold two classes or more, got a alone"),
        ({"train": {"a": 1, "b": 1}, "test": {"a": 1}}, {}, "{root}/test: must hold the 2 class folders"),
        ({"train": {"a": 1, "b": 0}, "test": {"a": 1, "b": 1}}, {}, "{root}/train/b: must hold photos"),
        ({"test": {"a": 1, "b": 1}}, {}, "{root}: must hold train/ beside test/, got none"),
        ({"": {"a": 2, "b": 1}}, {}, "{root}/b: must hold two photos or more to be split, got one"),
        ({"train": {"a": 1, "b": 1}, "val": {"a": 1, "b": 1}}, {"test_share": 0.2}, "load_folder: test_share is for"),
        ({"": {"a": 2, "b": 2}}, {"test_share": 1.0}, "load_folder: test_share must be between 0 and 1, got 1.0"),
        ({"": {"a": 2, "b": 2}}, {"size": 0}, "load_folder: size must be at least 1, got 0"),
        ({"": {"a": 2, "b": 2}}, {"limit": -1}, "load_folder: limit must be at least 1, got -1"),
        ({"": {}}, {}, "{root}: must hold one folder a class, got none"),
    ],
)
def test_load_folder_refuses(
    tmp_path: Path, parts: dict[str, dict[str, int]], arguments: dict[str, float], problem: str
) -> None:
    for part, counts in parts.items():
        write_photos(tmp_path / part, counts)
    with pytest.raises(ValueError, match=f"^{re.escape(problem.replace('{root}', str(tmp_path)))}"):
        load_folder(tmp_path, **arguments)


def test_load_folder_needs_a_folder_and_pillow(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(IntegrityError, match=re.escape(f"{tmp_path / 'none'}: no such folder")):
        load_folder(tmp_path / "none")
    monkeypatch.setitem(sys.modules, "PIL", None)
    with pytest.raises(ImportError, match="folder needs pillow"):
        load_folder(tmp_path)


def test_load_folder_real(data_root: Path) -> None:
    folder = data_root / "clothing-160"
    if not folder.is_dir():
        pytest.skip(f"no clothing-160 under {data_root}")
    split = load_folder(folder, size=32, limit=20)
    assert (len(split.classes), split.classes[0], split.classes[-1]) == (10, "dress", "t-shirt")
    assert split.train.labels.tolist() == list(range(10)) * 2
    assert 0.5 < float(split.train.decoded().__getitems__(range(20))[0].std()) < 2
    assert torch.equal(load_folder(folder, size=32).train.labels.bincount()[:3], torch.tensor([241, 123, 455]))
