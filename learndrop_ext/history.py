"""What the scheduler remembers: one record a step."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from learndrop_ext.decide.deltas import LayerChange


@dataclass(frozen=True)
class Record:
    """What one `step()` saw and did. Tuples have one entry for each of the L layers, None where a layer was dropped.

    Args:
        epoch: number of `step()` calls so far; 0 for layers dropped before the first step.
        prefix: layers dropped from here on.
        cut: after how many of them rows are kept.
        reason: of the decision.
        learning_rate: of the optimizer's first group.
        changes: what was measured of each layer.
        scores: computed from `changes`, see `decide.scores`.
        epoch_seconds: of the loop since the step before, rows made in it included.
        fill_seconds: part of `epoch_seconds` spent computing and storing rows.
        measure_seconds: of this step: measuring, deciding and, after a drop, freezing.
        forecast_seconds: what `epoch_seconds` was expected to be, None where nothing was known.
        samples: trained since the step before.
        forward_flops: of the training steps.
        fill_flops: of making rows.
        row_bytes, cache_bytes: of one row and of all rows after this step.
    """

    epoch: int
    prefix: int
    cut: int
    reason: str
    learning_rate: float
    changes: tuple[LayerChange | None, ...]
    scores: tuple[float | None, ...]
    forecast_seconds: float | None
    row_bytes: int
    cache_bytes: int
    epoch_seconds: float = 0.0
    fill_seconds: float = 0.0
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
        """The cosine between each layer's change and the one before."""
        return tuple(None if change is None else change.cosine for change in self.changes)


def record_of(values: dict[str, Any]) -> Record:
    """Return the record of what `dataclasses.asdict` gave for it."""
    fields: dict[str, Any] = {k: tuple(v) if isinstance(v, list) else v for k, v in values.items()}
    fields["changes"] = tuple(None if change is None else LayerChange(**change) for change in fields["changes"])
    return Record(**fields)
