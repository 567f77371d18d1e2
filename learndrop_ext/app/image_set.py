"""Labelled images read a batch at a time, without Python code per sample.

N samples, B samples in a batch, C channels, H and W pixels.
"""

from __future__ import annotations

import math
import operator
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any, TypeAlias

import torch
from torch import Tensor
from torch.nn import functional
from torch.utils.data import DataLoader, Dataset, default_collate

from learndrop_ext.app.photos import WHOLE, read_photo

AUGMENTATIONS = (None, "standard", "flip", "crop")

Batch: TypeAlias = tuple[Tensor, Tensor]


class ImageSet(Dataset[Batch]):
    """A map-style dataset of labelled images that reads whole batches.

    `image_set[i]` returns (float32 [C, H, W], int64 []). `__getitems__(ids)`, which a DataLoader calls, returns (float32
    [B, C, H, W], int64 [B]); the DataLoader's `collate_fn` must be `collate_batch`. Both raise IndexError for ids outside
    [0, N).

    Args:
        images: [N, C, H, W] uint8, or N image files, which are decoded at each read, see `read_photo`.
        labels: [N] int64. Images given as a tensor are moved to their device.
        mean, std: mean and standard deviation of pixels in [0, 1], per channel.
        size: side in pixels of images from files.
        augment: "standard" shifts each image by up to an eighth of its side, at most 4 pixels, fills with zeros, and, if
            `flip`, flips half of the images horizontally; "flip" only flips; "crop" scales a window of each image to its
            size, see `_windows`, and, if `flip`, flips; None does nothing. Drawn at each read from torch's global random
            state.
        flip: whether "standard" and "crop" flip.

    Raises:
        ValueError: If an argument has the wrong dtype, shape or value.
    """

    def __init__(
        self,
        images: Tensor | Sequence[Path],
        labels: Tensor,
        *,
        mean: Sequence[float],
        std: Sequence[float],
        size: int = 128,
        augment: str | None = None,
        flip: bool = True,
    ) -> None:
        if isinstance(images, Tensor) and (images.dtype != torch.uint8 or images.ndim != 4):
            raise ValueError(f"ImageSet: images must be uint8 [N, C, H, W], got {images.dtype} {list(images.shape)}")
        if labels.dtype != torch.int64 or labels.shape != (len(images),):
            raise ValueError(f"ImageSet: labels must be int64 [{len(images)}], got {labels.dtype} {list(labels.shape)}")
        channels = images.shape[1] if isinstance(images, Tensor) else 3
        if len(mean) != channels or len(std) != channels or min(std) <= 0:
            raise ValueError(
                f"ImageSet: mean and std (> 0) must have {channels} values, got {tuple(mean)}, {tuple(std)}"
            )
        if augment not in AUGMENTATIONS:
            raise ValueError(f"ImageSet: augment must be None, 'standard', 'flip' or 'crop', got {augment!r}")
        self.labels, self.device = labels, labels.device
        self.images: Tensor | tuple[Path, ...]
        # What names the images in a store of rows is `data` if they are in memory, `samples` if they are files.
        if isinstance(images, Tensor):
            self.images = self.data = images.to(self.device)
            self.size = images.shape[-1]
        else:
            self.images, self.size = tuple(images), size
            self.samples = list(zip(self.images, labels.tolist(), strict=True))
        self.mean, self.std = tuple(mean), tuple(std)
        self.augment, self.flip = augment, flip
        self._shift = (255 * torch.tensor(self.mean, device=self.device)).view(-1, 1, 1)
        self._scale = (1 / (255 * torch.tensor(self.std, device=self.device))).view(-1, 1, 1)

    def __len__(self) -> int:
        return len(self.images)

    def __repr__(self) -> str:
        flip = ", flip" if self.augment and self.flip else ""
        return (
            f"ImageSet({len(self)} of {len(self.mean)}x{self.size}x{self.size}, mean={self.mean}, "
            f"std={self.std}, augment={self.augment}{flip})"
        )

    def __getitem__(self, index: int) -> Batch:
        x, y = self.__getitems__([operator.index(index)])
        return x[0], y[0]

    def __getitems__(self, indices: Sequence[int]) -> Batch:
        ids = torch.as_tensor(indices, dtype=torch.int64, device="cpu")
        if ids.numel() and (int(ids.min()) < 0 or int(ids.max()) >= len(self)):
            wrong = next(i for i in ids.tolist() if not 0 <= i < len(self))
            raise IndexError(f"ImageSet: ids must be in [0, {len(self)}), got {wrong}")
        rows = ids.to(self.device, non_blocking=True)  # from pageable memory: read before the call returns
        windows = _windows(len(ids)) if self.augment == "crop" else None
        if isinstance(self.images, Tensor):
            x = self.images[rows] if windows is None else _cropped(self.images[rows], windows.to(self.device))
        else:
            read = zip(ids.tolist(), [WHOLE] * len(ids) if windows is None else windows.tolist(), strict=True)
            x = torch.stack([read_photo(self.images[i], size=self.size, window=w) for i, w in read]).to(self.device)
        if self.augment == "standard":
            x = _shifted(x, padding=min(4, self.size // 8))
        if self.augment == "flip" or (self.augment and self.flip):
            x = _flipped(x)
        return x.to(torch.float32).sub_(self._shift).mul_(self._scale), self.labels[rows]

    @property
    def bytes_decoded(self) -> int:
        """Bytes of the decoded images."""
        return len(self) * len(self.mean) * self.size**2

    def to(self, device: torch.device | str) -> ImageSet:
        """Return the set on a device. Files are decoded on the CPU."""
        return self._replaced(labels=self.labels.to(device))

    def subset(self, indices: Sequence[int]) -> ImageSet:
        """Return the set of the images at `indices`, in this order."""
        chosen = list(indices)
        images = self.images[chosen] if isinstance(self.images, Tensor) else tuple(self.images[i] for i in chosen)
        return self._replaced(images=images, labels=self.labels[chosen])

    def augmented(self, augment: str | None = "standard") -> ImageSet:
        """Return the set with another augmentation."""
        return self._replaced(augment=augment)

    def normalized(self, mean: Sequence[float], std: Sequence[float]) -> ImageSet:
        """Return the set with another mean and standard deviation."""
        return self._replaced(mean=mean, std=std)

    def resized(self, size: int) -> ImageSet:
        """Return the set with images of `size` pixels a side (bilinear, antialiased)."""
        if not isinstance(self.images, Tensor) or size == self.size:
            return self._replaced(size=size)
        n, c = self.images.shape[:2]
        images = torch.empty(n, c, size, size, dtype=torch.uint8, device=self.device)
        for part, out in zip(self.images.split(1024), images.split(1024), strict=True):
            out.copy_(functional.interpolate(part.float(), size=(size, size), mode="bilinear", antialias=True).round_())
        return self._replaced(images=images)

    def decoded(self) -> ImageSet:
        """Return the set with its files decoded into one uint8 tensor [N, C, H, W] on its device."""
        if isinstance(self.images, Tensor):
            return self
        images = torch.empty(len(self), 3, self.size, self.size, dtype=torch.uint8)
        with ThreadPoolExecutor() as pool:
            for i, image in enumerate(pool.map(partial(read_photo, size=self.size), self.images)):
                images[i] = image
        return self._replaced(images=images)

    def _replaced(self, **changes: Any) -> ImageSet:
        """Return the set with some constructor arguments replaced."""
        kept = ("images", "labels", "mean", "std", "size", "augment", "flip")
        return ImageSet(**{name: getattr(self, name) for name in kept} | changes)


def _shifted(images: Tensor, *, padding: int) -> Tensor:
    """Shift each of `images` [B, C, H, W] by up to `padding` pixels each way."""
    b, _, height, width = images.shape
    windows = functional.pad(images, (padding,) * 4).unfold(2, height, 1).unfold(3, width, 1)
    dy, dx = torch.randint(0, 2 * padding + 1, (2, b), device=images.device)
    return windows[torch.arange(b, device=images.device), :, dy, dx].contiguous()


def _windows(count: int) -> Tensor:
    """Draw windows of square images: [B, 4], left, top, width and height as shares of a side.

    As torchvision's RandomResizedCrop: 8 to 100 % of the area, and sides in a ratio of 3/4 to 4/3. Where a side would be
    longer than the image's, it is the image's.
    """
    area, ratio = torch.empty(count).uniform_(0.08, 1), torch.empty(count).uniform_(-1, 1).mul_(math.log(4 / 3)).exp_()
    sides = torch.stack([area * ratio, area / ratio], 1).sqrt_().clamp_(max=1)
    return torch.cat([torch.rand(count, 2) * (1 - sides), sides], 1)


def _cropped(images: Tensor, windows: Tensor) -> Tensor:
    """Scale the window [B, 4] of each of `images` [B, C, H, W] to its size, as float32 (bilinear)."""
    scale, shift = torch.diag_embed(windows[:, 2:]), 2 * windows[:, :2] + windows[:, 2:] - 1
    grid = functional.affine_grid(torch.cat([scale, shift[:, :, None]], 2), list(images.shape), align_corners=False)
    return functional.grid_sample(images.to(torch.float32), grid, padding_mode="border", align_corners=False)


def _flipped(images: Tensor) -> Tensor:
    """Flip each of `images` [B, C, H, W] horizontally with probability 1/2."""
    mirrored = torch.rand(len(images), 1, 1, 1, device=images.device) < 0.5
    return torch.where(mirrored, images.flip(3), images)


def collate_batch(batch: Batch | list[Batch]) -> Batch:
    """Return a batch unchanged, or stack a list of samples: the `collate_fn` of an `ImageSet`."""
    if isinstance(batch, tuple):
        return batch
    stacked: Batch = tuple(default_collate(batch))
    return stacked


def make_loader(
    image_set: ImageSet,
    batch_size: int,
    *,
    shuffle: bool = False,
    seed: int | None = None,
    drop_last: bool = False,
    num_workers: int = 0,
) -> DataLoader[Batch]:
    """Return a DataLoader of (float32 [B, C, H, W], int64 [B]) on the device of the set.

    seed: of the order; None to draw from torch's global random state. Workers stay from epoch to epoch, and batches are
    then pinned for a GPU. Raises ValueError if there are workers and the set is not on the CPU.
    """
    if num_workers and image_set.device.type != "cpu":
        raise ValueError(f"make_loader: num_workers must be 0 for a set on {image_set.device}, got {num_workers}")
    generator = None if seed is None else torch.Generator().manual_seed(seed)
    return DataLoader(
        image_set,
        batch_size,
        shuffle=shuffle,
        generator=generator,
        drop_last=drop_last,
        num_workers=num_workers,
        persistent_workers=num_workers > 0,
        pin_memory=num_workers > 0 and torch.cuda.is_available(),
        collate_fn=collate_batch,
    )
