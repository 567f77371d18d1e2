"""Loaders with ids: what is refused at once, and the table of ids."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from ids_streams import (
    Shards,
    Stream,
    begun,
    no_ids,
    trained,
)
from torch.utils.data import DataLoader

from learndrop_ext import CacheConfig
from learndrop_ext.data import id_source, source
from small_training import Net


@pytest.mark.parametrize(
    ("loader", "options", "error", "message"),
    [
        (3, {}, TypeError, "loader must be iterated over for batches, got int"),
        (
            (b for b in [1]),
            {},
            TypeError,
            "each time it is iterated over, got a generator, which can be iterated over only once",
        ),
        (iter([1]), {}, TypeError, "got a list_iterator"),
        (itertools.cycle([1]), {}, TypeError, "got a cycle"),
        ([], {}, ValueError, "loader must give batches, got none"),
        ([(torch.zeros(0, 3, 8, 8), torch.zeros(0), [])], {}, ValueError, "one sample or more, got an empty one"),
        (list(Stream()), {"ids": 5}, ValueError, "ids must be the position .*, got 5; there is a tuple with 3 entries"),
        (list(Stream()), {"ids": (2, 1)}, ValueError, r"got \(2, 1\); there is a Tensor with no entries"),
        (list(Stream(no_ids)), {"ids": "id", "input": "image"}, ValueError, r"got 'id'; .* with \['image', 'label'\]"),
        ([torch.zeros(2, 3, 8, 8)], {}, ValueError, "got 2; there is a Tensor with no entries"),
        (
            list(Stream()),
            {"ids": 0},
            ValueError,
            r"ids must be one per sample, wanted 8 at 0, got a Tensor \[8, 3, 8, 8\]",
        ),
        (list(Stream(lambda x, y, i: (x, y, i[:3]))), {}, ValueError, r"wanted 8 at 2, got a Tensor \[3\]"),
        (list(Stream(lambda x, y, i: (x, y, 7))), {}, ValueError, r"wanted 8 at 2, got a int \[\]"),
        (list(Stream(lambda x, y, i: (x, y, i / 2))), {}, TypeError, "ids must be int or str, got float"),
        (list(Stream(lambda x, y, i: (x, y, i > 2))), {}, TypeError, "ids must be int or str, got bool"),
        (list(Stream(lambda x, y, i: (x, y, [[v] for v in i]))), {}, TypeError, "ids must be int or str, got list"),
        (list(Stream(lambda x, y, i: (x, y, [b"a"] * 8))), {}, TypeError, "ids must be int or str, got bytes"),
        (list(Stream(lambda x, y, i: (x, y, [1, "a"] * 4))), {}, TypeError, "all int or all str, got both at 2"),
        (list(Stream()), {"ids": 2.0}, TypeError, r"a key, an index or a tuple of these, got 2\.0"),
        (list(Stream()), {"ids": ()}, TypeError, r"a key, an index or a tuple of these, got \(\)"),
        (list(Stream()), {"ids": True}, TypeError, "a key, an index or a tuple of these, got True"),
        (list(Stream()), {"input": 7}, ValueError, "input must be the position of the model's input in a batch, got 7"),
    ],
)
def test_what_is_refused_at_once(loader: Any, options: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=f"DropScheduler: .*{message}"):
        begun(loader, **options)


@pytest.mark.parametrize(("name", "value"), [("key", str), ("targets", [0] * 24)])
def test_what_numbers_samples_by_their_index_is_refused(tmp_path: Path, name: str, value: Any) -> None:
    cache = CacheConfig(store=tmp_path, **{name: value})
    with pytest.raises(ValueError, match=rf"ids must be None with CacheConfig\({name}=\.\.\.\), got 2"):
        begun(Stream(), cache=cache)


def test_several_processes_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(source, "several_processes", lambda: True)
    with pytest.raises(ValueError, match="ids must be None where several processes train one model, got 2"):
        begun(Stream())


def test_ids_that_change_their_type() -> None:
    batches = list(Stream(shuffle=False))
    x, y, ids = batches[1]
    batches[1] = (x, y, [str(i) for i in ids.tolist()])
    drop, optimizer = begun(batches)
    with pytest.raises(TypeError, match="ids must be all int or all str, got str after int"):
        trained(drop, optimizer)
    assert len(drop._source) == 8


def test_an_iteration_without_batches() -> None:
    class Once:
        left = 1

        def __iter__(self) -> Iterator[Any]:
            if self.left:
                self.left -= 1
                yield from Stream()

    drop, optimizer = begun(Once())
    with pytest.raises(
        RuntimeError, match="loader must give batches each time it is iterated over, got none from a Once"
    ):
        trained(drop, optimizer)


def test_a_loader_without_ids_is_told_of_them() -> None:
    for loader in (list(Stream()), DataLoader(Shards(), batch_size=8)):
        with pytest.raises(TypeError, match="position in a batch as ids="):
            begun(loader, ids=None)


# The parts


def test_ids_are_numbered_in_the_order_of_the_first_meeting() -> None:
    source = id_source.IdSource([], "index", key=0, seed=0)
    assert source.numbers(["b", "a", "b"]).tolist() == [0, 1, 0]
    assert source.numbers(["c", "a"]).tolist() == [2, 1]
    state = source.state()
    assert state is not None
    assert state["values"] == ["b", "a", "c"]
    other = id_source.IdSource([], "index", key=0, seed=0)
    other.load(state)
    assert other.numbers(["c", "d"]).tolist() == [2, 3]


def test_the_length_of_a_loader_that_does_not_say() -> None:
    assert id_source.length_of(Stream()) is None
    assert id_source.length_of(DataLoader(Shards(), batch_size=8)) is None
    assert id_source.length_of([1, 2]) == 2


def test_the_model_of_these_tests_has_four_layers() -> None:
    assert len(begun(Stream())[0].chain) == 4
    assert isinstance(begun(Stream())[0]._base, Net)
