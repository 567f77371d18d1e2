"""The rows of whole runs: what the live layers get of each sample, and when its image is read."""

from __future__ import annotations

import contextlib
import itertools
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, Dataset, TensorDataset

from learndrop_ext import CacheConfig, DropScheduler, Fixed
from learndrop_ext.guards import PROBES
from small_training import Jittered, called, data, epoch, parts, prefix_rows


class Numbered(Dataset[Any]):
    """The small data with the ids as labels; which samples were read is noted, and what was read last of each."""

    def __init__(self, count: int = 24, *, noise: bool = False) -> None:
        self.images = data(count).tensors[0]
        self.noise = noise
        self.reads: list[int] = []
        self.last: dict[int, torch.Tensor] = {}

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> tuple[torch.Tensor, int]:
        self.reads.append(index)
        x = self.images[index]
        if self.noise:
            x = x + torch.rand(())
        self.last[index] = x
        return x, index


def rowed(**options: Any) -> CacheConfig:
    return CacheConfig(codec="fp32", **({"key": str} | options))


def begun(
    dataset: Dataset[Any] | None = None, drops: dict[int, int] | None = None, *, batch_size: int = 8, **options: Any
) -> tuple[DropScheduler, torch.optim.Optimizer]:
    model, optimizer, loader = parts(dataset, batch_size=batch_size)
    drops = {1: 2} if drops is None else drops
    return DropScheduler(model, optimizer, loader, **({"policy": Fixed(drops), "cache": "fp32"} | options)), optimizer


def behind(drop: DropScheduler, k: int, images: torch.Tensor) -> torch.Tensor:
    """What the first k layers make of images."""
    with torch.no_grad():
        return drop.chain.prefix(k)(images) if k else images


def trained(drop: DropScheduler, optimizer: torch.optim.Optimizer, autocast: bool = False) -> list[Any]:
    """The batches of an epoch of training, with labels below 5, as the live layers got them."""
    batches = []
    drop.model.train()
    for x, y in drop.loader:
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            output, got = called(drop, x)
            loss = nn.functional.cross_entropy(output.float(), y % 5)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        batches.append((got, y))
    return batches


@pytest.mark.parametrize("drops", [{0: 2}, {1: 2}, {1: 1, 2: 2}, {0: 1, 1: 2, 2: 3}])
def test_rows_are_to_the_bit_what_the_dropped_layers_make_of_the_same_batch(drops: dict[int, int]) -> None:
    dataset = Numbered()
    drop, optimizer = begun(dataset, drops)
    made: dict[int, torch.Tensor] = {}
    for _ in range(5):
        k = drop.prefix
        cached = int(drop._rows.cache.filled.sum()) if drop._rows.cache is not None else 0
        for x, y in trained(drop, optimizer):
            wanted = behind(drop, k, dataset.images[y])
            if k and cached == 0:
                assert torch.equal(x, wanted)
                made |= dict(zip(y.tolist(), x, strict=True))
            elif k:
                assert all(torch.equal(row, made[i]) for i, row in zip(y.tolist(), x, strict=True))
        drop.step()
    assert drop.prefix == max(drops.values())


def test_growing_drops_read_images_in_one_epoch_only() -> None:
    dataset = Numbered()
    drop, optimizer = begun(dataset, {0: 1, 1: 2, 2: 3})
    reads, caches = [], []
    for _ in range(5):
        dataset.reads.clear()
        trained(drop, optimizer)
        reads.append(len(dataset.reads))
        caches.append(drop._rows.cache)
        drop.step()
    assert reads[0] == 24
    assert all(count <= PROBES for count in reads[1:])
    assert [record.fill_flops > 0 for record in drop.history if record.epoch] == [True, True, True, False, False]
    # The rows of the drop before are freed once all are computed again.
    assert len({id(cache) for cache in caches}) == 3
    for old in (caches[0], caches[1]):
        with pytest.raises(RuntimeError, match="the cache must be open"):
            old.gather(torch.tensor([0]))


def test_older_rows_are_freed_too_where_every_epoch_is_broken_off() -> None:
    drop, _ = begun(Numbered(), {1: 1, 2: 2}, batch_size=8)
    old = None
    for _ in range(30):
        for i, (x, _) in enumerate(drop.loader):
            drop.model(x)
            if i == 1:
                break
        drop.step()
        if drop.epoch == 2:
            old = drop._rows.older
    assert old is not None
    assert drop._rows.older is None
    with pytest.raises(RuntimeError, match="the cache must be open"):
        old.gather(torch.tensor([0]))


