from __future__ import annotations

import random

import numpy as np
import pytest
import torch

from learndrop_ext.rng import fork_rng


def draw() -> tuple[float, float, float]:
    return torch.rand(()).item(), float(np.random.rand()), random.random()


def seed_all() -> None:
    torch.manual_seed(1)
    np.random.seed(2)
    random.seed(3)


def test_own_randomness_draws_from_its_seed_alone() -> None:
    drawn = []
    for outer, seed in ((1, 5), (2, 5), (1, 6)):
        torch.manual_seed(outer)
        np.random.seed(outer)
        random.seed(outer)
        with fork_rng(seed):
            drawn.append(draw())
    assert drawn[0] == drawn[1]
    assert all(a != b for a, b in zip(drawn[0], drawn[2], strict=True))


def test_own_randomness_leaves_the_runs_own_states() -> None:
    seed_all()
    wanted = draw()
    seed_all()
    with fork_rng(0):
        draw()
    assert draw() == wanted


def test_own_randomness_leaves_the_runs_own_states_after_an_error() -> None:
    def fail() -> None:
        with fork_rng(0):
            draw()
            raise KeyError

    seed_all()
    wanted = draw()
    seed_all()
    with pytest.raises(KeyError):
        fail()
    assert draw() == wanted


@pytest.mark.parametrize("seed", [0, 2**32 - 1, 2**40 + 7])
def test_own_randomness_takes_seeds_of_64_bits(seed: int) -> None:
    with fork_rng(seed):
        first = draw()
    with fork_rng(seed):
        assert draw() == first
