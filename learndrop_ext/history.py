"""The scheduler's history: one record per step."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from learndrop_ext.decide.deltas import LayerChange


@dataclass(frozen=True)
class Record:
    """What one `step()` measured and decided. Tuples have one entry for each of the L layers, None for dropped layers.

    Args:
        epoch: number of `step()` calls so far; 0 for layers dropped before the first step.
        prefix: number of layers dropped from here on.
        reason: the policy's reason.
        learning_rate: learning rate of the optimizer's first group.
        changes: the measured change of each layer.
        scores: each layer's score, computed from `changes`; see `decide.scores`.
        epoch_seconds: time spent in the loop since the last step, computing rows included.
        fill_seconds: part of `epoch_seconds` spent computing and storing rows.
        wrap_seconds: with `wrap=`, part of `epoch_seconds` that the first step after a drop took longer than the others:
            compiling, or capturing graphs.
        measure_seconds: time spent in this step: measuring, deciding and, after a drop, freezing.
        forecast_seconds: the forecast of `epoch_seconds`, or None if there was none.
        samples: number of samples trained since the last step.
        forward_flops: forward FLOPs of the training steps.
        fill_flops: FLOPs spent computing rows.
        row_bytes, cache_bytes: bytes of one row and of all rows after this step.
        extras_bytes: bytes of what is kept beside the rows (labels, masks), without lists.
        tier: the slowest tier that holds rows: "device", "host" or "disk"; "none" if there are no rows.
    """

    epoch: int
    prefix: int
    reason: str
    learning_rate: float
    changes: tuple[LayerChange | None, ...]
    scores: tuple[float | None, ...]
    forecast_seconds: float | None
    row_bytes: int
    cache_bytes: int
    extras_bytes: int = 0
    tier: str = "none"
    epoch_seconds: float = 0.0
    fill_seconds: float = 0.0
    wrap_seconds: float = 0.0
    measure_seconds: float = 0.0
    samples: int = 0
    forward_flops: int = 0
    fill_flops: int = 0

    @property
    def relative(self) -> tuple[float | None, ...]:
        """The relative change of each layer."""
        return tuple(None if change is None else change.relative for change in self.changes)

    @property
    def cosine(self) -> tuple[float | None, ...]:
        """The cosine between each layer's change and its previous one."""
        return tuple(None if change is None else change.cosine for change in self.changes)


def record_of(values: dict[str, Any]) -> Record:
    """Return the record that `dataclasses.asdict` turned into `values`."""
    changes = tuple(None if change is None else LayerChange(**change) for change in values["changes"])
    return Record(**{**values, "changes": changes})
