"""The runs of bench_paper.py: the paper's networks and datasets, two scales and a rehearsal, and the sides of a comparison.

A side is one way to train a case. Some sides depend on what another one did: `short` on its seconds, `freeze-only` and the
drops chosen without scores on its drops.

E epochs, L layers.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from learndrop_ext.app.recipe import parse_policy
from learndrop_ext.decide.policy import Fixed, Policy, StoppedLearning

Record = Mapping[str, Any]
#: The records of the other sides of a case, by side.
Done = Mapping[str, Record]

NETWORKS = ("vgg11", "vgg13", "vgg16", "vgg19", "resnet18", "resnet34", "resnet50", "resnet101", "resnet152")
#: The networks for which a recipe is chosen, each for its family, and which are trained for long.
CHOSEN_BY = ("vgg11", "resnet18")
#: The networks and datasets of the rules and of the scores.
COMPARED = ("vgg11", "resnet18", "resnet50")
COMPARED_ON = ("mnist", "cifar10")


@dataclass(frozen=True)
class Scale:
    """How large a study is on one kind of machine.

    images: of each dataset to train on, None for all but the validation images; size: pixels a side, None for the
    original.
    """

    images: Mapping[str, int | None]
    epochs: int
    width: int = 16
    size: Mapping[str, int | None] | None = None
    validation: int = 1000
    test: int | None = 2000
    batch_size: int = 64
    lrs: tuple[float, ...] = (0.05, 0.1, 0.2)
    default_lr: float = 0.1
    long_images: int = 5000
    long_epochs: int = 60
    networks: tuple[str, ...] = NETWORKS
    chosen_by: tuple[str, ...] = CHOSEN_BY
    compared: tuple[str, ...] = COMPARED
    compared_on: tuple[str, ...] = COMPARED_ON


SCALES = {
    # One core of an AMD EPYC (family 25) takes 1,630 s an epoch for the 27 baselines and 3.3 times as much for all sides:
    # one seed of the paper's table is 9 hours of it, of which ResNet-50, 101 and 152 are 7.
    "cpu": Scale({"mnist": 5_000, "cifar10": 5_000, "imagenette": 1_500}, epochs=6, size={"imagenette": 64}),
    "gpu": Scale(
        {"mnist": None, "cifar10": None, "imagenette": None}, epochs=8, width=64, test=None, batch_size=256, lrs=()
    ),
    # Not width 4: torch 2.13 writes beyond the gradient of a 1x1 convolution of 4 channels-last channels on some CPUs.
    "toy": Scale(
        {"digits": 64},
        epochs=5,
        width=8,
        validation=16,
        test=16,
        batch_size=16,
        lrs=(0.05, 0.1),
        long_images=32,
        long_epochs=6,
        networks=CHOSEN_BY,
        chosen_by=("vgg11",),
        compared=("vgg11",),
        compared_on=("digits",),
    ),
}


@dataclass(frozen=True)
class Side:
    """One way to train a case.

    Args:
        policy: made from the sides that it follows; None for the plain recipe. It may return None: nothing to train.
        follows: sides of the same case, dataset, network and seed that come before.
        caches: whether rows are kept.
        shortened_to: the side whose seconds the plain recipe gets.
    """

    policy: Callable[[Done], Policy | None] | None = None
    follows: tuple[str, ...] = ()
    caches: bool = True
    shortened_to: str | None = None


def drops_of(record: Record) -> dict[int, int]:
    """{epochs done: layers dropped} of a record."""
    return {drop["epoch"]: drop["prefix"] for drop in record["drops"]}


def without_scores(choose: Callable[..., dict[int, int]], of: str) -> Side:
    """The drops that a function chooses to save as much as another side did."""

    def policy(done: Done) -> Policy | None:
        made, flops, moved = drops_of(done[of]), done["watched"]["layer_flops"], done["watched"]["relative"]
        return Fixed(choose(made, flops=flops, moved=moved), recalibrate=True) if made else None

    return Side(policy, follows=("watched", of))


def as_budget(*, recalibrate: bool = True, caches: bool = True) -> Side:
    """The drops of `budget` again."""
    return Side(lambda done: Fixed(drops_of(done["budget"]), recalibrate), follows=("budget",), caches=caches)


def named(text: str) -> Side:
    """A policy in the words of `learndrop --policy`."""
    return Side(lambda done: parse_policy(text))


def saved_flops(drops: Mapping[int, int], flops: Sequence[int], epochs: int) -> int:
    """Return the forward FLOPs of one sample an epoch that drops {epochs done: layers} save over a run, summed over epochs.

    flops: [L], of each layer.
    """
    steps = [*sorted(drops.items()), (epochs, 0)]
    return sum((end - epoch) * sum(flops[:prefix]) for (epoch, prefix), (end, _) in itertools.pairwise(steps))


def evenly(
    drops: Mapping[int, int], *, flops: Sequence[int], moved: Sequence[Sequence[float | None]]
) -> dict[int, int]:
    """Return as many drops as given, of as many layers in all, at an even pace until the end of the run.

    They begin where they save about as much as the drops given. flops: [L]; moved: [E][L], of which only E is used.
    """
    epochs, count, last = len(moved), len(drops), max(drops.values())
    wanted = saved_flops(drops, flops, epochs)

    def from_epoch(first: int) -> dict[int, int]:
        return {first + i * (epochs - first) // count: max(1, round((i + 1) * last / count)) for i in range(count)}

    paces = [from_epoch(first) for first in range(1, epochs)]
    return min(paces, key=lambda pace: abs(saved_flops(pace, flops, epochs) - wanted))


def hindsight(
    drops: Mapping[int, int], *, flops: Sequence[int], moved: Sequence[Sequence[float | None]]
) -> dict[int, int]:
    """Return the drops that save at least as much as those given and lose the least of what layers would still have moved.

    moved: [E][L], the relative change of each layer in each epoch of a run without drops; a layer that is dropped in an
    epoch loses its change in it. flops: [L]. Nothing is dropped before the first step.
    """
    epochs, wanted = len(moved), saved_flops(drops, flops, len(moved))

    def cheapest(price: float) -> dict[int, int]:
        """The drops with the smallest loss less `price` for each FLOP saved."""
        best: dict[int, tuple[float, tuple[int, ...]]] = {0: (0.0, (0,))}
        for epoch in moved[1:]:
            costs = [0.0]
            for of_layer, change in zip(flops[:-1], epoch, strict=False):
                costs.append(costs[-1] + (change or 0.0) - price * of_layer)
            reached: dict[int, tuple[float, tuple[int, ...]]] = {}
            before: tuple[float, tuple[int, ...]] | None = None
            for prefix, cost in enumerate(costs):
                if prefix in best and (before is None or best[prefix][0] < before[0]):
                    before = best[prefix]
                assert before is not None
                reached[prefix] = (before[0] + cost, (*before[1], prefix))
            best = reached
        prefixes = min(best.values())[1]
        return {i: prefix for i, prefix in enumerate(prefixes) if i and prefix > prefixes[i - 1]}

    low, high = 0.0, 1.0
    while saved_flops(cheapest(high / sum(flops)), flops, epochs) < wanted and high < 1e6:
        high *= 2
    for _ in range(40):
        middle = (low + high) / 2
        enough = saved_flops(cheapest(middle / sum(flops)), flops, epochs) >= wanted
        low, high = (low, middle) if enough else (middle, high)
    return cheapest(high / sum(flops))


#: Two settings of each rule, the first the gentler one.
RULES = (
    *("freezeout:0.8", "freezeout:0.5", "linearfreeze:0.5", "linearfreeze:0.2"),
    *("autofreeze:50", "autofreeze:75", "pipetransformer:0.2", "pipetransformer:0.4"),
)
PAPER = ("baseline", "budget", "stopped", "short", "freeze-only")
#: Thresholds of the default policy beside its own, by the name of their side.
THRESHOLDS = {f"threshold-{value:g}": value for value in (0.1, 0.4)}
SCORES = ("watched", "budget-even", "budget-hindsight", "stopped-even", "stopped-hindsight", *THRESHOLDS)
#: The drops of `budget` with the batch norms of dropped layers as training has left them, and recalibrated.
NORMS = ("as-trained", "recalibrated")
#: The default policy without its wait for the learning rate to fall.
ANY_RATE = "stopped-any-rate"
LONG = (*PAPER[:4], ANY_RATE)

SIDES: dict[str, Side] = {
    "baseline": Side(),
    "budget": named("budget:2.0,start=1"),
    "stopped": named("stopped"),
    "short": Side(follows=("budget",), shortened_to="budget"),
    "freeze-only": as_budget(caches=False),
    **{rule: named(rule) for rule in RULES},
    "watched": Side(lambda done: Fixed({})),
    "budget-even": without_scores(evenly, "budget"),
    "budget-hindsight": without_scores(hindsight, "budget"),
    "stopped-even": without_scores(evenly, "stopped"),
    "stopped-hindsight": without_scores(hindsight, "stopped"),
    **{name: Side(lambda done, value=value: StoppedLearning(threshold=value)) for name, value in THRESHOLDS.items()},
    "as-trained": as_budget(recalibrate=False),
    "recalibrated": as_budget(),
    ANY_RATE: Side(lambda done: StoppedLearning(annealed=1.0)),
}


@dataclass(frozen=True)
class Case:
    """One run of the study. setting: "paper", "long one-cycle", "long constant", or "recipe" where lr is tried."""

    setting: str
    dataset: str
    model: str
    side: str
    seed: int
    lr: float | None = None

    def is_of(self, record: Record) -> bool:
        """Whether a record is the result of this case."""
        return all(record[key] == getattr(self, key) for key in ("setting", "dataset", "model", "side", "seed")) and (
            self.lr in (None, record["recipe"]["lr"])
        )


PARTS = ("recipe", "paper", "rules", "scores", "norms", "long")


def plan(scale: Scale, *, parts: Sequence[str], seeds: int) -> Iterator[Case]:
    """Yield the runs in order: the recipes, then one seed of everything before the next, the paper's table first."""
    if "recipe" in parts:
        for dataset in scale.images:
            for model in scale.chosen_by:
                yield from (Case("recipe", dataset, model, "baseline", 0, lr) for lr in scale.lrs)
    for seed in range(seeds):
        every, some = (tuple(scale.images), scale.networks), (scale.compared_on, scale.compared)
        for part, sides, (datasets, models) in (
            ("paper", PAPER, every),
            ("rules", RULES, some),
            ("scores", SCORES, some),
            ("norms", NORMS, every),
        ):
            if part in parts:
                for dataset in datasets:
                    for model in models:
                        yield from (Case("paper", dataset, model, side, seed) for side in sides)
        if "long" in parts:
            for dataset in scale.compared_on:
                for model in scale.chosen_by:
                    for schedule in ("one-cycle", "constant"):
                        yield from (Case(f"long {schedule}", dataset, model, side, seed) for side in LONG)
