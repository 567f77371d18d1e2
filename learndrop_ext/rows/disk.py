"""The rows of a cache that are in a store, by slot. R rows, S bytes from one row to the next in memory, n rows in a call."""

from __future__ import annotations

import math
import time

import torch
from torch import Tensor

from learndrop_ext.ops import free_bytes
from learndrop_ext.rows.layout import RowForm
from learndrop_ext.rows.plan import lengthened_for
from learndrop_ext.rows.store.store import RowKeys, StoredRows, StoreError

#: Rows smaller than half of this are read together with their neighbours, which the same epoch needs too. A disk that reads
#: 1.0 to 1.7 GB/s sequentially reached 0.23 GB/s in random reads of 4 KB (58,000 a second with any number of threads), 0.74
#: of 32 KB and 0.9 of 128 KB; larger blocks were no faster.
BLOCK_BYTES = 128 << 10


class DamagedRowError(StoreError):
    """A row in a store has changed."""


class DiskTier:
    """R rows by slot in a store, read and written by several threads without the GIL.

    A forked process can read them. What writes raises OSError if the disk is full or the store could not be opened, and
    RuntimeError in a forked process. Private rows are of no use to other runs.
    """

    def __init__(self, *, private: bool) -> None:
        self.is_private = private
        self._stored: StoredRows | None = None
        self._lies: tuple[RowForm, torch.dtype] | None = None  # how rows that are written lie, and their dtype
        self._names: dict[int, tuple[bytes, int, int | None]] = {}  # by slot: sample, view, digest of the image
        # 1 + the place of each slot's row, 0 for none; negative once it is forgotten here, and not in the store.
        self._next = torch.zeros(0, dtype=torch.int64)
        self._free_bytes = -math.inf, 0  # time of the last query and its result

    def open(self, stored: StoredRows) -> None:
        """Keep rows among these from now on: what rows depend on is known once the first have arrived."""
        self._stored = stored
        stored.note_use()

    @property
    def is_open(self) -> bool:
        """Whether `open` was called."""
        return self._stored is not None

    @property
    def stored(self) -> StoredRows:
        """The rows of the store. Raises OSError before `open`."""
        if self._stored is None:
            raise OSError("the store was not opened")
        return self._stored

    def name(self, slots: Tensor, keys: RowKeys) -> None:
        """Note what the rows of slots [n] are called in the store."""
        self._names.update(zip(slots.tolist(), zip(*keys, strict=True), strict=True))

    def has(self, slots: Tensor) -> Tensor:
        """Return which slots [n] have their row in the store."""
        self._next = lengthened_for(self._next, slots)
        return self._next[slots] > 0

    def take(self, slots: Tensor, places: Tensor) -> None:
        """Note that the rows of slots [n] are at places [n] of the store."""
        self._next = lengthened_for(self._next, slots)
        self._next[slots] = places + 1

    def read(self, slots: Tensor, into: Tensor) -> None:
        """Read rows at slots [n] int64 (CPU) to `into` [n, S] uint8 (CPU). Raises OSError, and DamagedRowError if a row does
        not match its checksum.

        If the whole file fits into half of the free memory, small rows are read in blocks, which stay in the page cache. An
        epoch then reads the disk once, whatever the order of the rows.
        """
        blocks = BLOCK_BYTES if self._reads_blocks(into.shape[1]) else 1
        bad = self.stored.read(self._next[slots] - 1, into, block_bytes=blocks)
        if bad is not None:
            raise DamagedRowError(
                f"a row in the store must have the checksum it was written with, got another at slot {int(slots[bad])}: its "
                "file was altered or truncated"
            )

    def note_form(self, form: RowForm, dtype: torch.dtype) -> None:
        """Note how the rows lie that will be written, and their dtype."""
        self._lies = form, dtype

    def write(self, slots: Tensor, rows: Tensor) -> None:
        """Add the rows [n, S] uint8 (CPU) of distinct slots [n] int64 (CPU) to the store."""
        assert self._lies is not None
        self.take(slots, self.stored.append(self._keys(slots), rows, *self._lies))

    def forget(self, slots: Tensor, *, in_store: bool = False) -> None:
        """Treat slots [n] as never written. in_store: delete their rows from the store too, also those forgotten before."""
        self._next = lengthened_for(self._next, slots)
        there = slots[self._next[slots] != 0]
        if not in_store:
            self._next[there] = -self._next[there].abs()
        elif len(there):
            samples, views, _ = self._keys(there)
            self.stored.forget(samples, views)
            self._next[there] = 0

    def close(self) -> None:
        """Close the store's file."""
        if self._stored is not None:
            self._stored.close()

    def _keys(self, slots: Tensor) -> RowKeys:
        return RowKeys(*zip(*(self._names[slot] for slot in slots.tolist()), strict=True))

    def _reads_blocks(self, row_bytes: int) -> bool:
        """Whether rows are small and the file fits into half of the free memory, which is queried once per second."""
        if 2 * row_bytes >= BLOCK_BYTES:
            return False
        now = time.monotonic()
        if now > self._free_bytes[0] + 1:
            self._free_bytes = now, free_bytes(torch.device("cpu"))
        return 2 * self.stored.nbytes <= self._free_bytes[1]