@pytest.mark.parametrize("views", [2, 3])
def test_fresh_images_for_as_many_epochs_as_views_then_their_rows_in_turn(views: int) -> None:
    dataset = Numbered(noise=True)
    drop, optimizer = begun(dataset, {1: 2}, cache=rowed(views=views))
    trained(drop, optimizer)
    drop.step()
    rows: list[dict[int, torch.Tensor]] = []
    for turn in range(3 * views):
        dataset.reads.clear()
        batches = trained(drop, optimizer)
        found = {int(i): row for x, y in batches for i, row in zip(y, x, strict=True)}
        assert sorted(found) == list(range(24))
        if turn < views:
            # Some may be read again at the begin of an epoch, to be compared with what is kept.
            assert sorted(set(dataset.reads)) == list(range(24))
            for earlier in rows:
                assert not any(torch.equal(earlier[i], found[i]) for i in found)
            for x, y in batches:
                images = torch.stack([dataset.last[i] for i in y.tolist()])
                torch.testing.assert_close(x, behind(drop, 2, images))
        else:
            assert len(set(dataset.reads)) <= PROBES
            assert all(torch.equal(rows[turn % views][i], found[i]) for i in found)
        rows.append(found)
        drop.step()


# epochs of the run, views, the epoch of the drop, whether rows are worth storing
@pytest.mark.parametrize(
    ("epochs", "views", "at", "stored"),
    [(4, 1, 1, True), (4, 1, 2, True), (4, 1, 3, False), (6, 3, 2, True), (6, 3, 3, False), (None, 3, 3, True)],
)
def test_nothing_is_stored_that_would_not_be_read_again(epochs: int | None, views: int, at: int, stored: bool) -> None:
    dataset = Numbered(noise=views > 1)
    drop, optimizer = begun(dataset, {at: 2}, cache=rowed(views=views), epochs=epochs)
    for _ in range(at):
        trained(drop, optimizer)
        record = drop.step()
    assert record.prefix == 2
    assert (record.cache_bytes > 0) is stored
    for _ in range((epochs or 6) - at):
        for x, y in trained(drop, optimizer):
            images = torch.stack([dataset.last[i] for i in y.tolist()])
            if not stored:
                torch.testing.assert_close(x, behind(drop, 2, images))
        record = drop.step()
    assert (drop._rows.cache is not None and bool(drop._rows.cache.filled.any())) is stored
    assert (record.cache_bytes > 0) is stored


def test_mirror_draws_the_image_and_its_flip_in_turn_before_and_after_a_drop() -> None:
    dataset = Numbered()
    drop, optimizer = begun(dataset, {2: 2}, cache=rowed(mirror=True))
    assert drop._rows.views == 2
    seen: list[dict[int, bool]] = []
    for _ in range(7):
        k = drop.prefix
        flipped = {}
        for x, y in trained(drop, optimizer):
            ways = [behind(drop, k, images) for images in (dataset.images[y], dataset.images[y].flip(-1))]
            for i, row, plain, flip in zip(y.tolist(), x, *ways, strict=True):
                is_plain, is_flip = torch.allclose(row, plain, atol=1e-5), torch.allclose(row, flip, atol=1e-5)
                assert is_plain != is_flip
                flipped[i] = is_flip
        assert 0 < sum(flipped.values()) < 24
        seen.append(flipped)
        drop.step()
    for one, other in itertools.pairwise(seen):
        assert all(one[i] != other[i] for i in range(24))
    assert int(drop._rows.cache.filled.sum()) == 48


def test_a_sampler_that_draws_more_than_the_budgets_hold() -> None:
    drawn = list(range(8))

    class Chosen:
        def __iter__(self) -> Any:
            return iter(drawn)

        def __len__(self) -> int:
            return len(drawn)

    dataset = Numbered()
    model, optimizer, _ = parts()
    loader = DataLoader(dataset, batch_size=4, sampler=Chosen())
    # A row of 6 x 4 x 4 fp32 values is 384 bytes, and its number 8: 12 rows.
    config = rowed(budget_bytes=12 * 392)
    drop = DropScheduler(model, optimizer, loader, policy=Fixed({1: 2}), cache=config)
    trained(drop, optimizer)
    drop.step()
    assert drop._rows.cut == 2
    trained(drop, optimizer)
    drawn.extend(range(8, 24))
    wanted = prefix_rows(drop, 2)
    for turn in range(3):
        dataset.reads.clear()
        with warnings.catch_warnings(record=True) as said:
            warnings.simplefilter("always")
            batches = trained(drop, optimizer)
        ours = [str(w.message) for w in said if "do not hold the rows of all samples" in str(w.message)]
        assert len(ours) == (turn == 0)
        assert [i for _, y in batches for i in y.tolist()] == list(range(24))
        for x, y in batches:
            for i, row in zip(y.tolist(), x, strict=True):
                assert torch.allclose(row, wanted[i], atol=1e-5)
        # Those that do not fit are read each time.
        assert set(range(12, 24)) <= set(dataset.reads)
    assert int(drop._rows.cache.filled.sum()) == 12


