from __future__ import annotations

import copy
import dataclasses
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from torch.utils.data import default_collate

from learndrop_ext.data.extras import BatchExtras, equal, input_of, register, to_device

CPU = torch.device("cpu")
IMAGES = torch.arange(12.0).view(3, 4)
LABELS = torch.tensor([7, 8, 9])
MASKS = torch.tensor([[True, False], [False, False], [True, True]])


class Sample(NamedTuple):
    image: torch.Tensor
    label: torch.Tensor


def same(got: Any, wanted: Any) -> bool:
    """Equal values in equal structures of equal types."""
    if type(got) is not type(wanted):
        return False
    if isinstance(wanted, torch.Tensor):
        return got.dtype == wanted.dtype and torch.equal(got, wanted)
    if isinstance(wanted, np.ndarray):
        return got.dtype == wanted.dtype and np.array_equal(got, wanted)
    if isinstance(wanted, dict):
        return list(got) == list(wanted) and all(same(got[key], wanted[key]) for key in wanted)
    if isinstance(wanted, list | tuple):
        return len(got) == len(wanted) and all(map(same, got, wanted))
    return bool(got == wanted)


# name, batch, place of the input, the batch with rows 2 and 0 and other images
ROWS = torch.tensor([[5.0], [6.0]])
BATCHES: list[tuple[str, Any, int | str, Any]] = [
    ("a tensor", IMAGES, 0, ROWS),
    ("a tuple", (IMAGES, LABELS), 0, (ROWS, torch.tensor([9, 7]))),
    ("a list", [IMAGES, LABELS], 0, [ROWS, torch.tensor([9, 7])]),
    ("the input twice", {"copy": IMAGES, "x": IMAGES}, "x", {"copy": IMAGES[[2, 0]], "x": ROWS}),
    ("the input last", [LABELS, IMAGES], 1, [torch.tensor([9, 7]), ROWS]),
    ("counted from the end", [LABELS, IMAGES], -1, [torch.tensor([9, 7]), ROWS]),
    ("a dict", {"x": IMAGES, "y": LABELS}, "x", {"x": ROWS, "y": torch.tensor([9, 7])}),
    ("a named tuple", Sample(IMAGES, LABELS), 0, Sample(ROWS, torch.tensor([9, 7]))),
    ("strings", [IMAGES, ["a", "b", "c"]], 0, [ROWS, ["c", "a"]]),
    ("a tuple of strings", [IMAGES, ("a", "b", "c")], 0, [ROWS, ("c", "a")]),
    ("plain values", [IMAGES, [1, 2.5, None], [b"x", True, "z"]], 0, [ROWS, [None, 1], ["z", b"x"]]),
    (
        "nested",
        {"x": IMAGES, "target": {"label": LABELS, "parts": [MASKS, (LABELS, ["a", "b", "c"])]}},
        "x",
        {
            "x": ROWS,
            "target": {
                "label": torch.tensor([9, 7]),
                "parts": [MASKS[[2, 0]], (torch.tensor([9, 7]), ["c", "a"])],
            },
        },
    ),
    ("the input twice", (IMAGES, IMAGES), 0, (ROWS, IMAGES[[2, 0]])),
    (
        "boxes of different counts",
        (IMAGES, [torch.zeros(2, 4), torch.ones(3, 4), torch.ones(0, 4)]),
        0,
        (ROWS, [torch.ones(0, 4), torch.zeros(2, 4)]),
    ),
    ("a dict a sample", (IMAGES, [{"n": 1}, {"n": 2}, {"n": 3}]), 0, (ROWS, [{"n": 3}, {"n": 1}])),
    ("a numpy array", (IMAGES, np.array([7, 8, 9])), 0, (ROWS, np.array([9, 7]))),
    ("float64", (IMAGES, LABELS.double()), 0, (ROWS, torch.tensor([9.0, 7.0], dtype=torch.float64))),
    ("the same in all batches", (IMAGES, None, 0.5, {"set": "train"}), 0, (ROWS, None, 0.5, {"set": "train"})),
    ("many dtypes", (IMAGES, LABELS.half(), MASKS), 0, (ROWS, LABELS[[2, 0]].half(), MASKS[[2, 0]])),
]


