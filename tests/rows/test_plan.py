from __future__ import annotations

import shutil
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from tiered_cache import CPU

from learndrop_ext.rows import plan as tier_plan
from learndrop_ext.rows.config import CacheConfig
from learndrop_ext.rows.layout import RowLayout
from learndrop_ext.rows.plan import Budgets, TierPlan, budgets_of, lengthened, plan_for, plan_tiers, room_for

KILOBYTE = RowLayout(row_bytes=1000, stride_bytes=1024)

# slots, budgets in KB, staging, rows on device, host, disk, and in an area
PLANS = [
    (10, (10, 0, 0), 256, (10, 0, 0, 0)),
    (10, (None, 0, 0), 256, (10, 0, 0, 0)),
    (0, (0, 0, 0), 256, (0, 0, 0, 0)),
    (10, (9, 100, 0), 3, (3, 7, 0, 3)),
    (10, (9, 3, 100), 2, (5, 3, 2, 2)),
    (10, (9, 0, 100), 2, (5, 0, 5, 2)),
    (10, (9, 0, 100), 256, (0, 0, 10, 10)),
    (10, (0, 0, 100), 1, (0, 0, 10, 1)),
    (10, (3, 4, 100), 2, (0, 4, 6, 2)),
]


@pytest.mark.parametrize(("slots", "kilobytes", "staging", "wanted"), PLANS)
def test_plan_tiers(
    slots: int, kilobytes: tuple[int | None, int, int], staging: int, wanted: tuple[int, int, int, int]
) -> None:
    device, host, disk = kilobytes
    budgets = Budgets(None if device is None else device * 1024, host * 1024, disk * 1024, staging)
    assert plan_tiers(slots, KILOBYTE, budgets) == TierPlan(*wanted)


def test_plan_tiers_keeps_rows_where_they_are_when_slots_are_added() -> None:
    budgets = Budgets(9 * 1024, 6 * 1024, 1 << 20, 2)
    kept = plan_tiers(10, KILOBYTE, budgets)
    assert kept == TierPlan(5, 5, 0, 2)
    kept = plan_tiers(11, KILOBYTE, budgets, kept=kept)
    assert kept == TierPlan(5, 6, 0, 2)
    kept = plan_tiers(20, KILOBYTE, budgets, kept=kept)
    assert kept == TierPlan(5, 6, 9, 2)
    assert plan_tiers(30, KILOBYTE, Budgets(1 << 20, 1 << 20, 1 << 20), kept=kept) == TierPlan(5, 6, 19, 2)


def test_plan_tiers_stages_a_usual_batch() -> None:
    assert plan_tiers(1000, KILOBYTE, Budgets(0, 0, 1 << 30)) == TierPlan(0, 0, 1000, 256)


def test_plan_tiers_keeps_areas_of_large_rows_small() -> None:
    row = RowLayout(100 << 20, 100 << 20)
    assert plan_tiers(9, row, Budgets(0, 0, 1 << 40)).staging == 2


def test_plan_tiers_refuses_budgets_that_are_too_small() -> None:
    # Four rows share a page: 7 rows of which 3 are elsewhere take two pages, and with 5 elsewhere one.
    assert plan_tiers(7, KILOBYTE, Budgets(0, 3072, 8192, 1)).disk == 4
    assert plan_tiers(7, KILOBYTE, Budgets(0, 5120, 4096, 1)).disk == 2
    message = (
        r"budgets must hold 7 rows of 1,024 bytes, got 0 bytes on the device, 3,072 on the host and 8,191 on disk "
        r"\(8,192 wanted there\)"
    )
    with pytest.raises(ValueError, match=message):
        plan_tiers(7, KILOBYTE, Budgets(0, 3072, 8191, 1))
    with pytest.raises(ValueError, match="got 1,024 bytes on the device, 0 on the host and 0 on disk"):
        plan_tiers(2, KILOBYTE, Budgets(1024))


