from __future__ import annotations

import copy
import errno
import io
import os
import time
from collections import namedtuple
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils.data import Dataset

from learndrop_ext import CacheConfig, DropScheduler, Fixed
from learndrop_ext.data.source import KNOWN
from learndrop_ext.guards import PROBES
from learndrop_ext.rows.cache import ActivationCache
from small_training import Jittered, Net, called, data, epoch, parts

Run = tuple[DropScheduler, Net, torch.optim.Optimizer]


class Counted(Dataset[Any]):
    """The small data; how often a sample was read."""

    def __init__(self) -> None:
        self.data = data()
        self.reads = 0

    def __len__(self) -> int:
        return len(self.data)

    def __getitem__(self, index: int) -> Any:
        self.reads += 1
        return self.data[index]


def on_disk(folder: Path, *, on_device: int | str = "auto", **options: Any) -> CacheConfig:
    return CacheConfig(budget_bytes=on_device, disk_bytes=1 << 22, disk_dir=str(folder), **options)


def begun(config: CacheConfig, drops: dict[int, int], dataset: Dataset[Any] | None = None, **options: Any) -> Run:
    model, optimizer, loader = parts(dataset, **options)
    return DropScheduler(model, optimizer, loader, policy=Fixed(drops), cache=config), model, optimizer


def checkpoint(run: Run) -> dict[str, Any]:
    """What a user saves, through a file that holds no code."""
    drop, model, optimizer = run
    file = io.BytesIO()
    state = {"model": model.state_dict(), "optimizer": optimizer.state_dict(), "drop": drop.state_dict()}
    torch.save(state | {"order": drop.loader.generator.get_state()}, file)
    file.seek(0)
    return dict(torch.load(file, weights_only=True))


def resumed(
    state: dict[str, Any], config: CacheConfig, drops: dict[int, int], dataset: Any = None, **options: Any
) -> Run:
    model, optimizer, loader = parts(dataset, **options)
    loader.generator.set_state(state["order"])
    model.load_state_dict(state["model"])
    optimizer.load_state_dict(state["optimizer"])
    drop = DropScheduler(model, optimizer, loader, policy=Fixed(drops), cache=config)
    drop.load_state_dict(state["drop"])
    return drop, model, optimizer


def trained(run: Run, epochs: int) -> list[float]:
    drop, _, optimizer = run
    losses = []
    for _ in range(epochs):
        losses += epoch(drop, optimizer)
        drop.step()
    return losses


# None of the 24 rows of 1 KiB after conv1 fits beside the areas that rows from the disk go through; all do.
@pytest.mark.parametrize("on_device", [2048, "auto"])
@pytest.mark.parametrize("drops", [{1: 2}, {1: 1, 2: 3}, {1: 1, 4: 3}])
def test_a_resumed_run_uses_the_rows_of_the_file_and_equals_the_uninterrupted_one(
    tmp_path: Path, drops: dict[int, int], on_device: int | str
) -> None:
    config = on_disk(tmp_path, on_device=on_device)
    whole = begun(config, drops, Counted())
    wanted = trained(whole, 6)
    first = begun(config, drops, Counted())
    got = trained(first, 3)
    state = checkpoint(first)
    first[0].undrop()
    dataset = Counted()
    # The scheduler reads samples when it is made, before it knows of a state.
    begun(config, drops, dataset)
    before = dataset.reads
    second = resumed(state, config, drops, dataset)
    # The samples are read once more that tell whether these are the images that the rows were made of.
    read = dataset.reads
    assert read == 2 * before + KNOWN
    got += trained(second, 3)
    assert got == wanted
    # A few samples are read at each epoch, to see whether they are what they were; a later drop is made of rows.
    assert dataset.reads <= read + 3 * PROBES
    for name, value in whole[1].state_dict().items():
        assert torch.equal(value, second[1].state_dict()[name])
    assert second[0]._rows.cuts == whole[0]._rows.cuts
    cache = second[0]._rows.cache
    assert cache is not None
    assert (cache.plan.disk > 0) == (on_device == 2048)


def test_a_file_is_written_once_for_rows_that_stay(tmp_path: Path) -> None:
    run = begun(on_disk(tmp_path), {1: 1, 4: 2})
    trained(run, 1)
    # There are no rows yet.
    assert run[0].state_dict()["rows_file"] is None
    trained(run, 1)
    assert list(tmp_path.iterdir()) == []
    name = run[0].state_dict()["rows_file"]
    path = tmp_path / name
    written = path.stat()
    trained(run, 1)
    assert run[0].state_dict()["rows_file"] == name
    assert (path.stat().st_ino, path.stat().st_mtime_ns) == (written.st_ino, written.st_mtime_ns)
    trained(run, 2)
    assert path.exists()
    after = run[0].state_dict()["rows_file"]
    assert [p.name for p in tmp_path.iterdir()] == [after]
    assert after != name
    run[0].undrop()
    assert run[0].state_dict()["rows_file"] is None
    assert list(tmp_path.iterdir()) == []


