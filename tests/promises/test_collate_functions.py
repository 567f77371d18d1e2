"""A collate_fn may give anything per sample, and nothing random or coupled."""

from __future__ import annotations

import dataclasses
import random
from collections import UserDict
from collections.abc import Callable
from typing import Any, NamedTuple

import pytest
import torch
from four_quarters import Run, network, quarters
from torch.utils.data import DataLoader, TensorDataset, default_collate

from learndrop_ext import DropScheduler
from learndrop_ext.forward.images import Images


def mixup_half_the_time(samples: list[Any]) -> Any:
    x, y = default_collate(samples)
    if random.random() < 0.5:
        x = 0.6 * x + 0.4 * x.roll(1, 0)
    return x, y


def standardise_over_the_batch(samples: list[Any]) -> Any:
    x, y = default_collate(samples)
    return (x - x.mean()) / x.std(), y


@pytest.mark.parametrize("collate", [mixup_half_the_time, standardise_over_the_batch])
def test_a_collate_fn_that_is_no_function_of_the_sample_is_refused(collate: Callable[[list[Any]], Any]) -> None:
    model = network()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    with pytest.raises(ValueError, match=r"same sample for the same id each time and in any batch"):
        DropScheduler(model, optimizer, Run.make_loader(collate_fn=collate))


def test_labels_of_any_kind_are_carried() -> None:
    def ragged(samples: list[Any]) -> dict[str, Any]:
        x, y = default_collate(samples)
        ids = y.tolist()
        return {
            "x": x,
            "y": y,
            "double": y.double() / 3,
            "array": y.numpy() + 1,
            "none": None,
            "scale": 0.5,
            "boxes": [torch.full((i + 1, 4), float(i)) for i in ids],
        }

    run = Run(drops={})
    run.user = Run.make_loader(collate_fn=ragged)
    run.drop = run.scheduler({1: 2}, input="x")
    for _ in range(3):
        for batch in run.drop.loader:
            y = batch["y"]
            run.train_step(batch["x"], y)
            assert torch.equal(batch["double"], y.double() / 3)
            assert (batch["array"] == y.numpy() + 1).all()
            assert (batch["none"], batch["scale"]) == (None, 0.5)
            assert [len(box) - 1 for box in batch["boxes"]] == y.tolist()
        run.drop.step()
    assert run.drop.prefix == 2


def test_boxes_that_the_loop_scales_in_place_come_back_as_they_were() -> None:
    def with_boxes(samples: list[Any]) -> Any:
        x, y = default_collate(samples)
        return x, y, [{"box": torch.ones(i + 1, 4)} for i in y.tolist()]

    run = Run(drops={})
    run.user = Run.make_loader(collate_fn=with_boxes)
    run.drop = run.scheduler({0: 1})
    for _ in range(3):
        for x, y, boxes in run.drop.loader:
            assert all(bool((box["box"] == 1).all()) for box in boxes)
            for box in boxes:
                box["box"].mul_(0.5)
            run.train_step(x, y)
        run.drop.step()


class Features(UserDict[str, Any]):
    """What the image processors of transformers give."""


def test_a_batch_that_is_a_user_dict_keeps_its_type() -> None:
    def processed(samples: list[Any]) -> Features:
        x, y = default_collate(samples)
        return Features({"labels": y, "pixel_values": x, "names": [str(i) for i in y.tolist()]})

    run = Run(drops={})
    run.user = Run.make_loader(collate_fn=processed)
    run.drop = run.scheduler({1: 2}, input="pixel_values")
    for _ in range(3):
        for batch in run.drop.loader:
            assert type(batch) is Features
            assert list(batch) == ["labels", "pixel_values", "names"]
            assert batch["names"] == [str(i) for i in batch["labels"].tolist()]
            run.train_step(batch["pixel_values"], batch["labels"])
        run.drop.step()
    assert run.drop.prefix == 2


@dataclasses.dataclass
class Fields:
    labels: torch.Tensor
    pixel_values: torch.Tensor
    names: list[str]
    scale: float = 0.5


class Named(NamedTuple):
    labels: torch.Tensor
    pixel_values: torch.Tensor
    names: list[str]


@pytest.mark.parametrize("ids", [None, "names"])
@pytest.mark.parametrize("kind", [Fields, Named])
def test_a_batch_with_named_fields_keeps_its_type(kind: Any, ids: str | None) -> None:
    def collate(samples: list[Any]) -> Any:
        x, y, number = default_collate(samples)
        return kind(y, x, [f"sample {i}" for i in number.tolist()])

    run = Run(drops={})
    numbered = TensorDataset(*quarters().tensors, torch.arange(len(quarters())))
    run.user = DataLoader(numbered, 8, shuffle=True, collate_fn=collate)
    with pytest.raises(ValueError, match=r"got 'image'; the batch is a \w+ with \['labels', 'pixel_values', 'names'"):
        run.scheduler({}, input="image", ids=ids)
    run.drop = run.scheduler({1: 2}, input="pixel_values", ids=ids)
    for _ in range(4):
        for batch in run.drop.loader:
            assert type(batch) is kind
            numbers = [int(name.split()[1]) for name in batch.names]
            assert torch.equal(numbered.tensors[1][numbers], batch.labels)
            run.train_step(batch.pixel_values, batch.labels)
        run.drop.step()
    assert run.drop.prefix == 2
    assert isinstance(batch.pixel_values, Images)
    assert batch.pixel_values.pixels is None
