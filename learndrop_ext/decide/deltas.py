"""How far each layer's parameters have moved since the last measurement, and whether they keep their direction.

L layers, K columns of sums (see kernels/reference.py).
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import chain
from typing import Any

import torch
from torch import Tensor, nn

from learndrop_ext import ops
from learndrop_ext.kernels.chunks import Anchors, DeltaTable, Position, build_table
from learndrop_ext.kernels.shards import MAXIMUM, join, local_part

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
        layers: [L], the parameters of each layer: fp32, bf16, fp16 or fp64, of any size, on several devices, shared
            between layers (counted in the first), or sharded (DTensor; all ranks of the mesh measure at the same time,
            and each gets the sums over all).
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
        self._tables = build_tables(self._layers, persistence, {})

    def __len__(self) -> int:
        """L, the number of layers."""
        return len(self._layers)

    def measure(self, *, refresh: bool = True) -> tuple[LayerChange, ...]:
        """Return the change of each layer since the anchor. Waits for the devices.

        refresh: make the current parameters the anchor.
        """
        self._follow()
        # All devices work at the same time: no result is read before the last pass is launched.
        parts = [join(ops.delta_norms(part.table, refresh=refresh), part.table.mesh) for part in self._tables]
        together = torch.stack([part.cpu() for part in parts])  # [devices, L, K] float64
        sums = together.sum(0)
        sums[:, MAXIMUM] = together[:, :, MAXIMUM].amax(0)
        return tuple(map(layer_change, sums.tolist()))

    def drop_first(self, k: int) -> None:
        """Drop the first `k` layers; the others keep their anchors. Raise ValueError unless 0 <= k <= L.

        A parameter shared between a dropped layer and a later one is counted in the later one from now on.
        """
        if not 0 <= k <= len(self):
            raise ValueError(f"drop_first: k must be from 0 to {len(self)}, got {k}")
        self._follow()
        kept = {(layer - k, i): values for (layer, i), values in self._anchors().items() if layer >= k}
        self._tables = build_tables(self._layers[k:], self._persistence, kept)
        self._layers = self._layers[k:]
        if self._slots is not None:
            self._slots = self._slots[k:]

    def state_dict(self) -> dict[str, Any]:
        """Return CPU copies of the anchors; for sharded parameters, of this rank's shards.

        Returns:
            "persistence" (bool), "layers" (number of parameters of each) and "anchors" ("layer.position" -> tensors,
            newest first; two with persistence).
        """
        self._follow()
        saved: set[tuple[int, torch.device]] = set()
        anchors = {}
        for (layer, i), values in sorted(self._anchors().items()):
            memory = (values[0].data_ptr(), values[0].device)
            if memory not in saved or not values[0].numel():
                anchors[f"{layer}.{i}"] = [value.to("cpu", copy=True) for value in values]
            saved.add(memory)
        return {"persistence": self._persistence, "layers": list(map(len, self._layers)), "anchors": anchors}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore anchors from a `state_dict`: the next measurement equals that of the run it was saved in.

        Raises:
            ValueError: the state has another form, or is of other layers, shapes, dtypes or persistence. Nothing is
                changed then.
        """
        self._follow()
        if missing := {"persistence", "layers", "anchors"} - set(state):
            raise ValueError(f"load_state_dict: state must hold {sorted(missing)}, got {sorted(state)}")
        if state["persistence"] != self._persistence:
            raise ValueError(
                f"load_state_dict: state must have persistence={self._persistence}, got {state['persistence']}"
            )
        wanted = list(map(len, self._layers))
        if list(state["layers"]) != wanted:
            raise ValueError(
                f"load_state_dict: state must have {wanted} parameters in its layers, got {list(state['layers'])}"
            )
        mine = self._anchors()
        loaded: list[tuple[Tensor, Tensor]] = []
        for key, values in state["anchors"].items():
            layer, i = map(int, key.split("."))
            if (layer, i) not in mine:
                raise ValueError(f"load_state_dict: state must hold anchors of these layers only, got {key}")
            own = mine[layer, i]
            if len(values) != len(own):
                raise ValueError(f"load_state_dict: {key} must have {len(own)} anchors, got {len(values)}")
            for target, value in zip(own, values, strict=True):
                if target.shape != value.shape or target.dtype != value.dtype:
                    raise ValueError(
                        f"load_state_dict: {key} must be {list(target.shape)} {target.dtype}, "
                        f"got {list(value.shape)} {value.dtype}"
                    )
                loaded.append((target, value))
        covered = {target.data_ptr() for target, _ in loaded if target.numel()}
        for (layer, i), own in mine.items():
            if own[0].numel() and own[0].data_ptr() not in covered:
                raise ValueError(f"load_state_dict: state must hold anchors for {layer}.{i}, got none")
        for target, value in loaded:
            target.copy_(value)

    def _anchors(self) -> dict[Position, tuple[Tensor, ...]]:
        """The anchors of all parameters by (layer, position). They share the tables' memory."""
        return {
            (layer, part.places[layer][i]): values
            for part in self._tables
            for (layer, i), values in part.table.anchor_values().items()
        }

    def _follow(self) -> None:
        """Rebuild the tables, keeping the anchors, if parameters were replaced or have moved."""
        layers = self._layers if self._slots is None else look_up(self._slots)
        pairs = zip(chain.from_iterable(layers), chain.from_iterable(self._layers), strict=True)
        if any(now is not before for now, before in pairs) or any(part.table.stale() for part in self._tables):
            self._tables = build_tables(layers, self._persistence, self._anchors())
            self._layers = layers


@dataclass(frozen=True)
class DeviceTable:
    """The parameters on one device: their table, and their positions in each layer."""

    table: DeltaTable
    places: tuple[tuple[int, ...], ...]


def build_tables(layers: Sequence[Sequence[Tensor]], persistence: bool, anchors: Anchors) -> tuple[DeviceTable, ...]:
    """Return a table for each device that holds parameters, each with all layers; one on the CPU if there are none."""
    devices = dict.fromkeys(local_part(tensor).device for layer in layers for tensor in layer)
    parts = []
    for device in devices or {torch.device("cpu"): None}:
        places = tuple(
            tuple(i for i, tensor in enumerate(layer) if local_part(tensor).device == device) for layer in layers
        )
        kept = {
            (i_layer, j): anchors[i_layer, i]
            for i_layer, here in enumerate(places)
            for j, i in enumerate(here)
            if (i_layer, i) in anchors
        }
        members = [[layer[i] for i in here] for layer, here in zip(layers, places, strict=True)]
        parts.append(DeviceTable(build_table(members, persistence=persistence, anchors=kept), places))
    return tuple(parts)


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
