"""`wrap=`: what wrapping takes is measured, planned for and told; a compiled live part trains what is live."""

from __future__ import annotations

import itertools
import time
from functools import partial
from typing import Any

import pytest
import torch
from decide.four_layers import four_layers
from torch import nn

from learndrop_ext import Decision, DropScheduler, Fixed, Situation
from learndrop_ext.decide.forecast import RunCosts, one_drop, plan_seconds
from learndrop_ext.decide.schedules import best_prefixes
from small_training import Net, data, epoch, parts


class SlowAtFirst(nn.Module):
    """Takes a while at its first call, as a compiler does."""

    seconds = 0.3

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.module, self.called = module, False

    def forward(self, *args: Any) -> Any:
        time.sleep(0.0 if self.called else self.seconds)
        self.called = True
        return self.module(*args)


def test_the_time_of_wrapping_is_measured_after_each_drop_and_told_to_policies() -> None:
    costs: list[RunCosts | None] = []
    drops = Fixed({1: 1, 3: 2})

    def policy(situation: Situation) -> Decision:
        costs.append(situation.costs)
        return drops(situation)

    model, optimizer, loader = parts()
    drop = DropScheduler(model, optimizer, loader, policy=policy, wrap=SlowAtFirst, epochs=4)
    for _ in range(4):
        epoch(drop, optimizer)
        drop.step()
    taken = [record.wrap_seconds for record in drop.history]
    assert [seconds > 0.2 for seconds in taken] == [True, True, False, True]
    assert taken[2] == 0.0
    assert all(r.wrap_seconds <= r.epoch_seconds for r in drop.history)
    known = [c.wrap_seconds for c in costs if c is not None]
    assert min(known) > 0.2
    # The other steps of these epochs correct the costs of layers, the first one does not.
    assert drop._ledger.scale * 0.3 < 60
    forecasts = [record.forecast_seconds for record in drop.history]
    assert all(f is not None for f in forecasts[1:])
    assert forecasts[1] > 0.2  # type: ignore[operator]


def test_without_wrap_no_time_is_called_that() -> None:
    model, optimizer, loader = parts()
    drop = DropScheduler(model, optimizer, loader, policy=Fixed({1: 1}))
    for _ in range(2):
        epoch(drop, optimizer)
        drop.step()
    assert [record.wrap_seconds for record in drop.history] == [0.0, 0.0]


class Counting(nn.Module):
    """Counts its calls, as DistributedDataParallel must get each one that trains."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.module, self.calls = module, 0

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        self.calls += 1
        return self.module(*args, **kwargs)


class Scaled(Net):
    """Takes a scale before its images."""

    def forward(self, scale: torch.Tensor, x: torch.Tensor) -> torch.Tensor:  # type: ignore[override]
        return super().forward(x) * scale


@pytest.mark.parametrize("settings", [{"cache": None}, {"cache": "fp32", "epochs": 3}], ids=["no cache", "last epoch"])
def test_live_layers_train_as_they_are_wrapped_where_no_rows_are_kept(settings: dict[str, Any]) -> None:
    losses: dict[bool, list[float]] = {}
    for wraps in (False, True):
        _, _, loader = parts()
        torch.manual_seed(0)
        model = Scaled()
        optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
        options = settings | {"wrap": Counting} if wraps else settings
        seen = losses[wraps] = []
        with DropScheduler(
            model,
            optimizer,
            loader,
            policy=Fixed({2: 1}),
            call=lambda model, batch: model(torch.ones(()), batch[0]),
            **options,
        ) as drop:
            for _ in range(3):
                for x, y in drop.loader:
                    before = drop.model.body.calls if wraps else 0
                    loss = nn.functional.cross_entropy(drop.model(torch.ones(()), x=x), y)
                    optimizer.zero_grad()
                    loss.backward()
                    optimizer.step()
                    seen.append(loss.item())
                    if wraps:
                        assert drop.model.body.calls == before + 1
                drop.step()
            assert drop.prefix == 1
            assert drop._rows.cut == 0
            if wraps:
                calls = drop.model.body.calls
                with torch.no_grad():
                    drop.model(torch.ones(()), x=data().tensors[0])
                assert drop.model.body.calls == calls
    assert losses[True] == losses[False]


def test_a_plan_counts_wrapping_once_a_drop() -> None:
    plain, wrapped = four_layers(), four_layers(wrap_seconds=10.0)
    drops = (0, 1, 1, 3, 3)
    extra = [b - a for a, b in zip(plan_seconds(plain, drops), plan_seconds(wrapped, drops), strict=True)]
    assert extra == pytest.approx([0, 10, 0, 10, 0])
    # Nothing is wrapped anew where the prefix stays that of an epoch before.
    assert plan_seconds(wrapped, (2, 2), past=(2,)) == pytest.approx(plan_seconds(plain, (2, 2), past=(2,)))
    before, after = (one_drop(costs, 5, prefix=2, start=1) for costs in (plain, wrapped))
    assert after.seconds - before.seconds == pytest.approx(10)
    assert wrapped.drop_estimates(1)[0][2:] == pytest.approx([10 + s for s in plain.drop_estimates(1)[0][2:]])


def test_one_drop_is_planned_where_wrapping_takes_long() -> None:
    epochs, whole = 12, four_layers().epoch_seconds(0)

    def drops(wrap_seconds: float) -> int:
        costs = four_layers(wrap_seconds=wrap_seconds)
        found = (0, *best_prefixes(costs, epochs, epoch=0, prefix=0, seconds=0.5 * epochs * whole))
        assert sum(plan_seconds(costs, found[1:])) <= 0.5 * epochs * whole
        return sum(b > a for a, b in itertools.pairwise(found))

    assert drops(0.0) > 1
    assert drops(30.0) == 1


def unfreezing(model: Net, done: int) -> None:
    model.conv3.weight.requires_grad_(done != 1)


def losses_of(wrap: Any) -> tuple[list[float], list[bool]]:
    """The losses of a run that drops, trains the whole model again and drops more, and whether conv3 moved in each epoch."""
    model, optimizer, loader = parts()
    losses, moved = [], []
    with DropScheduler(model, optimizer, loader, policy=Fixed({1: 1, 4: 2}), cache="fp32", wrap=wrap) as drop:
        for done in range(6):
            unfreezing(model, done)
            before = model.conv3.weight.detach().clone()
            losses += epoch(drop, optimizer)
            moved.append(not torch.equal(model.conv3.weight, before))
            drop.step()
            if done == 2:
                drop.undrop()
    return losses, moved


@pytest.mark.slow
def test_a_compiled_live_part_trains_what_is_live() -> None:
    """torch.compile does not guard on requires_grad (pytorch issue 139476)."""
    torch._dynamo.reset()
    losses, moved = losses_of(None)
    compiled, also = losses_of(partial(torch.compile, backend="aot_eager"))
    torch.testing.assert_close(compiled, losses)
    assert also == moved
    assert moved == [True, False, True, True, True, True]
