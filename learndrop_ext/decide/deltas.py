"""How far each layer's parameters have moved since the last measurement, and whether they keep their direction.

L layers, K columns of sums (see kernels/reference.py).
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import chain
from typing import Any

from torch import Tensor, nn

from learndrop_ext import ops
from learndrop_ext.kernels.chunks import build_table
from learndrop_ext.kernels.shards import join

Slots = tuple[tuple[tuple[dict[str, nn.Parameter | None], str], ...], ...]


@dataclass(frozen=True)
class LayerChange:
    """One measurement of one layer. Norms are over all its parameters w, with delta = w - anchor.

    Args:
        l1: sum of the absolute values of delta.
        l2: Euclidean norm of delta.
        maximum: largest absolute value of delta.
        w_l1: sum of the absolute values of w.
        w_l2: Euclidean norm of w.
        nonfinite: number of elements whose delta is NaN or infinite. If there are any, the norms are NaN or infinite too.
        relative: l2 / w_l2, or 0 if w is 0.
        cosine: cosine between delta and the previous delta, in [-1, 1]; None if either is missing, zero or not finite.
    """

    l1: float
    l2: float
    maximum: float
    w_l1: float
    w_l2: float
    nonfinite: int
    relative: float
    cosine: float | None


class Deltas:
    """The change of each layer's parameters since the anchor, a copy taken at the last refresh.

    A parameter whose memory moves keeps its anchor as long as its shape and dtype stay the same; otherwise its current
    value becomes the anchor. Takes the memory of one copy of the parameters, or two with `persistence`.

    Args:
        layers: [L], the parameters of each layer: fp32, bf16, fp16 or fp64, of any size, on one device, shared between
            layers (counted in the first), or sharded (DTensor; all ranks of the mesh measure at the same time, and each
            gets the sums over all).
        persistence: also keep the previous delta, for the cosine.
        model: if given, parameters are looked up in it before every measurement, so that ones replaced by
            `load_state_dict(assign=True)` or `module.weight = nn.Parameter(...)` are found.

    Raises:
        TypeError, ValueError: as `kernels.chunks.build_table`.
        ValueError: a parameter does not belong to `model`.
    """

    def __init__(
        self,
        layers: Sequence[Sequence[Tensor]],
        *,
        persistence: bool = True,
        model: nn.Module | None = None,
    ) -> None:
        self._persistence = persistence
        self._layers = tuple(map(tuple, layers))
        self._slots = None if model is None else find_slots(self._layers, model)
        self._table = build_table(self._layers, persistence=persistence)

    def __len__(self) -> int:
        """L, the number of layers."""
        return len(self._layers)

    def measure(self, *, refresh: bool = True) -> tuple[LayerChange, ...]:
        """Return the change of each layer since the anchor. Waits for the device.

        refresh: make the current parameters the anchor.
        """
        self._follow()
        sums = join(ops.delta_norms(self._table, refresh=refresh), self._table.mesh)  # [L, K] float64
        return tuple(map(layer_change, sums.tolist()))

    def drop_first(self, k: int) -> None:
        """Drop the first `k` layers; the others keep their anchors. Raise ValueError unless 0 <= k <= L.

        A parameter shared between a dropped layer and a later one is counted in the later one from now on.
        """
        if not 0 <= k <= len(self):
            raise ValueError(f"drop_first: k must be from 0 to {len(self)}, got {k}")
        self._follow()
        kept = {(layer - k, i): values for (layer, i), values in self._table.anchor_values().items() if layer >= k}
        self._layers = self._layers[k:]
        self._table = build_table(self._layers, persistence=self._persistence, anchors=kept)
        if self._slots is not None:
            self._slots = self._slots[k:]

    def state_dict(self) -> dict[str, Any]:
        """Return CPU copies of the anchors; for sharded parameters, of this rank's shards.

        Returns:
            "persistence" (bool), "layers" (number of parameters of each) and "anchors" ("layer.position" -> tensors,
            newest first; two with persistence).
        """
        self._follow()
        anchors = {key: [value.to("cpu", copy=True) for value in values] for key, values in self._anchors().items()}
        return {"persistence": self._persistence, "layers": list(map(len, self._layers)), "anchors": anchors}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore anchors from a `state_dict`: the next measurement equals that of the run it was saved in.

        Raises:
            ValueError: the state has another form, or is of other layers, shapes, dtypes or persistence. Nothing is
                changed then.
        """
        self._follow()
        own, anchors = self._anchors(), state.get("anchors", {})
        wanted = {"persistence": self._persistence, "layers": list(map(len, self._layers)), **_forms(own)}
        got = {key: state.get(key) for key in ("persistence", "layers")} | _forms(anchors)
        for key in {**wanted, **got}:
            if wanted.get(key) != got.get(key):
                raise ValueError(f"load_state_dict: state must have {key}={wanted.get(key)}, got {got.get(key)}")
        for key, values in anchors.items():
            for target, value in zip(own[key], values, strict=True):
                target.copy_(value)

    def _anchors(self) -> dict[str, tuple[Tensor, ...]]:
        """The anchors as "layer.position" -> tensors that share the table's memory; of a shared parameter only once."""
        anchors = {}
        saved: set[int] = set()
        for (layer, i), values in sorted(self._table.anchor_values().items()):
            if values[0].data_ptr() not in saved or not values[0].numel():
                anchors[f"{layer}.{i}"] = values
            saved.add(values[0].data_ptr())
        return anchors

    def _follow(self) -> None:
        """Build the table again, keeping the anchors, if parameters were replaced or have moved."""
        layers = self._layers if self._slots is None else look_up(self._slots)
        pairs = zip(chain.from_iterable(layers), chain.from_iterable(self._layers), strict=True)
        if any(now is not before for now, before in pairs) or self._table.stale():
            self._table = build_table(layers, persistence=self._persistence, anchors=self._table.anchor_values())
            self._layers = layers


