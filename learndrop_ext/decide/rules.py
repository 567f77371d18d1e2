"""The freezing rules of other work as policies, for comparisons on equal terms.

Each gives the moment and the number of layers of its source; rows are kept behind them as behind any drop. What a source
does beside freezing, such as annealing the learning rate of each layer, is not part of its rule here. Where a source uses
norms of accumulated gradients, these use norms of the layers' changes over an epoch: the sum of the optimizer's steps.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from learndrop_ext.decide.policy import Decision, Situation


@dataclass(frozen=True)
class FreezeOut:
    """Drops each layer at its own moment, the later the deeper it is: layer i of L after the share t_i of the epochs.

    t_i = (t0 + (1 - t0) i / (L - 1))^3, the cubic schedule of Brock, Lim, Ritchie and Weston, "FreezeOut: accelerate
    training by progressively freezing layers", 2017 (arXiv 1706.04983).

    Args:
        t0 (float, optional): cube root of the share of the run after which the first layer is dropped. Default: 0.8

    Raises:
        ValueError: t0 is not within 0..1. When called: the length of the run is not known.
    """

    t0: float = 0.8
    uses_costs: ClassVar[bool] = False

    def __post_init__(self) -> None:
        _check_share("FreezeOut", "t0", self.t0)

    def __call__(self, situation: Situation) -> Decision:
        L = len(situation.layers)
        moments = [(self.t0 + (1 - self.t0) * i / max(1, L - 1)) ** 3 for i in range(L)]
        return _on_schedule("FreezeOut", situation, lambda time: sum(moment <= time for moment in moments))


@dataclass(frozen=True)
class LinearFreeze:
    """Drops layers at an even pace from `start` on, until the share `level` of them is dropped at the end of the run.

    Source: `LayerFreezing` of MosaicML's Composer (composer/algorithms/layer_freezing), whose arguments are freeze_start and
    freeze_level. The last layer is never dropped.

    Args:
        start (float, optional): share of the run without drops. Default: 0.5
        level (float, optional): share of the layers that are dropped at the end. Default: 1.0

    Raises:
        ValueError: a value is not within 0..1. When called: the length of the run is not known.
    """

    start: float = 0.5
    level: float = 1.0
    uses_costs: ClassVar[bool] = False

    def __post_init__(self) -> None:
        _check_share("LinearFreeze", "start", self.start)
        _check_share("LinearFreeze", "level", self.level)

    def __call__(self, situation: Situation) -> Decision:
        last = len(situation.layers) - 1

        def due(time: float) -> int:
            return int(self.level * last * (time - self.start) / (1 - self.start)) if time > self.start else 0

        return _on_schedule("LinearFreeze", situation, due)


@dataclass(frozen=True)
class AutoFreeze:
    """Drops the first live layers whose norms have changed least from one epoch to the next.

    With d the norm of a layer's change over an epoch, and d' over the epoch before, |d' - d| / d' is how much it has
    changed. Dropped are the live layers in front of the first one that has changed by the `percentile` of all or more.
    Source: Liu, Agarwal and Venkataraman, "AutoFreeze: automatically freezing model blocks to accelerate fine-tuning", 2021
    (arXiv 2102.01386).

    Args:
        percentile (float, optional): 0..100; linear between two layers. Default: 50.0

    Raises:
        ValueError: percentile is not within 0..100.
    """

    percentile: float = 50.0
    uses_costs: ClassVar[bool] = False

    def __post_init__(self) -> None:
        if not 0.0 <= self.percentile <= 100.0:
            raise ValueError(f"AutoFreeze: percentile must be within 0.0..100.0, got {self.percentile!r}")

    def __call__(self, situation: Situation) -> Decision:
        prefix, norms = situation.prefix, _live_norms(situation)
        if len(norms) < 2:
            return Decision(prefix, f"{len(norms)} of 2 measurements")
        changed = [abs(before - now) / before if before else 0.0 for before, now in zip(*norms[-2:], strict=True)]
        limit = float(np.percentile(changed, self.percentile))
        still = next((i for i, value in enumerate(changed) if value >= limit), len(changed))
        prefix = min(prefix + still, len(situation.layers) - 1)
        return Decision(prefix, f"{still} layers below the percentile {self.percentile:g}, {limit:.3g}")


@dataclass(frozen=True)
class PipeTransformer:
    """Drops all layers up to the live one with the smallest norm, at most the share `alpha` of the live layers at once.

    Dropped are min(k + alpha (L - k), the place of the layer with the smallest norm) of L layers, where k are dropped
    already. Source: He, Li, Soltanolkotabi and Avestimehr, "PipeTransformer: automated elastic pipelining for distributed
    training of transformers", 2021 (arXiv 2102.03161), section 3.1.

    Args:
        alpha (float, optional): 0..1. Default: 1 / 3

    Raises:
        ValueError: alpha is not within 0..1.
    """

    alpha: float = 1 / 3
    uses_costs: ClassVar[bool] = False

    def __post_init__(self) -> None:
        _check_share("PipeTransformer", "alpha", self.alpha)

    def __call__(self, situation: Situation) -> Decision:
        k, L, norms = situation.prefix, len(situation.layers), _live_norms(situation)
        if not norms:
            return Decision(k, "no measurement yet")
        smallest = k + norms[-1].index(min(norms[-1])) + 1
        bound = k + int(self.alpha * (L - k))
        return Decision(min(bound, smallest, L - 1), f"{smallest} layers by norm, at most {bound}")


def _check_share(owner: str, name: str, value: float) -> None:
    if not 0.0 <= value <= 1.0:
        raise ValueError(f"{owner}: {name} must be within 0.0..1.0, got {value!r}")


def _on_schedule(name: str, situation: Situation, due: Callable[[float], int]) -> Decision:
    """Drop what is due after the share of the run that is done. After `undrop()` only what becomes due later counts."""
    if situation.epochs is None:
        raise ValueError(f"{name}: epochs must be known, give DropScheduler(epochs=...), got None")
    wanted = due(situation.epoch / situation.epochs)
    again = situation.undropped is not None and wanted <= due(situation.undropped / situation.epochs)
    prefix = situation.prefix if again else max(situation.prefix, min(wanted, len(situation.layers) - 1))
    return Decision(prefix, f"{prefix} layers after epoch {situation.epoch} of {situation.epochs}")


def _live_norms(situation: Situation) -> list[list[float]]:
    """The norms of the changes of the layers that are live now, for each epoch done since the last `undrop()`."""
    measured = situation.changes[situation.undropped or 0 :]
    return [[change.l2 for change in layers[situation.prefix :] if change is not None] for layers in measured]