@pytest.mark.parametrize(("batch", "key", "wanted"), [case[1:] for case in BATCHES], ids=[case[0] for case in BATCHES])
def test_extras_gives_back_the_structure_with_other_images(batch: Any, key: int | str, wanted: Any) -> None:
    rest = BatchExtras(key=key, device=CPU)
    rest.put(batch, torch.tensor([4, 0, 2]))
    assert same(rest.get(torch.tensor([2, 4]), ROWS), wanted)


def test_extras_keeps_what_default_collate_makes() -> None:
    samples = [(torch.ones(2) * i, i, f"name{i}", {"box": torch.tensor([i, i])}) for i in range(4)]
    rest = BatchExtras(key=0, device=CPU)
    rest.put(default_collate(samples[:2]), torch.tensor([3, 1]))
    rest.put(default_collate(samples[2:]), torch.tensor([0, 2]))
    wanted = default_collate([samples[1], samples[2], samples[0]])
    assert same(rest.get(torch.tensor([1, 0, 3]), wanted[0]), wanted)


def test_extras_keeps_no_images() -> None:
    rest = BatchExtras(key=0, device=CPU)
    rest.put((torch.ones(2, 3, 8, 8), LABELS[:2]), torch.tensor([0, 999]))
    assert sum(column.stored.numel() for column in rest._columns if column.has_rows) == 1000


def test_extras_grows() -> None:
    rest = BatchExtras(key=0, device=CPU)
    rest.put((IMAGES[:2], LABELS[:2], ["a", "b"]), torch.tensor([1, 0]))
    rest.put((IMAGES[:1], LABELS[2:], ["c"]), torch.tensor([3]))
    assert same(rest.get(torch.tensor([3, 0, 1]), IMAGES), (IMAGES, torch.tensor([9, 8, 7]), ["c", "b", "a"]))


PER_SAMPLE = (
    "DropScheduler: every entry of a batch must be a tensor of 3 rows or a list of 3 values, one per sample, or a value "
    "that is the same in all batches, got "
)
REFUSED = [
    ((IMAGES, LABELS[:2]), PER_SAMPLE + r"a tensor \[2\] at batch\[1\]"),
    ((IMAGES, torch.tensor(1.0)), PER_SAMPLE + r"a tensor \[\] at batch\[1\]"),
    ((IMAGES, {"names": {1, 2}}), PER_SAMPLE + r"a set at batch\[1\]\['names'\]"),
    ((IMAGES, np.zeros(4)), PER_SAMPLE + r"a numpy array \[4\] at batch\[1\]"),
    ((IMAGES[:2], LABELS), r"a tensor of 2 rows or a list of 2 values, .* got a tensor \[3\] at batch\[1\]"),
]


@pytest.mark.parametrize(("batch", "message"), REFUSED)
def test_extras_refuses_entries_that_are_not_per_sample(batch: Any, message: str) -> None:
    rest = BatchExtras(key=0, device=CPU)
    with pytest.raises(ValueError, match=message):
        rest.put(batch, torch.tensor([0, 1, 2]))
    rest.put((IMAGES, LABELS), torch.tensor([0, 1, 2]))
    assert same(rest.get(torch.tensor([1]), ROWS), (ROWS, LABELS[1:2]))


# first batch, second batch, message
CHANGED = [
    (
        (IMAGES, ["a", "b", "c"]),
        (IMAGES, ["a", "b"]),
        r"every entry of a batch must be a tensor of 3 rows .* got 2 values at batch\[1\]",
    ),
    (
        (IMAGES, 0.5),
        (IMAGES, 0.25),
        r"must be per sample or the same in all batches, got 0.25 after 0.5 at batch\[1\]",
    ),
    ((IMAGES, LABELS), (IMAGES, LABELS, LABELS), "DropScheduler: all batches must have the same structure, got "),
    ((IMAGES, LABELS), [IMAGES, LABELS], "DropScheduler: all batches must have the same structure, got "),
    (
        (IMAGES, LABELS),
        (IMAGES, MASKS),
        r"DropScheduler: entries of all batches must be alike, wanted torch.int64 rows \[\] as in the first, "
        r"got torch.bool rows \[2\] at batch\[1\]",
    ),
    (
        (IMAGES, LABELS),
        (IMAGES, LABELS.float()),
        r"wanted torch.int64 rows \[\] as in the first, got torch.float32 rows \[\] at batch\[1\]",
    ),
    ((IMAGES, ["a", "b", "c"]), (IMAGES, LABELS), r"wanted a list of values as in the\s+first, got torch.int64 rows"),
    (
        (IMAGES, LABELS),
        (IMAGES, ["a", "b", "c"]),
        r"wanted torch.int64 rows \[\] as in the first, got a list of values at batch\[1\]",
    ),
]


