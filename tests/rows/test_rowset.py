"""`RowSet`, without a model: rows are numbers that say of which sample, cut and view they are."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from tiered_cache import CPU, ids
from torch import Tensor

from learndrop_ext.rows import rowset as rowset_module
from learndrop_ext.rows import run_store
from learndrop_ext.rows.cache import ActivationCache
from learndrop_ext.rows.config import CacheConfig
from learndrop_ext.rows.plan import Budgets, TierPlan, plan_for
from learndrop_ext.rows.rowset import RowSet
from learndrop_ext.rows.store.fingerprint import Fingerprint
from learndrop_ext.rows.store.store import RowStore, StoredRows

SHAPE = (3,)
ROW = 128  # bytes of a row of 3 values


def rowset(size: int = 6, **options: Any) -> RowSet:
    config = CacheConfig(**({"codec": "fp32", "views": 1} | options))

    def made_of(path: list[int], row: str) -> Fingerprint:
        views = "random" if config.rows_per_sample > 1 else "one"
        return Fingerprint(str(list(path)), path[-1], config.codec, "numbers", "", row, views)

    return RowSet(size, config=config, device=CPU, made_of=made_of, sample_keys=sample_keys)


def sample_keys(samples: Tensor) -> list[bytes]:
    return [b"sample %d" % i for i in samples.tolist()]


def values(cut: int, samples: Tensor, view: int = 0) -> Tensor:
    return (100 * cut + 10 * view + samples[:, None]) + torch.tensor([0.0, 0.25, 0.5])


def gathered(rows: RowSet, samples: Tensor) -> tuple[int, Tensor | None]:
    level, at = rows.locate(samples)
    return level, rows.gather(at, level) if level else None


def assert_rows(rows: RowSet, cut: int, *samples: int) -> None:
    level, got = gathered(rows, ids(*samples))
    assert level == cut
    if cut:
        assert got is not None
        assert torch.equal(got, values(cut, ids(*samples)))


def advanced(*cuts: int, **options: Any) -> RowSet:
    """After each of some drops, with the rows of all samples behind all but the last."""
    rows = rowset(**options)
    for i, cut in enumerate(cuts):
        rows.advance(cut, SHAPE, rows=6, private=True)
        if i < len(cuts) - 1:
            rows.keep(cut, torch.arange(6), values(cut, torch.arange(6)))
            rows.end_epoch()
    return rows


def test_nothing_is_kept_before_the_first_advance_and_after_stop() -> None:
    rows = rowset()
    for _ in range(2):
        assert (rows.cut, rows.cuts, rows.path, rows.tier, rows.stores) == (0, [], (), "none", False)
        assert_rows(rows, 0, 0, 1)
        assert rows.drawn().tolist() == []
        rows.forget()
        rows.prefetch(ids(0))
        rows.end_epoch()
        rows.advance(2, SHAPE, rows=6, private=True)
        assert (rows.cut, rows.cuts, rows.path, rows.tier, rows.stores) == (2, [2], (2,), "device", True)
        cache = rows.cache
        assert cache is not None
        rows.keep(2, ids(0), values(2, ids(0)))
        rows.advance(3, SHAPE, rows=6, private=True)
        rows.stop()
        with pytest.raises(RuntimeError, match="the cache must be open"):
            cache.gather(ids(0))
        assert rows.slots.used == 0


def test_rows_are_read_for_a_whole_batch_or_not_at_all() -> None:
    rows = advanced(2)
    assert torch.equal(rows.keep(2, ids(4, 1), values(2, ids(4, 1))), values(2, ids(4, 1)))
    for batch, cut in [((1,), 2), ((4, 1, 4), 2), ((1, 0), 0), ((0,), 0), ((), 0)]:
        assert_rows(rows, cut, *batch)
    rows.keep(2, ids(0), values(2, ids(0)))
    assert_rows(rows, 2, 1, 0)
    assert rows.drawn().tolist() == [0, 1, 4]
    assert rows.filled(ids(0, 2, 4)).tolist() == [True, False, True]
    # A sample with a slot has no row yet.
    assert rows.places(ids(1, 5)).tolist() == [1, 3]
    assert_rows(rows, 0, 1, 5)
    assert_rows(rows, 2, 1, 0)


def test_rows_of_the_drop_before_count_until_there_are_new_ones() -> None:
    rows = advanced(1, 2)
    assert rows.drawn().tolist() == [0, 1, 2, 3, 4, 5]
    assert rows.filled(ids(0, 5)).tolist() == [True, True]


def test_samples_may_be_forgotten_for_which_there_was_no_room_yet() -> None:
    rows = rowset()
    rows.advance(1, SHAPE, rows=2, private=True)
    rows.keep(1, ids(3, 4), values(1, ids(3, 4)))
    assert rows.places(ids(5)).tolist() == [2]
    rows.forget(ids(4, 5))
    assert rows.drawn().tolist() == [3]


@pytest.mark.parametrize("codec", ["fp32", "fp16"])
def test_keep_returns_what_later_epochs_get(codec: str) -> None:
    rows = rowset(codec=codec)
    rows.advance(1, (2, 3, 4), rows=6, private=True)
    made = (torch.rand(4, 2, 3, 4) + 1).contiguous(memory_format=torch.channels_last)
    got = rows.keep(1, torch.arange(4), made)
    assert torch.equal(got, made if codec == "fp32" else made.half().float())
    assert torch.equal(got, made) == (codec == "fp32")
    level, later = gathered(rows, torch.arange(4))
    assert level == 1
    assert later is not None
    assert torch.equal(later, got)
    assert later.stride() == got.stride() == made.stride()


def test_a_sample_that_comes_twice_in_a_batch_has_one_row() -> None:
    rows = rowset()
    rows.advance(1, (2, 3, 4), rows=6, private=True)
    batch = ids(3, 1, 3, 5, 1)
    made = torch.randn(5, 4, 2, 3).permute(0, 2, 3, 1)
    got = rows.keep(1, batch, made)
    # Those of the first place, in the first order of memory.
    assert torch.equal(got, made[[0, 1, 0, 3, 1]])
    assert got.stride() == made.stride()
    assert torch.equal(gathered(rows, ids(1, 3, 5))[1], made[[1, 0, 3]])
    places, first = rows.first_places(ids(5, 3, 5, 0, 3))
    assert places.tolist() == sorted(rows.places(ids(5, 3, 0)).tolist())
    assert ids(5, 3, 5, 0, 3)[first].tolist() == [3, 5, 0]
    assert first.tolist() == [1, 0, 3]


def test_room_grows_with_the_samples_drawn() -> None:
    rows = rowset(budget_bytes=6 * ROW)
    rows.advance(1, SHAPE, rows=2, private=True)
    for batch in (ids(5, 3, 1), ids(0, 2, 4)):
        rows.keep(1, batch, values(1, batch))
    assert_rows(rows, 1, 0, 1, 2, 3, 4, 5)


def test_samples_beyond_the_budgets_are_said_once_and_run_each_time() -> None:
    rows = rowset(8, budget_bytes=4 * ROW)
    rows.advance(1, SHAPE, rows=3, private=True)
    rows.keep(1, ids(0, 1, 2), values(1, ids(0, 1, 2)))
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        for batch in (ids(3, 4), ids(2, 5), ids(4, 4)):
            made = values(1, batch)
            assert torch.equal(rows.keep(1, batch, made), made)
            assert_rows(rows, 0, *batch.tolist())
    (only,) = (str(one.message) for one in said)
    assert "drop.loader: the budgets or the disk do not hold the rows of all samples that are drawn; those" in only
    # What was there stays, and what fits is still kept.
    assert_rows(rows, 1, 0, 1, 2)
    rows.keep(1, ids(1, 0), values(1, ids(1, 0)))
    assert_rows(rows, 1, 0, 1, 2)


def test_an_advance_that_the_budgets_do_not_hold_changes_nothing() -> None:
    rows = rowset(budget_bytes=6 * ROW)
    rows.advance(1, SHAPE, rows=6, private=True)
    rows.keep(1, torch.arange(6), values(1, torch.arange(6)))
    cache = rows.cache
    with pytest.raises(ValueError, match=r"plan_tiers: budgets must hold 6 rows of 256 bytes, got 768 bytes"):
        rows.advance(2, (40,), rows=6, private=True)
    assert (rows.cache, rows.older, rows.cuts, rows.path, rows.cut) == (cache, None, [1], (1,), 1)
    assert_rows(rows, 1, 0, 5)


def test_an_advance_keeps_to_the_budgets_that_its_cut_was_chosen_by(monkeypatch: pytest.MonkeyPatch) -> None:
    rows = rowset()

    def not_again(*_: Any) -> None:
        raise AssertionError("the memory was read a second time")

    monkeypatch.setattr(rowset_module, "budgets_of", not_again)
    with pytest.raises(ValueError, match="plan_tiers: budgets must hold 6 rows of 128 bytes, got 640 bytes"):
        rows.advance(1, SHAPE, rows=6, private=True, budgets=Budgets(5 * ROW))
    assert plan_for(SHAPE, "fp32", 6, Budgets(5 * ROW)) is None
    rows.advance(1, SHAPE, rows=6, private=True, budgets=Budgets(6 * ROW))
    assert rows.cache is not None
    assert rows.cache.plan == plan_for(SHAPE, "fp32", 6, Budgets(6 * ROW)) == TierPlan(6)


def test_older_rows_serve_until_every_sample_has_new_ones() -> None:
    rows = advanced(1, 3)
    older = rows.older
    assert older is not None
    assert (rows.cut, rows.cuts, rows.path, rows.stops) == (3, [1, 3], (1, 3), (1, 3))
    rows.keep(3, ids(0, 1), values(3, ids(0, 1)))
    for batch, cut in [((0, 1), 3), ((1, 2), 1), ((2, 3), 1)]:
        assert_rows(rows, cut, *batch)
    # The epoch was broken off.
    rows.end_epoch()
    assert rows.older is older
    rows.keep(3, ids(2, 3, 4, 5), values(3, ids(2, 3, 4, 5)))
    assert rows.stops == (3,)
    rows.end_epoch()
    assert (rows.older, rows.cuts, rows.path) == (None, [3], (1, 3))
    with pytest.raises(RuntimeError, match="the cache must be open"):
        older.gather(ids(0))
    assert_rows(rows, 3, *range(6))


def test_older_rows_that_nobody_has_filled_hold_up_nothing() -> None:
    rows = rowset()
    rows.advance(1, SHAPE, rows=6, private=True)
    rows.keep(1, ids(0, 1), values(1, ids(0, 1)))
    rows.advance(2, SHAPE, rows=6, private=True)
    rows.keep(2, ids(1, 0, 4), values(2, ids(1, 0, 4)))
    rows.end_epoch()
    assert rows.older is None


def test_images_leave_rows_at_the_older_cut_too() -> None:
    rows = rowset()
    rows.advance(1, SHAPE, rows=6, private=True)
    rows.keep(1, ids(0, 1), values(1, ids(0, 1)))
    rows.advance(2, SHAPE, rows=6, private=True)
    # Sample 2 was never drawn: its image passes both cuts.
    rows.keep(1, ids(2), values(1, ids(2)))
    assert_rows(rows, 1, 2, 1)
    rows.keep(2, ids(2), values(2, ids(2)))
    assert_rows(rows, 2, 2)
    assert_rows(rows, 1, 2, 1)
    rows.keep(2, ids(0, 1), values(2, ids(0, 1)))
    rows.end_epoch()
    assert rows.older is None
    # Later images are only encoded there as the older rows were, so that their rows are the same.
    assert rows.stops == (1, 2)
    assert torch.equal(rows.keep(1, ids(3), values(1, ids(3))), values(1, ids(3)))
    assert_rows(rows, 0, 3)


def test_an_image_on_its_way_is_encoded_at_each_cut_of_the_path() -> None:
    rows = advanced(1, 2, codec="fp16")
    rows.keep(2, torch.arange(6), values(2, torch.arange(6)))
    rows.end_epoch()
    made = torch.rand(2, 3)
    assert torch.equal(rows.keep(1, ids(0, 1), made), made.half().float())
    assert torch.equal(rows.keep(7, ids(0, 1), made), made)  # no cut of the path
    assert_rows(rows, 2, 0, 1)


def test_a_third_advance_frees_the_oldest_rows() -> None:
    rows = advanced(1, 2)
    oldest = rows.older
    assert oldest is not None
    rows.keep(2, ids(0, 1), values(2, ids(0, 1)))
    rows.advance(5, (7,), rows=6, private=True)
    assert (rows.cuts, rows.path) == ([2, 5], (1, 2, 5))
    with pytest.raises(RuntimeError, match="the cache must be open"):
        oldest.gather(ids(0))
    assert_rows(rows, 2, 0, 1)
    assert_rows(rows, 0, 2)


def test_forget_of_some_samples_is_forgotten_at_both_cuts() -> None:
    rows = advanced(1, 2)
    rows.keep(2, ids(0, 1), values(2, ids(0, 1)))
    rows.forget(ids(1, 2))
    for batch, cut in [((0,), 2), ((1,), 0), ((2,), 0), ((3,), 1), ((0, 3), 1)]:
        assert_rows(rows, cut, *batch)
    slots = rows.slots.table.clone()
    rows.keep(2, ids(1), values(2, ids(1)) + 5)
    assert torch.equal(gathered(rows, ids(1))[1], values(2, ids(1)) + 5)
    assert torch.equal(rows.slots.table, slots)


def test_forget_of_all_goes_on_at_the_same_cut() -> None:
    rows = advanced(1, 2)
    rows.keep(2, ids(0, 1), values(2, ids(0, 1)))
    caches = [cache for cache in (rows.older, rows.cache) if cache is not None]
    rows.forget()
    assert len(caches) == 2
    for cache in caches:
        with pytest.raises(RuntimeError, match="the cache must be open"):
            cache.gather(ids(0))
    assert (rows.cut, rows.cuts, rows.path, rows.older, rows.stores) == (2, [2], (2,), None, True)
    assert rows.slots.used == 0
    assert_rows(rows, 0, 0)
    rows.keep(2, torch.arange(6), values(2, torch.arange(6)))
    assert_rows(rows, 2, *range(6))


# what changes, and a sample that has no row then
CHANGES: list[tuple[Callable[[RowSet], Any], int]] = [
    (lambda rows: rows.forget(ids(2)), 2),
    (lambda rows: rows.forget(), 0),
    (lambda rows: rows.follow_size(7), 6),
    (lambda rows: rows.advance(2, SHAPE, rows=12, private=True), 5),
]


@pytest.mark.parametrize(("change", "without"), CHANGES)
@pytest.mark.parametrize("views", [1, 2])
def test_locate_follows_each_change_of_the_rows(change: Callable[[RowSet], Any], without: int, views: int) -> None:
    rows = rowset(views=views)
    rows.advance(1, SHAPE, rows=6 * views, private=True)
    order = ids(5, 0, 3, 1, 4, 2)
    for rows.epoch in range(views):
        rows.keep(1, order, values(1, order))
    for rows.epoch in range(4):
        level, at = rows.locate(order)
        assert level == 1
        assert torch.equal(at, rows.slots.places(order, rows.epoch))
    change(rows)
    assert rows.locate(ids(without))[0] < rows.cut
    made = values(rows.cut, ids(without))
    rows.keep(rows.cut, ids(without), made)
    level, at = rows.locate(ids(without))
    assert level == rows.cut
    assert torch.equal(rows.gather(at, level), made)


def test_a_dataset_may_grow_and_not_shrink() -> None:
    rows = advanced(2)
    rows.keep(2, torch.arange(6), values(2, torch.arange(6)))
    assert rows.stops == (2,)
    assert rows.follow_size(6) == 0
    assert rows.follow_size(9) == 3
    assert_rows(rows, 2, 0, 5)
    assert_rows(rows, 0, 5, 6)
    rows.keep(2, ids(8, 6), values(2, ids(8, 6)))
    assert_rows(rows, 2, 8, 0, 6)
    with pytest.raises(RuntimeError, match="the dataset must keep its 9 samples, or get more, got 6"):
        rows.follow_size(6)


def test_each_epoch_draws_another_view_and_keeps_its_rows() -> None:
    rows = rowset(views=3)
    rows.advance(1, SHAPE, rows=18, private=True)
    drawn = []
    for rows.epoch in range(6):
        view = rows.view(torch.arange(6))
        made = torch.cat([values(1, ids(i), int(v)) for i, v in enumerate(view)])
        level, got = gathered(rows, torch.arange(6))
        assert level == (rows.epoch >= 3)
        if got is None:
            rows.keep(1, torch.arange(6), made)
        else:
            assert torch.equal(got, made)
        drawn.append(view)
    assert torch.stack(drawn[:3]).sort(0).values.T.tolist() == [[0, 1, 2]] * 6
    rows.forget(ids(4))  # all of its views
    for rows.epoch in range(3):
        assert rows.drawn().tolist() == [0, 1, 2, 3, 5]


def test_renumbered_samples_begin_with_the_views_of_the_earlier_run() -> None:
    rows = rowset(4, views=1)
    rows.renumber(6, torch.tensor([2, 0, 1, 5, 4, 3]), 3)
    assert (len(rows.slots), rows.views, rows.config.views) == (6, 3, 3)
    assert rows.view(torch.arange(6)).tolist() == [2, 0, 1, 2, 1, 0]


def test_counts_are_of_the_rows_made_and_of_their_seconds() -> None:
    rows = advanced(1)
    rows.begin_making(False, 4)
    rows.keep(1, ids(0, 1, 2, 3), values(1, ids(0, 1, 2, 3)))
    rows.begin_making(True, 2)
    rows.keep(1, ids(4, 5), values(1, ids(4, 5)))
    images, older, seconds = rows.counts
    assert (images, older) == (4, 2)
    assert 0 < seconds < 60
    rows.forget_counts()
    assert rows.counts == (0, 0, 0.0)
    rows.keep(1, ids(0), values(1, ids(0)))  # without a beginning
    assert rows.counts == (0, 0, 0.0)


def test_rows_on_disk_are_read_ahead(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rows = rowset(budget_bytes=2 * ROW, store=tmp_path)
    rows.advance(1, SHAPE, rows=6, private=True)
    assert rows.tier == "disk"
    asked: list[list[int]] = []
    monkeypatch.setattr(ActivationCache, "prefetch", lambda _, at: asked.append(at.tolist()))
    rows.keep(1, ids(5, 4), values(1, ids(5, 4)))
    for batch in (ids(4, 5), ids(5, 0), ids()):
        rows.prefetch(batch)
    assert asked == [[1, 0]]
    assert_rows(rows, 1, 4, 5)


def test_rows_that_were_saved_are_there_when_the_run_resumes(tmp_path: Path) -> None:
    rows = advanced(1, 2, store=tmp_path)
    assert rows.save() is None  # none behind the last cut yet
    rows.keep(2, ids(3, 0, 5), values(2, ids(3, 0, 5)))
    saved = rows.save()
    assert saved is not None
    rows.close(keep=True)
    again = rowset(store=tmp_path)
    again.resume(saved, (1, 2), SHAPE)
    assert (again.cuts, again.path, again.stores) == ([2], (1, 2), True)
    assert_rows(again, 2, 0, 3, 5)
    assert_rows(again, 0, 1)
    again.keep(2, ids(1, 2, 4), values(2, ids(1, 2, 4)))
    assert_rows(again, 2, *range(6))
    # What the first checkpoint names is what the second one names, and both go with the run.
    assert again.save() == saved
    again.close(keep=False)
    assert RowStore(tmp_path).entries() == []


def test_rows_that_are_no_longer_there_or_of_another_path_are_computed_again(tmp_path: Path) -> None:
    rows = advanced(1, 2, store=tmp_path)
    rows.keep(2, torch.arange(6), values(2, torch.arange(6)))
    saved = rows.save()
    assert saved is not None
    rows.close(keep=True)
    again = rowset(store=tmp_path)
    with pytest.warns(RuntimeWarning, match=r"the rows are computed again: in the store .* must be of weights '\[2\]'"):
        again.resume(saved, (2,), SHAPE)
    assert_rows(again, 0, 0)
    with pytest.warns(RuntimeWarning, match="the rows are computed again: in the store .*, they are no longer there"):
        again.resume(("0123", None), (1, 2), SHAPE)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        again.resume(None, (1, 2), SHAPE)
    assert_rows(again, 0, 0)
    again.keep(2, torch.arange(6), values(2, torch.arange(6)))
    assert_rows(again, 2, *range(6))
    again.close(keep=False)


def test_the_rows_of_an_earlier_checkpoint_go_and_those_of_other_runs_stay(tmp_path: Path) -> None:
    shared = rowset(store=tmp_path)
    shared.advance(1, SHAPE, rows=6, private=False)
    shared.keep(1, torch.arange(6), values(1, torch.arange(6)))
    first = shared.save()
    shared.advance(2, SHAPE, rows=6, private=True)
    shared.keep(2, torch.arange(6), values(2, torch.arange(6)))
    second = shared.save()
    shared.end_epoch()
    shared.advance(3, SHAPE, rows=6, private=True)
    shared.keep(3, ids(0), values(3, ids(0)))
    third = shared.save()
    shared.save()
    assert first is not None
    assert second is not None
    assert third is not None
    shared.keep(3, torch.arange(6), values(3, torch.arange(6)))
    shared.end_epoch()  # frees the rows after two layers
    assert shared.save() == third
    assert {entry.digest for entry in RowStore(tmp_path).entries()} == {first[0], third[0]}
    shared.close(keep=False)
    assert {entry.digest for entry in RowStore(tmp_path).entries()} == {first[0]}
    # A checkpoint of rows that all runs share takes none of them away either.
    other = rowset(store=tmp_path)
    other.resume(first, (1,), SHAPE)
    assert_rows(other, 1, *range(6))
    assert other.save() == first
    other.close(keep=False)
    assert len(RowStore(tmp_path).entries()) == 1


@pytest.mark.parametrize("views", [1, 3])
def test_a_run_that_resumes_may_have_got_more_samples(tmp_path: Path, views: int) -> None:
    rows = rowset(store=tmp_path, views=views)
    rows.advance(1, SHAPE, rows=6 * views, private=False)
    for rows.epoch in range(views):
        rows.keep(1, torch.arange(6), values(1, torch.arange(6), rows.epoch))
    saved = rows.save()
    rows.close(keep=True)
    again = rowset(8, store=tmp_path, views=views)
    again.slots.view_offset[:6] = rows.slots.view_offset
    again.resume(saved, (1,), SHAPE)
    for again.epoch in range(views):
        level, got = gathered(again, torch.arange(6))
        assert level == 1
        assert torch.equal(got, values(1, torch.arange(6), again.epoch))
        assert again.drawn().tolist() == list(range(6))
    again.close(keep=False)


def test_samples_with_one_name_have_one_row_in_the_store(tmp_path: Path) -> None:
    """As those of a Subset that draws a sample more than once."""
    for first in (True, False):
        rows = rowset(store=tmp_path)
        rows._outliving._sample_keys = lambda samples: sample_keys(samples // 2)
        rows.advance(1, SHAPE, rows=6, private=False)
        rows.keep(1, ids(1, 4), values(1, ids(0, 2)))
        assert_same = [] if first else [0, 1, 2, 3, 4, 5]
        assert rows.drawn().tolist() == (assert_same or [1, 4])
        rows.keep(1, torch.arange(6), values(1, torch.arange(6) // 2))
        assert torch.equal(gathered(rows, torch.arange(6))[1], values(1, torch.arange(6) // 2))
        rows.close(keep=False)
        (entry,) = RowStore(tmp_path).entries()
        assert entry.places == 3


def test_samples_of_another_run_are_added_in_the_order_of_memory_of_its_rows(tmp_path: Path) -> None:
    made = torch.randn(6, 2, 3, 4)
    for samples, memory_format in ((ids(0, 1, 2), torch.channels_last), (ids(3, 4, 5), torch.contiguous_format)):
        rows = rowset(store=tmp_path)
        begin = int(samples[0])  # the second run has none of the samples of the first
        rows._outliving._sample_keys = lambda of, begin=begin: sample_keys(torch.where(of < begin, of + 100, of))
        rows.advance(1, (2, 3, 4), rows=6, private=False)
        mine = made[samples].contiguous(memory_format=memory_format)
        got = rows.keep(1, samples, mine)
        assert torch.equal(got, mine)
        assert got.stride() == mine.stride()
        rows.close(keep=False)
    rows = rowset(store=tmp_path)
    rows.advance(1, (2, 3, 4), rows=6, private=False)
    rows.keep(1, ids(0), made[:1])
    assert torch.equal(gathered(rows, torch.arange(6))[1], made)
    rows.close(keep=False)


def test_a_damaged_row_of_the_first_batch_costs_that_row(tmp_path: Path) -> None:
    rows = rowset(store=tmp_path)
    rows.advance(1, SHAPE, rows=6, private=False)
    rows.keep(1, torch.arange(6), values(1, torch.arange(6)))
    rows.close(keep=False)
    (path,) = tmp_path.glob("rows-*.bin")
    data = bytearray(path.read_bytes())
    data[data.index(values(1, ids(4)).numpy().tobytes())] ^= 1
    path.write_bytes(data)
    rows = rowset(store=tmp_path)
    rows.advance(1, SHAPE, rows=6, private=False)
    with pytest.warns(RuntimeWarning, match="rows are computed again: a row in the store must have the checksum"):
        rows.keep(1, ids(4, 0), values(1, ids(4, 0)))
    assert_rows(rows, 1, *range(6))
    rows.close(keep=False)


def test_rows_of_other_images_are_not_taken(tmp_path: Path) -> None:
    rows = rowset(store=tmp_path)
    rows.advance(1, SHAPE, rows=6, private=False)
    rows.keep(1, torch.arange(6), values(1, torch.arange(6)))
    rows.close(keep=False)
    rows = rowset(store=tmp_path)
    rows.advance(1, SHAPE, rows=6, private=False)
    made = values(1, ids(5, 1))
    made[1, 2] += 1
    with pytest.warns(RuntimeWarning, match="are computed again: they are not what the dropped layers make"):
        assert torch.equal(rows.keep(1, ids(5, 1), made), made)
    assert rows.drawn().tolist() == [1, 5]
    rows.keep(1, ids(0, 2, 3, 4), values(1, ids(0, 2, 3, 4)))
    assert torch.equal(gathered(rows, ids(1, 5))[1], made[[1, 0]])
    rows.close(keep=False)


def test_a_row_of_another_image_takes_the_place_of_the_one_in_the_store(tmp_path: Path) -> None:
    first, second = rowset(store=tmp_path), rowset(store=tmp_path)
    for rows, image in ((first, 7), (second, 8)):  # both begin before there are rows
        rows.advance(1, SHAPE, rows=6, private=False)
        rows.digests.note(ids(0), ids(image))
        rows.keep(1, ids(0), values(image, ids(0)))
    first.close(keep=False)
    second.close(keep=False)
    rows = rowset(store=tmp_path)
    rows.advance(1, SHAPE, rows=6, private=False)
    rows.digests.note(ids(0), ids(8))
    assert torch.equal(rows.keep(1, ids(0), values(8, ids(0)) + 1e-5), values(8, ids(0)))
    rows.close(keep=False)


def test_forget_everywhere_is_for_all_runs_and_forget_is_not(tmp_path: Path) -> None:
    for everywhere in (False, True):
        rows = rowset(store=tmp_path)
        rows.advance(1, SHAPE, rows=6, private=False)
        rows.keep(1, torch.arange(6), values(1, torch.arange(6)))
        rows.end_epoch()
        rows.forget(ids(1, 2) if everywhere else None, everywhere=everywhere)
        rows.close(keep=False)
        store = RowStore(tmp_path)
        (entry,) = store.entries()
        found = StoredRows(store, entry.fingerprint).find(dict(enumerate(sample_keys(torch.arange(6)))))
        assert sorted(found.sample.tolist()) == ([0, 3, 4, 5] if everywhere else list(range(6)))


def test_a_store_that_fails_costs_the_sharing_and_not_the_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refused(*_: Any, **__: Any) -> None:
        raise OSError(37, "No locks available")

    rows = rowset(store=tmp_path)
    rows.advance(1, SHAPE, rows=6, private=False)
    monkeypatch.setattr(run_store, "StoredRows", refused)
    with pytest.warns(RuntimeWarning, match=r"goes on without what the store has: .* No locks available"):
        rows.keep(1, ids(0, 1), values(1, ids(0, 1)))
    rows.keep(1, ids(2, 3, 4, 5), values(1, ids(2, 3, 4, 5)))
    rows.end_epoch()
    assert_rows(rows, 1, *range(6))
    rows.close(keep=False)
    assert RowStore(tmp_path).entries() == []


@pytest.mark.parametrize("error", [OSError(28, "No space left on device"), torch.OutOfMemoryError("out of memory")])
def test_rows_for_which_no_room_can_be_made_are_run_each_time(
    error: Exception, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows = rowset(store=tmp_path, budget_bytes=3 * ROW, store_bytes=1 << 20)
    rows.advance(1, SHAPE, rows=3, private=True)
    rows.keep(1, ids(0, 1, 2), values(1, ids(0, 1, 2)))

    def refused(*_: Any) -> None:
        raise error

    monkeypatch.setattr(ActivationCache, "grow", refused)
    with pytest.warns(RuntimeWarning, match="do not hold the rows of all samples"):
        assert torch.equal(rows.keep(1, ids(3), values(1, ids(3))), values(1, ids(3)))
    assert_rows(rows, 1, 0, 1, 2)
    assert_rows(rows, 0, 3)


def test_a_store_that_cannot_be_opened_is_tried_once_an_epoch(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tried = []

    def refused(*_: Any, **__: Any) -> None:
        tried.append(1)
        raise OSError(37, "No locks available")

    rows = rowset(store=tmp_path)
    monkeypatch.setattr(run_store, "StoredRows", refused)
    rows.advance(1, SHAPE, rows=6, private=False)
    with pytest.warns(RuntimeWarning, match="goes on without what the store has: .* No locks"):
        rows.keep(1, ids(0), values(1, ids(0)))
    rows.keep(1, ids(1), values(1, ids(1)))
    rows.epoch = 1
    rows.keep(1, ids(5), values(1, ids(5)))
    assert len(tried) == 2
    assert_rows(rows, 1, 0, 5)


@pytest.mark.parametrize("views", [2, 8])
def test_a_run_that_resumes_may_have_another_number_of_random_views(views: int, tmp_path: Path) -> None:
    first = rowset(views=4, store=tmp_path)
    first.advance(1, SHAPE, rows=24, private=False)
    for first.epoch in range(4):
        first.keep(1, ids(*range(6)), values(1, ids(*range(6)), view=first.epoch))
    saved = first.save()
    first.close(keep=True)
    again = rowset(views=views, store=tmp_path)
    again.resume(saved, (1,), SHAPE)
    there = torch.zeros(6)
    for again.epoch in range(views):
        there += again.filled(ids(*range(6)))
    assert there.tolist() == [min(views, 4)] * 6
