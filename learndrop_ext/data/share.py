"""The share of the samples whose rows one of several processes keeps, and from which it draws its batches."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator, Sequence

import torch


class Share:
    """The samples of one rank while layers are dropped: those it drew in its first whole epoch after the drop.

    A DistributedSampler gives each rank other samples in every epoch, so every rank would end up computing and keeping the
    rows of all samples. With a share, one rank computes and keeps the rows of a sample, and draws permutations of its own
    samples from then on, given by seed, epoch and rank.
    """

    def __init__(self, *, seed: int, rank: int) -> None:
        self.seed, self.rank = seed, rank
        self.ids: torch.Tensor | None = None  # [n] int64, each once; None until a whole epoch has been drawn
        self._sizes: list[int] = []  # batch sizes of that epoch

    def forget(self) -> None:
        """Follow the user's order again until a whole epoch of it has been drawn."""
        self.ids, self._sizes = None, []

    def note(self, batches: Iterable[Sequence[int]], count: int | None) -> Iterator[Sequence[int]]:
        """Yield the batches of an epoch, `count` if that is known. Their samples become the share once all are drawn."""
        drawn: list[list[int]] = []
        for ids in batches:
            drawn.append([int(i) for i in ids])
            if len(drawn) == count:
                self._take(drawn)
            yield ids
        self._take(drawn)

    def batches(self, epoch: int) -> Iterator[list[int]]:
        """Yield an epoch of batches from the share, of the number and sizes of the user's: of a permutation, and of another
        one after it if the user's epoch drew samples more than once."""
        assert self.ids is not None
        key = hashlib.sha256(f"{self.seed} {epoch} {self.rank}".encode()).digest()
        generator = torch.Generator().manual_seed(int.from_bytes(key[:8], "little") >> 1)
        left: list[int] = []
        for size in self._sizes:
            while len(left) < size:
                left += self.ids[torch.randperm(len(self.ids), generator=generator)].tolist()
            yield left[:size]
            left = left[size:]

    def __len__(self) -> int:
        """Return the number of batches in an epoch."""
        return len(self._sizes)

    def _take(self, drawn: list[list[int]]) -> None:
        if self.ids is None and drawn:
            self.ids = torch.as_tensor(list(dict.fromkeys(i for ids in drawn for i in ids)), dtype=torch.int64)
            self._sizes = [len(ids) for ids in drawn]
