"""Random flips and shifts of rows on their way out of a cache."""

from __future__ import annotations

import torch

from learndrop_ext.cache.cache import ActivationCache
from learndrop_ext.cache.config import CacheConfig


class Moves:
    """Draws a flip and a shift for each row that is read.

    Args:
        config: says which of them to draw.
        generator: draws them.
    """

    def __init__(self, config: CacheConfig, generator: torch.Generator) -> None:
        self._config = config
        self._generator = generator

    def gather(self, cache: ActivationCache, at: torch.Tensor) -> torch.Tensor:
        """Return the rows at places [B] of a cache, moved."""
        flip = shift = None
        if self._config.flip:
            flip = torch.rand(len(at), generator=self._generator) < 0.5
        if self._config.shift:
            most = self._config.shift
            shift = torch.randint(-most, most + 1, (len(at), 2), generator=self._generator)
        return cache.gather(at, flip=flip, shift=shift)

    def take(self, rows: torch.Tensor, index: torch.Tensor) -> torch.Tensor:
        """Return rows[index] of rows [n, ...] and index [B], flipped and shifted like those of a cache."""
        if not self._config.augmented:
            in_order = torch.equal(index, torch.arange(len(rows)))
            return rows if in_order else rows[index.to(rows.device)]
        scratch = ActivationCache(
            len(rows), rows.shape[1:], codec=self._config.codec, device=rows.device, augmented=True
        )
        scratch.append(torch.arange(len(rows)), rows)
        moved = self.gather(scratch, index)
        scratch.close()
        return moved


def mirrored(x: torch.Tensor, flip: torch.Tensor) -> torch.Tensor:
    """Return images [B, C, H, W], those in `flip` [B] bool (CPU) flipped horizontally."""
    where = flip.to(x.device).view(-1, *[1] * (x.dim() - 1))
    return torch.where(where, x.flip(-1), x)
