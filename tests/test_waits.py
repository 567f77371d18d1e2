"""A step on rows waits for nothing on the device: on a GPU the calls that wait are counted, here they are looked for."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode

from learndrop_ext import DropScheduler, Fixed
from small_training import parts

ATEN = torch.ops.aten
WAITING = {ATEN._local_scalar_dense, ATEN.nonzero, ATEN.equal, ATEN._unique2, ATEN.unique_consecutive, ATEN.is_nonzero}


class Waits(TorchDispatchMode):
    """Collects the operations that would wait for the device if one of their operands were there."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[tuple[str, list[torch.Tensor]]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        tensors = [a for a in pytree.tree_leaves((args, kwargs)) if isinstance(a, torch.Tensor)]
        packet = func.overloadpacket
        masks = packet in (ATEN.index, ATEN.index_put_) and any(t.dtype == torch.bool for t in tensors)
        if packet in WAITING or masks:
            self.found.append((packet.__name__, tensors))
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("codec", ["fp32", "fp16", "uint8"])
def test_a_step_on_rows_looks_at_no_value_of_the_batch(codec: str) -> None:
    model, optimizer, loader = parts()
    drop = DropScheduler(model, optimizer, loader, policy=Fixed({0: 2}), cache=codec)
    mean = torch.tensor([0.1, 0.2, 0.3]).view(1, 3, 1, 1)

    def epoch() -> None:
        model.train()
        for x, y in drop.loader:
            loss = nn.functional.cross_entropy(model((x - mean) / 2), y)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()

    epoch()
    epoch()
    batches = iter(drop.loader)
    x, y = next(batches)  # what an epoch begins with is not part of a step
    waits = Waits()
    with waits:
        for _ in range(2):
            loss = nn.functional.cross_entropy(model((x - mean) / 2), y)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            x, y = next(batches)
    # Ids and places are on the CPU on every machine; batches, rows and weights are on the device.
    labels = [column.stored for column in drop._extras._columns[1:]]
    where = {t.untyped_storage().data_ptr() for t in (*model.parameters(), *model.buffers(), y, *labels)}
    for name, tensors in waits.found:
        for tensor in tensors:
            assert not tensor.is_floating_point(), name
            assert tensor.untyped_storage().data_ptr() not in where, name
    assert waits.found  # the mode sees the operations on ids


@pytest.mark.cuda
def test_a_step_on_rows_does_not_wait_for_the_gpu() -> None:
    model, optimizer, loader = parts()
    model.cuda()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    drop = DropScheduler(model, optimizer, loader, policy=Fixed({0: 2}))

    def step(x: torch.Tensor, y: torch.Tensor) -> None:
        loss = nn.functional.cross_entropy(model(x), y)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()

    model.train()
    for _ in range(2):
        for x, y in drop.loader:
            step(x, y)
    batches = iter(drop.loader)
    step(*next(batches))
    torch.cuda.set_sync_debug_mode("error")
    try:
        step(*next(batches))
    finally:
        torch.cuda.set_sync_debug_mode("default")
