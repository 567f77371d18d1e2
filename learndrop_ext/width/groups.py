"""Which channels can be cut, and what goes with them: the dependency graph of Torch-Pruning in our own words.

A group is C channels that go together: outputs of convolutions or linear layers, inputs of those that read them, and the
norms between.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.utils import _pytree as pytree

from learndrop_ext.preserve import preserved

CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)


@dataclass(frozen=True)
class Part:
    """One side of a layer.

    Args:
        name, module: the layer.
        side: "out", "in", or "both" for a norm or depthwise convolution, whose outputs each have an input of their own.
        of: [n] int64, for each channel of the side the group's channel that it belongs to, or -1.
    """

    name: str
    module: nn.Module = field(repr=False)
    side: str
    of: Tensor = field(repr=False)

    @property
    def role(self) -> str:
        """ "in" if its weights read the group's channels, "out" if they write them, "norm" for a norm."""
        return "norm" if isinstance(self.module, _BatchNorm) else "in" if self.side == "in" else "out"


@dataclass(frozen=True)
class Group:
    """C channels that go together. name: the first layer that writes them, in the order of the modules."""

    name: str
    size: int
    parts: tuple[Part, ...] = field(repr=False)

    def mean(self, role: str, values: Mapping[str, Tensor]) -> Tensor:
        """Return the mean over the parts of a role, [C, K] float64, NaN for a channel that none has. values: {layer: [n, K]
        float64}, of each channel of the layer's side."""
        parts = [part for part in self.parts if part.role == role and part.name in values]
        columns = values[parts[0].name].shape[1] if parts else 1
        total, count = torch.zeros(self.size, columns, dtype=torch.float64), torch.zeros(self.size, 1)
        for part in parts:
            here = part.of >= 0
            total.index_add_(0, part.of[here], values[part.name][here])
            count.index_add_(0, part.of[here], torch.ones(int(here.sum()), 1))
        return total / count


#: What is left of the channels of a side: {(layer, side): their numbers [n] int64, in order}.
Cuts = dict[tuple[str, str], Tensor]


def cuts_of(groups: Sequence[Group], keeps: Sequence[Tensor]) -> Cuts:
    """Return what is left of each side that loses channels. keeps: [C] bool for each group, the channels that stay."""
    left: dict[tuple[str, str], Tensor] = {}
    for group, keep in zip(groups, keeps, strict=True):
        for part in group.parts if not bool(keep.all()) else ():
            stays = (part.of < 0) | keep[part.of]
            left[part.name, part.side] = left.get((part.name, part.side), torch.ones_like(stays)) & stays
    return {key: stays.nonzero().flatten() for key, stays in left.items()}


