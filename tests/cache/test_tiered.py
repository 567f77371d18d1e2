from __future__ import annotations

import shutil
import warnings
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    precondition,
    rule,
    run_state_machine_as_test,
)
from torch import Tensor

from learndrop_ext.cache import plan as tier_plan
from learndrop_ext.cache import storage
from learndrop_ext.cache.cache import ActivationCache
from learndrop_ext.cache.config import CacheConfig
from learndrop_ext.cache.file import CacheFileError
from learndrop_ext.cache.fingerprint import Fingerprint
from learndrop_ext.cache.layout import RowLayout
from learndrop_ext.cache.plan import Budgets, TierPlan, budgets_of, plan_tiers

CPU = torch.device("cpu")
PRINT = Fingerprint(weights="w", cut=1, codec="fp32", views=1, samples=9, dataset="d")
KILOBYTE = RowLayout(row_bytes=1000, stride_bytes=1024)


def ids(*values: int) -> Tensor:
    return torch.tensor(values, dtype=torch.int64)


def rows(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def tiered(
    slots: int, shape: tuple[int, ...], path: Path, *, device: int, host: int, staging: int = 256, **options: Any
) -> ActivationCache:
    """A cache with `device` rows there, none where the areas are too large for that, `host` there, the rest on disk."""
    row = ActivationCache(0, shape, codec=options.get("codec", "fp32"), device=CPU).row_bytes
    on_device = min(device + 2 * min(staging, slots), slots - 1)
    budgets = Budgets(on_device * row, host * row, 1 << 20, staging)
    options = {"codec": "fp32"} | options
    return ActivationCache(slots, shape, device=CPU, budgets=budgets, path=path, **options)


# slots, budgets in KB, staging, rows on device, host, disk, and in an area
PLANS = [
    (10, (10, 0, 0), 256, (10, 0, 0, 0)),
    (10, (None, 0, 0), 256, (10, 0, 0, 0)),
    (0, (0, 0, 0), 256, (0, 0, 0, 0)),
    (10, (9, 100, 0), 2, (5, 5, 0, 2)),
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
    # Four rows share a page: 7 rows of which 3 are elsewhere take two pages.
    assert plan_tiers(7, KILOBYTE, Budgets(0, 3072, 8192, 1)).disk == 4
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


# configuration, the budgets on a CPU, and on a GPU, of which 1000 bytes are free
MEANT: list[tuple[dict[str, Any], Budgets, Budgets]] = [
    ({"budget_bytes": 5, "host_bytes": 6}, Budgets(5, 0, 0), Budgets(5, 6, 0)),
    ({"host_bytes": "auto"}, Budgets(1500, 0, 0), Budgets(500, 1500, 0)),
    ({"budget_bytes": 5, "disk_bytes": 7, "disk_dir": "."}, Budgets(5, 0, 7), Budgets(5, 0, 7)),
    ({"budget_bytes": 5, "disk_bytes": "auto", "disk_dir": "."}, Budgets(5, 0, 450), Budgets(5, 0, 450)),
    ({"budget_bytes": 5, "disk_dir": "."}, Budgets(5, 0, 0), Budgets(5, 0, 0)),
    ({"budget_bytes": 5, "shared": True, "disk_dir": "."}, Budgets(5, 0, 450), Budgets(5, 0, 450)),
    ({"budget_bytes": 5, "shared": True, "disk_bytes": 7, "disk_dir": "."}, Budgets(5, 0, 7), Budgets(5, 0, 7)),
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


@pytest.mark.parametrize("staging", [1, 2, 5, 256])
@pytest.mark.parametrize("ahead", [False, True])
def test_gather_serves_a_batch_from_all_tiers_in_order(tmp_path: Path, staging: int, ahead: bool) -> None:
    cache = tiered(9, (5,), tmp_path / "rows", device=3, host=2, staging=staging)
    assert cache.plan == (TierPlan(3, 2, 4, staging) if staging < 3 else TierPlan(0, 2, 7, min(staging, 9)))
    stored = rows(9, 5)
    order = ids(8, 0, 4, 2, 5, 3, 1, 7, 6)
    cache.append(order[:5], stored[order[:5]])
    cache.append(order[5:], stored[order[5:]])
    for asked in (ids(8, 8, 0, 3, 7, 3, 8, 6, 1, 5, 4, 2), ids(0, 1), ids(6), ids()):
        if ahead:
            cache.prefetch(asked)
        assert torch.equal(cache.gather(asked), stored[asked])
    cache.close()


@pytest.mark.parametrize("codec", ["fp32", "fp16", "uint8"])
@pytest.mark.parametrize("staging", [2, 256])
def test_gather_from_tiers_equals_gather_from_one(tmp_path: Path, codec: str, staging: int) -> None:
    one = ActivationCache(9, (3, 4, 6), codec=codec, device=CPU, augmented=True)
    all_tiers = tiered(9, (3, 4, 6), tmp_path / "rows", device=3, host=2, staging=staging, codec=codec, augmented=True)
    stored = rows(9, 3, 4, 6).contiguous(memory_format=torch.channels_last)
    asked = ids(8, 0, 3, 3, 5, 1, 7)
    flip = torch.arange(7) % 2 == 0
    shift = torch.arange(14).view(7, 2) % 3 - 1
    got = []
    for cache in (one, all_tiers):
        cache.append(torch.arange(9), stored)
        got.append(cache.gather(asked, flip=flip, shift=shift))
        assert got[-1].is_contiguous(memory_format=torch.channels_last)
    assert torch.equal(got[0], got[1])
    all_tiers.close()


def test_prefetch_is_forgotten_when_rows_change(tmp_path: Path) -> None:
    cache = tiered(4, (5,), tmp_path / "rows", device=0, host=2)
    cache.append(torch.arange(4), rows(4, 5))
    changed = rows(4, 5, seed=1)
    cache.prefetch(ids(1, 3))
    assert cache._rows is not None
    assert cache._rows._prefetch is not None
    cache._rows._prefetch.future.result()
    cache.append(torch.arange(4), changed)
    assert torch.equal(cache.gather(ids(1, 3)), changed[[1, 3]])
    cache.prefetch(ids(0, 1))
    assert torch.equal(cache.gather(ids(2, 3)), changed[[2, 3]])
    cache.prefetch(ids(0, 1))
    cache.prefetch(ids(2, 3))
    assert torch.equal(cache.gather(ids(0, 1)), changed[[0, 1]])
    cache.prefetch(ids(0, 1))
    cache.close()


def test_prefetch_reads_only_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cache = tiered(5, (5,), tmp_path / "rows", device=0, host=2, staging=3)
    cache.append(torch.arange(5), rows(5, 5))
    asked: list[list[int]] = []
    read = storage.TierStorage.read

    def noting(self: storage.TierStorage, slots: Tensor, into: Tensor) -> None:
        asked.append(slots.tolist())
        read(self, slots, into)

    monkeypatch.setattr(storage.TierStorage, "read", noting)
    for batch in (ids(3, 1), ids(2, 4, 2), ids(0)):
        cache.prefetch(batch)
        cache.gather(batch)
    assert asked == [[1, 3], [2, 4], [0]]
    cache.close()


def test_grow_goes_on_in_the_slowest_tier(tmp_path: Path) -> None:
    path = tmp_path / "rows"
    cache = ActivationCache(3, (5,), codec="fp32", device=CPU, path=path, budgets=Budgets(512, 256, 1 << 20, 1))
    stored = rows(9, 5)
    cache.append(torch.arange(3), stored[:3])
    for slots, plan in [
        (4, TierPlan(4)),
        (5, TierPlan(2, 2, 1, 1)),
        (9, TierPlan(2, 2, 5, 1)),
    ]:
        before = len(cache.filled)
        cache.grow(slots)
        assert cache.plan == plan
        assert cache.nbytes == slots * 128
        cache.append(torch.arange(before, slots), stored[before:slots])
        assert torch.equal(cache.gather(torch.arange(slots)), stored[:slots])
    cache.close()


REFUSED: list[tuple[Callable[[ActivationCache], Any], type[Exception], str]] = [
    (lambda c: c.append(ids(0, 0), rows(2, 5)), ValueError, "append: slots must name no row twice, got 0 twice"),
    (lambda c: c.append(ids(0, 1), rows(1, 5)), ValueError, r"append: slots must be \[1\], got \[2\]"),
    (lambda c: c.append(ids(9), rows(1, 5)), IndexError, r"append: slots must be within 0\.\.8, got 9\.\.9"),
    (lambda c: c.append(ids(-1), rows(1, 5)), IndexError, r"append: slots must be within 0\.\.8, got -1\.\.-1"),
    (lambda c: c.append(ids(0).int(), rows(1, 5)), TypeError, "append: slots must be int64, got torch.int32"),
    (lambda c: c.append(ids(0)[None], rows(1, 5)), ValueError, r"append: slots must be \[B\] on the CPU, got \[1, 1\]"),
    (lambda c: c.append(ids(0).to("meta"), rows(1, 5)), ValueError, r"on the CPU, got \[1\] on meta"),
    (lambda c: c.append(ids(8), rows(1, 5).half()), ValueError, "rows must be torch.float32 as the first were"),
    (lambda c: c.append(ids(8), rows(1, 4)), ValueError, r"append: rows must be \[B, 5\], got \[1, 4\]"),
    (lambda c: c.append(ids(8), rows(1, 5).to("meta")), ValueError, "append_rows: rows must be on the cache's device"),
    (lambda c: c.gather(ids(9)), IndexError, r"gather: slots must be within 0\.\.8, got 9\.\.9"),
    (lambda c: c.gather(ids(7)), IndexError, "gather: slots must have been written, got 7, which was not"),
    (lambda c: c.gather(ids(0).float()), TypeError, "gather: slots must be int64, got torch.float32"),
    (lambda c: c.prefetch(ids(7)), IndexError, "prefetch: slots must have been written, got 7, which was not"),
    (lambda c: c.prefetch(ids(0).bool()), TypeError, "prefetch: slots must be int64, got torch.bool"),
    (lambda c: c.grow(10**6), ValueError, "plan_tiers: budgets must hold 1000000 rows"),
]


@pytest.mark.parametrize(("call", "error", "message"), REFUSED)
def test_tiered_cache_refuses_before_it_writes(
    tmp_path: Path, call: Callable[[ActivationCache], Any], error: type[Exception], message: str
) -> None:
    cache = tiered(9, (5,), tmp_path / "rows", device=3, host=2, staging=2)
    written = ids(0, 4, 6, 8)
    stored = rows(4, 5)
    cache.append(written, stored)
    with pytest.raises(error, match=message):
        call(cache)
    assert torch.nonzero(cache.filled).flatten().tolist() == written.tolist()
    assert torch.equal(cache.gather(written), stored)
    cache.close()


def test_cache_wants_a_path_for_a_disk_budget() -> None:
    with pytest.raises(ValueError, match="ActivationCache: path must be given with a disk budget, got None"):
        ActivationCache(1, (2,), codec="fp32", device=CPU, budgets=Budgets(0, 0, 1))
    cache = ActivationCache(1, (2,), codec="fp32", device=CPU)
    with pytest.raises(ValueError, match=r"ActivationCache.save: the cache must have a path, got None"):
        cache.save(PRINT)


def test_a_prefetch_that_failed_is_reported(tmp_path: Path) -> None:
    cache = tiered(6, (5,), tmp_path / "rows", device=0, host=0, staging=3)
    stored = rows(6, 5)
    cache.append(torch.arange(6), stored)
    with (tmp_path / "rows.part").open("r+b") as opened:
        opened.seek(4096 + 4 * 128)
        opened.write(b"\xaa")
    # By the gather that asks for its rows, and once.
    cache.prefetch(ids(4, 1))
    with pytest.raises(CacheFileError, match="row 4 must have the checksum it was written with"):
        cache.gather(ids(4, 1))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert torch.equal(cache.gather(ids(0, 1)), stored[:2])
    # By a warning where nothing asks for them any more.
    said = r"rows that were read ahead could not be read \(cache file .*row 4 must have .*\); nothing has used them"
    for use in (
        lambda: cache.gather(ids(0, 1)),
        lambda: cache.prefetch(ids(0)),
        lambda: cache.append(ids(5), stored[5:]),
        lambda: cache.grow(len(cache.filled) + 1),
    ):
        cache.prefetch(ids(4, 1))
        with pytest.warns(RuntimeWarning, match=said):
            use()
    assert torch.equal(cache.gather(ids(0, 5)), stored[[0, 5]])
    cache.prefetch(ids(4, 1))
    with pytest.warns(RuntimeWarning, match=said):
        cache.close()


class CacheBesideDictionary(RuleBasedStateMachine):
    """Any sequence of operations gives the rows that a dictionary with the same writes holds."""

    folder: Path

    @initialize(
        slots=st.integers(0, 12),
        shape=st.sampled_from([(5,), (3, 2, 4), (40,)]),
        staging=st.sampled_from([1, 3, 256]),
        data=st.data(),
    )
    def begin(self, slots: int, shape: tuple[int, ...], staging: int, data: st.DataObject) -> None:
        self.path = self.folder / "rows"
        self.path.unlink(missing_ok=True)
        self.shape, self.staging, self.writes = shape, staging, 0
        self.wanted: dict[int, Tensor] = {}
        self.saved: dict[int, Tensor] | None = None
        self.cache = ActivationCache(
            slots, shape, codec="fp32", device=CPU, budgets=self.draw_budgets(data), path=self.path
        )

    def draw_budgets(self, data: st.DataObject) -> Budgets:
        device, host = data.draw(st.integers(0, 16)), data.draw(st.integers(0, 4))
        return Budgets(device * 256, host * 256, 1 << 20, self.staging)

    def draw_slots(self, data: st.DataObject, among: list[int], *, unique: bool) -> Tensor:
        return ids(*data.draw(st.lists(st.sampled_from(among), unique=unique, max_size=8)))

    @precondition(lambda self: len(self.cache.filled))
    @rule(data=st.data())
    def append(self, data: st.DataObject) -> None:
        slots = self.draw_slots(data, list(range(len(self.cache.filled))), unique=True)
        self.writes += 1
        stored = rows(len(slots), *self.shape, seed=self.writes)
        self.cache.append(slots, stored)
        self.wanted |= dict(zip(slots.tolist(), stored, strict=True))

    @precondition(lambda self: self.wanted)
    @rule(data=st.data(), ahead=st.booleans())
    def gather(self, data: st.DataObject, ahead: bool) -> None:
        slots = self.draw_slots(data, sorted(self.wanted), unique=False)
        if ahead:
            self.cache.prefetch(slots)
        got = self.cache.gather(slots)
        assert got.shape == (len(slots), *self.shape)
        assert all(torch.equal(row, self.wanted[slot]) for row, slot in zip(got, slots.tolist(), strict=True))

    @precondition(lambda self: self.wanted)
    @rule(data=st.data())
    def prefetch(self, data: st.DataObject) -> None:
        self.cache.prefetch(self.draw_slots(data, sorted(self.wanted), unique=False))

    @rule(more=st.integers(0, 4))
    def grow(self, more: int) -> None:
        self.cache.grow(len(self.cache.filled) + more)

    @precondition(lambda self: len(self.cache.filled))
    @rule(data=st.data(), everything=st.booleans())
    def forget(self, data: st.DataObject, everything: bool) -> None:
        slots = self.draw_slots(data, list(range(len(self.cache.filled))), unique=False)
        self.cache.forget(None if everything else slots)
        gone = set(self.wanted) if everything else set(slots.tolist())
        self.wanted = {slot: row for slot, row in self.wanted.items() if slot not in gone}

    @rule()
    def save(self) -> None:
        self.cache.save(PRINT)
        self.saved = dict(self.wanted)

    @precondition(lambda self: self.path.exists())
    @rule(data=st.data())
    def close_and_open(self, data: st.DataObject) -> None:
        assert self.saved is not None
        self.cache.close()
        self.cache = ActivationCache.open(self.path, PRINT, device=CPU, budgets=self.draw_budgets(data))
        self.wanted = dict(self.saved)

    @invariant()
    def filled_slots_are_those_written(self) -> None:
        assert torch.nonzero(self.cache.filled).flatten().tolist() == sorted(self.wanted)

    def teardown(self) -> None:
        if hasattr(self, "cache"):
            self.cache.close()
            assert not self.path.with_name("rows.part").exists()


def test_cache_equals_a_dictionary_over_long_random_sequences(tmp_path: Path) -> None:
    CacheBesideDictionary.folder = tmp_path
    with warnings.catch_warnings():
        run_state_machine_as_test(
            CacheBesideDictionary,
            settings=settings(
                max_examples=60,
                stateful_step_count=40,
                deadline=None,
                derandomize=True,
                suppress_health_check=list(HealthCheck),
            ),
        )
