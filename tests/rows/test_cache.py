from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from tiered_cache import CPU, disk_in, ids, reopened, tiered
from torch import Tensor

from learndrop_ext.rows.cache import ActivationCache


def rows(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(0)).to(dtype)


@pytest.mark.parametrize("shape", [(5,), (4, 6), (3, 4, 5), (2, 1, 1), (1, 3, 3), (2, 3, 4, 5)], ids=str)
def test_cache_gives_fp32_rows_back_to_the_bit(shape: tuple[int, ...]) -> None:
    cache = ActivationCache(6, shape, codec="fp32", device=CPU)
    stored = rows(6, *shape)
    order = ids(4, 0, 5, 2, 1, 3)
    cache.append(order[:4], stored[:4])
    cache.append(order[4:], stored[4:])
    wanted = torch.stack([stored[order.tolist().index(i)] for i in (3, 3, 0, 5)])
    got = cache.gather(ids(3, 3, 0, 5))
    assert got.dtype == torch.float32
    assert torch.equal(got, wanted)


def like(strides: tuple[int, ...], values: Tensor) -> Tensor:
    """The values in another order in memory."""
    return torch.empty_strided(values.shape, strides).copy_(values)


# shape of a batch, its strides
STRIDES = [
    ((4, 3, 5, 6), (90, 30, 6, 1)),
    ((4, 3, 5, 6), (90, 1, 18, 3)),  # channels-last
    ((4, 5, 6, 3), (90, 6, 1, 30)),  # contiguous images, permuted to [B, H, W, C]
    ((4, 5, 6, 3), (90, 1, 5, 30)),
    ((4, 7, 9), (63, 1, 7)),
    ((4, 2, 3, 4, 5), (120, 1, 40, 2, 8)),
    ((4, 8, 1, 1), (8, 1, 8, 8)),
    ((4, 1, 3, 3), (9, 1, 3, 1)),
    ((4, 3, 3, 1), (9, 3, 1, 9)),
    ((4, 1, 7), (7, 1, 1)),
]


@pytest.mark.parametrize("codec", ["fp32", "bf16", "fp16", "uint8"])
@pytest.mark.parametrize("staged", [False, True])
@pytest.mark.parametrize(("shape", "strides"), STRIDES, ids=str)
def test_cache_gives_rows_back_with_the_strides_of_the_first(
    tmp_path: Path, shape: tuple[int, ...], strides: tuple[int, ...], codec: str, staged: bool
) -> None:
    # Whole numbers up to 255 that every codec holds: in uint8 each channel has a step of 1.
    stored = rows(*shape).mul(50).round().clamp(0, 255)
    stored.flatten(2)[..., 0], stored.flatten(2)[..., -1] = 0, 255
    if stored[0, 0].numel() == 1:
        stored[:, 0], stored[:, -1] = 0, 255
    options = {"device": 1, "host": 0, "staging": 1, "codec": codec, "disk": disk_in(tmp_path, private=False)}
    cache = (
        tiered(4, shape[1:], tmp_path, **options)  # type: ignore[arg-type]
        if staged
        else ActivationCache(4, shape[1:], codec=codec, device=CPU)
    )
    cache.append(ids(0, 1), like(strides, stored)[:2])
    # Later rows may come in any order.
    cache.append(ids(2), stored[2:3].contiguous())
    cache.append(ids(3), stored[3:].transpose(1, -1).contiguous().transpose(1, -1))
    for order in (ids(3, 2, 1, 0), ids(1)):
        got = cache.gather(order)
        assert got.stride() == strides
        assert torch.equal(got, stored[order])
    assert cache.gather(ids()).shape == (0, *shape[1:])
    if staged:
        cache.save()
        cache.close()
        again = reopened(tmp_path, 4, shape[1:], codec=codec).gather(ids(0, 3))
        assert again.stride() == strides
        assert torch.equal(again, stored[ids(0, 3)])


@pytest.mark.parametrize("codec", ["fp32", "uint8"])
@pytest.mark.parametrize(
    ("part", "strides"),
    [
        (lambda x: x[:, :, ::2], (54, 18, 6, 1)),
        (lambda x: x.permute(0, 2, 3, 1)[..., :2], (60, 6, 1, 30)),
        (lambda x: x[..., :1].expand(-1, -1, -1, 6), (90, 30, 6, 1)),
    ],
)
def test_rows_with_gaps_or_overlap_come_back_dense_in_their_order(
    part: Callable[[Tensor], Tensor], strides: tuple[int, ...], codec: str
) -> None:
    stored = part(rows(2, 3, 5, 6))
    cache = ActivationCache(2, stored.shape[1:], codec=codec, device=CPU)
    cache.append(ids(0, 1), stored)
    got = cache.gather(ids(0, 1))
    assert got.stride() == strides
    assert float((got - stored).abs().max()) <= (0 if codec == "fp32" else 6 / 255)


def test_rows_that_are_gathered_without_gradients_can_be_written_to() -> None:
    cache = ActivationCache(1, (2, 3), codec="fp32", device=CPU)
    cache.append(ids(0), rows(1, 2, 3))
    with torch.no_grad():
        got = cache.gather(ids(0))
    weight = torch.ones((), requires_grad=True)
    got.add_(weight).sum().backward()
    assert weight.grad == 6


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_cache_gives_rows_back_in_their_dtype(dtype: torch.dtype) -> None:
    cache = ActivationCache(2, (7,), codec="fp32", device=CPU)
    stored = rows(2, 7, dtype=dtype)
    cache.append(ids(0, 1), stored)
    got = cache.gather(ids(0, 1))
    assert got.dtype == dtype
    assert torch.equal(got, stored)


