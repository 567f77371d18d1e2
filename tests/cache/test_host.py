from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor

from learndrop_ext.cache import host as host_rows
from learndrop_ext.cache.cache import ActivationCache
from learndrop_ext.cache.host import SWITCH_SIZES, HostTier, copy_engine_from
from learndrop_ext.cache.plan import Budgets, TierPlan
from learndrop_ext.ops import transfer

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


# The copies cost 30 us and run at 50 GB/s, the kernel costs nothing and runs at `speed` bytes a second.
@pytest.mark.parametrize(
    ("speed", "wanted"),
    [(1e8, 4096), (20e9, 8192), (45e9, 128 << 10), (60e9, 2 * SWITCH_SIZES[-1])],
)
def test_copy_engine_from_is_where_copies_win_for_good(
    monkeypatch: pytest.MonkeyPatch, speed: float, wanted: int
) -> None:
    clock = 0.0

    def copies(source: Tensor, index: Tensor, into: Tensor) -> None:
        nonlocal clock
        clock += 30e-6 + into.nbytes / 50e9

    def kernel(source: Tensor, index: Tensor, into: Tensor) -> None:
        nonlocal clock
        clock += into.nbytes / speed

    monkeypatch.setattr(transfer, "copy_rows_to_device", copies)
    monkeypatch.setattr(transfer, "gather_rows_to_device", kernel)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda _: None)
    monkeypatch.setattr(host_rows, "time", SimpleNamespace(perf_counter=lambda: clock))
    assert copy_engine_from.__wrapped__(CPU) == wanted


@pytest.mark.cuda
@pytest.mark.parametrize("row", [128, 4096, 100_352])
@pytest.mark.parametrize("move", [transfer.copy_rows_to_device, transfer.gather_rows_to_device])
@pytest.mark.parametrize("side", [False, True])
def test_rows_come_to_a_gpu_as_they_are(move: object, row: int, side: bool) -> None:
    store = HostTier(300, row, CUDA)
    store.data.copy_(host_bytes(300, row))
    index = torch.randperm(300)[:129]
    into = torch.zeros(129, row, dtype=torch.uint8, device=CUDA)
    stream = torch.cuda.Stream() if side else torch.cuda.current_stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        move(store.data, index, into)  # type: ignore[operator]
    stream.synchronize()
    assert torch.equal(into.cpu(), store.data[index])


@pytest.mark.cuda
def test_copy_engine_from_is_measured_once() -> None:
    first = copy_engine_from(CUDA)
    assert first in (*SWITCH_SIZES, 2 * SWITCH_SIZES[-1])
    assert copy_engine_from(CUDA) == first


@pytest.mark.cuda
@pytest.mark.parametrize("staging", [2, 256])
@pytest.mark.parametrize("shape", [(40,), (16, 14, 14)], ids=str)
def test_tiers_of_a_gpu_equal_one_tier(tmp_path: Path, shape: tuple[int, ...], staging: int) -> None:
    slots = 600
    stored = torch.randn(slots, *shape, device=CUDA)
    one = ActivationCache(slots, shape, codec="fp16", device=CUDA)
    row = one.row_bytes
    budgets = Budgets((20 + 2 * staging) * row, 200 * row, 1 << 30, staging)
    tiers = ActivationCache(slots, shape, codec="fp16", device=CUDA, budgets=budgets, path=tmp_path / "rows")
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
