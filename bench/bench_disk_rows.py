"""Rows of a store, read in random order and verified, compared with plain positioned reads of the same rows.

    pytest bench/bench_disk_rows.py --benchmark-only

Each round reads the whole file cold: its pages are dropped from the page cache before (POSIX_FADV_DONTNEED; the host of a
virtual machine may still cache them). The plain reads use the same batches of rows and as many threads, with one read and a
checksum per row, so that both sides do the same work. A sequential read of the file shows the limit of the disk. All three
take turns in each round, because the speed of a shared disk changes from second to second. LEARNDROP_BENCH_DIR is the
folder on the disk to be measured (default: the temporary one).

"train from a store" is an epoch of training whose rows of 128 KB take 20 times their budget in memory: the rest is read from
the store, one batch ahead, beside plain reads of all rows. The live layer is small, so that the disk decides.
"""

from __future__ import annotations

import math
import os
import tempfile
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from measure import measure_in_turn, waited_for
from pytest_benchmark.fixture import BenchmarkFixture
from torch import nn
from torch.utils.data import DataLoader, Dataset

from learndrop_ext import _C, CacheConfig, DropScheduler, Fixed
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
#: Rows of the store that is trained from, in fp32, and how much of them memory may hold.
SHAPE, MEMORY_SHARE = (8, 64, 64), 20


class Plain(Dataset[Any]):
    """Images that take no memory, and no time to read."""

    def __init__(self, count: int) -> None:
        self.count = count

    def __len__(self) -> int:
        return self.count

    def __repr__(self) -> str:
        return f"Plain({self.count} images, each of its number)"

    def __getitem__(self, index: int) -> tuple[torch.Tensor, int]:
        return torch.full((), float(index)).expand(1, *SHAPE[1:]), index % 2


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
            _C.crc32c(memory[i])

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


@pytest.mark.benchmark(timer=waited_for)
def test_train_from_a_store(benchmark: BenchmarkFixture, tmp_path: Path) -> None:
    folder = Path(tempfile.mkdtemp(dir=os.environ.get("LEARNDROP_BENCH_DIR", tmp_path)))
    size = 4 * math.prod(SHAPE)
    count = max(MEMORY_SHARE, FILE_BYTES // size // BATCH) * BATCH
    model = nn.Sequential(nn.Conv2d(1, SHAPE[0], 3, padding=1), nn.Flatten(), nn.Linear(math.prod(SHAPE), 2))
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-9)
    loader = DataLoader(Plain(count), BATCH, shuffle=True)
    config = CacheConfig(codec="fp32", budget_bytes=count * size // MEMORY_SHARE, store=folder)
    drop = DropScheduler(model, optimizer, loader, policy=Fixed({0: 1}), cache=config)

    def train() -> None:
        for x, y in drop.loader:
            optimizer.zero_grad()
            nn.functional.cross_entropy(model(x), y).backward()
            optimizer.step()

    train()
    assert drop.step().tier == "disk"
    (path,) = folder.glob("rows-*.bin")
    descriptor = os.open(path, os.O_RDONLY)
    stored = path.stat().st_size - 4096
    memory = [memoryview(bytearray(size)) for _ in range(BATCH)]
    at = [4096 + i * size for i in torch.randperm(stored // size).tolist()]

    def read_rows(thread: int, begin: int) -> None:
        for i in range(thread, min(BATCH, len(at) - begin), THREADS):
            os.preadv(descriptor, [memory[i]], at[begin + i])
            _C.crc32c(memory[i])

    with ThreadPoolExecutor(THREADS) as pool:

        def plain() -> None:
            for begin in range(0, len(at), BATCH):
                list(pool.map(read_rows, range(THREADS), [begin] * THREADS))

        measure_in_turn(
            benchmark,
            train,
            {"plain reads of the rows": plain},
            prepare=lambda: os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED),
            suite="disk_rows",
            case=f"train from a store of {MEMORY_SHARE} times the memory, {size >> 10} KB rows, cold, {THREADS} threads",
            moved_bytes=len(at) * size,
            rounds=ROUNDS,
        )
    os.close(descriptor)
    drop.close()
