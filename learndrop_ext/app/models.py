"""VGG and ResNet for small images and for ImageNet-sized images.

With `stem="imagenet"` a network has the parameter names, shapes and arithmetic of the torchvision network of the same name
(`vgg11` here is torchvision's `vgg11_bn`), so checkpoints are interchangeable. With `stem="small"`, for images of 8 to 64
pixels, a ResNet starts with a 3x3 convolution of stride 1 and no max pooling, and a VGG ends in global average pooling and
one linear classifier.

Sources: VGG, Simonyan and Zisserman, arXiv 1409.1556, table 1 (columns A, B, D, E), with batch norm after each convolution;
ResNet, He et al., arXiv 1512.03385, table 1, with the stride of a bottleneck in its 3x3 convolution, as in torchvision;
initial weights of convolutions, He et al., arXiv 1502.01852, section 2.2 (zero-mean normal of variance 2/n), with n counted
over the outputs, as in torchvision.

B batch, C channels, H and W pixels, K classes.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

import torch
from torch import Tensor, nn

from learndrop_ext.rng import fork_rng

STEMS = ("small", "imagenet")
#: Kernels of a block's convolutions, and its output channels as a multiple of its width.
BASIC, BOTTLENECK = ((3, 3), 1), ((1, 3, 1), 4)


class Block(nn.Module):
    """Convolutions and a shortcut around them: [B, C, H, W] -> [B, expansion * width, H/stride, W/stride].

    The first 3x3 convolution has the stride, the last one the channels of the output.
    """

    def __init__(self, in_channels: int, width: int, kernels: Sequence[int], expansion: int, *, stride: int) -> None:
        super().__init__()
        self.depth = len(kernels)
        channels = in_channels
        for i, kernel in enumerate(kernels):
            out = width * expansion if i == len(kernels) - 1 else width
            step = stride if i == kernels.index(3) else 1
            conv = nn.Conv2d(channels, out, kernel, stride=step, padding=kernel // 2, bias=False)
            self.add_module(f"conv{i + 1}", conv)
            self.add_module(f"bn{i + 1}", nn.BatchNorm2d(out))
            channels = out
        self.relu = nn.ReLU(inplace=True)
        self.downsample = None
        if stride != 1 or in_channels != channels:
            conv = nn.Conv2d(in_channels, channels, 1, stride=stride, bias=False)
            self.downsample = nn.Sequential(conv, nn.BatchNorm2d(channels))

    def forward(self, x: Tensor) -> Tensor:
        shortcut = out = x
        if self.downsample is not None:
            shortcut = self.downsample(x)
        for i in range(1, self.depth + 1):
            out = getattr(self, f"bn{i}")(getattr(self, f"conv{i}")(out))
            if i == self.depth:
                out += shortcut
            out = self.relu(out)
        rectified: Tensor = out
        return rectified


class ResNet(nn.Module):
    """A residual network of four stages of `depths` blocks: [B, C, H, W] float -> logits [B, K].

    Blocks of stage i have width * 2**i. For the other arguments and errors see `build_model`.
    """

    def __init__(
        self,
        block: tuple[Sequence[int], int],
        depths: Sequence[int],
        *,
        num_classes: int,
        in_channels: int,
        stem: str,
        width: int,
    ) -> None:
        super().__init__()
        kernel, stride = (7, 2) if stem == "imagenet" else (3, 1)
        self.conv1 = nn.Conv2d(in_channels, width, kernel, stride=stride, padding=kernel // 2, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        self.relu = nn.ReLU(inplace=True)
        self.maxpool = nn.MaxPool2d(3, stride=2, padding=1) if stem == "imagenet" else nn.Identity()
        kernels, expansion = block
        stages = []
        channels = width
        for stage, depth in enumerate(depths):
            blocks = []
            for i in range(depth):
                stride = 2 if stage > 0 and i == 0 else 1
                blocks.append(Block(channels, width * 2**stage, kernels, expansion, stride=stride))
                channels = width * 2**stage * expansion
            stages.append(nn.Sequential(*blocks))
        self.layer1, self.layer2, self.layer3, self.layer4 = stages
        self.avgpool = nn.AdaptiveAvgPool2d(1)
        self.fc = nn.Linear(channels, num_classes)
        _init_convolutions(self)

    def forward(self, x: Tensor) -> Tensor:
        x = self.maxpool(self.relu(self.bn1(self.conv1(x))))
        x = self.layer4(self.layer3(self.layer2(self.layer1(x))))
        logits: Tensor = self.fc(torch.flatten(self.avgpool(x), 1))
        return logits


class VGG(nn.Module):
    """A plain network of five stages of `depths` 3x3 convolutions with batch norm: [B, C, H, W] float -> logits [B, K].

    Stages have 1, 2, 4, 8 and 8 times width channels and end in a 2x2 max pool. With the small stem, pooling rounds odd
    sizes up, so that images under 32 pixels do not vanish. With the imagenet stem, the classifier has hidden layers of
    64 * width units with dropout 0.5. For the other arguments and errors see `build_model`.
    """

    def __init__(self, depths: Sequence[int], *, num_classes: int, in_channels: int, stem: str, width: int) -> None:
        super().__init__()
        features: list[nn.Module] = []
        channels = in_channels
        for depth, factor in zip(depths, (1, 2, 4, 8, 8), strict=True):
            for _ in range(depth):
                features += [
                    nn.Conv2d(channels, factor * width, 3, padding=1),
                    nn.BatchNorm2d(factor * width),
                    nn.ReLU(inplace=True),
                ]
                channels = factor * width
            features.append(nn.MaxPool2d(2, ceil_mode=stem == "small"))
        self.features = nn.Sequential(*features)
        self.avgpool = nn.AdaptiveAvgPool2d(7 if stem == "imagenet" else 1)
        self.classifier: nn.Module
        if stem == "imagenet":
            self.classifier = nn.Sequential(
                nn.Linear(channels * 7 * 7, 64 * width),
                nn.ReLU(inplace=True),
                nn.Dropout(),
                nn.Linear(64 * width, 64 * width),
                nn.ReLU(inplace=True),
                nn.Dropout(),
                nn.Linear(64 * width, num_classes),
            )
        else:
            self.classifier = nn.Linear(channels, num_classes)
        _init_convolutions(self)
        for module in self.classifier.modules():
            if isinstance(module, nn.Linear):
                nn.init.normal_(module.weight, 0.0, 0.01)
                nn.init.zeros_(module.bias)

    def forward(self, x: Tensor) -> Tensor:
        logits: Tensor = self.classifier(torch.flatten(self.avgpool(self.features(x)), 1))
        return logits


def _init_convolutions(model: nn.Module) -> None:
    for module in model.modules():
        if isinstance(module, nn.Conv2d):
            nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
            if module.bias is not None:
                nn.init.zeros_(module.bias)


MODELS: dict[str, partial[VGG] | partial[ResNet]] = {
    "vgg11": partial(VGG, (1, 1, 2, 2, 2)),
    "vgg13": partial(VGG, (2, 2, 2, 2, 2)),
    "vgg16": partial(VGG, (2, 2, 3, 3, 3)),
    "vgg19": partial(VGG, (2, 2, 4, 4, 4)),
    "resnet10": partial(ResNet, BASIC, (1, 1, 1, 1)),
    "resnet18": partial(ResNet, BASIC, (2, 2, 2, 2)),
    "resnet34": partial(ResNet, BASIC, (3, 4, 6, 3)),
    "resnet50": partial(ResNet, BOTTLENECK, (3, 4, 6, 3)),
    "resnet101": partial(ResNet, BOTTLENECK, (3, 4, 23, 3)),
    "resnet152": partial(ResNet, BOTTLENECK, (3, 8, 36, 3)),
}


def build_model(
    name: str,
    *,
    num_classes: int,
    in_channels: int = 3,
    stem: str = "small",
    width: int = 64,
    seed: int | None = None,
) -> nn.Module:
    """Build a network of `MODELS` with random weights, K outputs and C input channels.

    Every VGG has batch norm, so torchvision's name "vgg11_bn" means "vgg11". stem: see the top of this module. width:
    channels of the first stage, 64 as published. seed: of the weights, which are then drawn on the CPU without changing the
    global random state. Raises ValueError if the name or the stem is unknown or a size is not a positive integer.
    """
    network = MODELS.get(name.removesuffix("_bn") if name.startswith("vgg") else name)
    if network is None:
        raise ValueError(f"build_model: name must be one of {', '.join(MODELS)}, got {name!r}")
    owner = network.func.__name__
    if stem not in STEMS:
        raise ValueError(f"{owner}: stem must be 'small' or 'imagenet', got {stem!r}")
    for argument, value in (("num_classes", num_classes), ("in_channels", in_channels), ("width", width)):
        if isinstance(value, bool) or not isinstance(value, int) or value < 1:
            raise ValueError(f"{owner}: {argument} must be a positive integer, got {value!r}")
    build = partial(network, num_classes=num_classes, in_channels=in_channels, stem=stem, width=width)
    if seed is None:
        return build()
    with fork_rng(seed), torch.device("cpu"):
        return build()
