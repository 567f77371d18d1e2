"""What a batch holds beside its images lies in the budgets too, and is told."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, Dataset

from learndrop_ext import CacheConfig, DropScheduler, Fixed
from small_training import data, epoch, parts

#: Two layers of Net leave 6 x 4 x 4 values in fp32; a label is one int64; a mask 3 x 8 x 8 bytes.
ROW, LABEL, MASK, IMAGES = 384, 8, 192, 24


class Masked(Dataset[Any]):
    """The small images, with a mask and a number of boxes of each."""

    def __len__(self) -> int:
        return IMAGES

    def __getitem__(self, index: int) -> dict[str, Any]:
        x, y = data()[index]
        return {"image": x, "label": y, "mask": torch.full((3, 8, 8), index, dtype=torch.uint8), "names": str(index)}


def masked(device: str = "cpu", **config: Any) -> tuple[DropScheduler, torch.optim.Optimizer]:
    model, _, _ = parts()
    model.to(device)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    loader = DataLoader(Masked(), batch_size=8, shuffle=True)
    cache = CacheConfig(codec="fp32", **config)
    return DropScheduler(model, optimizer, loader, policy=Fixed({0: 2}), cache=cache, input="image"), optimizer


def trained(drop: DropScheduler, optimizer: torch.optim.Optimizer) -> None:
    for batch in drop.loader:
        loss = nn.functional.cross_entropy(drop.model(batch["image"]), batch["label"])
        assert batch["mask"].float().mean((1, 2, 3)).tolist() == [float(name) for name in batch["names"]]
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()


def test_what_is_kept_beside_rows_comes_off_the_budget() -> None:
    whole = IMAGES * (ROW + LABEL + MASK)
    drop, optimizer = masked(budget_bytes=whole)
    trained(drop, optimizer)
    record = drop.step()
    assert record.tier == "device"
    assert record.extras_bytes == IMAGES * (LABEL + MASK)
    assert record.cache_bytes + record.extras_bytes <= whole
    assert drop.forecast(3).extras_bytes == IMAGES * (LABEL + MASK)

    drop, optimizer = masked(budget_bytes=whole - 1)
    trained(drop, optimizer)
    assert drop.step().tier == "none"
    assert "the budget is 14.015 kB, less 4.8 kB for labels and what else is in a batch" in drop.history[0].reason


def test_the_budget_that_is_told_is_the_one_that_was_given() -> None:
    drop, _ = masked(budget_bytes=1000)  # less than the masks alone
    assert "no rows: they take 9.216 kB and the budget is 1 kB" in drop.history[0].reason


def test_resuming_counts_it_too() -> None:
    whole = IMAGES * (ROW + LABEL + MASK)
    drop, optimizer = masked(budget_bytes=whole)
    trained(drop, optimizer)
    drop.step()
    state, weights = drop.state_dict(), drop.model.state_dict()
    drop.close()
    for budget, kept in ((whole, IMAGES), (whole - 1, 16)):
        other, optimizer = masked(budget_bytes=budget)
        other.model.load_state_dict(weights)
        other.load_state_dict(state)
        if kept < IMAGES:
            with pytest.warns(RuntimeWarning, match="the budgets or the disk do not hold the rows of all samples"):
                trained(other, optimizer)
        else:
            trained(other, optimizer)
        assert (other.prefix, len(other._rows.drawn())) == (2, kept)
        trained(other, optimizer)
        other.close()


def test_what_is_there_already_is_not_counted_again_in_free_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    free = 2 * IMAGES * (ROW + LABEL)

    def rest(device: torch.device) -> int:
        return free

    monkeypatch.setattr("learndrop_ext.rows.plan.free_bytes", rest)
    model, optimizer, loader = parts()
    drop = DropScheduler(model, optimizer, loader, policy=Fixed({0: 2, 2: 3}), cache="fp32")
    for _ in range(2):
        epoch(drop, optimizer)
        if drop.epoch == 1:  # labels of all images lie there, and the rows of the next cut are 8 x 4 x 4 values
            free = 2 * IMAGES * 512
        drop.step()
    assert drop.history[-1].prefix == 3
    assert drop._rows.cut == 3


@pytest.mark.cuda
def test_large_masks_lie_on_the_host_where_the_device_has_no_room() -> None:
    drop, optimizer = masked("cuda", budget_bytes=IMAGES * ROW // 2, host_bytes=1 << 20)
    for _ in range(3):
        trained(drop, optimizer)
        drop.step()
    mask = next(column for column in drop._extras._columns if "mask" in column.name)
    assert mask.stored.device.type == "cpu"
    assert drop.history[-1].tier == "host"
