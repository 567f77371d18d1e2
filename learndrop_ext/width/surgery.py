"""Which channels can be cut and what goes with them, by the dependency graph of Torch-Pruning; and the cut, computed before
anything is changed: a change is assignments only, and can be taken back."""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
LAYERS = (*CONVOLUTIONS, nn.Linear)
SIZES = ("out_channels", "in_channels", "groups", "out_features", "in_features", "num_features")
#: Why channels stay that are not only those of layers, by the kind of Torch-Pruning's node.
ELSEWHERE = {"OUTPUT": "the model's output", "PARAMETER": "those of a parameter outside of a layer"}
#: What a cut changes of a model and of its optimizer, for `torch.save`: {"sizes": {layer: {attribute: number of channels}},
#: "tensors": {parameter or buffer: its values}, a shared one under its first name, "optimizer": {parameter: its state}}.
State = dict[str, dict[str, Any]]


class Part(NamedTuple):
    """The channels [m] int64 of one of `sides(module)` that are in a group, and which of the group's they are, [m] int64."""

    name: str
    module: nn.Module
    side: str
    channels: Tensor
    of: Tensor


class Group(NamedTuple):
    """C channels that go together: outputs of some layers, inputs of those that read them, and the norms between. Its name
    is that of the first layer that writes them, in the order of the modules."""

    name: str
    size: int
    parts: tuple[Part, ...]

    def mean(self, side: str, values: Mapping[tuple[str, str], Tensor]) -> Tensor:
        """Return the mean over the layers with this side, [C, K] float64, NaN for a channel that none has. values: {(layer,
        side): [n, K] float64}, of each of its channels."""
        parts = [part for part in self.parts if part.side == side and (part.name, side) in values]
        columns = values[parts[0].name, side].shape[1] if parts else 1
        total, count = torch.zeros(self.size, columns, dtype=torch.float64), torch.zeros(self.size, 1)
        for part in parts:
            total.index_add_(0, part.of, values[part.name, side][part.channels])
            count.index_add_(0, part.of, torch.ones(len(part.of), 1))
        return total / count


def sides(module: nn.Module) -> dict[str, tuple[str, ...]]:
    """Return what can be cut of a layer, {"out" or "in": attributes with the number of channels that it writes or reads}. A
    norm has only "norm", a depthwise convolution only "out", any other module nothing."""
    if isinstance(module, nn.modules.batchnorm._BatchNorm):
        return {"norm": ("num_features",)}
    if isinstance(module, nn.Linear):
        return {"out": ("out_features",), "in": ("in_features",)}
    if not isinstance(module, CONVOLUTIONS):
        return {}
    if 1 < module.groups == module.in_channels == module.out_channels:
        return {"out": ("out_channels", "in_channels", "groups")}
    return {"out": ("out_channels",), "in": ("in_channels",)}


