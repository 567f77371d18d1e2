from __future__ import annotations

import gzip
import os
import pickle
import re
import struct
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from learndrop_ext.app.datasets import DATASETS, Split, load_dataset
from learndrop_ext.app.image_files import IntegrityError

IMAGE = "train-images-idx3-ubyte"
LABEL = "train-labels-idx1-ubyte"


def idx(values: np.ndarray) -> bytes:
    return struct.pack(f">4B{values.ndim}I", 0, 0, 8, values.ndim, *values.shape) + values.tobytes()


def write_mnist(folder: Path, *, suffix: str = "", train: int = 5, test: int = 3) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for prefix, n in (("train", train), ("t10k", test)):
        images = np.arange(n, dtype=np.uint8)[:, None, None] + np.zeros((28, 28), np.uint8)
        labels = np.arange(n, dtype=np.uint8) % 10
        for name, values in (("images-idx3", images), ("labels-idx1", labels)):
            content = idx(values)
            path = folder / f"{prefix}-{name}-ubyte{suffix}"
            path.write_bytes(gzip.compress(content) if suffix else content)


def write_cifar(path: Path, first: int, n: int = 4, *, labels: bytes = b"labels") -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    data = np.arange(first, first + n, dtype=np.uint8)[:, None] + np.zeros((n, 3072), np.uint8)
    content = {b"data": data, labels: [(first + i) % 10 for i in range(n)]}
    path.write_bytes(pickle.dumps(content, protocol=2))


def write_cifar10(folder: Path) -> None:
    for i in range(5):
        write_cifar(folder / f"data_batch_{i + 1}", 4 * i)
    write_cifar(folder / "test_batch", 100)


def write_photos(folder: Path, counts: dict[str, int]) -> None:
    for part in ("train", "val"):
        for c, (name, n) in enumerate(counts.items()):
            (folder / part / name).mkdir(parents=True)
            for i in range(n):
                grey = Image.fromarray(np.full((16, 20, 3), 50 * c + 10 * i, np.uint8))
                grey.save(folder / part / name / f"{i}.JPEG", quality=100)


def test_load_dataset_digits() -> None:
    split = load_dataset("digits")
    assert isinstance(split, Split)
    assert (len(split.train), len(split.test)) == (1437, 360)
    assert (split.channels, split.size, split.classes) == (1, 8, tuple("0123456789"))
    assert split.train.images.shape == (1437, 1, 8, 8)
    assert split.train.images.max() == 255
    assert (split.train.augment, split.test.augment) == (None, None)
    assert not split.train.flip
    pixels = split.train.images.double() / 255
    assert split.train.mean == (pytest.approx(pixels.mean().item(), abs=5e-5),)
    assert split.train.std == (pytest.approx(pixels.std(correction=0).item(), abs=5e-5),)
    again = load_dataset("digits", limit=100)
    assert (len(again.train), len(again.test)) == (100, 100)
    assert torch.equal(again.train.images, split.train.images[:100])
    together = torch.cat([split.train.labels, split.test.labels]).bincount()
    assert together.tolist() == [178, 182, 177, 183, 181, 182, 181, 179, 174, 180]


@pytest.mark.parametrize("suffix", ["", ".gz"])
@pytest.mark.parametrize(
    ("name", "folder"),
    [("mnist", "MNIST/raw"), ("fashion-mnist", "FashionMNIST/raw"), ("mnist", ".")],
)
def test_load_dataset_mnist(tmp_path: Path, name: str, folder: str, suffix: str) -> None:
    write_mnist(tmp_path / folder, suffix=suffix)
    split = load_dataset(name, tmp_path)
    assert (len(split.train), len(split.test), split.channels, split.size) == (5, 3, 1, 28)
    assert split.classes == tuple("0123456789")
    assert split.train.images.shape == (5, 1, 28, 28)
    assert split.train.images[:, 0, 27, 27].tolist() == [0, 1, 2, 3, 4]
    assert split.train.labels.tolist() == [0, 1, 2, 3, 4]
    assert len(load_dataset(name, str(tmp_path), limit=4).train) == 4


