from __future__ import annotations

import pytest
import torch

from learndrop_ext.cache.cache import ActivationCache
from learndrop_ext.cache.config import CacheConfig
from learndrop_ext.data.moves import Moves

CPU = torch.device("cpu")
ROWS = torch.arange(1.0, 1.0 + 60 * 2 * 3 * 3).view(60, 2, 3, 3)


def moves(seed: int = 0, **options: object) -> Moves:
    return Moves(CacheConfig(codec="fp32", **options), torch.Generator().manual_seed(seed))  # type: ignore[arg-type]


def shifted(row: torch.Tensor, dy: int, dx: int) -> torch.Tensor:
    """The row moved down by dy and right by dx, with zero fill."""
    out = torch.zeros_like(row)
    for y in range(3):
        for x in range(3):
            if 0 <= y - dy < 3 and 0 <= x - dx < 3:
                out[:, y, x] = row[:, y - dy, x - dx]
    return out


def kinds(moved: torch.Tensor, rows: torch.Tensor, most: int, flips: bool) -> set[tuple[bool, int, int]]:
    """How each row was moved; fails where one was moved in no such way."""
    found = set()
    for got, row in zip(moved, rows, strict=True):
        ways = [
            (flip, dy, dx)
            for flip in ((False, True) if flips else (False,))
            for dy in range(-most, most + 1)
            for dx in range(-most, most + 1)
            if torch.equal(got, shifted(row.flip(-1) if flip else row, dy, dx))
        ]
        assert len(ways) == 1
        found.add(ways[0])
    return found


@pytest.mark.parametrize(("flip", "shift", "least"), [(True, 0, 2), (False, 1, 7), (True, 1, 12)])
@pytest.mark.parametrize("stored", [True, False])
def test_rows_are_flipped_and_shifted(flip: bool, shift: int, least: int, stored: bool) -> None:
    wanted = moves(flip=flip, shift=shift)
    index = torch.arange(59, -1, -1)
    if stored:
        cache = ActivationCache(60, (2, 3, 3), codec="fp32", device=CPU, augmented=True)
        cache.append(torch.arange(60), ROWS)
        got = wanted.gather(cache, index)
    else:
        got = wanted.take(ROWS, index)
    assert len(kinds(got, ROWS[index], shift, flip)) >= least


def test_each_step_moves_in_another_way() -> None:
    wanted = moves(flip=True, shift=1)
    first, second = (wanted.take(ROWS, torch.arange(60)) for _ in range(2))
    assert not torch.equal(first, second)
    assert torch.equal(moves(flip=True, shift=1).take(ROWS, torch.arange(60)), first)


def test_without_moves_rows_are_given_as_they_are() -> None:
    still = moves()
    assert still.take(ROWS, torch.arange(60)) is ROWS
    assert torch.equal(still.take(ROWS, torch.tensor([4, 4, 0])), ROWS[[4, 4, 0]])
    assert torch.equal(still.take(ROWS, torch.arange(3)), ROWS[:3])
