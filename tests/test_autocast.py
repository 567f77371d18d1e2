"""The autocast of the loop: rows are of the dtype that the training step runs under, now and in a resumed run."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from learndrop_ext import CacheConfig, Decision, DropScheduler, Fixed, Situation
from learndrop_ext.decide.forecast import RunCosts
from small_training import Net, called, data, parts

BF16 = torch.bfloat16


class Planning:
    """Has training steps timed before the first one, as Budget does, and drops two layers before it."""

    speedup = 1.0

    def check(self, costs: RunCosts, epochs: int | None) -> None:
        assert all(layer.train_seconds > 0 for layer in costs.layers)

    def __call__(self, situation: Situation) -> Decision:
        return Decision(2, "planned")


def train(drop: DropScheduler, optimizer: torch.optim.Optimizer, dtype: torch.dtype | None) -> torch.Tensor:
    """Train an epoch under autocast, and return the rows that the live layers got."""
    rows = []
    drop.model.train()
    for x, y in drop.loader:
        with torch.autocast("cpu", dtype=dtype, enabled=dtype is not None):
            out, row = called(drop, x)
            loss = nn.functional.cross_entropy(out, y)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        rows.append(row)
    return torch.cat(rows)


def wanted(drop: DropScheduler, dtype: torch.dtype | None) -> torch.Tensor:
    """The rows of the data in their order."""
    with torch.no_grad(), torch.autocast("cpu", dtype=dtype, enabled=dtype is not None):
        rows: torch.Tensor = drop.chain.prefix(2).eval()(data().tensors[0])
        return rows


def assert_rows(drop: DropScheduler, dtype: torch.dtype | None) -> None:
    """All rows are kept, and are those computed under autocast of dtype."""
    rows = drop._rows
    assert rows.cache is not None
    assert bool(rows.cache.filled.all())
    kept = rows.cache.gather(rows.places(torch.arange(24)))
    assert kept.dtype == (dtype or torch.float32)
    torch.testing.assert_close(kept, wanted(drop, dtype), rtol=1e-2, atol=1e-2)


def test_rows_are_made_under_the_autocast_of_the_loop() -> None:
    model, optimizer, loader = parts()
    with DropScheduler(model, optimizer, loader, policy=Fixed({0: 2}), cache="fp32", epochs=3) as drop:
        for _ in range(2):
            assert train(drop, optimizer, BF16).dtype == BF16
            drop.step()
            assert_rows(drop, BF16)
        # Compared to the bit: two rows are closer to each other than bf16 is to fp32.
        assert not torch.equal(wanted(drop, None).to(BF16), wanted(drop, BF16))
        assert drop.history[-1].fill_flops == 0


def test_nothing_is_said_of_layers_that_are_not_dropped() -> None:
    model, optimizer, loader = parts()
    with DropScheduler(model, optimizer, loader, policy=Fixed({2: 2}), cache="fp32", epochs=4) as drop:
        for dtype in (BF16, None, BF16):
            train(drop, optimizer, dtype)
            drop.step()
        assert_rows(drop, BF16)


@pytest.mark.parametrize("first", [BF16, None])
@pytest.mark.parametrize("policy", [Planning(), Fixed({0: 2})])
def test_under_another_autocast_the_rows_are_computed_again(policy: Any, first: torch.dtype | None) -> None:
    words = {BF16: "autocast of torch.bfloat16", None: "no autocast"}
    (second,) = set(words) - {first}
    model, optimizer, loader = parts()
    with DropScheduler(model, optimizer, loader, policy=policy, cache="fp32", epochs=6) as drop:
        train(drop, optimizer, first)
        drop.step()
        assert_rows(drop, first)
        message = (
            rf"computed again: they were computed under {words[first]}, and the loop now trains under {words[second]}"
        )
        with pytest.warns(RuntimeWarning, match=message) as said:
            train(drop, optimizer, second)
        assert len(said) == 1
        drop.step()
        for _ in range(2):  # and then nothing more is said
            train(drop, optimizer, second)
            drop.step()
        assert_rows(drop, second)
        assert drop.history[-1].fill_flops == 0


def test_steps_are_timed_under_the_autocast_of_call(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: set[bool] = set()
    convolution = nn.Conv2d._conv_forward

    def recorded(module: nn.Conv2d, *args: Any) -> torch.Tensor:
        seen.add(torch.is_autocast_enabled("cpu"))
        return convolution(module, *args)

    def call(model: nn.Module, batch: Any) -> Any:
        with torch.autocast("cpu", dtype=BF16):
            return model(batch[0])

    model, optimizer, loader = parts()
    monkeypatch.setattr(nn.Conv2d, "_conv_forward", recorded)
    with warnings.catch_warnings():
        warnings.simplefilter("error", RuntimeWarning)
        warnings.filterwarnings("ignore", "DropScheduler: layers dropped before the first step")
        with DropScheduler(model, optimizer, loader, policy=Planning(), call=call, cache="fp32", epochs=3) as drop:
            assert seen == {True}
            for _ in range(2):
                train(drop, optimizer, BF16)
                drop.step()
            assert seen == {True}
            assert_rows(drop, BF16)
            once = sum(layer.flops for layer in drop.chain[:2])
            assert [record.fill_flops for record in drop.history] == [0, len(data()) * once, 0]


def test_a_resumed_run_asks_for_the_same_autocast(tmp_path: Path) -> None:
    cache = CacheConfig("fp32", store=tmp_path, store_bytes=1 << 20)

    def begun(model: Net, *given: Any) -> DropScheduler:
        return DropScheduler(model, *given, policy=Fixed({0: 2}), cache=cache, epochs=5)

    model, optimizer, loader = parts()
    drop = begun(model, optimizer, loader)
    train(drop, optimizer, BF16)
    drop.step()
    state = drop.state_dict()
    for dtype in (BF16, None):
        same, optimizer, loader = parts()
        same.load_state_dict(model.state_dict())
        again = begun(same, optimizer, loader)
        again.load_state_dict(state)
        assert_rows(again, BF16)
        if dtype is None:
            with pytest.warns(RuntimeWarning, match=r"did nothing under torch.bfloat16 .* and does nothing under None"):
                train(again, optimizer, None)
        else:
            train(again, optimizer, BF16)
        again.step()
        assert (again.history[-1].fill_flops > 0) == (dtype is None)
