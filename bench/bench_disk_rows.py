"""Rows of a store, read in random order and verified, compared with plain positioned reads of the same rows.

    pytest bench/bench_disk_rows.py --benchmark-only

Each round reads the whole file cold: its pages are dropped from the page cache before (POSIX_FADV_DONTNEED; the host of a
virtual machine may still cache them). The plain reads use the same batches of rows and as many threads, with one read and a
checksum per row, so that both sides do the same work. A sequential read of the file shows the limit of the disk. All three
take turns in each round, because the speed of a shared disk changes from second to second. LEARNDROP_BENCH_DIR is the
folder on the disk to be measured (default: the temporary one).
"""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from measure import measure_in_turn, waited_for
from pytest_benchmark.fixture import BenchmarkFixture

from learndrop_ext.ops import transfer
from learndrop_ext.rows.disk import DiskTier
from learndrop_ext.rows.layout import RowForm, RowLayout
from learndrop_ext.rows.store.fingerprint import Fingerprint
from learndrop_ext.rows.store.store import THREADS, RowKeys, RowStore, StoredRows

FILE_BYTES = int(os.environ.get("LEARNDROP_BENCH_FILE_MB", "256")) << 20
BATCH = 128
CHUNK = 1 << 20
# The disk is shared: single rounds differ by half.
ROUNDS = int(os.environ.get("LEARNDROP_BENCH_ROUNDS", "15"))
SIZES = [4096, 32 << 10, 128 << 10, 256 << 10]


@dataclass(frozen=True)
class File:
    """An open file of rows, in the order in which they are asked for."""

    rows: DiskTier
    layout: RowLayout
    descriptor: int
    order: torch.Tensor
    row_bytes: int

    def drop_pages(self) -> None:
        os.posix_fadvise(self.descriptor, 0, 0, os.POSIX_FADV_DONTNEED)


@pytest.fixture(params=SIZES, ids=lambda size: f"{size >> 10}KB")
def file(request: pytest.FixtureRequest) -> Iterator[File]:
    size = request.param
    count = max(1, FILE_BYTES // size // BATCH) * BATCH
    with tempfile.TemporaryDirectory(dir=os.environ.get("LEARNDROP_BENCH_DIR")) as folder:
        store, form = RowStore(Path(folder)), RowForm.of(torch.empty(1, size // 4), "fp32")
        made_of = Fingerprint(weights="", cut=1, codec="fp32", layers="", loop="", row="", views="one")
        rows = DiskTier(private=False)
        rows.open(StoredRows(store, made_of))
        rows.note_form(form, torch.float32)
        for slots in torch.arange(count).split(BATCH):
            rows.name(slots, RowKeys([b"%d" % i for i in slots.tolist()], [0] * BATCH, [None] * BATCH))
            rows.write(slots, torch.randint(0, 256, (BATCH, size), dtype=torch.uint8))
        (path,) = Path(folder).glob("rows-*.bin")
        descriptor = os.open(path, os.O_RDONLY)
        os.fsync(descriptor)
        yield File(rows, RowLayout.of(form.shape, "fp32"), descriptor, torch.randperm(count), size)
        os.close(descriptor)
        rows.close()
        store.close()


@pytest.mark.benchmark(timer=waited_for)
def test_disk_rows(benchmark: BenchmarkFixture, file: File) -> None:
    into = torch.empty((BATCH, file.row_bytes), dtype=torch.uint8)
    memory = [memoryview(row.numpy()) for row in into]
    buffers = [bytearray(CHUNK) for _ in range(THREADS)]
    share = -(-len(file.order) * file.row_bytes // THREADS // CHUNK) * CHUNK
    end = file.layout.end(len(file.order))
    batches = [slots.tolist() for slots in file.order.split(BATCH)]

    def ours() -> None:
        for slots in file.order.split(BATCH):
            file.rows.read(slots, into)

    def from_begin_to_end(thread: int) -> None:
        for offset in range(4096 + thread * share, min(4096 + (thread + 1) * share, end), CHUNK):
            os.preadv(file.descriptor, [buffers[thread]], offset)

    def read_rows(positions: range, slots: list[int]) -> None:
        for i in positions:
            os.preadv(file.descriptor, [memory[i]], file.layout.begin(slots[i]))
            transfer.crc32c(memory[i])

    with ThreadPoolExecutor(THREADS) as pool:

        def sequential() -> None:
            list(pool.map(from_begin_to_end, range(THREADS)))

        def plain() -> None:
            for slots in batches:
                shares = [range(thread, BATCH, THREADS) for thread in range(THREADS)]
                list(pool.map(read_rows, shares, [slots] * THREADS))

        measure_in_turn(
            benchmark,
            ours,
            {"plain reads of the rows": plain, "sequential read": sequential},
            prepare=file.drop_pages,
            suite="disk_rows",
            case=f"read {file.row_bytes >> 10} KB rows, cold, {THREADS} threads",
            moved_bytes=len(file.order) * file.row_bytes,
            rounds=ROUNDS,
        )