def find_groups(
    model: nn.Module, example: tuple[Any, ...], dropped: Collection[nn.Module], untouched: Sequence[str], linear: bool
) -> tuple[tuple[Group, ...], dict[str, str]]:
    """Return the groups that can be narrowed, and {layer: why its group cannot}. Modules of `dropped` do not train any more,
    outputs of `untouched` stay. linear: cut only linear layers. The model has hooks and is in eval mode afterwards.

    Raises:
        ImportError: Torch-Pruning is not installed.
        ValueError: the model does not run on the example, or Torch-Pruning cannot trace it.
    """
    try:
        import torch_pruning
    except ImportError as error:
        raise ImportError('WidthScheduler: it needs Torch-Pruning: pip install "learndrop_ext[width]"') from error
    called: Counter[nn.Module] = Counter()
    for module in model.modules():
        module.register_forward_hook(lambda module, args, output: called.update([module]))

    def forward(*_: Any) -> list[Tensor]:
        """Each output behind an operation of its own: one is seen where a graph ends in something other than a layer."""
        return [t * 1 for t in pytree.tree_leaves(model(*example)) if isinstance(t, Tensor) and t.requires_grad]

    try:
        with torch.enable_grad():
            graph = torch_pruning.DependencyGraph().build_dependency(model, None, forward_fn=forward, verbose=False)
        found = list(graph.get_all_groups(root_module_types=list(LAYERS)))
    except Exception as error:
        traced = "model must be one that Torch-Pruning can trace"
        wanted = traced if called[model] else "example must be what the model takes"
        raise ValueError(f"WidthScheduler: {wanted}, got {type(error).__name__}: {error}") from error
    fixed = _fixed(model, called, dropped, linear)
    names = {module: name for name, module in model.named_modules()}
    order = list(names.values()).index
    groups, refused = [], {}
    for group in found:
        parts: list[Part] = []
        reasons: list[str | None] = []
        for item in group.items:
            module = item.dep.target.module
            if module not in names:
                kind = item.dep.target.type.name
                reasons.append(f"its channels are {ELSEWHERE[kind]}" if kind in ELSEWHERE else None)
                continue
            name, side = names[module], "out" if graph.is_out_channel_pruning_fn(item.dep.handler) else "in"
            side = side if side in sides(module) else next(iter(sides(module)), "")
            reasons.append(f"{name} is untouched" if side != "in" and name in untouched else fixed.get(module))
            if side:
                parts.append(Part(name, module, side, torch.tensor(item.idxs), torch.tensor(item.root_idxs)))
        name = min((part.name for part in parts if part.side == "out"), key=order)
        if reason := next(filter(None, reasons), None):
            refused[name] = reason
        else:
            groups.append(Group(name, len(group[0].idxs), tuple(parts)))
    return tuple(sorted(groups, key=lambda group: order(group.name))), refused


