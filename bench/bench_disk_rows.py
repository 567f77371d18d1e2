"""Rows of a file, read in random order and checked, beside a plain read of the same file from its begin to its end, and
beside plain reads of the same rows in the same order, which show what the disk gives for reads of that size.

    pytest bench/bench_disk_rows.py --benchmark-only --benchmark-group-by=param:case

Each round reads the whole file cold: its pages are dropped from the page cache before (POSIX_FADV_DONTNEED; what a
virtual machine's host caches stays). All use THREADS threads; the plain ones check nothing, and the sequential one reads MB
by MB into one buffer a thread. LEARNDROP_BENCH_DIR names the folder, on the disk to be measured (default: the temporary
one).
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
from pytest_benchmark.fixture import BenchmarkFixture

from learndrop_ext.cache.disk import THREADS, DiskTier
from learndrop_ext.cache.layout import RowLayout

FILE_BYTES = 256 << 20
BATCH = 128
CHUNK = 1 << 20
# The disk is shared: single rounds differ by half.
ROUNDS = 15
SIZES = [4096, 32 << 10, 128 << 10, 196 << 10]


@dataclass(frozen=True)
class File:
    """An open file of `count` rows, in the order in which they are asked for."""

    rows: DiskTier
    descriptor: int
    order: torch.Tensor
    row_bytes: int

    def drop_pages(self) -> None:
        os.posix_fadvise(self.descriptor, 0, 0, os.POSIX_FADV_DONTNEED)


@pytest.fixture(params=SIZES, ids=lambda size: f"{size >> 10}KB")
def file(request: pytest.FixtureRequest) -> Iterator[File]:
    size = request.param
    count = FILE_BYTES // size // BATCH * BATCH
    with tempfile.TemporaryDirectory(dir=os.environ.get("LEARNDROP_BENCH_DIR")) as folder:
        rows = DiskTier(Path(folder) / "rows", RowLayout(size, size))
        rows.grow(count, first=0)
        for slots in torch.arange(count).split(BATCH):
            rows.write(slots, torch.randint(0, 256, (BATCH, size), dtype=torch.uint8))
        descriptor = os.open(rows.part, os.O_RDONLY)
        os.fsync(descriptor)
        yield File(rows, descriptor, torch.randperm(count), size)
        os.close(descriptor)
        rows.close()


@pytest.mark.parametrize("contender", ["learndrop", "sequential read", "plain reads of the rows"])
def test_disk_rows(benchmark: BenchmarkFixture, file: File, contender: str) -> None:
    into = torch.empty((BATCH, file.row_bytes), dtype=torch.uint8)
    buffers = [bytearray(CHUNK) for _ in range(THREADS)]
    share = -(-len(file.order) * file.row_bytes // THREADS // CHUNK) * CHUNK
    end = file.rows.layout.end(len(file.order))

    def batches() -> None:
        for slots in file.order.split(BATCH):
            file.rows.read(slots, into)

    def from_begin_to_end(thread: int) -> None:
        for offset in range(4096 + thread * share, min(4096 + (thread + 1) * share, end), CHUNK):
            os.preadv(file.descriptor, [buffers[thread]], offset)

    def row_by_row(offsets: list[int]) -> None:
        row = bytearray(file.row_bytes)
        for offset in offsets:
            os.preadv(file.descriptor, [row], offset)

    offsets = [file.rows.layout.begin(slot) for slot in file.order.tolist()]
    with ThreadPoolExecutor(THREADS) as pool:

        def sequential() -> None:
            list(pool.map(from_begin_to_end, range(THREADS)))

        def plain() -> None:
            list(pool.map(row_by_row, [offsets[thread::THREADS] for thread in range(THREADS)]))

        benchmark.extra_info |= {
            "suite": "disk_rows",
            "case": f"read {file.row_bytes >> 10} KB rows, cold, {THREADS} threads",
            "contender": contender,
            "bytes": len(file.order) * file.row_bytes,
        }
        calls = {"learndrop": batches, "sequential read": sequential, "plain reads of the rows": plain}
        benchmark.pedantic(calls[contender], setup=file.drop_pages, rounds=ROUNDS)
