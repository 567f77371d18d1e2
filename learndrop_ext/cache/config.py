"""The values a user sets for the cache, with their checks."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass

from learndrop_ext.ops import CODECS

PARTITIONS = ("share", "all")


@dataclass(frozen=True)
class CacheConfig:
    """How the rows of the dropped prefix are kept.

    codec: "fp16" (default, saturating at 65504), "bf16", "fp32" (exact for fp32 training) or "uint8" (one scale and
    zero point per sample and channel; half the bytes of fp16).
    views: how many random augmentations of a sample are kept; 1 wants a dataset without randomness.
    budget_bytes: the most the rows may take on the device, or "auto": half of what is free when a drop is decided.
    host_bytes, disk_bytes: the most that the rows which do not fit there may take in the host's memory (of a GPU model)
    and then in a file; "auto" as above. disk_dir: the folder of the file; where disk_bytes holds all rows, a run that
    goes on from a checkpoint finds them there.
    partition: of several processes, "share" (default): each keeps rows of the samples that it draws in its first whole
    epoch after a drop, and draws its batches from these from then on; or "all": each follows its sampler and keeps rows
    of whatever it draws, in the end of all samples. Without effect in one process.
    device: None for the model's device. Another device than the model's is refused.
    flip, shift: augmentation of cached [C, H, W] rows on the way out, drawn per sample and step: horizontal flip with
    probability 1/2, and an integer shift of up to `shift` pixels of the row with zero fill. Off by default.
    """

    codec: str = "fp16"
    views: int = 1
    budget_bytes: int | str = "auto"
    host_bytes: int | str = 0
    disk_bytes: int | str = 0
    disk_dir: str | None = None
    device: str | None = None
    flip: bool = False
    shift: int = 0
    mirror: bool = False
    shared: bool = False
    partition: str = "share"

    @property
    def augmented(self) -> bool:
        """Whether rows are flipped or shifted on the way out."""
        return self.flip or self.shift > 0

    def __post_init__(self) -> None:
        if self.codec not in CODECS:
            raise ValueError(f"CacheConfig: codec must be one of {', '.join(CODECS)}, got {self.codec!r}")
        if not isinstance(self.views, int) or isinstance(self.views, bool) or self.views < 1:
            raise ValueError(f"CacheConfig: views must be a whole number >= 1, got {self.views!r}")
        if self.partition not in PARTITIONS:
            raise ValueError(f"CacheConfig: partition must be 'share' or 'all', got {self.partition!r}")
        for name in ("budget_bytes", "host_bytes", "disk_bytes"):
            value = getattr(self, name)
            if value != "auto" and not (isinstance(value, int) and value >= 0):
                raise ValueError(f"CacheConfig: {name} must be bytes >= 0 or 'auto', got {value!r}")
        if self.disk_bytes and self.disk_dir is None:
            raise ValueError(
                f"CacheConfig: disk_dir must be a folder where disk_bytes is {self.disk_bytes!r}, got None"
            )
        if not isinstance(self.shift, int) or self.shift < 0:
            raise ValueError(f"CacheConfig: shift must be pixels >= 0, got {self.shift!r}")


def cache_config(cache: CacheConfig | str | None, views: int | None) -> CacheConfig:
    """The configuration that the arguments of DropScheduler mean. Raises TypeError or ValueError for others."""
    if isinstance(cache, str):
        cache = CacheConfig(codec=cache)
    if cache is not None and not isinstance(cache, CacheConfig):
        raise TypeError(f"DropScheduler: cache must be a CacheConfig, a codec or None, got {type(cache).__name__}")
    config = cache if cache is not None else CacheConfig()
    return config if views is None else dataclasses.replace(config, views=views)
