"""The costs of a run with four layers, whose sums can be done by hand."""

from __future__ import annotations

from typing import Any

from learndrop_ext.decide.costs import LayerCost
from learndrop_ext.decide.forecast import RunCosts

#: Frozen 1 s, live 3 s, 2 s as the first live one; 1, 1, 2 and 4 parameters.
LAYERS = tuple(
    LayerCost(name, 10, 1.0, 3.0, (4,), first_seconds=2.0, parameters=count)
    for name, count in (("stem", 1), ("block1", 1), ("block2", 2), ("fc", 4))
)


def four_layers(**more: Any) -> RunCosts:
    """Two samples an epoch; an image 0.5 s, a row 0.25 s and 0.5 s to store, 0.8 s of optimizer, 1 s of other things.

    A sample takes 0.5 + (2 + 3 + 3 + 3) + 0.8 + 1 = 13.3 s with all layers live; 0.25 + 8 + 0.7 + 1 = 9.95 s from the
    rows after one layer, 0.25 + 5 + 0.6 + 1 = 6.85 s after two, 0.25 + 2 + 0.4 + 1 = 3.65 s after three.
    """
    values: dict[str, Any] = {
        "layers": LAYERS,
        "cuts": (0, 1, 2, 3),
        "row_seconds": (0.0, 0.25, 0.25, 0.25),
        "write_seconds": (0.0, 0.5, 0.5, 0.5),
        "image_seconds": 0.5,
        "other_seconds": 1.0,
        "samples": 2,
        "optimizer_seconds": 0.8,
    }
    return RunCosts(**{**values, **more})
