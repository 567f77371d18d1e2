"""Twenty rows, what they are called in a store, and what is done with a store in processes of their own."""

from __future__ import annotations

import dataclasses
import os
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from learndrop_ext.ops import transfer
from learndrop_ext.rows.layout import RowForm, RowLayout
from learndrop_ext.rows.store.fingerprint import Fingerprint
from learndrop_ext.rows.store.keeping import compact
from learndrop_ext.rows.store.store import RowKeys, RowStore, StoredRows

PRINT = Fingerprint(
    weights="ab12", cut=2, codec="fp32", layers="Net: a, b", loop="nothing", row="torch.float32 [1500]", views="one"
)
FORM = RowForm.of(torch.empty(1, 1500), "fp32")
STRIDE = RowLayout.of(FORM.shape, "fp32").stride_bytes
VALUES = torch.randint(0, 256, (20, STRIDE), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))


def other(number: int) -> Fingerprint:
    return dataclasses.replace(PRINT, weights=f"other {number}")


def names(of: range | list[int]) -> list[bytes]:
    return [b"sample %d" % i for i in of]


def keys(of: range | list[int]) -> RowKeys:
    return RowKeys(names(of), [0] * len(of), [i for i in of])


def add(stored: StoredRows, of: range | list[int]) -> torch.Tensor:
    return stored.append(keys(of), VALUES[list(of)], FORM, torch.float32)


def rows_of(stored: StoredRows) -> dict[int, torch.Tensor]:
    """All rows in a store that are as they were written, by sample."""
    found = stored.find(dict(enumerate(names(range(20)))))
    into = torch.zeros(len(found.place), STRIDE, dtype=torch.uint8)
    good = ~stored.damaged(found.place)
    assert stored.read(found.place[good], into[good.nonzero().flatten()]) is None
    out = {}
    for i, place in zip(found.sample[good].tolist(), found.place[good], strict=True):
        assert stored.read(place[None], into[:1]) is None
        out[i] = into[0, :6000].clone()
    return out


def whole(rows: dict[int, torch.Tensor]) -> bool:
    """Whether all rows have the values of their sample."""
    return all(torch.equal(row, VALUES[i, :6000]) for i, row in rows.items())


class KillSwitch:
    """Kills this process at the n-th call that changes a file or the index, before it (half=False) or half-way."""

    def __init__(self) -> None:
        self.calls = self.kill_at = 0
        self.half = False
        transfer.write_rows = self._counted(transfer.write_rows, _half_of_rows)
        for name in ("open", "close", "unlink"):
            setattr(os, name, self._counted(getattr(os, name), lambda real, *given, **more: real(*given, **more)))

    def watch(self, store: RowStore) -> None:
        """Count the statements of an index too."""
        store.db.set_trace_callback(lambda _: self._count())

    def _count(self) -> None:
        self.calls += 1
        if self.calls == self.kill_at:
            os.kill(os.getpid(), signal.SIGKILL)

    def _counted(self, real: Callable[..., Any], half: Callable[..., Any]) -> Callable[..., Any]:
        def call(*given: Any, **more: Any) -> Any:
            if self.half and self.calls + 1 == self.kill_at:
                half(real, *given, **more)
            self._count()
            return real(*given, **more)

        return call


def _half_of_rows(real: Callable[..., Any], file: Any, slots: Any, rows: Any, checksums: Any, **more: Any) -> None:
    real(file, slots[: len(slots) // 2], rows, checksums, **more)


def killed_everywhere(folder: str) -> None:
    """Kill a child at each call of an append, a deletion and a compaction. Print how often, and how many rows were left."""
    switch = KillSwitch()
    points, left = 0, set()
    for half in (False, True):
        at = 0
        while True:
            at += 1
            inner = Path(folder) / f"{half} {at}"
            inner.mkdir()
            store = RowStore(inner)
            add(StoredRows(store, PRINT), range(8))
            store.close()
            if _ends(switch, inner, at, half=half):
                break
            points += 1
            store = RowStore(inner)
            stored = StoredRows(store, PRINT)
            found = rows_of(stored)
            assert whole(found), (at, half)
            assert set(range(4, 8)) <= set(found), (at, half, sorted(found))
            left.add(len(found))
            add(stored, range(20))
            stored.close()
            compact(store)
            assert len(list(inner.glob("rows-*.bin"))) == 1, (at, half)
            assert whole(rows_of(StoredRows(store, PRINT)))
            assert len(rows_of(StoredRows(store, PRINT))) == 20
            store.close()
    print(points, sorted(left))


def _ends(switch: KillSwitch, folder: Path, at: int, *, half: bool) -> bool:
    """Whether a child that is killed at its `at`-th call has come to its end before."""
    process = os.fork()
    if not process:
        store = RowStore(folder)
        switch.calls, switch.kill_at, switch.half = 0, at, half
        switch.watch(store)
        stored = StoredRows(store, PRINT)
        add(stored, range(8, 14))
        stored.forget(names(range(4)), [0] * 4)
        stored.close()
        compact(store)
        os._exit(0)
    status = os.waitpid(process, 0)[1]
    assert status == 0 or os.WTERMSIG(status) == signal.SIGKILL, status
    return status == 0


def add_in_pieces(folder: str, seed: str) -> None:
    """Add all rows in another order, some at a time."""
    store = RowStore(Path(folder))
    stored = StoredRows(store, PRINT)
    order = torch.randperm(20, generator=torch.Generator().manual_seed(int(seed))).tolist()
    for begin in range(0, 20, 3):
        add(stored, order[begin : begin + 3])
    print(sorted(rows_of(stored)))


def die_with_private_rows(folder: str) -> None:
    """End without closing anything."""
    add(StoredRows(RowStore(Path(folder)), PRINT, private=True), range(4))
    os._exit(0)


def written_by_a_fork(folder: str) -> None:
    """Read and add rows in a forked process. Print what happens."""
    stored = StoredRows(RowStore(Path(folder)), PRINT)
    places = add(stored, range(4))
    process = os.fork()
    if not process:
        into = torch.zeros(4, STRIDE, dtype=torch.uint8)
        print(stored.read(places, into), torch.equal(into[:, :6000], VALUES[:4, :6000]))
        try:
            add(stored, range(4, 8))
        except RuntimeError as error:
            print(error, flush=True)
        os._exit(0)
    os.waitpid(process, 0)
    print(sorted(rows_of(stored)))
