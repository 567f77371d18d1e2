"""The cases of bench_training_gpu.py: networks, recipes, and the images and weights that they are trained on.

python bench/training_cases.py     names them, in the order in which they are run
"""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn

from learndrop_ext import Budget, Policy, StoppedLearning
from learndrop_ext.app.datasets import IMAGENET_MEAN, IMAGENET_STD, load_dataset, load_folder
from learndrop_ext.app.image_set import ImageSet
from learndrop_ext.app.models import build_model
from learndrop_ext.app.networks import build_network

#: Images in an epoch of photos: the 3,068 of clothing-160 are taken again and again, as so many images of their own.
PHOTOS = 20_000
#: They are enlarged to so many times their side, 320 pixels at least: about as long to decode as those of ImageNet.
ENLARGED = 2


@dataclass(frozen=True)
class Case:
    """A network, its data, and the recipe that all sides share.

    seconds: no side is begun that would end later, as far as is known. lr: peak of the one-cycle learning rate of SGD.
    workers: decode the photos at each reading; None: data on the device. size: pixels a side, None as they are. steps:
    "eager", "compile" or "graphs", on all sides; None: those with which a run without dropping is expected to end first.
    tunes: cuDNN times its algorithms for each shape, which for EfficientNet-Lite0 took 50 s on an H200, where six epochs
    take 8 s.
    """

    name: str
    dataset: str
    model: str
    seconds: float
    epochs: int
    lr: float = 0.2
    batch_size: int = 256
    augment: str | None = "standard"
    workers: int | None = None
    size: int | None = None
    steps: str | None = None
    tunes: bool = True

    @property
    def pretrained(self) -> bool:
        """Whether it fine-tunes published weights."""
        return self.model.startswith("timm:")

    @property
    def policies(self) -> dict[str, Policy]:
        """The sides that drop, and keep rows."""
        if self.pretrained:
            return {"learndrop": Budget(2.0)}
        return {"learndrop": Budget(2.0, start=1), "default": StoppedLearning()}

    @property
    def sides(self) -> tuple[str, ...]:
        """What is run, in this order; see bench_training_gpu.py."""
        rivals = ("freeze-only", "linear probe", "kernel") if self.workers is not None else ()
        return ("baseline", *self.policies, "short", *rivals)


LITE0, LITE2 = "timm:tf_efficientnet_lite0", "timm:tf_efficientnet_lite2"
#: Network, epochs on CIFAR-10, learning rate.
SCRATCH = [("vgg11", 12, 0.1), ("vgg16", 12, 0.1), ("resnet18", 12, 0.2), ("resnet50", 8, 0.2), ("resnet152", 6, 0.2)]
CASES = [
    Case("photos-lite0", "clothing", LITE0, 110, 6, 0.02, 128, "crop", workers=12, size=224, tunes=False),
    Case("photos-lite2", "clothing", LITE2, 120, 6, 0.02, 128, "crop", workers=12, size=224, tunes=False),
    Case("cifar10-lite2", "cifar10", LITE2, 150, 4, 0.05, 256, None, size=224, tunes=False),
    Case("cifar10-lite0", "cifar10", LITE0, 90, 5, 0.05, 256, None, size=128, steps="graphs", tunes=False),
    *(Case(f"cifar10-{model}", "cifar10", model, 240, epochs, lr) for model, epochs, lr in SCRATCH),
    *(Case(f"mnist-{model}", "mnist", model, 240, 4, lr, augment=None) for model, _, lr in SCRATCH),
]


@dataclass(frozen=True)
class Setting:
    """What holds for all runs: where they run, whether they are a rehearsal, where the data and weights are.

    weights: a file, or a folder with a file NAME.pth of each network, whose NAME holds lite0 or lite2. scratch: a folder for
    the photos that are made.
    """

    device: torch.device
    toy: bool
    data: Path | None
    weights: Path | None
    scratch: Path


@dataclass(frozen=True)
class Work:
    """A case with its images, a seed, and a way to make its network from a seed, with fresh or pretrained weights."""

    case: Case
    train: ImageSet
    test: ImageSet
    from_seed: Callable[[int], nn.Module]
    device: torch.device
    steps: str = "eager"
    seed: int = 0

    def make_model(self) -> nn.Module:
        return self.from_seed(self.seed)


class NotRunError(Exception):
    """Why a case, or a side of it, has no result."""


def load(case: Case, setting: Setting) -> Work:
    """Read a case's images and find its network; a rehearsal takes the digits, or a few photos, and narrow networks."""
    device, toy = setting.device, setting.toy
    if setting.data is None and not toy:
        raise NotRunError("it needs LEARNDROP_DATA")
    if case.workers is not None:
        folder = toy_photos(setting.scratch / "photos") if toy else setting.data / "clothing-160"  # type: ignore[operator]
        split = load_folder(enlarged(folder, setting.scratch / "enlarged"), size=case.size)
        count = 48 if toy else PHOTOS
        train = split.train.subset([i % len(split.train) for i in range(count)])
        test = split.test.decoded().to(device)
    else:
        split = load_dataset("digits", limit=48) if toy else load_dataset(case.dataset, setting.data)
        train, test = (part.to(device).resized(case.size or part.size) for part in (split.train, split.test))
        if case.pretrained and not toy:
            train, test = (part.normalized(IMAGENET_MEAN, IMAGENET_STD) for part in (train, test))
    weights = weights_of(case, setting) if case.pretrained and not toy else None

    def from_seed(seed: int) -> nn.Module:
        if weights is not None:
            return build_network(case.model, num_classes=len(split.classes), weights=str(weights), seed=seed).model
        # Not 4: torch 2.13 writes beyond the gradient of a 1x1 convolution of 4 channels-last channels on some CPUs.
        shape = {"num_classes": len(split.classes), "in_channels": split.channels, "width": 8 if toy else 64}
        return build_model("resnet10" if case.pretrained else case.model, **shape, seed=seed)

    return Work(case, train.augmented(case.augment), test, from_seed, device)


def weights_of(case: Case, setting: Setting) -> Path:
    """Return the file of a network's published weights."""
    if setting.weights is None:
        raise NotRunError("it needs LEARNDROP_WEIGHTS")
    variant = case.model[-5:]
    files = [setting.weights] if setting.weights.is_file() else sorted(setting.weights.rglob(f"*{variant}*.pth"))
    if not files:
        raise NotRunError(f"LEARNDROP_WEIGHTS must hold a file *{variant}*.pth, got none in {setting.weights}")
    return files[0]


def enlarged(folder: Path, into: Path) -> Path:
    """Write the photos of a folder, enlarged, to the same names in another one, and return that."""
    from PIL import Image

    if into.exists():
        return into

    def enlarge(path: Path) -> None:
        target = into / path.relative_to(folder)
        target.parent.mkdir(parents=True, exist_ok=True)
        with Image.open(path) as photo:
            photo.resize((ENLARGED * photo.width, ENLARGED * photo.height)).save(target, quality=90)

    with ThreadPoolExecutor() as pool:
        list(pool.map(enlarge, folder.rglob("*.jpg")))
    return into


def toy_photos(folder: Path) -> Path:
    """Write a few photos for a rehearsal."""
    from PIL import Image

    for i in range(32):
        path = folder / ("train", "test")[i // 16] / ("dark", "light")[i % 2] / f"{i}.jpg"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.linear_gradient("L").resize((24, 16 + i)).save(path)
    return folder
