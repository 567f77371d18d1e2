"""TieredRows on a simulated GPU: whatever the order in which its streams run, no row is wrong."""

from __future__ import annotations

import gc
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from simulated_gpu import CUDA, Gpu, plain
from tiered_cache import disk_in
from torch import Tensor

from learndrop_ext.rows.disk import DamagedRowError, DiskTier
from learndrop_ext.rows.layout import RowForm, RowLayout
from learndrop_ext.rows.plan import Budgets, TierPlan
from learndrop_ext.rows.tiers import TieredRows

SLOTS, STRIDE = 48, 128
FORM = RowForm((32,), "fp32", (1,), (1,))
ORDERS = 20  # a test


@pytest.fixture(autouse=True)
def no_garbage(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """What a simulated GPU has pinned is unpinned before it is gone."""
    yield
    gc.collect()


class Run:
    """Rows on a simulated GPU beside a plain tensor that holds the same."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, folder: Path, seed: int) -> None:
        self.gpu = Gpu(monkeypatch, seed)
        self.random = self.gpu.random
        torch.manual_seed(seed)
        self.staging = self.random.choice([2, 3, 5])
        self.disk = disk_in(folder)
        self.wanted = torch.randint(0, 256, (SLOTS, STRIDE), dtype=torch.uint8)
        self.filled = torch.zeros(SLOTS, dtype=torch.bool)
        self.batches: list[tuple[Tensor, Tensor]] = []  # what came, what was wanted
        self.disk.note_form(FORM, torch.float32)
        self.rows = TieredRows(SLOTS, RowLayout(STRIDE, STRIDE), CUDA, budgets=self.budgets(), disk=self.disk)
        self.append(torch.randperm(SLOTS))

    def budgets(self) -> Budgets:
        device, host = self.random.randrange(20) + 2 * self.staging, self.random.randrange(30)
        return Budgets(device * STRIDE, host * STRIDE, 1 << 30, self.staging)

    def append(self, slots: Tensor) -> None:
        self.rows.discard_prefetch()
        self.disk.forget(slots, in_store=True)
        for part in self.rows.staged(slots, load=False):
            values, to = self.wanted[slots[part.begin : part.end]].clone(), plain(self.rows.data)
            self.gpu.current.enqueue(lambda to=to, part=part, values=values: to.index_copy_(0, part.index, values))
            self.rows.write_back(part)
        self.filled[slots] = True

    def change(self, slots: Tensor) -> None:
        self.wanted[slots] = torch.randint(0, 256, (len(slots), STRIDE), dtype=torch.uint8)
        self.append(slots)

    def gather(self, slots: Tensor) -> None:
        out, wanted = torch.zeros(len(slots), STRIDE, dtype=torch.uint8), self.wanted[slots].clone()
        for part in self.rows.staged(slots, load=True):
            data, to = plain(self.rows.data), out[part.begin : part.end]
            self.gpu.current.enqueue(lambda data=data, part=part, to=to: to.copy_(data[part.index]))
        self.batches.append((out, wanted))

    def batch(self, size: int) -> Tensor:
        return torch.randint(SLOTS, (size,))

    def step(self) -> None:
        """Something that training, or a change of the rows, does."""
        chance = self.random.random()
        if chance < 0.55:
            batch = self.batch(self.random.choice([1, 3, 8, 14]))
            self.gather(batch)
            if self.random.random() < 0.8:
                self.rows.prefetch(self.batch(8) if self.random.random() < 0.4 else batch)
        elif chance < 0.85:
            self.change(torch.randperm(SLOTS)[: self.random.choice([1, 4, 9])])
        elif chance < 0.95:
            self.rows.arrange(SLOTS, self.budgets(), self.filled)
        else:
            self.gpu.current.synchronize()

    def check(self) -> None:
        self.gpu.run_all()
        for came, wanted in self.batches:
            assert torch.equal(came, wanted)
        every = torch.arange(SLOTS)
        assert torch.equal(plain(self.rows.storage.rows(every)), self.wanted)
        assert self.gpu.faults == []


@pytest.mark.parametrize("first", range(0, 3 * ORDERS, ORDERS))
def test_no_order_of_the_streams_gives_a_wrong_row(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, first: int) -> None:
    for seed in range(first, first + ORDERS):
        run = Run(monkeypatch, tmp_path, seed)
        for _ in range(40):
            run.step()
        run.check()
        run.rows.close()


@pytest.mark.parametrize("first", range(0, 3 * ORDERS, ORDERS))
def test_no_order_of_the_streams_gives_a_wrong_row_where_reads_fail(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, first: int
) -> None:
    failed = 0
    for seed in range(first, first + ORDERS):
        run = Run(monkeypatch, tmp_path, seed)
        real = DiskTier.read

        def read(self: DiskTier, slots: Tensor, into: Tensor, run: Run = run, real: Callable[..., None] = real) -> None:
            if run.random.random() < 0.3:
                raise DamagedRowError("a row is not what was written", 0)
            real(self, slots, into)

        with monkeypatch.context() as patched, warnings.catch_warnings():
            warnings.filterwarnings("ignore", "ActivationCache: rows that were read ahead could not be read")
            patched.setattr(DiskTier, "read", read)
            for _ in range(40):
                try:
                    run.step()
                except DamagedRowError:
                    failed += 1
            run.rows.discard_prefetch()
        run.check()
        run.rows.close()
    assert failed > 10


def files(folder: Path) -> int:
    """How many files of rows there are."""
    return len(list(folder.glob("rows-*.bin")))


def only_on(run: Run, *, host: int, disk: int) -> None:
    """Place no row on the device."""
    budgets = Budgets(0, host * STRIDE, 1 << 30 if disk else 0, run.staging)
    run.rows.arrange(SLOTS, budgets, run.filled)
    assert run.rows.plan == TierPlan(0, host, disk, run.staging)


@pytest.mark.parametrize("disk", [0, 28])
def test_rows_dropped_without_close_are_released_after_their_copies(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, disk: int
) -> None:
    for seed in range(6):
        run = Run(monkeypatch, tmp_path, seed)
        only_on(run, host=SLOTS - disk, disk=disk)
        copy_stream = run.rows._resources.copy_stream
        assert copy_stream is not None
        # The allocator was told that this stream uses the memory too.
        assert (run.rows.data.data_ptr(), copy_stream.stream) in run.gpu.recorded
        run.rows.prefetch(torch.arange(SLOTS - run.staging, SLOTS))
        promise = run.rows._prefetch[2]  # type: ignore[index]
        promise.run()  # type: ignore[attr-defined]
        del promise
        assert run.gpu.pinned != {}
        assert len(run.gpu.threads) == 1
        del copy_stream
        del run.rows, run.disk
        gc.collect()
        assert (run.gpu.pinned, run.gpu.threads) == ({}, [])
        run.gpu.run_all()
        assert run.gpu.faults == []
        assert files(tmp_path) == 0


def test_a_plan_without_staging_has_no_copy_stream_and_no_pinned_memory(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    run = Run(monkeypatch, tmp_path, 0)
    only_on(run, host=20, disk=28)
    assert sorted(run.gpu.pinned.values()) == [2 * run.staging * STRIDE, 20 * STRIDE]
    run.rows.arrange(SLOTS, Budgets(None), run.filled)
    assert run.rows._resources.copy_stream is None
    assert run.gpu.pinned == {}
    run.gather(torch.arange(SLOTS))
    run.check()
    run.rows.close()


def test_the_copy_stream_stays_where_nothing_changes_for_it(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    run = Run(monkeypatch, tmp_path, 0)
    only_on(run, host=20, disk=28)
    before = run.rows._resources.copy_stream
    run.rows.grow(SLOTS + 1, run.filled)
    assert run.rows.plan == TierPlan(0, 20, 29, run.staging)
    assert run.rows._resources.copy_stream is before
    # The areas move behind four rows of the device: the same stream, and the new memory is known to the allocator.
    run.rows.arrange(SLOTS, Budgets((4 + 2 * run.staging) * STRIDE, 20 * STRIDE, 1 << 30, run.staging), run.filled)
    assert run.rows.plan == TierPlan(4, 20, 24, run.staging)
    assert run.rows._resources.copy_stream is before
    assert before is not None
    assert (run.rows.data.data_ptr(), before.stream) in run.gpu.recorded
    # Without rows on disk it needs no pinned memory of its own.
    only_on(run, host=SLOTS, disk=0)
    after = run.rows._resources.copy_stream
    assert after is not None
    assert after is not before
    assert after.bounce is None
    del before
    assert list(run.gpu.pinned.values()) == [SLOTS * STRIDE]
    run.check()
    run.rows.close()


def test_close_ends_thread_and_file_where_the_gpu_reports_an_error(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    run = Run(monkeypatch, tmp_path, 0)
    only_on(run, host=20, disk=28)
    run.rows.prefetch(torch.arange(SLOTS - 2, SLOTS))
    run.rows.discard_prefetch()
    assert len(run.gpu.threads) == 1
    assert files(tmp_path) == 1

    def broken() -> None:
        raise RuntimeError("CUDA error: an illegal memory access was encountered")

    copy_stream = run.rows._resources.copy_stream
    assert copy_stream is not None
    monkeypatch.setattr(copy_stream.stream, "synchronize", broken)
    with pytest.raises(RuntimeError, match="illegal memory access"):
        run.rows.close()
    assert run.gpu.threads == []
    assert files(tmp_path) == 0
    # The second time there is nothing left to end.
    run.rows.close()
