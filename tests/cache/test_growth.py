"""Rows that are added one by one, forgotten, and clamped."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from learndrop_ext.cache import storage
from learndrop_ext.cache.cache import ActivationCache
from learndrop_ext.cache.disk import DiskTier
from learndrop_ext.cache.fingerprint import Fingerprint
from learndrop_ext.cache.host import HostTier
from learndrop_ext.cache.layout import RowLayout
from learndrop_ext.cache.plan import Budgets, TierPlan, add_reserve, lengthened, room_for

CPU = torch.device("cpu")
PRINT = Fingerprint(weights="w", cut=1, codec="fp32", views=1, samples=9, dataset="d")
ROW = 128  # bytes of a row of 5 values
KILOBYTE = RowLayout(row_bytes=1000, stride_bytes=1024)


def ids(*values: int) -> Tensor:
    return torch.tensor(values, dtype=torch.int64)


def rows(count: int, seed: int = 0) -> Tensor:
    return torch.randn(count, 5, generator=torch.Generator().manual_seed(seed))


def cache_of(slots: int, budgets: Budgets | None = None, path: Path | None = None, **options: Any) -> ActivationCache:
    options = {"codec": "fp32"} | options
    return ActivationCache(slots, (5,), device=CPU, budgets=budgets, path=path, **options)


@pytest.fixture
def allocated(monkeypatch: pytest.MonkeyPatch) -> dict[str, list[int]]:
    """Rows of each piece of memory that a tier takes, one after the other."""
    taken: dict[str, list[int]] = {"device": [], "host": []}
    real, real_init = storage.allocate, HostTier.__init__

    def allocate(count: int, stride_bytes: int, device: torch.device) -> Tensor:
        taken["device"].append(count)
        return real(count, stride_bytes, device)

    def init(self: HostTier, count: int, stride_bytes: int, device: torch.device) -> None:
        taken["host"].append(count)
        real_init(self, count, stride_bytes, device)

    monkeypatch.setattr(storage, "allocate", allocate)
    monkeypatch.setattr(HostTier, "__init__", init)
    return taken


def grow_one_by_one(cache: ActivationCache, wanted: Tensor) -> None:
    for slot in range(len(cache.filled), len(wanted)):
        cache.grow(slot + 1)
        assert len(cache.filled) == cache.plan.slots == slot + 1
        assert cache.nbytes == (slot + 1) * ROW
        with pytest.raises(IndexError, match=f"slots must have been written, got {slot}, which was not"):
            cache.gather(ids(slot))
        for outside in (slot + 1, -1):
            with pytest.raises(IndexError, match=rf"must be (in|within) .*, got {outside}"):
                cache.append(ids(outside), wanted[:1])
        cache.append(ids(slot), wanted[slot : slot + 1])
    assert torch.equal(cache.gather(torch.arange(len(wanted))), wanted)


def test_rows_added_one_by_one_are_copied_five_times_each_at_most(allocated: dict[str, list[int]]) -> None:
    cache = cache_of(1)
    cache.append(ids(0), rows(1000)[:1])
    grow_one_by_one(cache, rows(1000))
    counts = allocated["device"]
    # At least a quarter more each time: 1 + 4/5 + 16/25 + ... of the last.
    assert all(after >= before * 5 / 4 for before, after in itertools.pairwise(counts))
    assert counts[-1] <= 1250
    assert sum(counts[:-1]) <= 5 * 1000
    assert len(counts) < 40


def test_growing_rows_of_the_host_are_copied_as_seldom(allocated: dict[str, list[int]], tmp_path: Path) -> None:
    cache = cache_of(4, Budgets(2 * ROW, 600 * ROW, 1 << 20, 1), tmp_path / "rows")
    assert cache.plan == TierPlan(0, 4, 0, 1)
    cache.append(torch.arange(4), rows(700)[:4])
    grow_one_by_one(cache, rows(700))
    assert cache.plan == TierPlan(0, 600, 100, 1)
    counts = allocated["host"]
    # The budget ends the last step. From then on the file grows, and no memory is taken.
    assert all(after >= before * 5 / 4 for before, after in itertools.pairwise(counts[:-1]))
    assert counts[-1] == 600
    assert sum(counts[:-1]) <= 5 * 600
    assert allocated["device"] == [2]
    cache.close()


def test_growth_goes_through_all_tiers_within_their_budgets(allocated: dict[str, list[int]], tmp_path: Path) -> None:
    cache = cache_of(3, Budgets(10 * ROW, 20 * ROW, 1 << 20, 1), tmp_path / "rows")
    cache.append(torch.arange(3), rows(70)[:3])
    grow_one_by_one(cache, rows(70)[:60])
    assert cache.plan == TierPlan(8, 20, 32, 1)
    assert max(allocated["device"]) == 10
    assert max(allocated["host"]) == 20
    cache.save(PRINT)
    cache.close()
    cache = ActivationCache.open(tmp_path / "rows", PRINT, device=CPU, budgets=Budgets(0, 0, 1 << 20))
    assert torch.equal(cache.gather(torch.arange(60)), rows(70)[:60])
    grow_one_by_one(cache, rows(70))
    cache.close()


def test_a_file_takes_disk_space_for_new_rows_only(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[tuple[int, int]] = []
    monkeypatch.setattr("os.posix_fallocate", lambda _, begin, size: asked.append((begin, size)))
    disk = DiskTier(tmp_path / "rows", RowLayout(4096, 4096))
    disk.grow(3, first=1)
    disk.grow(5, first=3)
    disk.grow(5, first=3)
    disk.grow(6, first=6)
    disk.grow(7, first=6)
    # Rows that were in memory until now want their space in the file too.
    disk.grow(7, first=0)
    assert asked == [(8192, 8192), (16384, 8192), (28672, 4096), (4096, 28672)]
    assert disk.slots == 7
    disk.close()


def test_growth_beyond_the_budgets_changes_nothing(tmp_path: Path) -> None:
    cache = cache_of(4, Budgets(4 * ROW), tmp_path / "rows")
    cache.append(torch.arange(4), rows(4))
    cache.save(PRINT)
    with pytest.raises(ValueError, match="plan_tiers: budgets must hold 5 rows of 128 bytes, got 512 bytes on the dev"):
        cache.grow(5)
    assert (cache.plan, len(cache.filled), cache.saved) == (TierPlan(4), 4, True)
    assert torch.equal(cache.gather(torch.arange(4)), rows(4))
    cache.grow(4)
    assert cache.saved


def test_growth_without_memory_for_a_reserve_takes_what_is_needed(monkeypatch: pytest.MonkeyPatch) -> None:
    cache = cache_of(8)
    cache.append(torch.arange(8), rows(8))
    real = storage.allocate

    def scarce(count: int, stride_bytes: int, device: torch.device) -> Tensor:
        if count > 9:
            raise torch.OutOfMemoryError(f"{count} rows do not fit")
        return real(count, stride_bytes, device)

    monkeypatch.setattr(storage, "allocate", scarce)
    cache.grow(9)
    assert torch.equal(cache.gather(torch.arange(8)), rows(8))
    with pytest.raises(torch.OutOfMemoryError, match="10 rows do not fit"):
        cache.grow(10)
    assert len(cache.filled) == 9


# plan, budgets in rows, slots to have room for, the plan with room
RESERVES = [
    (TierPlan(8), (None, 0, 0), 10, TierPlan(10)),
    (TierPlan(8), (9, 50, 0), 10, TierPlan(9)),
    (TierPlan(8), (8, 50, 0), 10, TierPlan(8)),
    (TierPlan(8), (20, 50, 0), 8, TierPlan(8)),
    (TierPlan(8), (20, 50, 0), 7, TierPlan(8)),
    (TierPlan(8), (20, 50, 0), 0, TierPlan(8)),
    (TierPlan(2, 6, 0, 1), (4, 50, 0), 10, TierPlan(2, 8, 0, 1)),
    (TierPlan(2, 6, 0, 1), (4, 7, 90), 10, TierPlan(2, 7, 0, 1)),
    (TierPlan(2, 6, 2, 1), (4, 7, 90), 20, TierPlan(2, 6, 2, 1)),
]


@pytest.mark.parametrize(("plan", "kilobytes", "slots", "wanted"), RESERVES)
def test_add_reserve(plan: TierPlan, kilobytes: tuple[int | None, int, int], slots: int, wanted: TierPlan) -> None:
    device, host, disk = kilobytes
    budgets = Budgets(None if device is None else device * 1024, host * 1024, disk * 1024)
    assert add_reserve(plan, KILOBYTE, budgets, slots=slots) == wanted


def test_room_for_is_a_quarter_more() -> None:
    assert [room_for(slots) for slots in (0, 1, 2, 4, 5, 100)] == [0, 2, 3, 5, 7, 125]


def test_lengthened_tables_keep_what_they_hold() -> None:
    table = torch.arange(1, 9)
    assert lengthened(table, 8) is table
    assert lengthened(table, 3) is table
    assert lengthened(table, 9).tolist() == [*range(1, 9), 0, 0]
    assert lengthened(table, 20).tolist() == [*range(1, 9), *[0] * 12]
    assert lengthened(torch.zeros(0), 1).tolist() == [0]


@pytest.mark.parametrize(
    ("slots", "part"),
    [(10, TierPlan(3, 4, 3, 2)), (7, TierPlan(3, 4, 0, 2)), (5, TierPlan(3, 2, 0, 2)), (2, TierPlan(2, 0, 0, 2))],
)
def test_the_first_slots_of_a_plan(slots: int, part: TierPlan) -> None:
    assert TierPlan(3, 4, 5, 2).first(slots) == part
    assert part.slots == slots


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"device": -1}, "Budgets: device must be bytes >= 0, got -1"),
        ({"host": -1}, "Budgets: host must be bytes >= 0, got -1"),
        ({"disk": -2}, "Budgets: disk must be bytes >= 0, got -2"),
        ({"staging_rows": 0}, "Budgets: staging_rows must be >= 1, got 0"),
    ],
)
def test_budgets_refuse(arguments: dict[str, int], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Budgets(**arguments)


@pytest.mark.parametrize("budgets", [None, Budgets(4 * ROW, 2 * ROW, 1 << 20, 1)], ids=["one tier", "all tiers"])
def test_forgotten_rows_count_as_never_written(tmp_path: Path, budgets: Budgets | None) -> None:
    path = tmp_path / "rows"
    cache = cache_of(9, budgets, path)
    cache.append(torch.arange(9), rows(9))
    cache.save(PRINT)
    for wrong, error in ((ids(0, 9), IndexError), (ids(0).int(), TypeError), (ids(0)[None], ValueError)):
        with pytest.raises(error, match=r"ActivationCache.forget: slots must be"):
            cache.forget(wrong)
    assert cache.saved
    assert bool(cache.filled.all())
    cache.forget(ids(1, 8, 1))
    assert not cache.saved
    assert torch.nonzero(~cache.filled).flatten().tolist() == [1, 8]
    for slot in (1, 8):
        with pytest.raises(IndexError, match=f"slots must have been written, got {slot}, which was not"):
            cache.gather(ids(0, slot))
    assert torch.equal(cache.gather(ids(0, 2, 7)), rows(9)[[0, 2, 7]])
    # The rows that are left keep their dtype.
    with pytest.raises(ValueError, match=r"rows must be torch\.float32 as the first were"):
        cache.append(ids(1), rows(1).half())
    cache.save(PRINT)
    cache.close()
    cache = ActivationCache.open(path, PRINT, device=CPU, budgets=budgets)
    assert torch.nonzero(~cache.filled).flatten().tolist() == [1, 8]
    cache.forget()
    assert not bool(cache.filled.any())
    assert not cache.saved
    cache.append(ids(8, 2), rows(2).half())
    assert torch.equal(cache.gather(ids(2, 8)), rows(2).half().flip(0))
    assert torch.nonzero(cache.filled).flatten().tolist() == [2, 8]
    cache.close()


def test_rows_read_ahead_and_then_forgotten_are_not_given_out(tmp_path: Path) -> None:
    cache = cache_of(6, Budgets(0, 0, 1 << 20, 4), tmp_path / "rows")
    cache.append(torch.arange(6), rows(6))
    cache.prefetch(ids(1, 2))
    cache.forget(ids(2))
    with pytest.raises(IndexError, match="slots must have been written, got 2"):
        cache.gather(ids(1, 2))
    cache.append(ids(2), -rows(1))
    assert torch.equal(cache.gather(ids(1, 2)), torch.stack([rows(6)[1], -rows(1)[0]]))
    cache.close()


# codec, dtype, values of a row, whether fp16 clamps a finite one
SATURATING: list[tuple[str, torch.dtype, list[float], bool]] = [
    ("fp16", torch.float32, [0.0, 65504.0, -65504.0, 1e-9, 1.0], False),
    ("fp16", torch.float32, [0.0, 65505.0, 0.0, 0.0, 0.0], True),
    ("fp16", torch.float32, [0.0, 0.0, 0.0, 0.0, -1e9], True),
    ("fp16", torch.float32, [torch.inf, -torch.inf, torch.nan, 0.0, 0.0], False),
    ("fp16", torch.float32, [torch.inf, torch.nan, 1e5, 0.0, 0.0], True),
    ("fp16", torch.bfloat16, [65536.0, 0.0, 0.0, 0.0, 0.0], True),
    ("fp16", torch.bfloat16, [65280.0, 0.0, 0.0, 0.0, 0.0], False),
    ("fp16", torch.float16, [65504.0, torch.inf, 0.0, 0.0, 0.0], False),
    ("bf16", torch.float32, [1e9, 0.0, 0.0, 0.0, 0.0], False),
    ("fp32", torch.float32, [1e9, 0.0, 0.0, 0.0, 0.0], False),
]


@pytest.mark.parametrize(("codec", "dtype", "values", "wanted"), SATURATING)
@pytest.mark.parametrize("tiers", [False, True])
def test_saturated(
    tmp_path: Path, codec: str, dtype: torch.dtype, values: list[float], wanted: bool, tiers: bool
) -> None:
    budgets = Budgets(0, 0, 1 << 20, 1) if tiers else None
    cache = cache_of(3, budgets, tmp_path / "rows", codec=codec)
    assert cache.saturated is False
    cache.append(ids(0), torch.zeros(1, 5, dtype=dtype))
    assert cache.saturated is False
    cache.append(ids(1), torch.tensor([values], dtype=dtype))
    cache.append(ids(2), torch.zeros(1, 5, dtype=dtype))
    assert cache.saturated is wanted
    cache.forget(ids(1))
    assert cache.saturated is wanted
    cache.forget()
    assert cache.saturated is False
    cache.close()


def test_saturation_is_looked_for_in_the_first_batches() -> None:
    for late in (15, 16):
        cache = cache_of(20, codec="fp16")
        for slot in range(20):
            cache.append(ids(slot), torch.full((1, 5), 1e6 if slot == late else 1.0))
        assert cache.saturated is (late == 15)


def test_a_refused_batch_does_not_count_as_saturated() -> None:
    cache = cache_of(3, codec="fp16")
    with pytest.raises(IndexError):
        cache.append(ids(3), torch.full((1, 5), 1e6))
    assert cache.saturated is False
