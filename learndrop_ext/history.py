"""What the scheduler remembers: one record a step, and the fingerprint of what it froze."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Record:
    """What one `step()` saw and did. Tuples have one entry for each of the L layers, None where a layer was dropped.

    epoch: epochs done. prefix, cut: layers dropped after this step, and after how many of them rows are kept. relative,
    cosine, scores: of the layers. epoch_seconds: of the epoch's loop; measure_seconds, fill_seconds: of this step.
    samples: trained in the epoch. forward_flops: of the epoch's steps; fill_flops: of the fill.
    row_bytes, cache_bytes: of one row and of all rows kept after this step.
    """

    epoch: int
    prefix: int
    cut: int
    reason: str
    learning_rate: float
    relative: tuple[float | None, ...]
    cosine: tuple[float | None, ...]
    scores: tuple[float | None, ...]
    epoch_seconds: float
    measure_seconds: float
    fill_seconds: float
    samples: int
    forward_flops: int
    fill_flops: int
    row_bytes: int
    cache_bytes: int


def record_of(values: dict[str, Any]) -> Record:
    """The record that `dataclasses.asdict` made these values of."""
    fields: dict[str, Any] = {k: tuple(v) if isinstance(v, list) else v for k, v in values.items()}
    return Record(**fields)