def test_load_dataset_mnist_refuses(tmp_path: Path) -> None:
    def refuses(name: str, content: bytes | None, problem: str) -> None:
        write_mnist(tmp_path)
        path = tmp_path / name
        path.unlink()
        if content is not None:
            path.write_bytes(content)
        with pytest.raises(IntegrityError, match=f"^{re.escape(f'{path}: {problem}')}$"):
            load_dataset("mnist", tmp_path)

    zeros = np.zeros((5, 28, 28), np.uint8)
    refuses(LABEL, None, "no such file, nor with the ending .gz")
    refuses(IMAGE, idx(zeros[:, :14]), "images must be 28x28, got 14x28")
    refuses(LABEL, idx(np.zeros(6, np.uint8)), "must hold 5 labels, one an image, got 6")
    refuses(LABEL, idx(np.full(5, 10, np.uint8)), "labels must be from 0 to 9, got 10")
    refuses(IMAGE, idx(zeros[0]), "the IDX magic number must be 2051 (bytes, 3 dimensions), got 2050")
    refuses("t10k-images-idx3-ubyte", b"", "an IDX header has 16 bytes, got 0")


@pytest.mark.parametrize("folder", ["cifar-10-batches-py", "."])
def test_load_dataset_cifar10(tmp_path: Path, folder: str) -> None:
    write_cifar10(tmp_path / folder)
    split = load_dataset("cifar10", tmp_path)
    assert (len(split.train), len(split.test), split.channels, split.size) == (20, 4, 3, 32)
    assert split.train.images[:, 2, 31, 31].tolist() == list(range(20))
    assert split.train.labels.tolist() == list(range(10)) * 2
    assert split.classes == tuple("0123456789")


def test_load_dataset_limit_leaves_later_batches_alone(tmp_path: Path) -> None:
    write_cifar10(tmp_path)
    for i in (3, 4, 5):
        (tmp_path / f"data_batch_{i}").unlink()
    split = load_dataset("cifar10", tmp_path, limit=7)
    assert split.train.labels.tolist() == [0, 1, 2, 3, 4, 5, 6]
    assert len(split.test) == 4
    with pytest.raises(IntegrityError, match=re.escape(f"{tmp_path / 'data_batch_3'}: no such file")):
        load_dataset("cifar10", tmp_path, limit=9)


def test_load_dataset_cifar100(tmp_path: Path) -> None:
    folder = tmp_path / "cifar-100-python"
    write_cifar(folder / "train", 0, 6, labels=b"fine_labels")
    write_cifar(folder / "test", 6, 2, labels=b"fine_labels")
    split = load_dataset("cifar100", tmp_path)
    assert (len(split.train), len(split.test), len(split.classes)) == (6, 2, 100)
    assert split.test.labels.tolist() == [6, 7]


@pytest.mark.parametrize("folder", ["imagenette-128", "imagenette2-160", "."])
def test_load_dataset_imagenette(tmp_path: Path, folder: str) -> None:
    write_photos(tmp_path / folder, {"n01440764": 3, "n09999999": 1, "n03888257": 2})
    split = load_dataset("imagenette", tmp_path, size=16)
    assert split.classes == ("n01440764", "n03888257", "n09999999")
    assert (split.channels, split.size, len(split.train), len(split.test)) == (3, 16, 6, 6)
    # in turn from each class; greys are 50 a class (in the order of writing) and 10 a file
    assert split.train.labels.tolist() == [0, 1, 2, 0, 1, 0]
    decoded = split.train.decoded()
    assert decoded.images.shape == (6, 3, 16, 16)
    assert decoded.images[:, 0, 8, 8].tolist() == [0, 100, 50, 10, 110, 20]
    assert decoded.decoded() is decoded
    limited = load_dataset("imagenette", tmp_path, size=16, limit=4)
    assert limited.train.labels.tolist() == [0, 1, 2, 0]
    lazy, whole = split.train.__getitems__([5, 0]), decoded.__getitems__([5, 0])
    assert torch.equal(lazy[0], whole[0])
    assert torch.equal(lazy[1], whole[1])


def test_load_dataset_imagenette_is_128_pixels_by_default(tmp_path: Path) -> None:
    write_photos(tmp_path, {"a": 1})
    split = load_dataset("imagenette", tmp_path)
    assert split.size == 128
    assert split.train[0][0].shape == (3, 128, 128)


def test_load_dataset_imagenette_refuses(tmp_path: Path) -> None:
    folder = tmp_path / "imagenette2"
    write_photos(folder, {"a": 1, "b": 1})
    photo = folder / "train/b/0.JPEG"
    photo.write_bytes(photo.read_bytes()[:-40])
    damaged = load_dataset("imagenette", tmp_path, size=16).train
    for read in (damaged.decoded, lambda: damaged[1]):
        with pytest.raises(IntegrityError, match=re.escape(f"{photo}: must be a whole image, got: ")):
            read()
    (folder / "val/b/0.JPEG").unlink()
    with pytest.raises(IntegrityError, match=re.escape(f"{folder / 'val/b'}: must hold photos (.jpg, ")):
        load_dataset("imagenette", tmp_path)
    (folder / "val/b").rmdir()
    with pytest.raises(
        IntegrityError, match=re.escape("must hold the 2 class folders of the training part, got b missing")
    ):
        load_dataset("imagenette", tmp_path)
    with pytest.raises(IntegrityError, match=re.escape(f"{tmp_path / 'none/train'}: no such folder")):
        load_dataset("imagenette", tmp_path / "none")


