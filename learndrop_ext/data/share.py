"""The share of the samples that one of several processes keeps rows of, and draws its batches from."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator, Sequence

import torch


class Share:
    """The samples of one rank while layers are dropped: those that it drew in its first whole epoch after the drop.

    A DistributedSampler deals each rank other samples in every epoch, so that every rank would end up making and keeping
    the rows of all. With a share the rows of a sample are made and kept once, by one rank, and the rank goes on with
    permutations of its own samples.

    Args:
        seed: of the permutations.
        rank: of this process.
    """

    def __init__(self, *, seed: int, rank: int) -> None:
        self.seed = seed
        self.rank = rank
        self.ids: torch.Tensor | None = None  # [n] int64, each once; None until a whole epoch was drawn
        self._sizes: list[int] = []  # of that epoch's batches

    def forget(self) -> None:
        """Follow the user's order again, until a whole epoch of it was drawn."""
        self.ids, self._sizes = None, []

    def note(self, batches: Iterable[Sequence[int]], count: int | None) -> Iterator[Sequence[int]]:
        """Pass the batches of an epoch on; what they hold is the share once all have been drawn.

        Args:
            batches: in the user's order.
            count: how many there are, None if that is not known before the last one.
        """
        drawn: list[list[int]] = []
        for ids in batches:
            drawn.append([int(i) for i in ids])
            if len(drawn) == count:
                self._take(drawn)
            yield ids
        self._take(drawn)

    def batches(self, epoch: int) -> Iterator[list[int]]:
        """Return an epoch of batches from the share, as many and as large as the user's were.

        The order is a permutation that seed, epoch and rank give. Where the user's epoch drew samples several times, a
        further permutation follows.
        """
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
        """How many batches an epoch of the share has."""
        return len(self._sizes)

    def _take(self, drawn: list[list[int]]) -> None:
        if self.ids is None and drawn:
            self.ids = torch.as_tensor(list(dict.fromkeys(i for ids in drawn for i in ids)), dtype=torch.int64)
            self._sizes = [len(ids) for ids in drawn]