def test_the_folder_of_a_store_is_made(tmp_path: Path) -> None:
    model, optimizer, loader = parts()
    store = tmp_path / "of" / "rows"
    with pytest.raises(TypeError, match="policy must be a function"):
        DropScheduler(model, optimizer, loader, policy=3, cache=CacheConfig(store=store))  # type: ignore[arg-type]
    assert not store.exists()
    drop = DropScheduler(model, optimizer, loader, policy=Fixed({0: 2}), cache=CacheConfig(store=store))
    epoch(drop, optimizer)
    drop.close()
    assert (store / "index.sqlite").exists()


def test_rows_that_the_tiers_hold_only_without_room_to_read_ahead_are_not_kept(tmp_path: Path) -> None:
    model, optimizer, loader = parts(data(1050), batch_size=350)
    row = 4 * 8 * 8 * 4
    cache = CacheConfig(codec="fp32", budget_bytes=1000 * row, store=tmp_path, store_bytes=80 * 4096)
    drop = DropScheduler(model, optimizer, loader, policy=Fixed({0: 1}), cache=cache)
    assert (
        "no rows: they take 1.075 MB and the budget is 1.352 MB, less what reading ahead takes"
        in drop.history[0].reason
    )
    epoch(drop, optimizer)
    assert drop.step().tier == "none"


def test_a_drop_keeps_to_the_budgets_that_its_cut_was_chosen_by(monkeypatch: pytest.MonkeyPatch) -> None:
    def less_now(*_: Any) -> Any:
        raise AssertionError("the budgets were read again")

    monkeypatch.setattr("learndrop_ext.rows.rowset.budgets_of", less_now)
    model, optimizer, loader = parts(data())
    drop = DropScheduler(model, optimizer, loader, policy=Fixed({0: 1}), cache=CacheConfig(codec="fp32"))
    epoch(drop, optimizer)
    assert drop.step().tier == "device"


@pytest.mark.parametrize("drops", [{0: 2}, {1: 1, 3: 2}])
def test_rows_made_on_first_draw_spread_over_the_tiers(tmp_path: Path, drops: dict[int, int]) -> None:
    def run(config: CacheConfig) -> tuple[list[Any], DropScheduler]:
        drop, _ = begun(Numbered(700), drops, cache=config, batch_size=64)
        batches = []
        for stop in (4, 6, 2, 6, 4, 11, 11):
            for _, (x, y) in zip(range(stop), drop.loader, strict=False):
                batches.append((called(drop, x)[1], y))
            drop.step()
        return batches, drop

    wanted, _ = run(rowed())
    # 600 rows of 384 bytes: two areas of 256 rows for those that come from the disk, and 88 rows that stay.
    got, drop = run(rowed(budget_bytes=600 * 384, store_bytes=1 << 22, store=tmp_path))
    plan = drop._rows.cache.plan
    assert (plan.device > 0, plan.disk > 0) == (True, True)
    assert bool(drop._rows.cache.filled.all())
    for one, other in zip(got, wanted, strict=True):
        assert torch.equal(one[0], other[0])
        assert torch.equal(one[1], other[1])


@pytest.mark.parametrize("drops", [{0: 2}, {1: 2}])
def test_rows_are_made_under_the_autocast_of_the_training_step(drops: dict[int, int]) -> None:
    dataset = Numbered()
    drop, optimizer = begun(dataset, drops)
    for _ in range(4):
        k = drop.prefix
        for x, y in trained(drop, optimizer, autocast=True):
            if not k:
                continue
            with torch.autocast("cpu", torch.bfloat16):
                wanted = behind(drop, k, dataset.images[y])
            assert x.dtype == wanted.dtype == torch.bfloat16
            torch.testing.assert_close(x, wanted, rtol=2e-2, atol=2e-2)
        drop.step()
    assert drop._guards.loop.autocast == torch.bfloat16
    assert int(drop._rows.cache.filled.sum()) == 24


def test_rows_are_made_anew_under_another_autocast() -> None:
    drop, optimizer = begun(Numbered())
    for autocast, dtype in ((False, torch.float32), (False, torch.float32), (True, None), (True, torch.bfloat16)):
        changed = "they were computed under no autocast, and the loop now trains under autocast of torch.bfloat16"
        with contextlib.nullcontext() if dtype is not None else pytest.warns(RuntimeWarning, match=changed):
            batches = trained(drop, optimizer, autocast=autocast)
        if drop.prefix and dtype is not None:
            assert {x.dtype for x, _ in batches} == {dtype}
        drop.step()


