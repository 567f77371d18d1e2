from __future__ import annotations

import copy
import gc
from collections.abc import Callable

import pytest
import torch
from torch import nn

from learndrop_ext.rows import output_pool as batch_memory
from learndrop_ext.rows.cache import ActivationCache
from learndrop_ext.rows.output_pool import MAX_POOLED, OutputPool

CPU = torch.device("cpu")
SHAPE = (4, 8, 3, 5)


@pytest.fixture(autouse=True)
def every_size(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(batch_memory, "MIN_POOLED_BYTES", 1)


def strides_of(shape: tuple[int, ...]) -> tuple[int, ...]:
    memory_format = torch.channels_last if len(shape) == 4 else torch.contiguous_format
    return torch.empty(shape, device="meta").contiguous(memory_format=memory_format).stride()


def take(memory: OutputPool, shape: tuple[int, ...] = SHAPE) -> torch.Tensor:
    return memory.take(shape, strides_of(shape), torch.float32)


@pytest.mark.parametrize("shape", [SHAPE, (4, 8, 1, 1), (4, 1, 3, 5), (1, 8, 3, 5), (6, 7), (0, 8, 3, 5)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_a_batch_is_a_tensor_as_torch_makes_it(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    strides = strides_of(shape)
    made = OutputPool(CPU).take(shape, strides, dtype)
    wanted = torch.empty_strided(shape, strides, dtype=dtype)
    assert (made.shape, made.stride(), made.dtype) == (wanted.shape, wanted.stride(), wanted.dtype)
    assert made._base is None
    assert not made.requires_grad


def test_memory_comes_again_when_the_batch_is_gone() -> None:
    memory = OutputPool(CPU)
    first = take(memory)
    place = first.data_ptr()
    assert take(memory).data_ptr() != place
    del first
    assert place in {take(memory).data_ptr() for _ in range(3)}
    # The last batch of an epoch is smaller.
    assert take(memory, (2, *SHAPE[1:])).numel() == 240


def held_by_a_view(x: torch.Tensor) -> object:
    return x[1:, :2]


def held_by_an_array(x: torch.Tensor) -> object:
    return x.numpy()[::2]


def held_by_a_graph(x: torch.Tensor) -> object:
    return (x * torch.ones((), requires_grad=True)).sum()


def held_by_a_storage(x: torch.Tensor) -> object:
    return x.untyped_storage()


def held_by_another_library(x: torch.Tensor) -> object:
    return torch.utils.dlpack.to_dlpack(x)


def held_by_a_detached_one(x: torch.Tensor) -> object:
    return x.detach()


@pytest.mark.parametrize(
    "hold",
    [
        held_by_a_view,
        held_by_an_array,
        held_by_a_graph,
        held_by_a_storage,
        held_by_a_detached_one,
        held_by_another_library,
    ],
)
def test_memory_that_anything_still_holds_stays(hold: Callable[[torch.Tensor], object]) -> None:
    memory = OutputPool(CPU)
    x = take(memory)
    place = x.data_ptr()
    keeps = hold(x)
    del x
    gc.collect()
    others = [take(memory) for _ in range(MAX_POOLED - 1)]
    assert place not in {other.data_ptr() for other in others}
    assert len({other.data_ptr() for other in others}) == len(others)
    del keeps, others
    gc.collect()
    assert place in {other.data_ptr() for other in [take(memory) for _ in range(MAX_POOLED)]}


def test_memory_that_another_process_sees_is_not_lent_again() -> None:
    memory = OutputPool(CPU)
    x = take(memory).fill_(3)
    x.share_memory_()
    del x
    gc.collect()
    batches = [take(memory).fill_(0) for _ in range(MAX_POOLED)]
    assert not any(batch.is_shared() for batch in batches)


def test_no_more_than_a_few_pieces_are_kept() -> None:
    memory = OutputPool(CPU)
    batches = [take(memory) for _ in range(10)]
    assert len({batch.data_ptr() for batch in batches}) == 10
    assert len(memory._pooled) == MAX_POOLED


def test_larger_batches_take_the_place_of_smaller_ones() -> None:
    memory = OutputPool(CPU)
    for size in range(1, 20):
        take(memory, (size, 7))
        assert [storage.nbytes() for storage, _ in memory._pooled][-1] == size * 28
    assert len(memory._pooled) == MAX_POOLED


def test_a_batch_outlives_the_memory_that_it_came_from() -> None:
    memory = OutputPool(CPU)
    x = take(memory).fill_(2)
    del memory
    gc.collect()
    assert bool((x == 2).all())


def test_batches_that_a_loop_keeps_are_not_written_over() -> None:
    cache = ActivationCache(60, (3, 4, 4), codec="fp32", device=CPU)
    rows = torch.randn(60, 3, 4, 4)
    cache.append(torch.arange(60), rows)
    kept = [(slots, cache.gather(slots)) for slots in torch.randperm(60).split(8)]
    for slots, batch in kept:
        assert torch.equal(batch, rows[slots])


def test_training_and_its_gradients_are_the_same() -> None:
    torch.manual_seed(0)
    cache = ActivationCache(64, (3, 8, 8), codec="fp32", device=CPU)
    rows = torch.randn(64, 3, 8, 8)
    cache.append(torch.arange(64), rows)
    net = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(144, 2))
    other = copy.deepcopy(net)
    losses = []
    for slots in torch.randperm(64).split(8):
        # Two graphs alive at once: backward runs after the next batch was read.
        losses.append((net(cache.gather(slots)).square().mean(), other(rows[slots].clone()).square().mean()))
        if len(losses) == 2:
            for one, same in losses:
                assert torch.equal(one, same)
                one.backward()
                same.backward()
            losses.clear()
    for p, q in zip(net.parameters(), other.parameters(), strict=True):
        assert p.grad is not None
        assert q.grad is not None
        assert torch.equal(p.grad, q.grad)
