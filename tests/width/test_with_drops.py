"""Narrowing a model of which a DropScheduler drops layers: live layers only, rows stay, costs and cuts follow."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from narrow_models import everything
from torch import nn

from learndrop_ext import CacheConfig, Decision, DropScheduler, Fixed, Situation
from learndrop_ext.width import Iterative, Linear, OneShot, WidthScheduler
from small_training import called, epoch, parts

EXAMPLE = torch.randn(2, 3, 8, 8)


def both(policy: Any, *, epochs: int = 6, **options: Any) -> tuple[nn.Module, Any, DropScheduler, WidthScheduler]:
    model, optimizer, loader = parts()
    drop = DropScheduler(model, optimizer, loader, policy=policy, epochs=epochs, cache=CacheConfig(codec="fp32"))
    return model, optimizer, drop, WidthScheduler(model, optimizer, EXAMPLE, **{"epochs": epochs} | options)


@pytest.mark.filterwarnings("ignore:DropScheduler. layers dropped before the first step:RuntimeWarning")
def test_only_live_layers_are_narrowed_and_never_the_channels_of_the_rows() -> None:
    model, optimizer, drop, width = both(Fixed({1: 2}), schedule=OneShot(1))
    epoch(drop, optimizer)
    drop.step()
    assert drop.prefix == 2
    before = everything(model, optimizer)
    record = width.step()
    assert record.widths == {"conv1": 4, "conv2": 6, "conv3": 4}
    assert {name for name in width.refused if width.refused[name].endswith(" is dropped")} == {"conv1", "conv2"}
    drop.follow_widths()
    after = everything(model, optimizer)
    changed = {name for name in before["tensors"] if before["tensors"][name].shape != after["tensors"][name].shape}
    assert changed == {"conv3.weight", "conv3.bias", "fc.weight"}
    assert before["modes"] == after["modes"]
    losses = [epoch(drop, optimizer) for _ in range(1)]
    assert drop.step().samples == 24
    assert len(losses[0]) == 3
    drop.close()


def test_rows_stay_valid_when_layers_behind_them_are_narrowed() -> None:
    model, optimizer, drop, width = both(Fixed({0: 2}), schedule=Linear(), keep=0.25, epochs=4)
    filled = []
    for _ in range(4):
        epoch(drop, optimizer)
        filled.append(drop.step().fill_flops > 0)
        width.step()
        drop.follow_widths()
    assert filled == [True, False, False, False]  # rows are computed once
    assert model.conv3.out_channels == 2
    for x, _ in drop.loader:
        output, row = called(drop, x)
        assert torch.equal(row, drop.chain.prefix(2)(x.read()))
        assert torch.allclose(output, drop.chain.suffix(2)(row), atol=1e-6)
        assert output.shape == (8, 5)
    drop.close()
    assert [len(module._forward_hooks) for module in model.modules()] == [0] * len(list(model.modules()))


def test_narrow_first_then_drop_keeps_rows_of_the_narrow_width() -> None:
    _model, optimizer, drop, width = both(Fixed({2: 2}), schedule=OneShot(1))
    epoch(drop, optimizer)
    drop.step()
    width.step()
    drop.follow_widths()
    assert [layer.shape for layer in drop.chain][:3] == [(2, 8, 8), (3, 4, 4), (4,)]
    epoch(drop, optimizer)
    assert drop.step().prefix == 2
    epoch(drop, optimizer)
    record = drop.step()
    assert record.row_bytes == 256  # 3 * 4 * 4 numbers of 4 bytes, in a stride of 128 bytes
    assert record.fill_flops > 0
    drop.close()


def test_the_forecast_follows() -> None:
    _model, optimizer, drop, width = both(Fixed({}), schedule=OneShot(1), keep=0.25)
    wide = drop.forecast()
    epoch(drop, optimizer)
    before = drop.step()
    width.step()
    drop.follow_widths()
    narrow = drop.forecast()
    assert drop._ledger.measured
    sizes = [[by_prefix["bytes"] for by_prefix in found.as_dict()["rows"]] for found in (wide, narrow)]
    assert all(sum(now) < sum(then) for now, then in zip(sizes[1], sizes[0], strict=True) if sum(then) > 24 * 128)
    epoch(drop, optimizer)
    assert drop.step().forward_flops < before.forward_flops / 2
    drop.close()


def test_a_policy_sees_the_costs_of_the_narrow_layers() -> None:
    flops: list[int] = []

    def policy(situation: Situation) -> Decision:
        if situation.costs is not None:
            flops.append(sum(layer.flops for layer in situation.costs.layers))
        return Decision(0, "only looked")

    _model, optimizer, drop, width = both(policy, schedule=Iterative(0.5), keep=0.25, epochs=3)
    for _ in range(3):
        epoch(drop, optimizer)
        record = drop.step()
        width.step()
        drop.follow_widths()
    assert all(score is not None for score in record.scores)
    assert [one.removed > 0 for one in width.history] == [True, True, False]
    assert len(flops) == 3
    assert flops[2] < flops[1] < flops[0]
    drop.close()


def test_a_wrapped_live_part_is_wrapped_again() -> None:
    wrapped: list[nn.Module] = []

    def wrap(module: nn.Module) -> nn.Module:
        wrapped.append(module)
        return module

    model, optimizer, loader = parts()
    drop = DropScheduler(model, optimizer, loader, policy=Fixed({1: 1}), epochs=3, wrap=wrap)
    width = WidthScheduler(model, optimizer, EXAMPLE, schedule=OneShot(1), epochs=3)
    epoch(drop, optimizer)
    drop.step()
    width.step()
    drop.follow_widths()
    assert len(wrapped) == 3
    assert sum(p.numel() for p in wrapped[-1].parameters()) == sum(p.numel() for p in drop.chain.suffix(1).parameters())
    epoch(drop, optimizer)
    drop.step()
    drop.close()


def test_a_model_without_live_layers_to_narrow_says_so() -> None:
    model, optimizer, drop, width = both(Fixed({1: 3}), schedule=OneShot(1))
    epoch(drop, optimizer)
    drop.step()
    before = everything(model, optimizer)
    record = width.step()
    assert record.removed == 0
    assert record.reason.startswith("no layer can be narrowed: {")
    assert "conv1 is dropped" in record.reason
    assert before["shapes"] == repr(model)
    drop.close()
    assert width.step().removed > 0  # all layers are live again


def test_activations_behind_rows_are_measured() -> None:
    model, optimizer, drop, width = both(Fixed({0: 2}), schedule=OneShot(2), criterion="activation")
    for _ in range(2):
        epoch(drop, optimizer)
        drop.step()
        width.step()
        drop.follow_widths()
    assert model.conv3.out_channels == 4
    drop.close()


def test_a_narrowed_model_that_is_not_followed_is_refused() -> None:
    _model, optimizer, drop, width = both(Fixed({}), schedule=OneShot(1))
    epoch(drop, optimizer)
    drop.step()
    width.step()
    epoch(drop, optimizer)
    with pytest.raises(
        RuntimeError, match=r"drop\.step: wanted the widths .* got other shapes of 11 parameters: call drop\.step"
    ):
        drop.step()
    with pytest.raises(RuntimeError, match=r"drop\.follow_widths: it must be called after .* got 24 samples trained"):
        drop.follow_widths()
    drop.close()


def test_a_model_with_other_layers_is_refused() -> None:
    model, _optimizer, drop, _ = both(Fixed({}))
    model.conv2 = nn.Identity()
    model.bn2 = nn.Identity()
    model.conv3 = nn.Conv2d(4, 8, 3)
    with pytest.raises(
        ValueError, match=r"drop\.follow_widths: the model must keep its layers, conv1, .* got conv1, conv3"
    ):
        drop.follow_widths()
    drop.close()
