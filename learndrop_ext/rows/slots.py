"""Where the rows of a sample are: (sample, view) -> place. N samples, V views, B samples in a batch."""

from __future__ import annotations

from typing import Protocol

import torch

from learndrop_ext.rows.plan import lengthened


class SlotTable:
    """Assigns slots to samples in the order in which they are first drawn.

    The row of a view is at place slot * V + view, so the rows of the samples drawn so far are contiguous. The generator
    draws the first view of each sample.
    """

    def __init__(self, size: int, views: int, generator: torch.Generator) -> None:
        self.views = views
        self.used = 0
        self.generator = generator
        self._order = torch.empty(0, dtype=torch.int64)  # samples by slot, with room for more
        self.table = self._table_room = torch.empty(0, dtype=torch.int64)  # [N] slots, -1 for none
        self.view_offset = self._offset_room = torch.empty(0, dtype=torch.int64)  # [N]
        self.extend(size)

    def __len__(self) -> int:
        return len(self.table)

    def extend(self, more: int) -> None:
        """Add samples at the end. Memory grows in steps, so frequent calls are cheap."""
        begin, end = len(self.table), len(self.table) + more
        self._table_room = lengthened(self._table_room, end)
        self._offset_room = lengthened(self._offset_room, end)
        self._table_room[begin:end] = -1
        self._offset_room[begin:end] = torch.randint(1 << 30, (more,), generator=self.generator)
        self.table, self.view_offset = self._table_room[:end], self._offset_room[:end]

    def clear(self) -> None:
        """Release all slots."""
        self.table.fill_(-1)
        self.used = 0

    def order(self) -> torch.Tensor:
        """Return the samples [n] by slot."""
        return self._order[: self.used].clone()

    def ids(self, slots: torch.Tensor) -> torch.Tensor:
        """Return the samples [n] that have the slots [n]."""
        return self._order[slots]

    def view(self, ids: torch.Tensor, epoch: int) -> torch.Tensor:
        """Return the view [B] of each sample in an epoch. All V views are drawn in V consecutive epochs."""
        if self.views == 1:
            return torch.zeros_like(ids)
        return (self.view_offset[ids] + epoch) % self.views

    def places(self, ids: torch.Tensor, epoch: int) -> torch.Tensor:
        """Return the place [B] of each sample's row in an epoch, -1 for samples without a slot."""
        slots = self.table.index_select(0, ids)
        if self.views == 1:
            return slots
        return torch.where(slots < 0, -1, slots * self.views + self.view(ids, epoch))

    def assign(self, ids: torch.Tensor, epoch: int) -> torch.Tensor:
        """Return `places`, after assigning slots to samples that have none."""
        at = self.places(ids, epoch)
        without = at < 0
        if not bool(without.any()):
            return at
        new = torch.as_tensor(list(dict.fromkeys(ids[without].tolist())))
        begin, self.used = self.used, self.used + len(new)
        self.table[new] = torch.arange(begin, self.used)
        self._order = lengthened(self._order, self.used)
        self._order[begin : self.used] = new
        return self.places(ids, epoch)

    def drawn(self) -> torch.Tensor:
        """Return the samples [n] that have a slot."""
        return torch.nonzero(self.table >= 0).flatten()


def first_of_each(places: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the distinct places [n] of a batch in ascending order, and the position [n] of the first of each."""
    ascending, order = places.sort(stable=True)
    keep = torch.ones(len(places), dtype=torch.bool)
    keep[1:] = ascending[1:] != ascending[:-1]
    return ascending[keep], order[keep]


class Filled(Protocol):
    """What is kept by place. filled: [R] bool, which places were written."""

    filled: torch.Tensor


def filled_at(store: Filled | None, at: torch.Tensor) -> torch.Tensor:
    """Return which places [B] (-1 for none) were written."""
    if store is None or not len(store.filled):
        return torch.zeros(len(at), dtype=torch.bool)
    inside = (at >= 0) & (at < len(store.filled))
    return inside & store.filled[at.clamp(0, len(store.filled) - 1)]
