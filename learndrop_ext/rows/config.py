"""The user's settings of the cache."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeGuard

import torch

from learndrop_ext.ops import CODECS


@dataclass(frozen=True)
class CacheConfig:
    """How the rows of the dropped layers are kept.

    Args:
        codec (str, optional): "fp16" (clamped to +-65504), "bf16", "fp32" (exact for fp32 training) or "uint8" (one
            scale and zero point per sample and channel; half the bytes of fp16). Default: "fp16"
        views (int or "auto", optional): random augmentations kept of each sample; 1 needs a dataset without randomness.
            "auto" is 1 for such a dataset. If samples are random independently of each other, "auto" is the largest
            number with which epochs that read images take at most half of the shortened run, and at least 2; see
            `data.source.settle_views`. Default: "auto"
        budget_bytes (int or "auto", optional): limit on the bytes of rows on the model's device, and of the labels and all
            else in a batch that is kept beside them; "auto" is half of what is free when a drop is decided. Default: "auto"
        host_bytes (int or "auto", optional): limit on the bytes of further rows in host memory, for a model on a GPU;
            "auto" is half of what is free. Default: 0
        store (str or Path, optional): a folder in which rows outlive the run, made if it is not there. They spill there if
            memory does not hold them, a run that resumes finds them there, and so does any other run with the same layers
            and images, see docs/memory-and-disk.md. Default: None
        store_bytes (int or "auto", optional): limit on the bytes that this run adds to the store for the rows of one drop;
            "auto" is half of what is free. Default: "auto"
        key (Callable, optional): index in the dataset -> str or int, the name of its sample in the store. It must be another
            one if the image is another one. Default: path, size and time of its file; the image's own values for a dataset
            in memory; else its index, for a dataset whose repr tells it from others
        targets (sequence, optional): the labels of all samples of the dataset [N], if the batches are (images, labels) and
            the dataset does not offer them as `targets`, `labels` or `samples`: a run that finds its rows in the store then
            reads no image for its label. Default: None
        mirror (bool, optional): keep two rows of each sample, one of the image and one of its horizontal flip, and draw
            them in turn. Default: False
        partition ("share" or "all", optional): with several processes, each keeps the rows of the samples it draws in its
            first whole epoch after a drop, and draws its batches from these from then on ("share"); or each follows its
            sampler and keeps the rows of whatever it draws ("all"). Default: "share"
        seed (int, optional): random seed of views and of the order of samples with ids. Default: 0

    Raises:
        ValueError: if a value is out of range, or two exclude each other.
    """

    codec: str = "fp16"
    views: int | str = "auto"
    budget_bytes: int | str = "auto"
    host_bytes: int | str = 0
    store: str | os.PathLike[str] | None = None
    store_bytes: int | str = "auto"
    key: Callable[[int], str | int] | None = None
    targets: Sequence[Any] | torch.Tensor | None = field(default=None, compare=False, repr=False)
    mirror: bool = False
    partition: str = "share"
    seed: int = 0

    @property
    def rows_per_sample(self) -> int:
        """V, the rows kept of each sample; 1 while `views` is "auto"."""
        return 2 if self.mirror else self.views if isinstance(self.views, int) else 1

    def __post_init__(self) -> None:
        if self.codec not in CODECS:
            raise ValueError(f"CacheConfig: codec must be one of {', '.join(CODECS)}, got {self.codec!r}")
        if self.views != "auto" and not (_is_whole(self.views) and self.views >= 1):
            raise ValueError(f"CacheConfig: views must be a whole number >= 1 or 'auto', got {self.views!r}")
        if self.partition not in ("share", "all"):
            raise ValueError(f"CacheConfig: partition must be 'share' or 'all', got {self.partition!r}")
        for name in ("budget_bytes", "host_bytes", "store_bytes"):
            value = getattr(self, name)
            if value != "auto" and not (_is_whole(value) and value >= 0):
                raise ValueError(f"CacheConfig: {name} must be bytes >= 0 or 'auto', got {value!r}")
        if not isinstance(self.mirror, bool):
            raise ValueError(f"CacheConfig: mirror must be True or False, got {self.mirror!r}")
        if self.store is not None and not isinstance(self.store, str | os.PathLike):
            raise ValueError(f"CacheConfig: store must be the path of a folder or None, got {self.store!r}")
        if self.store is not None:  # the program may change its folder
            object.__setattr__(self, "store", os.path.abspath(os.path.expanduser(self.store)))
        if self.key is not None and not callable(self.key):
            raise ValueError(f"CacheConfig: key must be a function of an index or None, got {self.key!r}")
        if not _is_whole(self.seed):
            raise ValueError(f"CacheConfig: seed must be a whole number, got {self.seed!r}")
        if self.mirror and self.views not in (1, "auto"):
            raise ValueError(f"CacheConfig: views must be 1 if mirror is True, got {self.views}")


def _is_whole(value: object) -> TypeGuard[int]:
    return isinstance(value, int) and not isinstance(value, bool)


def cache_config(cache: CacheConfig | str | None) -> CacheConfig:
    """Return the configuration given as an argument of DropScheduler. Raises TypeError or ValueError for a wrong one."""
    if isinstance(cache, str):
        cache = CacheConfig(codec=cache)
    if cache is not None and not isinstance(cache, CacheConfig):
        raise TypeError(f"DropScheduler: cache must be a CacheConfig, a codec or None, got {type(cache).__name__}")
    return cache if cache is not None else CacheConfig()
