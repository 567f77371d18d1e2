"""The datasets of the command line, read from their original files.

N samples, C channels, H and W pixels.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import chain, zip_longest
from pathlib import Path
from types import ModuleType
from typing import Any, TypeAlias

import torch
from torch import Tensor

from learndrop_ext.app.image_files import IntegrityError, check_labels, find_file, read_cifar, read_idx
from learndrop_ext.app.image_set import ImageSet
from learndrop_ext.app.photos import list_class_folders

#: Mean and standard deviation of ImageNet's training pixels in [0, 1], which most published weights expect.
IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


@dataclass(frozen=True)
class Split:
    """The parts of a dataset, and the properties that a model and a recipe depend on."""

    train: ImageSet
    test: ImageSet
    classes: tuple[str, ...]  # folders, or the labels themselves, indexed by label
    validation: ImageSet | None = None  # a part for choosing a recipe

    @property
    def channels(self) -> int:
        """C."""
        return len(self.train.mean)

    @property
    def size(self) -> int:
        """Side of the images in pixels."""
        return self.train.size

    def map(self, change: Callable[[ImageSet], ImageSet]) -> Split:
        """Return the split with `change` applied to each part."""
        validation = None if self.validation is None else change(self.validation)
        return Split(change(self.train), change(self.test), self.classes, validation)


#: The images and labels of a part, and what a reader returns: the training and the test part, and the classes.
Subset: TypeAlias = tuple[Tensor | Sequence[Path], Tensor]
Parts: TypeAlias = tuple[Subset, Subset, tuple[str, ...]]


@dataclass(frozen=True)
class Source:
    """The reader of a dataset, and its mean and standard deviation of training pixels in [0, 1], per channel."""

    read: Callable[[Path, int | None], Parts]
    mean: tuple[float, ...]
    std: tuple[float, ...]
    flip: bool = True


def load_dataset(
    name: str, root: str | Path | None = None, *, limit: int | None = None, size: int | None = None
) -> Split:
    """Read a dataset from its original files. Raises IntegrityError if a file is missing or damaged.

    Args:
        name: a key of `DATASETS`. The 1,797 images of digits come with scikit-learn; a fixed seed splits them into 1,437
            and 360.
        root: the folder with the files, or torchvision's root folder, which holds MNIST/raw, FashionMNIST/raw,
            cifar-10-batches-py, cifar-100-python or imagenette-128 (imagenette2, ...). Not used for digits.
        limit: keep only the first images of each part, in file order; for Imagenette, which is sorted by class, one from
            each class in turn. Other files are not opened.
        size: side of the images in pixels. Default: unchanged; 128 for Imagenette
    """
    source = DATASETS.get(name)
    if source is None:
        raise ValueError(f"load_dataset: name must be one of {', '.join(DATASETS)}, got {name!r}")
    if root is None and name != "digits":
        raise ValueError(f"load_dataset: {name} needs a root, the folder that holds its files, got None")
    _check_counts("load_dataset", limit=limit, size=size)
    train, test, classes = source.read(Path() if root is None else Path(root), limit)
    return _split([train, test], classes, source, limit=limit, size=size)


def load_folder(
    root: str | Path, *, limit: int | None = None, size: int | None = None, test_share: float | None = None
) -> Split:
    """List the photos of a folder that holds one folder per class, with the mean and standard deviation of ImageNet.

    With train/ and test/, val/ or validation/ in `root`, each holds the same class folders. The test part is test/ if it
    exists, and val/ or validation/ is then the validation part. Otherwise `root`, or its train/, holds the class folders,
    and the photos of each class are split with a fixed seed.

    Args:
        root: the folder.
        limit: keep only the first photos of each part, one from each class in turn.
        size: side of the images in pixels; the central square of each photo is scaled to it. Default: 128
        test_share: share of each class for the test part, in (0, 1), if there is no test part. Default: 0.2
    """
    root = Path(root)
    _package("PIL", "folder", "pillow")
    _check_counts("load_folder", limit=limit, size=size)
    if test_share is not None and not 0 < test_share < 1:
        raise ValueError(f"load_folder: test_share must be between 0 and 1, got {test_share}")
    if not root.is_dir():
        raise IntegrityError(root, "no such folder")
    held_out = [name for name in ("test", "val", "validation") if (root / name).is_dir()]
    if held_out and not (root / "train").is_dir():
        raise IntegrityError(root, f"must hold train/ beside {held_out[0]}/, got none")
    train = list_class_folders(root / "train" if (root / "train").is_dir() else root)
    if len(train) < 2:
        raise IntegrityError(root, f"must hold two classes or more, got {', '.join(train)} alone")
    parts = [list_class_folders(root / name, classes=tuple(train)) for name in held_out]
    if not held_out:
        train, test = _split_classes(train, share=0.2 if test_share is None else test_share)
        parts = [test]
    elif test_share is not None:
        raise ValueError(f"load_folder: test_share is for a folder without a test part, got {root / held_out[0]}")
    subsets = [_in_turn(part) for part in (train, *parts[:2])]
    return _split(subsets, tuple(train), DATASETS["imagenette"], limit=limit, size=size)


def _split_classes(
    folders: Mapping[str, Sequence[Path]], *, share: float
) -> tuple[dict[str, tuple[Path, ...]], dict[str, tuple[Path, ...]]]:
    """Split the photos of each class at random with a fixed seed, at least one photo in each part."""
    generator = torch.Generator().manual_seed(0)
    train, test = {}, {}
    for name, files in folders.items():
        if len(files) < 2:
            raise IntegrityError(files[0].parent, "must hold two photos or more to be split, got one")
        drawn = torch.randperm(len(files), generator=generator).tolist()
        count = min(max(1, round(share * len(files))), len(files) - 1)
        test[name] = tuple(files[i] for i in sorted(drawn[:count]))
        train[name] = tuple(files[i] for i in sorted(drawn[count:]))
    return train, test


def _check_counts(owner: str, **values: int | None) -> None:
    for argument, value in values.items():
        if value is not None and value < 1:
            raise ValueError(f"{owner}: {argument} must be at least 1, got {value}")


def _split(
    subsets: Sequence[Subset], classes: tuple[str, ...], source: Source, *, limit: int | None, size: int | None
) -> Split:
    """Make a Split of a training part, a test part and an optional validation part, with the pixels of a source."""
    pixels: dict[str, Any] = {"mean": source.mean, "std": source.std, "flip": source.flip, "size": size or 128}
    parts = [ImageSet(images[:limit], labels[:limit], **pixels) for images, labels in subsets]
    if size is not None:
        parts = [part.resized(size) for part in parts]
    return Split(parts[0], parts[1], classes, *parts[2:])


def _read_digits(_: Path, __: int | None) -> Parts:
    digits = _package("sklearn.datasets", "digits", "scikit-learn").load_digits()
    # 17 grey levels, 0 to 16, scaled to 0..255
    images = (torch.from_numpy(digits.images) * (255 / 16)).to(torch.uint8).unsqueeze(1)
    labels = torch.from_numpy(digits.target).to(torch.int64)
    order = torch.randperm(1797, generator=torch.Generator().manual_seed(0))
    train, test = order[:1437], order[1437:]
    return (images[train], labels[train]), (images[test], labels[test]), DIGITS


def _read_mnist(root: Path, _: int | None, *, name: str) -> Parts:
    folder = _folder(root, f"{name}/raw", first="train-images-idx3-ubyte")
    parts = []
    for prefix in ("train", "t10k"):
        path = find_file(folder, f"{prefix}-images-idx3-ubyte", suffixes=("", ".gz"))
        labels_path = find_file(folder, f"{prefix}-labels-idx1-ubyte", suffixes=("", ".gz"))
        images, labels = read_idx(path, dims=3), read_idx(labels_path, dims=1).to(torch.int64)
        if images.shape[1:] != (28, 28):
            raise IntegrityError(path, f"images must be 28x28, got {images.shape[1]}x{images.shape[2]}")
        if len(labels) != len(images):
            raise IntegrityError(labels_path, f"must hold {len(images)} labels, one an image, got {len(labels)}")
        check_labels(labels_path, int(labels.min()), int(labels.max()), classes=10)
        parts.append((images.unsqueeze(1), labels))
    return parts[0], parts[1], DIGITS


def _read_cifar(
    root: Path, limit: int | None, *, folder: str, files: Sequence[Sequence[str]], labels: str, classes: int
) -> Parts:
    """files: of the training and the test part; labels: their key."""
    found = _folder(root, folder, first=files[0][0])
    subsets = []
    for names in files:
        batches: list[tuple[Tensor, Tensor]] = []
        for name in names:
            if limit is None or sum(len(y) for _, y in batches) < limit:
                batches.append(read_cifar(find_file(found, name), labels=labels, classes=classes))
        subsets.append((torch.cat([x for x, _ in batches]), torch.cat([y for _, y in batches])))
    return subsets[0], subsets[1], tuple(str(label) for label in range(classes))


def _read_imagenette(root: Path, _: int | None) -> Parts:
    _package("PIL", "imagenette", "pillow")
    found = sorted(path for path in root.glob("imagenette*") if (path / "train").is_dir())
    folder = root if (root / "train").is_dir() or not found else found[0]
    train = list_class_folders(folder / "train")
    test = list_class_folders(folder / "val", classes=tuple(train))
    return _in_turn(train), _in_turn(test), tuple(train)


def _in_turn(folders: Mapping[str, Sequence[Path]]) -> Subset:
    """Interleave the files of the classes: the first of each class, the second of each, and so on."""
    labelled = [[(path, label) for path in files] for label, files in enumerate(folders.values())]
    order = [pair for pair in chain.from_iterable(zip_longest(*labelled)) if pair is not None]
    return [path for path, _ in order], torch.tensor([label for _, label in order], dtype=torch.int64)


def _package(module: str, dataset: str, package: str) -> ModuleType:
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise ImportError(
            f"load_dataset: {dataset} needs {package}, which is not installed: pip install {package}"
        ) from error


def _folder(root: Path, usual: str, *, first: str) -> Path:
    if (root / usual).is_dir():
        return root / usual
    if not root.is_dir():
        raise IntegrityError(root, "no such folder")
    if not any(root.glob(f"{first}*")):
        raise IntegrityError(root, f"must hold {first} or a folder {usual}, got neither")
    return root


DIGITS = tuple("0123456789")
CIFAR10_FILES = tuple(f"data_batch_{i}" for i in range(1, 6)), ("test_batch",)
CIFAR10 = partial(_read_cifar, folder="cifar-10-batches-py", files=CIFAR10_FILES, labels="labels", classes=10)
CIFAR100 = partial(
    _read_cifar, folder="cifar-100-python", files=(("train",), ("test",)), labels="fine_labels", classes=100
)

# Mean and standard deviation are over the whole training part; for Imagenette, those of ImageNet.
DATASETS = {
    "digits": Source(_read_digits, (0.3041,), (0.3757,), flip=False),
    "mnist": Source(partial(_read_mnist, name="MNIST"), (0.1307,), (0.3081,), flip=False),
    "fashion-mnist": Source(partial(_read_mnist, name="FashionMNIST"), (0.2860,), (0.3530,)),
    "cifar10": Source(CIFAR10, (0.4914, 0.4822, 0.4465), (0.2470, 0.2435, 0.2616)),
    "cifar100": Source(CIFAR100, (0.5071, 0.4865, 0.4409), (0.2673, 0.2564, 0.2762)),
    "imagenette": Source(_read_imagenette, IMAGENET_MEAN, IMAGENET_STD),
}
