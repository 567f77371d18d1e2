"""Values that fp16 does not hold."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from five_values import cache_of
from tiered_cache import ids

from learndrop_ext.rows.plan import Budgets

# codec, dtype, values of a row, whether fp16 clamps a finite one
SATURATING: list[tuple[str, torch.dtype, list[float], bool]] = [
    ("fp16", torch.float32, [0.0, 65504.0, -65504.0, 1e-9, 1.0], False),
    ("fp16", torch.float32, [0.0, 65505.0, 0.0, 0.0, 0.0], True),
    ("fp16", torch.float32, [0.0, 0.0, 0.0, 0.0, -1e9], True),
    ("fp16", torch.float32, [torch.inf, -torch.inf, torch.nan, 0.0, 0.0], False),
    ("fp16", torch.float32, [torch.inf, torch.nan, 1e5, 0.0, 0.0], True),
    ("fp16", torch.bfloat16, [65536.0, 0.0, 0.0, 0.0, 0.0], True),
    ("fp16", torch.bfloat16, [65280.0, 0.0, 0.0, 0.0, 0.0], False),
    ("fp16", torch.float16, [65504.0, torch.inf, 0.0, 0.0, 0.0], False),
    ("bf16", torch.float32, [1e9, 0.0, 0.0, 0.0, 0.0], False),
    ("fp32", torch.float32, [1e9, 0.0, 0.0, 0.0, 0.0], False),
]


@pytest.mark.parametrize(("codec", "dtype", "values", "wanted"), SATURATING)
@pytest.mark.parametrize("tiers", [False, True])
def test_saturated(
    tmp_path: Path, codec: str, dtype: torch.dtype, values: list[float], wanted: bool, tiers: bool
) -> None:
    budgets = Budgets(0, 0, 1 << 20, 1) if tiers else None
    cache = cache_of(3, budgets, tmp_path, codec=codec)
    assert cache.saturated is False
    cache.append(ids(0), torch.zeros(1, 5, dtype=dtype))
    assert cache.saturated is False
    cache.append(ids(1), torch.tensor([values], dtype=dtype))
    cache.append(ids(2), torch.zeros(1, 5, dtype=dtype))
    assert cache.saturated is wanted
    cache.forget(ids(1))
    assert cache.saturated is wanted
    cache.forget()
    assert cache.saturated is False
    cache.close()


def test_saturation_is_looked_for_in_the_first_batches() -> None:
    for late in (15, 16):
        cache = cache_of(20, codec="fp16")
        for slot in range(20):
            cache.append(ids(slot), torch.full((1, 5), 1e6 if slot == late else 1.0))
        assert cache.saturated is (late == 15)


def test_a_refused_batch_does_not_count_as_saturated() -> None:
    cache = cache_of(3, codec="fp16")
    with pytest.raises(IndexError):
        cache.append(ids(3), torch.full((1, 5), 1e6))
    assert cache.saturated is False