def _fixed(
    model: nn.Module, called: Counter[nn.Module], dropped: Collection[nn.Module], linear: bool
) -> dict[nn.Module, str | None]:
    """Return {module: why it may not be cut, or None}. called: how often each is in a forward."""
    owners: dict[nn.Parameter, list[str]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        owners.setdefault(parameter, []).append(name)
    fixed = {}
    for name, module in model.named_modules():
        own = {key: getattr(module, key) for key in ("weight", "bias") if sides(module)}
        parameters = [value for value in own.values() if isinstance(value, nn.Parameter)]
        hidden = [key for key, value in own.items() if not isinstance(value, nn.Parameter | None)][:1]
        shared = [" and ".join(owners[parameter]) for parameter in parameters if len(owners[parameter]) > 1][:1]
        groups = getattr(module, "groups", 1) if "in" in sides(module) else 1
        reasons = (
            (not own and any(p.numel() > 1 for p in module.parameters()), f"{name} is a {type(module).__name__}"),
            (groups > 1, f"{name} is a grouped convolution that is not depthwise"),
            (module in dropped, f"{name} is dropped"),
            (own and called[module] != 1, f"{name} is called {called[module]} times in a forward"),
            (hidden, f"{''.join(hidden)} of {name} is parametrized or masked, not a parameter of its own"),
            (shared, f"{name} shares a parameter: {''.join(shared)}"),
            (not all(parameter.requires_grad for parameter in parameters), f"{name} does not train"),
            (own and linear and not isinstance(module, nn.Linear), "the criterion is for fully connected layers"),
        )
        fixed[module] = next((reason for holds, reason in reasons if holds), None)
    return fixed


def state_of(model: nn.Module, optimizer: torch.optim.Optimizer) -> State:
    """Return the state. Its tensors share memory with the model's and the optimizer's."""
    layers = {name: module for name, module in model.named_modules() if sides(module)}
    parameters = dict(model.named_parameters())
    return {
        "sizes": {name: {k: v for k, v in vars(m).items() if k in SIZES} for name, m in layers.items()},
        "tensors": {name: tensor.data for name, tensor in (*parameters.items(), *model.named_buffers())},
        "optimizer": {name: dict(optimizer.state[p]) for name, p in parameters.items() if p in optimizer.state},
    }


def put(state: State, model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    """Make a state that of the model and of the optimizer. Parameters and buffers stay the same objects; those that get
    another shape lose their gradient."""
    modules, parameters = dict(model.named_modules()), dict(model.named_parameters())
    for name, sizes in state["sizes"].items():
        modules[name].__dict__.update(sizes)
    for name, tensor in (*parameters.items(), *model.named_buffers()):
        values = state["tensors"][name]
        if tensor.shape != values.shape:
            # A graph that is still alive, such as that of the loop's last loss, keeps the node that adds to this gradient,
            # and the node keeps the shape. After a change of dtype autograd makes a new one.
            other = torch.float32 if tensor.dtype == torch.float64 else torch.float64
            tensor.grad = None
            tensor.data = torch.empty(0, dtype=other, device=tensor.device)
        tensor.data = values
    for name, parameter in parameters.items():
        if name in state["optimizer"]:
            optimizer.state[parameter] = dict(state["optimizer"][name])
        else:
            optimizer.state.pop(parameter, None)


def narrowed(state: State, groups: Sequence[Group], factors: Sequence[Tensor]) -> tuple[State, State]:
    """Return two states that compute the same if the graph is right. factors: [C] float64 for each group.

    In the first, weights that read the groups' channels are multiplied by the factors, so that nothing reads those with 0.
    The second is the first without these channels. The optimizer's tensors are cut as their parameter.

    Raises:
        ValueError: the optimizer has a tensor for a parameter that is cut with neither its shape nor a single element.
    """
    sizes, tensors = dict(state["sizes"]), dict(state["tensors"])
    stay: dict[tuple[str, int], Tensor] = {}  # {(layer, dimension of its weight): [n] bool}
    for group, factor in zip(groups, factors, strict=True):
        for part in group.parts if bool((factor != 1).any()) else ():
            attributes, dim = sides(part.module)[part.side], int(part.side == "in")
            scale = torch.ones(state["sizes"][part.name][attributes[0]], dtype=torch.float64)
            scale[part.channels] = factor[part.of]
            stay[part.name, dim] = stay.get((part.name, dim), scale != 0) & (scale != 0)
            sizes[part.name] = {**sizes[part.name], **dict.fromkeys(attributes, int(stay[part.name, dim].sum()))}
            if dim:
                weight = tensors[f"{part.name}.weight"].clone()
                scale = scale.to(weight).view(1, -1, *[1] * (weight.dim() - 2))
                tensors[f"{part.name}.weight"] = weight.mul_(scale).masked_fill_(scale == 0, 0.0)
    masked, optimizer = state | {"tensors": dict(tensors)}, dict(state["optimizer"])
    for (layer, dim), stays in stay.items():
        for own in ("weight",) if dim else ("weight", "bias", "running_mean", "running_var"):
            if (name := f"{layer}.{own}") not in tensors:
                continue
            shape = list(tensors[name].shape)
            tensors[name] = select(tensors[name], dim, stays)
            for key, value in optimizer.get(name, {}).items():
                if isinstance(value, Tensor) and value.numel() != 1:
                    if (got := list(value.shape)) != shape:
                        raise ValueError(
                            f"width.step: optimizer must hold numbers or tensors of the parameter's shape, {shape}, for "
                            f"{name}, got {key} of {got}"
                        )
                    optimizer[name] = {**optimizer[name], key: select(value, dim, stays)}
    return masked, {"sizes": sizes, "tensors": tensors, "optimizer": optimizer}


def select(tensor: Tensor, dim: int, stays: Tensor) -> Tensor:
    """Return what stays, [n] bool, along a dimension, with the dimensions in the tensor's order in memory."""
    # Of equal strides, those of dimensions with one entry are the inner ones.
    order = sorted(range(tensor.dim()), key=lambda i: (-tensor.stride()[i], tensor.shape[i] == 1))
    values = tensor.detach().permute(order).index_select(order.index(dim), stays.nonzero().flatten().to(tensor.device))
    return values.permute([order.index(i) for i in range(tensor.dim())])