def find_groups(
    model: nn.Module, run: Callable[[], Any], dropped: Collection[nn.Module], untouched: Collection[str]
) -> tuple[tuple[Group, ...], dict[str, str]]:
    """Return the groups that can be narrowed, and {layer: why its group cannot}. The model is left as it was.

    Args:
        run: calls the model on an example.
        dropped: modules that do not train any more.
        untouched: names of layers whose outputs stay.

    Raises:
        ImportError: Torch-Pruning is not installed.
        ValueError: the model does not run on the example, or Torch-Pruning cannot trace it.
    """
    try:
        import torch_pruning
    except ImportError as error:
        raise ImportError('WidthScheduler: it needs Torch-Pruning: pip install "learndrop_ext[width]"') from error
    called: Counter[nn.Module] = Counter()
    wanted = "example must be what the model takes"
    try:
        with preserved(model), torch.enable_grad():
            model.eval()
            for module in model.modules():
                module.register_forward_hook(lambda module, args, output: called.update([module]))
            run()
        wanted = "model must be one that Torch-Pruning can trace"
        with preserved(model), torch.enable_grad():
            graph = torch_pruning.DependencyGraph()
            graph.build_dependency(model, None, forward_fn=lambda model, _: _outputs(run()), verbose=False)
            found = list(graph.get_all_groups(root_module_types=[*CONVOLUTIONS, nn.Linear]))
    except Exception as error:
        raise ValueError(f"WidthScheduler: {wanted}, got {type(error).__name__}: {error}") from error
    judge = _Judge(model, called, dropped, untouched)
    groups, refused = [], {}
    for group in found:
        parts, reasons = [], []
        for item in group.items:
            module, kind = item.dep.target.module, item.dep.target.type.name
            if module in judge.names:
                side, width = side_of(module, "out" if graph.is_out_channel_pruning_fn(item.dep.handler) else "in")
                of = torch.full((width,), -1)
                if width:
                    of[item.idxs] = torch.tensor(item.root_idxs)
                    parts.append(Part(judge.names[module], module, side, of))
                reasons.append(judge.reason(module, side, width))
            elif kind in ("OUTPUT", "PARAMETER"):
                what = "the model's output" if kind == "OUTPUT" else "those of a parameter outside of a layer"
                reasons.append(f"its channels are {what}")
        name = min((part.name for part in parts if part.role == "out"), key=judge.order)
        if reason := next(filter(None, reasons), None):
            refused[name] = reason
        else:
            groups.append(Group(name, len(group[0].idxs), tuple(parts)))
    return tuple(sorted(groups, key=lambda group: judge.order(group.name))), refused


def _outputs(values: Any) -> list[Tensor]:
    """Return the tensors that a model returned, each behind an operation of its own: Torch-Pruning sees an output where a
    graph ends in something other than a layer."""
    return [t * 1 for t in pytree.tree_leaves(values) if isinstance(t, Tensor) and t.requires_grad]


def side_of(module: nn.Module, side: str) -> tuple[str, int]:
    """Return the side of a layer that is cut and its number of channels, 0 for a layer that cannot be cut."""
    if isinstance(module, _BatchNorm):
        return "both", module.num_features
    if isinstance(module, nn.Linear):
        return side, module.in_features if side == "in" else module.out_features
    if isinstance(module, CONVOLUTIONS):
        depthwise = 1 < module.groups == module.in_channels == module.out_channels
        return "both" if depthwise else side, module.in_channels if side == "in" else module.out_channels
    return side, 0


class _Judge:
    """Says why a layer may not be cut."""

    def __init__(
        self,
        model: nn.Module,
        called: Counter[nn.Module],
        dropped: Collection[nn.Module],
        untouched: Collection[str],
    ) -> None:
        self.names = {module: name for name, module in model.named_modules()}
        self.order = list(self.names.values()).index
        self._called, self._dropped, self._untouched = called, dropped, untouched
        self._owners: dict[int, list[str]] = {}
        for name, parameter in model.named_parameters(remove_duplicate=False):
            self._owners.setdefault(id(parameter), []).append(name)

    def reason(self, module: nn.Module, side: str, width: int) -> str | None:
        """Return why a side may not be cut, or None."""
        name = self.names[module]
        if not width and any(parameter.numel() > 1 for parameter in module.parameters()):
            return f"{name} is a {type(module).__name__}"
        if isinstance(module, CONVOLUTIONS) and module.groups > 1 and side != "both":
            return f"{name} is a grouped convolution that is not depthwise"
        if module in self._dropped:
            return f"{name} is dropped"
        if width and self._called[module] != 1:
            return f"{name} is called {self._called[module]} times in a forward"
        if name in self._untouched and side != "in":
            return f"{name} is untouched"
        for own in ("weight", "bias") if width else ():
            parameter = module._parameters.get(own)
            if parameter is None and getattr(module, own, None) is not None:
                return f"{own} of {name} is parametrized or masked, not a parameter of its own"
            if parameter is not None and len(self._owners[id(parameter)]) > 1:
                return f"{name} shares a parameter: {' and '.join(self._owners[id(parameter)])}"
            if parameter is not None and not parameter.requires_grad:
                return f"{name} does not train"
        return None
