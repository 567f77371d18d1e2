"""The cut: tensors of a model and of its optimizer before and after, by name. All is computed before anything is changed;
a change is assignments only, and can be taken back."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.utils import _pytree as pytree

from learndrop_ext.width.groups import Cuts, side_of


@dataclass(frozen=True)
class State:
    """What a cut changes of a model and of its optimizer; plain values, for `torch.save`.

    Args:
        sizes: {layer: {attribute: number of channels}}.
        tensors: {parameter or buffer: its values}; a shared one under its first name.
        optimizer: {parameter: its state}.
    """

    sizes: Mapping[str, Mapping[str, int]]
    tensors: Mapping[str, Tensor]
    optimizer: Mapping[str, Mapping[str, Any]]


def state_of(model: nn.Module, optimizer: torch.optim.Optimizer) -> State:
    """Return the state. Its tensors share memory with the model's and the optimizer's."""
    sizes = {
        name: {attribute: getattr(module, attribute) for side in ("out", "in") for attribute in _sizes(module, side)}
        for name, module in model.named_modules()
    }
    parameters = dict(model.named_parameters())
    return State(
        {name: of_layer for name, of_layer in sizes.items() if of_layer},
        {name: tensor.data for name, tensor in (*parameters.items(), *model.named_buffers())},
        {name: dict(optimizer.state[p]) for name, p in parameters.items() if p in optimizer.state},
    )


def copied(state: State, device: torch.device | None = None) -> State:
    """Return a state with memory of its own. device: where. Default: where it is"""
    values = (state.tensors, state.optimizer)
    return State(state.sizes, *pytree.tree_map_only(Tensor, lambda t: t.detach().to(device, copy=True), values))


def put(state: State, model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    """Make a state that of the model and of the optimizer. Parameters and buffers stay the same objects; those that get
    another shape lose their gradient."""
    modules, parameters = dict(model.named_modules()), dict(model.named_parameters())
    for name, sizes in state.sizes.items():
        modules[name].__dict__.update(sizes)
    for name, tensor in (*parameters.items(), *model.named_buffers()):
        values = state.tensors[name]
        if tensor.shape != values.shape:
            # A graph that is still alive, such as that of the loop's last loss, keeps the node that adds to this gradient,
            # and the node keeps the shape. After a change of dtype autograd makes a new one.
            other = torch.float32 if tensor.dtype == torch.float64 else torch.float64
            tensor.grad = None
            tensor.data = torch.empty(0, dtype=other, device=tensor.device)
        tensor.data = values
    for name, parameter in parameters.items():
        if name in state.optimizer:
            optimizer.state[parameter] = dict(state.optimizer[name])
        else:
            optimizer.state.pop(parameter, None)


def cut(state: State, model: nn.Module, cuts: Cuts) -> State:
    """Return a state without the channels that `cuts` leaves out. The optimizer's tensors are cut as their parameter.

    Raises:
        ValueError: the optimizer has a tensor for a parameter that is cut with neither its shape nor a single element.
    """
    sizes = {name: dict(of_layer) for name, of_layer in state.sizes.items()}
    indices: dict[str, dict[int, Tensor]] = {}
    for (name, side), left in cuts.items():
        sizes[name] |= dict.fromkeys(_sizes(model.get_submodule(name), side), len(left))
        for own in ("weight",) if side == "in" else ("weight", "bias", "running_mean", "running_var"):
            indices.setdefault(f"{name}.{own}".lstrip("."), {})[int(side == "in")] = left
    tensors, kept = dict(state.tensors), dict(state.optimizer)
    for name in indices.keys() & tensors.keys():
        shape = tensors[name].shape
        tensors[name] = select(tensors[name], indices[name])
        found = {}
        for key, value in kept.get(name, {}).items():
            if isinstance(value, Tensor) and value.shape != shape and value.numel() != 1:
                raise ValueError(
                    f"width.step: optimizer must hold numbers or tensors of the parameter's shape, {list(shape)}, for "
                    f"{name}, got {key} of {list(value.shape)}"
                )
            cuttable = isinstance(value, Tensor) and value.shape == shape
            found[key] = select(value, indices[name]) if cuttable else value
        kept |= {name: found} if name in kept else {}
    return State(sizes, tensors, kept)


def masked(state: State, cuts: Cuts) -> State:
    """Return a state of the same shapes in which nothing reads the channels that `cuts` leaves out: it computes what the
    cut model does, if the graph is right about what goes together."""
    tensors = dict(state.tensors)
    for (name, side), left in cuts.items():
        key = f"{name}.weight".lstrip(".")
        if side == "in":
            gone = torch.ones(tensors[key].shape[1], dtype=torch.bool)
            gone[left] = False
            tensors[key] = tensors[key].index_fill(1, gone.nonzero().flatten().to(tensors[key].device), 0.0)
    return replace(state, tensors=tensors)


def scaled(state: State, scales: Mapping[str, Tensor]) -> State:
    """Return a state with weights multiplied along their inputs. scales: {layer: [n]}."""
    tensors = dict(state.tensors)
    for name, scale in scales.items():
        key = f"{name}.weight".lstrip(".")
        tensors[key] = tensors[key] * scale.to(tensors[key]).view(1, -1, *[1] * (tensors[key].dim() - 2))
    return replace(state, tensors=tensors)


def select(tensor: Tensor, by_dim: Mapping[int, Tensor]) -> Tensor:
    """Return the entries at some indices along some dimensions, with the dimensions in the tensor's order in memory."""
    values = tensor.detach()
    for dim, index in by_dim.items():
        values = values.index_select(dim, index.to(tensor.device))
    # Of equal strides, those of dimensions with one entry are the inner ones.
    strides, sizes = tensor.stride(), tensor.shape
    order = sorted(range(tensor.dim()), key=lambda i: (-strides[i], sizes[i] == 1))
    memory = values.new_empty([values.shape[i] for i in order])
    return memory.permute([order.index(i) for i in range(tensor.dim())]).copy_(values)


def cuts_to(sizes: Mapping[str, Mapping[str, int]], model: nn.Module) -> Cuts:
    """Return cuts that leave the first channels of each layer, so that the model gets the sizes of a state.

    Raises:
        ValueError: the sizes are of other layers, or larger than the model's.
    """
    cuts: Cuts = {}
    modules = {name: module for name, module in model.named_modules() if _sizes(module, "out")}
    if modules.keys() != sizes.keys():
        other = sorted(modules.keys() ^ sizes.keys())
        raise ValueError(f"WidthScheduler.load_state_dict: state must be of this model, got other layers: {other}")
    for layer, module in modules.items():
        for side, width in {side_of(module, "out"), side_of(module, "in")}:
            left = sizes[layer][_sizes(module, side)[0]]
            if left > width:
                raise ValueError(
                    "WidthScheduler.load_state_dict: state must be no wider than the model, got "
                    f"{left} for {width} of {layer}"
                )
            if left < width:
                cuts[layer, side] = torch.arange(left)
    return cuts


def _sizes(module: nn.Module, side: str) -> tuple[str, ...]:
    """The attributes of a layer that hold the number of channels of a side."""
    side, width = side_of(module, side)
    if not width:
        return ()
    if isinstance(module, _BatchNorm):
        return ("num_features",)
    if side == "both":
        return ("in_channels", "out_channels", "groups")
    return (f"{side}_{'features' if isinstance(module, nn.Linear) else 'channels'}",)
