"""Budget: whole runs played through, with costs that the forecast does not know and with exact ones."""

from __future__ import annotations

import dataclasses
import random
import statistics

import pytest

from learndrop_ext.decide.costs import LayerCost
from learndrop_ext.decide.forecast import RunCosts, largest_speedup, plan_seconds
from learndrop_ext.decide.policy import Budget, Situation
from learndrop_ext.decide.schedules import best_prefixes


def network(train: list[float], views: int) -> RunCosts:
    L = len(train)
    return RunCosts(
        layers=tuple(LayerCost("", 1, t / 3, t, (1,), first_seconds=t * 2 / 3, parameters=1) for t in train),
        cuts=tuple(range(L)),
        row_seconds=(0.0,) + (0.1,) * (L - 1),
        write_seconds=(0.0,) + (0.1,) * (L - 1),
        image_seconds=0.5,
        other_seconds=0.3,
        samples=1000,
        views=views,
    )


def measured(truth: RunCosts, draw: random.Random) -> RunCosts:
    """The costs as somebody measures them who is up to 10 % off everywhere, and right about the whole step."""

    def off(value: float) -> float:
        return value * draw.uniform(0.9, 1.1)

    layers = []
    for layer in truth.layers:
        train = off(layer.train_seconds)
        layers.append(
            dataclasses.replace(layer, seconds=off(layer.seconds), train_seconds=train, first_seconds=train * 2 / 3)
        )
    model = dataclasses.replace(
        truth,
        layers=tuple(layers),
        row_seconds=tuple(map(off, truth.row_seconds)),
        write_seconds=tuple(map(off, truth.write_seconds)),
        image_seconds=off(truth.image_seconds),
    )
    return dataclasses.replace(model, scale=truth.epoch_seconds(0) / model.epoch_seconds(0))


def play(truth: RunCosts, policy: Budget, epochs: int, *, wrong: float, seed: int) -> float:
    """Time taken over that asked for, with 3 % of noise in each epoch and a forecast that is `wrong` times too long."""
    draw = random.Random(seed)
    model = measured(truth, draw)
    full = truth.epoch_seconds(0) * epochs
    past: list[int] = []
    taken = modelled = 0.0
    for epoch in range(epochs):
        # What the epochs done show of the forecast; the first ones, without drops, were forecast right.
        scale = wrong if not any(past) else taken / modelled
        seen = Situation(
            epoch=epoch,
            epochs=epochs,
            prefix=past[-1] if past else 0,
            layers=("",) * len(truth.layers),
            scores=tuple((None,) * k + (0.5,) * (len(truth.layers) - k) for k in past),
            costs=dataclasses.replace(model, scale=model.scale * scale),
            elapsed_seconds=taken,
            full_seconds=full,
        )
        past.append(policy(seen).prefix)
        rest = past + past[-1:] * (epochs - len(past))
        taken += plan_seconds(truth, rest)[epoch] * draw.uniform(0.97, 1.03)
        modelled += plan_seconds(model, rest)[epoch]
    return taken / (full / policy.speedup)


EFFICIENT = [4.0, 5.0, 4.0, 3.0, 3.0, 2.5, 2.0, 2.0, 1.0, 0.5]
HEAVY_FIRST = [2.0, 8.0, 6.0, 8.0, 4.0, 5.0, 1.5, 1.5, 0.3]
ALIKE = [1.0] * 12


@pytest.mark.parametrize("wrong", [0.9, 1.0, 1.1])
@pytest.mark.parametrize(
    ("train", "views", "epochs", "policy"),
    [
        (EFFICIENT, 1, 5, Budget(1.5)),
        (EFFICIENT, 1, 5, Budget(2.0)),
        (EFFICIENT, 1, 10, Budget(3.0)),
        (EFFICIENT, 1, 10, Budget(2.0, 1)),
        (EFFICIENT, 2, 10, Budget(2.0)),
        (HEAVY_FIRST, 1, 5, Budget(2.0)),
        (HEAVY_FIRST, 1, 20, Budget(2.0, 5)),
        (ALIKE, 1, 6, Budget(2.0)),
    ],
)
def test_budget_ends_a_run_in_time(train: list[float], views: int, epochs: int, policy: Budget, wrong: float) -> None:
    truth = network(train, views)
    policy.check(truth, epochs)
    ratios = [play(truth, policy, epochs, wrong=wrong, seed=seed) for seed in range(5)]
    # What was dropped for a forecast that was too long stays dropped, and the run ends early.
    early = 0.1 if wrong > 1 else 0.0
    assert 0.95 - early < statistics.median(ratios) < 1.05
    assert all(0.92 - early < ratio < 1.08 for ratio in ratios), ratios


def followed(truth: RunCosts, policy: Budget, epochs: int) -> tuple[list[int], float]:
    """The prefix of each epoch of a run whose epochs take what was forecast, and the seconds of the run."""
    prefixes: list[int] = []
    taken = 0.0
    for epoch in range(epochs):
        seen = Situation(
            epoch=epoch,
            epochs=epochs,
            prefix=prefixes[-1] if prefixes else 0,
            layers=("",) * 10,
            scores=tuple((None,) * k + (0.5,) * (10 - k) for k in prefixes),
            costs=truth,
            elapsed_seconds=taken,
        )
        prefixes.append(policy(seen).prefix)
        rest = prefixes + prefixes[-1:] * (epochs - 1 - epoch)
        taken += plan_seconds(truth, rest)[epoch]
    return prefixes, taken


@pytest.mark.parametrize("epochs", [4, 5, 10])
@pytest.mark.parametrize("speedup", [1.5, 2.0, 3.0, 4.0])
def test_budget_grows_in_the_second_half_only(epochs: int, speedup: float) -> None:
    truth = network(EFFICIENT, 1)
    prefixes, taken = followed(truth, Budget(speedup), epochs)
    assert len(set(prefixes[: -(-epochs // 2)])) == 1
    assert prefixes == sorted(prefixes)
    assert taken <= truth.epoch_seconds(0) * epochs / speedup


def test_budget_grows_from_step_to_step() -> None:
    truth = network(EFFICIENT, 1)
    assert largest_speedup(truth, 5) > 4
    prefixes, taken = followed(truth, Budget(2.0), 5)
    assert prefixes == sorted(prefixes)
    assert prefixes[0] < prefixes[-1]
    assert 0.95 < taken / (truth.epoch_seconds(0) * 5 / 2) <= 1.0


@pytest.mark.parametrize("speedup", [1.5, 2.0, 3.0])
def test_budget_drops_a_few_layers_for_many_epochs_rather_than_many_for_a_few(speedup: float) -> None:
    truth = network(EFFICIENT, 1)
    full = truth.epoch_seconds(0) * 10
    seen = Situation(0, 10, 0, ("",) * len(EFFICIENT), (), costs=truth, full_seconds=full)
    weights = Budget(speedup)._weights(seen)[0]
    prefixes = best_prefixes(truth, 10, epoch=0, prefix=0, seconds=full / speedup, weights=weights)
    by_depth = sum(k * k for k in prefixes)
    static = next(k for k in range(10) if sum(plan_seconds(truth, [k] * 10)) <= full / speedup)
    assert prefixes[0] <= static
    # No worse than the fixed prefix that is fast enough.
    assert by_depth <= 10 * static * static