def test_a_file_found_again_is_written_no_second_time(tmp_path: Path) -> None:
    config = on_disk(tmp_path, on_device=2048)
    first = begun(config, {1: 2})
    trained(first, 2)
    state = checkpoint(first)
    second = resumed(state, config, {1: 2})
    assert second[0].state_dict()["rows_file"] == state["drop"]["rows_file"]
    assert len(list(tmp_path.iterdir())) == 1


def cut_short(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-1])


def flip_a_bit(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[4096] ^= 1
    path.write_bytes(content)


class Other(Counted):
    """Other images under the same name."""

    def __getitem__(self, index: int) -> Any:
        x, y = self.data[index]
        return x + 1, y


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (Path.unlink, "No such file"),
        (cut_short, "bytes long, got"),
        (flip_a_bit, "row 0 must have the checksum"),
        (lambda path: path.write_bytes(b"x" * 9000), "the first bytes must be"),
    ],
)
def test_rows_are_made_again_where_the_file_is_gone_or_spoilt(
    tmp_path: Path, spoil: Callable[[Path], Any], message: str
) -> None:
    config = on_disk(tmp_path)
    wanted = trained(begun(config, {1: 2}), 4)
    first = begun(config, {1: 2})
    got = trained(first, 2)
    state = checkpoint(first)
    spoil(tmp_path / state["drop"]["rows_file"])
    with pytest.warns(RuntimeWarning, match=f"load_state_dict: the rows are computed again .*{message}"):
        second = resumed(state, config, {1: 2})
    assert got + trained(second, 2) == wanted


