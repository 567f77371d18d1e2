"""The plans of Budget against its description, followed by trying all schedules."""

from __future__ import annotations

import itertools
import random

import pytest

from learndrop_ext.decide.costs import LayerCost
from learndrop_ext.decide.forecast import RunCosts, largest_speedup, plan_seconds
from learndrop_ext.decide.policy import Budget, Decision, Situation


def cheapest(
    costs: RunCosts,
    seen: Situation,
    seconds: float,
    weights: tuple[int, ...],
    *,
    hold: int,
    first: tuple[int, ...] = (),
) -> tuple[int, ...]:
    """Of all schedules of the epochs left, by trying each: the smallest loss in time, else the shortest."""
    left = seen.epochs - seen.epoch
    plans = [
        plan
        for plan in itertools.combinations_with_replacement(range(seen.prefix, len(seen.layers)), left)
        if len(set(plan[:hold])) == 1 and plan[: len(first)] == first
    ]
    taken = {plan: sum(plan_seconds(costs, plan, past=seen.past)) for plan in plans}
    in_time = [plan for plan in plans if taken[plan] <= seconds * (1 + 1e-9)]
    return (
        min(in_time, key=lambda plan: (sum(sum(weights[:k]) for k in plan), plan))
        if in_time
        else min(taken, key=taken.get)
    )


def first_epoch(speedup: float, start: int, seen: Situation) -> int:
    """The epoch before which Budget drops nothing."""
    half, costs = int(seen.epochs / (2 * speedup)), seen.costs
    plans = [(0,) * half + (k,) * (seen.epochs - half) for k in range(1, len(seen.layers))]
    fastest = min(sum(plan_seconds(costs, plan)) for plan in plans)
    is_in_time = 1.1 * speedup * fastest <= costs.epoch_seconds(0) * seen.epochs
    return half if 0 < start < half and is_in_time and not seen.prefix else start


def as_documented(speedup: float, start: int, seen: Situation) -> tuple[int, float]:
    """The decision of Budget and the forecast of the run, by trying all schedules."""
    costs, L = seen.costs, len(seen.layers)
    limit = costs.epoch_seconds(0) * seen.epochs / speedup - seen.elapsed_seconds
    first_half = 0 if start else -(-seen.epochs // 2) - seen.epoch
    hold = max(1, first_half)

    def total(plan: tuple[int, ...]) -> float:
        return sum(plan_seconds(costs, plan, past=seen.past))

    def plan_with(weights: tuple[int, ...]) -> tuple[int, ...]:
        if any(seen.past) and first_half > 0:
            held = cheapest(costs, seen, limit, weights, hold=1, first=(seen.prefix,) * hold)
            if total(held) <= limit:
                return held
        planned = cheapest(costs, seen, limit, weights, hold=hold)
        if any(seen.past):
            return planned
        for k in range(cheapest(costs, seen, limit * 1.1, weights, hold=hold)[0], planned[0]):
            cautious = cheapest(costs, seen, limit, weights, hold=1, first=(k,) * hold)
            shortest = cheapest(costs, seen, 0.0, weights, hold=1, first=(k,) * hold)
            if total(cautious) <= limit and total(shortest) * 1.1 <= limit:
                return cautious
        return planned

    if start:
        latest = [values[-1] for values in zip(*seen.scores, strict=True)]
        top = max(value or 0.0 for value in latest)
        orders = [tuple(1 + round(3 * (value or 0.0) / top) for value in latest)]
    else:
        orders = [tuple(range(1, 2 * L, 2)), (1,) * L]
    for weights in orders:
        plan = plan_with(weights)
        if seen.elapsed_seconds + total(plan) > 0.96 * (limit + seen.elapsed_seconds):
            break
    return plan[0], seen.elapsed_seconds + total(plan)


def some_costs(draw: random.Random) -> RunCosts:
    layers = tuple(
        LayerCost(str(i), 1, draw.uniform(0.2, 2), draw.uniform(2, 6), (1,), parameters=draw.randint(1, 9))
        for i in range(5)
    )
    return RunCosts(layers, (0, 1, 2, 3, 4), (0.0, *(draw.uniform(0, 1) for _ in range(4))), (0.3,) * 5, 1.0, 0.5, 2)


@pytest.mark.parametrize("seed", range(60))
def test_budget_decides_as_documented(seed: int) -> None:
    draw = random.Random(seed)
    costs = some_costs(draw)
    epochs, start = draw.randint(1, 6), draw.randint(0, 1)
    epoch = draw.randint(start, epochs - 1) if start < epochs else start - 1
    speedup = draw.uniform(1.0, 1.1 * largest_speedup(costs, epochs))
    dropped = draw.randint(0, 3)
    past = tuple(sorted(draw.choice((0, dropped)) for _ in range(epoch))) if start else (dropped,) * epoch
    seen = Situation(
        epoch=epoch,
        epochs=epochs,
        prefix=past[-1] if past else 0,
        layers=tuple("abcde"),
        scores=tuple((None,) * k + (0.1, 0.7, 0.4, 0.9, 0.2)[k:] for k in past),
        costs=costs,
        elapsed_seconds=draw.uniform(0.9, 1.1) * sum(costs.epoch_seconds(k) for k in past),
    )
    if epoch < (begin := first_epoch(speedup, start, seen)):
        decision = Decision(seen.prefix, f"budget {speedup:g}x: no drop before epoch {begin}")
        assert Budget(speedup, start)(seen) == decision
        return
    prefix, seconds = as_documented(speedup, start, seen)
    wanted = costs.epoch_seconds(0) * epochs / speedup
    reason = f"budget {speedup:g}x: {prefix} of 5 layers, forecast {seconds:.1f} s of {wanted:.1f} s"
    assert Budget(speedup, start)(seen) == Decision(prefix, reason)


def test_budget_from_a_later_start_waits_for_half_of_its_time_if_the_rest_can_make_up_for_it() -> None:
    waited = set()
    for seed in range(40):
        draw = random.Random(seed)
        costs, epochs, speedup = some_costs(draw), draw.randint(16, 24), draw.uniform(1.1, 3.9)
        epoch = draw.randint(1, int(epochs / (2 * speedup)) - 1)
        scores = ((0.1, 0.7, 0.4, 0.9, 0.2),) * epoch
        elapsed = epoch * costs.epoch_seconds(0)
        seen = Situation(epoch, epochs, 0, tuple("abcde"), scores, costs=costs, elapsed_seconds=elapsed)
        waits = first_epoch(speedup, 1, seen) > 1
        said = f"no drop before epoch {int(epochs / (2 * speedup))}"
        assert Budget(speedup, 1)(seen).reason.endswith(said) == waits
        waited.add(waits)
    assert waited == {True, False}