def test_a_resume_in_the_middle_of_an_epoch_goes_on_with_the_rows_that_are_there(tmp_path: Path) -> None:
    config = rowed(store_bytes=1 << 20, store=tmp_path, targets=range(24))
    first, optimizer = begun(Numbered(), cache=config)
    trained(first, optimizer)
    first.step()
    there = []
    for i, (x, y) in enumerate(first.loader):
        first.model(x)
        there += y.tolist()
        if i == 1:
            break
    state = first.state_dict()
    assert state["stored"] is not None
    dataset = Numbered()
    model, optimizer, loader = parts(dataset, batch_size=8)
    model.load_state_dict(first.model.state_dict())
    second = DropScheduler(model, optimizer, loader, policy=Fixed({1: 2}), cache=config)
    second.load_state_dict(state)
    assert int(second._rows.cache.filled.sum()) == len(there) == 16
    dataset.reads.clear()
    batches = trained(second, optimizer)
    missing = set(range(24)) - set(there)
    assert missing <= set(dataset.reads)
    # The labels of the others are known without reading.
    assert len(dataset.reads) <= len(missing) + PROBES
    assert sorted(i for _, y in batches for i in y.tolist()) == list(range(24))
    wanted = prefix_rows(second, 2)
    for x, y in batches:
        torch.testing.assert_close(x, wanted[y])
    assert int(second._rows.cache.filled.sum()) == 24


def test_labels_of_few_samples_are_not_taken_for_the_structure_of_a_batch() -> None:
    def pairs(samples: list[Any]) -> tuple[torch.Tensor, list[Any], torch.Tensor]:
        # Two points a sample, and batches of two samples.
        ids = [i for _, i in samples]
        return (
            torch.stack([x for x, _ in samples]),
            [torch.tensor([[i, 0], [i, 1]]) for i in ids],
            torch.tensor(ids),
        )

    model, optimizer, _ = parts()
    loader = DataLoader(Numbered(), batch_size=2, shuffle=True, collate_fn=pairs)
    drop = DropScheduler(model, optimizer, loader, policy=Fixed({1: 2}), cache="fp32")
    for _ in range(4):
        for x, points, ids in drop.loader:
            drop.model(x)
            assert [p.tolist() for p in points] == [[[i, 0], [i, 1]] for i in ids.tolist()]
        drop.step()
    assert drop.prefix == 2


def test_views_of_a_dataset_with_random_targets_are_kept_and_not_made_anew() -> None:
    class Pointed(Dataset[Any]):
        """A point that follows the flip of the image."""

        def __len__(self) -> int:
            return 24

        def __getitem__(self, index: int) -> Any:
            x, y = data()[index]
            if torch.rand(()) < 0.5:
                return x.flip(-1), torch.tensor([7 - index % 8]), y
            return x, torch.tensor([index % 8]), y

    model, optimizer, loader = parts(Pointed())
    drop = DropScheduler(model, optimizer, loader, policy=Fixed({1: 2}), cache=rowed(views=2))
    for _ in range(8):
        for x, _, _ in drop.loader:
            drop.model(x)
        drop.step()
    assert int(drop._rows.cache.filled.sum()) == 48


def test_an_undropped_run_makes_its_rows_anew() -> None:
    drop, optimizer = begun(Numbered(), {1: 2})
    for _ in range(2):
        trained(drop, optimizer)
        drop.step()
    assert drop._rows.cache is not None
    drop.undrop()
    assert drop._rows.cache is None
    assert drop._rows.cut == 0
    assert drop._rows.slots.used == 0
    images = drop.loader.dataset.images  # type: ignore[attr-defined]
    for x, y in drop.loader:
        assert torch.equal(x, images[y])


def test_the_rows_made_are_counted() -> None:
    drop, optimizer = begun(TensorDataset(*data().tensors), {1: 1, 2: 2})
    counted = []
    for _ in range(4):
        epoch(drop, optimizer)
        images, older, seconds = drop._rows.counts
        counted.append((images, older, seconds > 0))
        drop.step()
    assert counted == [(0, 0, False), (24, 0, True), (0, 24, True), (0, 0, False)]


def test_a_random_dataset_keeps_as_many_views_as_were_asked_for() -> None:
    model, optimizer, loader = parts(Jittered())
    drop = DropScheduler(model, optimizer, loader, policy=Fixed({0: 1}), cache=rowed(views=3))
    seen = [{round(float(row.sum()), 4) for x, _ in drop.loader for row in called(drop, x)[1]} for _ in range(6)]
    assert len(set.union(*seen[:3])) == 72
    assert seen[3:] == seen[:3]