@pytest.mark.parametrize(("first", "second", "message"), CHANGED)
def test_extras_refuses_a_batch_unlike_the_first(first: Any, second: Any, message: str) -> None:
    rest = BatchExtras(key=0, device=CPU)
    rest.put(first, torch.tensor([0, 1, 2]))
    with pytest.raises(ValueError, match=message):
        rest.put(second, torch.tensor([2, 1, 0]))
    assert same(rest.get(torch.tensor([0, 1, 2]), IMAGES), first)


@pytest.mark.parametrize(
    ("batch", "key"), [(IMAGES, 0), (IMAGES, "x"), ([LABELS, IMAGES], 1), ({"a": LABELS, "x": IMAGES}, "x")]
)
def test_input_of(batch: Any, key: int | str) -> None:
    assert input_of(batch, key) is IMAGES


@pytest.mark.parametrize(
    ("batch", "key", "message"),
    [
        ((IMAGES, LABELS), 2, "in a batch, got 2; the batch is a tuple with 2 entries"),
        ((IMAGES, LABELS), "x", "in a batch, got 'x'; the batch is a tuple with 2 entries"),
        ({"image": IMAGES}, 0, r"in a batch, got 0; the batch is a dict with \['image'\]"),
        (5, 0, "in a batch, got 0; the batch is a int with no entries"),
        ((["a"], IMAGES), 0, "input must be the position of a tensor in a batch, got 0, a list"),
    ],
)
def test_input_of_refuses(batch: Any, key: int | str, message: str) -> None:
    with pytest.raises(ValueError, match=f"DropScheduler: .*{message}"):
        input_of(batch, key)


def test_to_device_moves_tensors_only() -> None:
    moved = to_device({"x": IMAGES, "names": ["a"], "more": (LABELS, 3)}, torch.device("meta"))
    assert moved["x"].device.type == moved["more"][0].device.type == "meta"
    assert (moved["names"], moved["more"][1]) == (["a"], 3)


class Record(dict[str, Any]):
    """A dict of another type."""


def test_a_dict_of_another_type_keeps_its_type() -> None:
    batch = Record(y=LABELS, x=IMAGES)
    register(batch)
    rest = BatchExtras(key="x", device=CPU)
    rest.put(batch, torch.tensor([4, 0, 2]))
    got = rest.get(torch.tensor([2, 4]), ROWS)
    assert type(got) is Record
    assert same(dict(got), {"y": LABELS[[2, 0]], "x": ROWS})


def test_a_batch_whose_images_cannot_be_replaced_is_refused() -> None:
    class Strange(Mapping[str, Any]):
        def __getitem__(self, name: str) -> Any:
            return {"x": IMAGES, "y": LABELS}[name]

        def __iter__(self) -> Iterator[str]:
            return iter("xy")

        def __len__(self) -> int:
            return 2

    with pytest.raises(TypeError, match=r"loader must give batches that are tensors, .*, got images in a Strange"):
        BatchExtras(key="x", device=CPU).put(Strange(), torch.tensor([4, 0, 2]))


def test_values_of_any_type_are_compared_by_what_they_hold() -> None:
    @dataclasses.dataclass
    class Box:
        box: torch.Tensor

    class Plain:
        def __init__(self, values: Any) -> None:
            self.values = values

    for kind in (Box, Plain):
        ones, zeros = [[kind(torch.full((2, 4), value))] for value in (1.0, 0.0)]
        assert equal(ones, copy.deepcopy(ones))
        assert not equal(ones, zeros)