def test_cache_rounds_and_saturates_fp16() -> None:
    values = torch.tensor([[1e9, -1e9, 65504.0, 65519.0, 0.0, 1.0009765625, 1.0004, 1e-9]])
    cache = ActivationCache(1, (8,), codec="fp16", device=CPU)
    cache.append(ids(0), values)
    wanted = [[65504.0, -65504.0, 65504.0, 65504.0, 0.0, 1.0009765625, 1.0, 0.0]]
    assert cache.gather(ids(0)).tolist() == wanted


@pytest.mark.parametrize(
    ("codec", "most"),
    # Half a unit in the last place of 3.0; for uint8 half of a step of a channel's range.
    [("fp32", 0.0), ("fp16", 2.0**-10), ("bf16", 2.0**-7), ("uint8", 3.0 / 255 / 2 + 1e-6)],
)
def test_cache_is_as_exact_as_its_codec(codec: str, most: float) -> None:
    stored = torch.rand(3, 4, 5, 6, generator=torch.Generator().manual_seed(0)) * 3
    cache = ActivationCache(3, (4, 5, 6), codec=codec, device=CPU)
    cache.append(ids(0, 1, 2), stored)
    assert float((cache.gather(ids(0, 1, 2)) - stored).abs().max()) <= most


def test_cache_sizes_are_bytes() -> None:
    # 100 values of 2 bytes, rounded up to a multiple of 128.
    for slots in (0, 10):
        cache = ActivationCache(slots, (4, 5, 5), codec="fp16", device=CPU)
        assert (cache.row_bytes, cache.nbytes) == (256, 256 * slots)


def test_cache_grow_keeps_the_rows_and_leaves_the_new_ones_unwritten() -> None:
    cache = ActivationCache(2, (3,), codec="fp32", device=CPU)
    stored = rows(3, 3)
    cache.append(ids(1), stored[:1])
    cache.grow(4)
    assert torch.equal(cache.gather(ids(1)), stored[:1])
    assert cache.filled.tolist() == [False, True, False, False]
    cache.append(ids(3, 0), stored[1:])
    assert torch.equal(cache.gather(ids(1, 3, 0)), stored)
    assert cache.nbytes == 4 * cache.row_bytes


# what is called, exception, message
REFUSED: list[tuple[Callable[[ActivationCache], Any], type[Exception], str]] = [
    (
        lambda c: c.append(ids(0), rows(1, 5, 4).half()),
        ValueError,
        "append: rows must be torch.float32 as the first were, got torch.float16",
    ),
    (lambda c: c.append(ids(0, 1), rows(1, 5, 4)), ValueError, r"append_rows: index must be \[1\], .* got \[2\]"),
    (lambda c: c.append(ids(3), rows(1, 5, 4)), IndexError, r"append_rows: index must be in \[0, 3\), got 3"),
    (lambda c: c.append(ids(-1), rows(1, 5, 4)), IndexError, r"append_rows: index must be in \[0, 3\), got -1"),
    (lambda c: c.append(ids(0, 3), rows(2, 5, 4)), IndexError, r"append_rows: index must be in \[0, 3\), got 3"),
    (
        lambda c: c.append(ids(0, 0), rows(2, 5, 4)),
        ValueError,
        "append_rows: index must name no row twice, got 0 twice",
    ),
    (lambda c: c.append(ids(0).int(), rows(1, 5, 4)), TypeError, "append_rows: index must be int64, got torch.int32"),
]


@pytest.mark.parametrize(("call", "error", "message"), REFUSED)
def test_cache_refuses_before_it_writes(
    call: Callable[[ActivationCache], Any], error: type[Exception], message: str
) -> None:
    cache = ActivationCache(3, (5, 4), codec="fp32", device=CPU)
    stored = rows(1, 5, 4)
    cache.append(ids(2), stored)
    with pytest.raises(error, match=message):
        call(cache)
    assert cache.filled.tolist() == [False, False, True]
    assert torch.equal(cache.gather(ids(2)), stored)


def test_cache_refuses_a_first_row_without_noting_its_dtype() -> None:
    cache = ActivationCache(1, (2,), codec="fp32", device=CPU)
    with pytest.raises(TypeError, match=r"rows must be float32, bfloat16 or float16, got torch\.float64"):
        cache.append(ids(0), rows(1, 2).double())
    cache.append(ids(0), rows(1, 2))
    assert torch.equal(cache.gather(ids(0)), rows(1, 2))


USES: list[tuple[str, Callable[[ActivationCache], Any]]] = [
    ("append", lambda c: c.append(ids(0), rows(1, 2))),
    ("gather", lambda c: c.gather(ids(0))),
    ("grow", lambda c: c.grow(2)),
    ("row_bytes", lambda c: c.row_bytes),
    ("nbytes", lambda c: c.nbytes),
]


@pytest.mark.parametrize(("name", "use"), USES, ids=[case[0] for case in USES])
def test_cache_refuses_any_use_once_closed(name: str, use: Callable[[ActivationCache], Any]) -> None:
    cache = ActivationCache(1, (2,), codec="fp32", device=CPU)
    cache.append(ids(0), rows(1, 2))
    cache.close()
    cache.close()
    with pytest.raises(RuntimeError, match=f"ActivationCache.{name}: the cache must be open, and it was closed"):
        use(cache)