@pytest.mark.parametrize(
    ("options", "dataset", "message"),
    [
        ({"codec": "fp32"}, None, "rows must be of codec 'fp32', got rows of codec 'fp16'"),
        ({"views": 2}, None, "rows must be of views 2, got rows of views 1"),
        ({}, Other, "rows must be of images"),
    ],
)
def test_rows_of_another_cache_are_not_used(
    tmp_path: Path, options: dict[str, Any], dataset: type[Other] | None, message: str
) -> None:
    first = begun(on_disk(tmp_path), {1: 1}, None if dataset is None else Counted())
    trained(first, 2)
    state = checkpoint(first)
    # So that the images differ and not the name of their class.
    if dataset is not None:
        dataset.__qualname__, dataset.__module__ = Counted.__qualname__, Counted.__module__
    with pytest.warns(RuntimeWarning, match=message):
        second = resumed(state, on_disk(tmp_path, **options), {1: 1}, None if dataset is None else dataset())
    cache = second[0]._rows.cache
    assert cache is not None
    assert not bool(cache.filled.any())
    for _ in range(cache.filled.numel() // 24):
        epoch(second[0], second[2])
    assert bool(cache.filled.all())


def test_a_model_of_another_code_with_the_same_weights_does_not_use_the_rows(tmp_path: Path) -> None:
    class Leaky(Net):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            x = torch.nn.functional.leaky_relu(self.bn1(self.conv1(x)))
            x = self.bn2(self.conv2(x)).relu()
            return self.fc(self.conv3(x).relu().mean((2, 3)))

    config = on_disk(tmp_path)
    first = begun(config, {1: 2})
    trained(first, 2)
    state = checkpoint(first)
    _, _, loader = parts()
    model = Leaky()
    model.load_state_dict(state["model"])
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    drop = DropScheduler(model, optimizer, loader, policy=Fixed({1: 2}), cache=config)
    with pytest.warns(RuntimeWarning, match="rows must be of layers"):
        drop.load_state_dict(state["drop"])


def test_views_and_the_rest_of_the_batch_come_back_with_the_rows(tmp_path: Path) -> None:
    def named(samples: Any) -> dict[str, Any]:
        x, y = torch.utils.data.default_collate(samples)
        return {"x": x, "about": (y, [f"class {c}" for c in y.tolist()]), "mask": x[:, 0] > 0}

    def run(source: Any, state: dict[str, Any] | None = None) -> list[Any]:
        model, optimizer, loader = parts(Jittered(), collate_fn=named)
        config = on_disk(tmp_path, on_device=2048, views=2)
        if state is not None:
            model.load_state_dict(state["model"])
            loader.generator.set_state(state["order"])
        drop = DropScheduler(model, optimizer, loader, policy=Fixed({1: 1}), cache=config, input="x")
        if state is None:
            for _ in range(3):  # both views are drawn
                for batch in drop.loader:
                    drop.model(batch["x"])
                drop.step()
            source.append(checkpoint((drop, model, optimizer)))
        else:
            drop.load_state_dict(state["drop"])
        return [batch | {"x": called(drop, batch["x"])[1]} for _ in range(3) for batch in drop.loader]

    states: list[dict[str, Any]] = []
    wanted = run(states)
    got = run(None, states[0])
    assert len(wanted) == len(got) == 9
    for one, other in zip(wanted, got, strict=True):
        assert one.keys() == other.keys()
        assert torch.equal(one["x"], other["x"])
        assert torch.equal(one["mask"], other["mask"])
        assert torch.equal(one["about"][0], other["about"][0])
        assert one["about"][1] == other["about"][1]


def test_rows_that_were_fetched_later_are_in_the_next_file(tmp_path: Path) -> None:
    class Chosen(torch.utils.data.Sampler[int]):
        def __init__(self) -> None:
            self.ids = [3, 1, 4, 1, 5, 9]

        def __iter__(self) -> Any:
            return iter(self.ids)

        def __len__(self) -> int:
            return len(self.ids)

    config = on_disk(tmp_path, on_device=2048)
    chosen = Chosen()
    first = begun(config, {1: 1}, Counted(), sampler=chosen, shuffle=False)
    trained(first, 2)
    old = first[0].state_dict()["rows_file"]
    chosen.ids = [9, 11, 3, 0]
    epoch(first[0], first[2])
    assert not (tmp_path / old).exists()
    state = checkpoint(first)
    wanted = epoch(first[0], first[2])
    dataset = Counted()
    second = resumed(state, config, {1: 1}, dataset, sampler=chosen, shuffle=False)
    dataset.reads = 0
    assert epoch(second[0], second[2]) == wanted
    assert dataset.reads <= PROBES


def test_no_file_is_kept_where_the_budget_for_the_disk_does_not_hold_all_rows(tmp_path: Path) -> None:
    run = begun(CacheConfig(disk_bytes=8192, disk_dir=str(tmp_path)), {1: 1})
    trained(run, 2)
    assert run[0].state_dict()["rows_file"] is None
    assert list(tmp_path.iterdir()) == []


def test_a_full_disk_costs_the_file_and_not_the_checkpoint(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: Any) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    config = on_disk(tmp_path)
    run = begun(config, {1: 2})
    wanted = copy.deepcopy(trained(run, 2))
    with monkeypatch.context() as patch:
        patch.setattr(ActivationCache, "save", full)
        with pytest.warns(
            RuntimeWarning, match=r"state_dict: a run that resumes .* will compute its rows again .*No space"
        ):
            state = checkpoint(run)
    assert state["drop"]["rows_file"] is None
    assert wanted + trained(resumed(state, config, {1: 2}), 2) == wanted + trained(run, 2)


def test_a_batch_that_no_file_can_hold_is_said(tmp_path: Path) -> None:
    pair = namedtuple("pair", "x y")

    run = begun(on_disk(tmp_path), {1: 1}, collate_fn=lambda samples: pair(*torch.utils.data.default_collate(samples)))
    trained(run, 2)
    with pytest.warns(
        RuntimeWarning, match=r"will compute its rows again \(BatchExtras.state: batches must be of plain"
    ):
        assert run[0].state_dict()["rows_file"] is None


def test_what_killed_runs_left_is_deleted_and_what_living_ones_write_is_not(tmp_path: Path) -> None:
    living = begun(on_disk(tmp_path, on_device=2048), {1: 1})
    trained(living, 1)
    (part,) = tmp_path.glob("*.part")
    dead = tmp_path / "rows-0123456789ab-3.bin.part"
    fresh = tmp_path / "rows-0123456789ac-3.bin.part"
    foreign = tmp_path / "thesis.part"
    for path in (dead, fresh, foreign):
        path.write_bytes(b"x")
    long_ago = time.time() - 3600
    for path in (dead, part, foreign):
        os.utime(path, (long_ago, long_ago))
    trained(begun(on_disk(tmp_path), {1: 1}), 1)
    assert sorted(tmp_path.glob("*")) == sorted([part, fresh, foreign])
