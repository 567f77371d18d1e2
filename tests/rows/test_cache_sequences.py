from __future__ import annotations

import shutil
import warnings
from pathlib import Path

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
from tiered_cache import CPU, disk_in, ids, reopened, rows
from torch import Tensor

from learndrop_ext.rows.cache import ActivationCache
from learndrop_ext.rows.plan import Budgets


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
        self.store = self.folder / "rows"
        shutil.rmtree(self.store, ignore_errors=True)
        self.shape, self.staging, self.writes = shape, staging, 0
        self.wanted: dict[int, Tensor] = {}
        disk = disk_in(self.store, private=False)
        self.cache = ActivationCache(slots, shape, codec="fp32", device=CPU, budgets=self.draw_budgets(data), disk=disk)

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
        self.cache.save()

    @rule(data=st.data())
    def save_and_open_again(self, data: st.DataObject) -> None:
        gone = torch.nonzero(~self.cache.filled).flatten()
        assert self.cache.disk is not None
        self.cache.disk.forget(gone, in_store=True)
        self.cache.save()
        self.cache.close()
        self.cache = reopened(self.store, len(self.cache.filled), self.shape, budgets=self.draw_budgets(data))

    @invariant()
    def filled_slots_are_those_written(self) -> None:
        assert torch.nonzero(self.cache.filled).flatten().tolist() == sorted(self.wanted)

    def teardown(self) -> None:
        if hasattr(self, "cache"):
            self.cache.close()


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
