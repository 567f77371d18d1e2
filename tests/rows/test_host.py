from __future__ import annotations

import gc
import os
from pathlib import Path

import pytest
import torch
from tiered_cache import disk_in
from torch import Tensor

from learndrop_ext.ops import transfer
from learndrop_ext.rows.cache import ActivationCache
from learndrop_ext.rows.host import HostTier, PinnedRows
from learndrop_ext.rows.plan import Budgets, TierPlan

CPU = torch.device("cpu")
CUDA = torch.device("cuda", 0)


def host_bytes(rows: int, stride: int) -> Tensor:
    return torch.randint(0, 256, (rows, stride), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("count", [0, 1, 7])
@pytest.mark.parametrize("device", [CPU, pytest.param(CUDA, marks=pytest.mark.cuda)], ids=str)
def test_host_rows_give_back_what_was_written(device: torch.device, count: int) -> None:
    store = HostTier(10, 256, device)
    stored = host_bytes(10, 256).to(device)
    order = torch.tensor([3, 1, 4, 9, 5, 2, 6, 0, 8, 7])
    store.write(order, stored)
    into = torch.zeros(12, 256, dtype=torch.uint8, device=device)
    store.read(order[:count], into[2 : 2 + count])
    assert torch.equal(into[2 : 2 + count], stored[:count])
    assert int(into[:2].sum()) + int(into[2 + count :].sum()) == 0


@pytest.mark.skipif(torch.cuda.is_available(), reason="wants a machine without a GPU")
def test_host_rows_that_cannot_be_pinned_are_out_of_memory() -> None:
    with pytest.raises(
        torch.OutOfMemoryError, match="PinnedRows: the host must have 2,560 bytes of memory to pin, got "
    ):
        HostTier(10, 256, CUDA)


@pytest.fixture
def pinned(monkeypatch: pytest.MonkeyPatch) -> dict[int, int]:
    """Address and bytes of what is pinned, by a GPU that is not there."""
    memory: dict[int, int] = {}
    monkeypatch.setattr(transfer, "pin", lambda rows, device: memory.update({rows.data_ptr(): rows.nbytes}))
    monkeypatch.setattr(transfer, "unpin", lambda rows: memory.pop(rows.data_ptr()))
    return memory


@pytest.mark.parametrize(("stride", "kernel"), [(32 << 10, True), (64 << 10, False)])
def test_rows_come_to_a_gpu_in_the_way_that_is_faster_for_their_size(
    monkeypatch: pytest.MonkeyPatch, pinned: dict[int, int], stride: int, kernel: bool
) -> None:
    used: list[bool] = []
    monkeypatch.setattr(transfer, "rows_to_device", lambda *_, kernel: used.append(kernel))
    into = torch.empty(3, stride, dtype=torch.uint8, device="meta")
    HostTier(10, stride, CUDA).read(torch.tensor([1, 2, 3]), into)
    assert used == [kernel]


def lines_of_memory(address: int) -> dict[str, str]:
    """What the kernel says of the pages at an address, in /proc/self/smaps."""
    found: dict[str, str] = {}
    here = False
    for line in Path("/proc/self/smaps").read_text().splitlines():
        first = line.split()[0]
        if not first.endswith(":"):
            begin, end = (int(part, 16) for part in first.split("-"))
            here = begin <= address < end
        elif here:
            name, _, value = line.partition(":")
            found[name] = value.strip()
    return found


def test_a_fork_does_not_get_pinned_pages(monkeypatch: pytest.MonkeyPatch, pinned: dict[int, int]) -> None:
    store = HostTier(10, 8192, CUDA)
    first, last = store.data.data_ptr(), store.data.data_ptr() + store.data.nbytes - 1
    assert pinned == {first: 81920}
    # "dc" stands for "do not copy area on fork".
    assert all("dc" in lines_of_memory(address)["VmFlags"].split() for address in (first, last))
    stored = host_bytes(10, 8192)
    store.write(torch.arange(10), stored)
    process = os.fork()
    if process == 0:
        refused = 0
        for use in (HostTier.read, HostTier.write):
            try:
                use(store, torch.arange(2), stored[:2])
            except RuntimeError as error:
                refused += "rows in pinned memory must be used by the process that made the cache" in str(error)
        del store
        gc.collect()
        # It unpins nothing that it does not have.
        os._exit(10 * refused + len(pinned))
    assert os.waitstatus_to_exitcode(os.waitpid(process, 0)[1]) == 21
    into = torch.zeros_like(stored)
    store.read(torch.arange(10), into)
    assert torch.equal(into, stored)
    data = store.data
    del store
    assert pinned == {}
    assert "dc" not in lines_of_memory(data.data_ptr())["VmFlags"].split()


def test_memory_of_no_rows_is_not_pinned(pinned: dict[int, int]) -> None:
    assert PinnedRows(0, 128, CUDA).data.shape == (0, 128)
    assert pinned == {}


@pytest.mark.cuda
@pytest.mark.parametrize("row", [128, 4096, 100_352])
@pytest.mark.parametrize("kernel", [False, True])
@pytest.mark.parametrize("side", [False, True])
def test_rows_come_to_a_gpu_as_they_are(kernel: bool, row: int, side: bool) -> None:
    store = HostTier(300, row, CUDA)
    store.data.copy_(host_bytes(300, row))
    index = torch.randperm(300)[:129]
    into = torch.zeros(129, row, dtype=torch.uint8, device=CUDA)
    stream = torch.cuda.Stream() if side else torch.cuda.current_stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        transfer.rows_to_device(store.data, index, into, kernel=kernel)
    stream.synchronize()
    assert torch.equal(into.cpu(), store.data[index])


@pytest.mark.cuda
@pytest.mark.parametrize("staging", [2, 256])
@pytest.mark.parametrize("shape", [(40,), (16, 14, 14)], ids=str)
def test_tiers_of_a_gpu_equal_one_tier(tmp_path: Path, shape: tuple[int, ...], staging: int) -> None:
    slots = 600
    stored = torch.randn(slots, *shape, device=CUDA)
    one = ActivationCache(slots, shape, codec="fp16", device=CUDA)
    row = one.row_bytes
    budgets = Budgets((20 + 2 * staging) * row, 200 * row, 1 << 30, staging)
    tiers = ActivationCache(slots, shape, codec="fp16", device=CUDA, budgets=budgets, disk=disk_in(tmp_path))
    assert tiers.plan == TierPlan(20, 200, 380, staging)
    for at in torch.randperm(slots).split(128):
        one.append(at, stored[at])
        tiers.append(at, stored[at])
    # Two epochs, each batch announced while the one before is used; the result is read only at the end, so that an
    # area that was filled too early would be seen.
    batches = [torch.randint(slots, (128,)) for _ in range(20)]
    got = []
    for batch, following in zip(batches, [*batches[1:], batches[0]], strict=True):
        got.append(tiers.gather(batch))
        tiers.prefetch(following)
    assert all(torch.equal(rows, one.gather(batch)) for rows, batch in zip(got, batches, strict=True))
    assert tiers._rows is not None
    for other in (Budgets(0, 0, 1 << 30), Budgets(None)):
        tiers._rows.arrange(slots, other, tiers.filled)
        assert torch.equal(tiers.gather(batches[0]), got[0])
    tiers.close()
