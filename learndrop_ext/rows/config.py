"""The user's settings of the cache."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TypeGuard

from learndrop_ext.ops import CODECS

PARTITIONS = ("share", "all")


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
        budget_bytes (int or "auto", optional): limit on the bytes of rows on the model's device; "auto" is half of what
            is free when a drop is decided. Default: "auto"
        host_bytes (int or "auto", optional): limit on the bytes of further rows in host memory, for a model on a GPU.
            Default: 0
        disk_bytes (int or "auto", optional): limit on the bytes of further rows in a file. If it holds all rows, a run
            that resumes from a checkpoint finds them there. Default: 0
        disk_dir (str, optional): the folder of the file. Default: None
        shared (bool, optional): look in `disk_dir` for rows that another run computed from the same images with the same
            layers, and leave this run's rows there; `disk_bytes=0` then means "auto". Default: False
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
    disk_bytes: int | str = 0
    disk_dir: str | None = None
    shared: bool = False
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
        if self.partition not in PARTITIONS:
            raise ValueError(f"CacheConfig: partition must be 'share' or 'all', got {self.partition!r}")
        for name in ("budget_bytes", "host_bytes", "disk_bytes"):
            value = getattr(self, name)
            if value != "auto" and not (_is_whole(value) and value >= 0):
                raise ValueError(f"CacheConfig: {name} must be bytes >= 0 or 'auto', got {value!r}")
        for name in ("shared", "mirror"):
            if not isinstance(getattr(self, name), bool):
                raise ValueError(f"CacheConfig: {name} must be True or False, got {getattr(self, name)!r}")
        for name in ("disk_bytes", "shared"):
            if getattr(self, name) and self.disk_dir is None:
                raise ValueError(
                    f"CacheConfig: disk_dir must be a folder where {name} is {getattr(self, name)!r}, got None"
                )
        if not _is_whole(self.seed):
            raise ValueError(f"CacheConfig: seed must be a whole number, got {self.seed!r}")
        if self.mirror and self.views not in (1, "auto"):
            raise ValueError(f"CacheConfig: views must be 1 if mirror is True, got {self.views}")


def _is_whole(value: object) -> TypeGuard[int]:
    return isinstance(value, int) and not isinstance(value, bool)


def cache_config(cache: CacheConfig | str | None) -> CacheConfig:
    """Return the configuration given as an argument of DropScheduler.

    Raises:
        TypeError: if `cache` is neither a CacheConfig, the name of a codec nor None.
        ValueError: if the codec is unknown.
    """
    if isinstance(cache, str):
        cache = CacheConfig(codec=cache)
    if cache is not None and not isinstance(cache, CacheConfig):
        raise TypeError(f"DropScheduler: cache must be a CacheConfig, a codec or None, got {type(cache).__name__}")
    return cache if cache is not None else CacheConfig()