@pytest.mark.parametrize(
    ("name", "arguments", "message"),
    [
        ("svhn", {"root": "."}, r"name must be one of digits, mnist, .*imagenette, got 'svhn'"),
        ("mnist", {}, r"mnist needs a root, the folder that holds its files, got None"),
        ("digits", {"limit": 0}, r"limit must be at least 1, got 0"),
        ("imagenette", {"root": ".", "size": 0}, r"size must be at least 1, got 0"),
    ],
)
def test_load_dataset_refuses(name: str, arguments: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=f"^load_dataset: {message}$"):
        load_dataset(name, **arguments)


@pytest.mark.parametrize(
    ("name", "wanted"),
    [
        ("mnist", "train-images-idx3-ubyte or a folder MNIST/raw"),
        ("fashion-mnist", "train-images-idx3-ubyte or a folder FashionMNIST/raw"),
        ("cifar10", "data_batch_1 or a folder cifar-10-batches-py"),
        ("cifar100", "train or a folder cifar-100-python"),
    ],
)
def test_load_dataset_names_what_the_root_lacks(tmp_path: Path, name: str, wanted: str) -> None:
    with pytest.raises(IntegrityError, match=re.escape(f"{tmp_path}: must hold {wanted}, got neither")):
        load_dataset(name, tmp_path)
    with pytest.raises(IntegrityError, match=re.escape(f"{tmp_path / 'none'}: no such folder")):
        load_dataset(name, tmp_path / "none")


@pytest.mark.parametrize(
    ("name", "module", "package"),
    [("digits", "sklearn.datasets", "scikit-learn"), ("imagenette", "PIL", "pillow")],
)
def test_load_dataset_names_the_package_it_lacks(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, name: str, module: str, package: str
) -> None:
    monkeypatch.setitem(sys.modules, module, None)
    message = f"load_dataset: {name} needs {package}, which is not installed: pip install {package}"
    with pytest.raises(ImportError, match=f"^{message}$"):
        load_dataset(name, tmp_path)


def real(*folders: str) -> Path:
    """The root of the real sets, from LEARNDROP_DATA."""
    root = os.environ.get("LEARNDROP_DATA")
    if root is None or not all((Path(root) / folder).is_dir() for folder in folders):
        pytest.skip(f"no {', '.join(folders)} under LEARNDROP_DATA")
    return Path(root)


@pytest.mark.parametrize(
    ("name", "folder", "count", "first"),
    [
        ("mnist", "MNIST/raw", 60_000, [5, 0, 4, 1, 9]),
        ("cifar10", "cifar-10-batches-py", 50_000, [6, 9, 9, 4, 1]),
    ],
)
def test_load_dataset_real(name: str, folder: str, count: int, first: list[int]) -> None:
    split = load_dataset(name, real(folder))
    assert (len(split.train), len(split.test)) == (count, 10_000)
    assert split.train.labels[:5].tolist() == first
    assert split.classes == tuple("0123456789")
    assert split.train.labels.bincount().sum() == count
    pixels = split.train.images.transpose(0, 1).reshape(split.channels, -1).float() / 255
    assert split.train.mean == pytest.approx(pixels.mean(1).tolist(), abs=1e-4)
    assert split.train.std == pytest.approx(pixels.std(1, correction=0).tolist(), abs=1e-4)


def test_load_dataset_real_imagenette() -> None:
    split = load_dataset("imagenette", real("imagenette-128"), limit=30)
    assert split.classes[:3] == ("n01440764", "n02102040", "n02979186")
    assert split.train.labels.tolist() == list(range(10)) * 3
    x, y = split.train.decoded().__getitems__(range(30))
    assert x.shape == (30, 3, 128, 128)
    assert 0.5 < x.std() < 1.5
    assert len(load_dataset("imagenette", real("imagenette-128")).train) == 9469
    assert y.dtype == torch.int64


def test_datasets_lists_every_name() -> None:
    assert list(DATASETS) == ["digits", "mnist", "fashion-mnist", "cifar10", "cifar100", "imagenette"]
