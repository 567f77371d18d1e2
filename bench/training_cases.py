"""The cases of bench_training_gpu.py: networks, recipes, and the images and weights that they are trained on."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import nn

from learndrop_ext import Budget, Policy, StoppedLearning
from learndrop_ext.app.datasets import IMAGENET_MEAN, IMAGENET_STD, load_dataset, load_folder
from learndrop_ext.app.image_set import ImageSet
from learndrop_ext.app.models import build_model
from learndrop_ext.app.networks import build_network


@dataclass(frozen=True)
class Case:
    """A network, its data, and the recipe that all sides share.

    lr: peak of the one-cycle learning rate of SGD; adam: Adam at that constant rate in its place. workers: decode the
    photos at each reading; None: data on the device. tunes: cuDNN times its algorithms for each shape, which for
    EfficientNet-Lite0 took 50 s on an H200, where six epochs take 8 s.
    """

    name: str
    dataset: str
    model: str
    epochs: int
    lr: float = 0.2
    batch_size: int = 256
    augment: str | None = "standard"
    adam: bool = False
    workers: int | None = None
    tunes: bool = True


CASES = [
    Case("cifar10-lite0", "cifar10", "timm:tf_efficientnet_lite0", 5, 0.05, 256, None, tunes=False),
    Case("cifar10-resnet18", "cifar10", "resnet18", 12),
    Case("cifar10-vgg11", "cifar10", "vgg11", 12, lr=0.1),
    Case("mnist-vgg11", "mnist", "vgg11", 4, lr=0.1, augment=None),
    Case("mnist-resnet18", "mnist", "resnet18", 4, augment=None),
    Case("cifar10-resnet50", "cifar10", "resnet50", 8),
    Case("warm-start", "cifar10", "resnet18", 12, lr=1e-3, batch_size=128, augment=None, adam=True),
    Case("clothing-gpu", "clothing", "timm:tf_efficientnet_lite0", 6, 0.02, 64, None, tunes=False),
    Case("clothing-workers", "clothing", "timm:tf_efficientnet_lite0", 6, 0.02, 64, None, workers=8, tunes=False),
    Case("cifar10-vgg16", "cifar10", "vgg16", 12, lr=0.1),
    Case("mnist-vgg16", "mnist", "vgg16", 4, lr=0.1, augment=None),
    Case("mnist-resnet50", "mnist", "resnet50", 4, augment=None),
    Case("cifar10-resnet152", "cifar10", "resnet152", 6),
    Case("mnist-resnet152", "mnist", "resnet152", 4, augment=None),
]


@dataclass(frozen=True)
class Setting:
    """What holds for all runs: where they run, whether they are a rehearsal, where the data and weights are."""

    device: torch.device
    toy: bool
    data: Path | None
    weights: Path | None


@dataclass(frozen=True)
class Work:
    """A case with its images, a seed, and a way to make its network from a seed, with fresh or pretrained weights."""

    case: Case
    train: ImageSet
    test: ImageSet
    from_seed: Callable[[int], nn.Module]
    device: torch.device
    policy: Policy = field(default_factory=StoppedLearning)
    compiled: bool = False
    seed: int = 0

    def make_model(self) -> nn.Module:
        return self.from_seed(self.seed)


class NotRunError(Exception):
    """Why a case has no result."""


def load(case: Case, setting: Setting) -> Work:
    """Read a case's images and find its network; a rehearsal takes the digits, or a few photos, and narrow networks."""
    if case.model.startswith("timm:"):
        return load_pretrained(case, setting)
    device = setting.device
    if setting.data is None and not setting.toy:
        raise NotRunError("it needs LEARNDROP_DATA")
    split = load_dataset("digits", limit=48) if setting.toy else load_dataset(case.dataset, setting.data)
    # Not 4: torch 2.13 writes beyond the gradient of a 1x1 convolution of 4 channels-last channels on some CPUs.
    width = 8 if setting.toy else 64

    def from_seed(seed: int) -> nn.Module:
        return build_model(
            case.model, num_classes=len(split.classes), in_channels=split.channels, width=width, seed=seed
        )

    return Work(case, split.train.to(device).augmented(case.augment), split.test.to(device), from_seed, device)


def load_pretrained(case: Case, setting: Setting) -> Work:
    """Read photos at 128 pixels, and EfficientNet-Lite0 with its published weights, to be fine-tuned in half the time."""
    if setting.data is None or setting.weights is None:
        raise NotRunError("it needs LEARNDROP_DATA and LEARNDROP_WEIGHTS")
    limit = 48 if setting.toy else None
    if case.dataset == "clothing":
        split = load_folder(setting.data / "clothing-160", size=128, limit=limit)
        test = split.test.decoded().to(setting.device)
        train = split.train if case.workers is not None else split.train.decoded().to(setting.device)
    else:
        split = load_dataset(case.dataset, setting.data, limit=limit)
        train, test = (
            part.to(setting.device).resized(128).normalized(IMAGENET_MEAN, IMAGENET_STD)
            for part in (split.train, split.test)
        )

    def from_seed(seed: int) -> nn.Module:
        classes, weights = len(split.classes), str(setting.weights)
        return build_network(case.model, num_classes=classes, weights=weights, seed=seed).model

    return Work(case, train, test, from_seed, setting.device, policy=Budget(2.0))