def _forms(anchors: Mapping[str, Sequence[Tensor]]) -> dict[str, list[str]]:
    return {f"anchors[{key}]": [f"{list(value.shape)} {value.dtype}" for value in anchors[key]] for key in anchors}


def find_slots(layers: Sequence[Sequence[Tensor]], model: nn.Module) -> Slots:
    """Return where to find each parameter in `model`: the parameter dictionary of its module, and its name."""
    slots = {
        id(parameter): (module._parameters, name)
        for module in model.modules()
        for name, parameter in reversed(list(module.named_parameters(recurse=False, remove_duplicate=False)))
    }
    for i_layer, layer in enumerate(layers):
        for i, tensor in enumerate(layer):
            if id(tensor) not in slots:
                raise ValueError(
                    f"Deltas: layers[{i_layer}][{i}] must be a parameter of the model, "
                    f"got a tensor of shape {list(tensor.shape)} that it does not hold"
                )
    return tuple(tuple(slots[id(tensor)] for tensor in layer) for layer in layers)


def look_up(slots: Slots) -> tuple[tuple[Tensor, ...], ...]:
    """Return the parameters that are in `slots` now."""
    layers = []
    for i_layer, layer in enumerate(slots):
        found = []
        for i, (owner, name) in enumerate(layer):
            if (tensor := owner.get(name)) is None:
                raise RuntimeError(
                    f"Deltas: layers[{i_layer}][{i}] must stay a parameter of its module, got a module without {name!r}"
                )
            found.append(tensor)
        layers.append(tuple(found))
    return tuple(layers)


def layer_change(row: Sequence[float]) -> LayerChange:
    """Convert a row of sums, in the order of kernels/reference.py, to a LayerChange."""
    l1, l2_squared, maximum, w_l1, w_l2_squared, nonfinite, *persistence = row
    l2, w_l2 = math.sqrt(l2_squared), math.sqrt(w_l2_squared)
    cosine = None
    if persistence:
        dot, previous_squared = persistence
        # Two roots: the product of the squares may overflow where the product of the roots does not.
        scale = l2 * math.sqrt(previous_squared)
        if scale > 0 and math.isfinite(dot) and math.isfinite(scale):
            cosine = max(-1.0, min(1.0, dot / scale))
    relative = l2 / w_l2 if w_l2 else 0.0
    return LayerChange(l1, l2, maximum, w_l1, w_l2, int(nonfinite), relative, cosine)