def test_tier_plan_says_what_is_where() -> None:
    assert str(TierPlan(3, 0, 4, 1)) == "3 rows on device, 4 rows on disk"
    assert str(TierPlan(0)) == "no rows"


# slots, budgets in rows, slots to reserve memory for, the plan
RESERVES = [
    (8, (None, 0, 0), 10, TierPlan(10)),
    (8, (9, 50, 0), 10, TierPlan(9)),
    (8, (8, 50, 0), 10, TierPlan(8)),
    (8, (20, 50, 0), 8, TierPlan(8)),
    (8, (20, 50, 0), 7, TierPlan(8)),
    (8, (20, 50, 0), 0, TierPlan(8)),
    (8, (4, 50, 0), 10, TierPlan(2, 8, 0, 1)),
    (8, (4, 7, 90), 10, TierPlan(2, 7, 0, 1)),
    (10, (4, 6, 90), 20, TierPlan(2, 6, 2, 1)),
]


@pytest.mark.parametrize(("slots", "kilobytes", "room", "wanted"), RESERVES)
def test_plan_tiers_reserves_memory_in_the_last_tier_within_its_budget(
    slots: int, kilobytes: tuple[int | None, int, int], room: int, wanted: TierPlan
) -> None:
    device, host, disk = kilobytes
    budgets = Budgets(None if device is None else device * 1024, host * 1024, disk * 1024, 1)
    assert plan_tiers(slots, KILOBYTE, budgets, room=room) == wanted


def test_plan_for_says_whether_rows_fit_with_the_areas_and_pages_that_they_need() -> None:
    # 1,000 rows of 128 bytes on the device and 80 pages on disk would be 3,560 rows, were it not for the areas.
    budgets = Budgets(1000 * 128, 0, 80 * 4096)
    assert plan_for((64,), "fp16", 1000, budgets) == TierPlan(1000)
    assert plan_for((64,), "fp16", 1050, budgets) == TierPlan(488, 0, 562, 256)
    # Rows of 4 KB: 1,000 on the device and 80 on disk, and only 488 beside two areas of 256.
    budgets = Budgets(1000 * 4096, 0, 80 * 4096)
    assert plan_for((2048,), "fp16", 1000, budgets) == TierPlan(1000)
    assert plan_for((2048,), "fp16", 1050, budgets) is None


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


# configuration, the budgets on a CPU, and on a GPU, of which 1000 bytes are free
MEANT: list[tuple[dict[str, Any], Budgets, Budgets]] = [
    ({"budget_bytes": 5, "host_bytes": 6}, Budgets(5, 0, 0), Budgets(5, 6, 0)),
    ({"host_bytes": "auto"}, Budgets(1500, 0, 0), Budgets(500, 1500, 0)),
    ({"budget_bytes": 5, "store_bytes": 7, "store": "."}, Budgets(5, 0, 7), Budgets(5, 0, 7)),
    ({"budget_bytes": 5, "store": "."}, Budgets(5, 0, 450), Budgets(5, 0, 450)),
    ({"budget_bytes": 5, "store_bytes": 7}, Budgets(5, 0, 0), Budgets(5, 0, 0)),
]


@pytest.mark.parametrize(("arguments", "on_cpu", "on_gpu"), MEANT)
def test_budgets_of_a_configuration(
    monkeypatch: pytest.MonkeyPatch, arguments: dict[str, Any], on_cpu: Budgets, on_gpu: Budgets
) -> None:
    monkeypatch.setattr(tier_plan, "free_bytes", lambda device: 3000 if device.type == "cpu" else 1000)
    monkeypatch.setattr(shutil, "disk_usage", lambda folder: SimpleNamespace(free=900))
    config = CacheConfig(**arguments)
    assert budgets_of(config, CPU) == on_cpu
    assert budgets_of(config, torch.device("cuda")) == on_gpu
