"""WidthScheduler: takes channels out of a model while it trains, once per step, like a learning-rate scheduler."""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import functools
import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from learndrop_ext import ops
from learndrop_ext.forward.bypass import bypass_of
from learndrop_ext.forward.cuts import Hook
from learndrop_ext.forward.proof import rows_agree
from learndrop_ext.preserve import preserved
from learndrop_ext.width.criteria import CRITERIA, SCOPES, Coreset, Criterion, Scope, Seen, Zeros
from learndrop_ext.width.schedules import OneCycle, Schedule, Tolerance
from learndrop_ext.width.surgery import Group, State, find_groups, narrowed, put, sides, state_of


@dataclasses.dataclass(frozen=True)
class WidthRecord:
    """What one `step()` did: its number from 1, what was done and why, the share of the channels that was to be left, the
    number removed, negative if some came back, {layer: number of its channels now} of the layers that could be narrowed at
    first, the number of the model's parameters now, and the accuracy that was given."""

    step: int
    reason: str
    left: float
    removed: int
    widths: dict[str, int]
    parameters: int
    accuracy: float | None


class WidthScheduler(contextlib.AbstractContextManager["WidthScheduler"]):
    """Takes filters and neurons out of a model while it trains, and their entries out of the optimizer's state.

    Call `step()` once per epoch. Parameters stay the same objects, so that parameter groups and the learning-rate schedule
    go on. Before a cut the narrow model is compared on the example with one in which nothing reads the channels that go.
    Layers dropped by a DropScheduler, and all that they write, stay. `history` has a `WidthRecord` per step, `refused` says
    which layers cannot be narrowed now and why, by the first layer of each group.

    Args:
        model (nn.Module): the model that the loop trains.
        optimizer (Optimizer): the optimizer of its parameters.
        example (Tensor or tuple of Tensor): what the model is called on, [B, ...] on its device.
        criterion (str or Criterion, optional): which channels go first, a key of `CRITERIA` or a function. Default: "l1"
        keep (float, optional): share of the channels left in the end, above 0. Default: 0.5
        schedule (Schedule, optional): how many are left after each step. Default: `OneCycle()`
        controller (Tolerance, optional): decides by the accuracy in place of a schedule; `keep` is then the least share.
        scope (str or Scope, optional): over what shares are taken, a key of `SCOPES` or a function. Default: "layer"
        least (float, optional): share of its channels that each layer keeps, at least one. Default: 0.1
        untouched (sequence of str, optional): names of layers whose outputs all stay. Default: none
        epochs (int, optional): number of `step()` calls in the run; a schedule needs it. Default: None
        seed (int, optional): of random numbers. Default: 0

    Raises:
        ImportError: Torch-Pruning is not installed.
        TypeError, ValueError: an argument is not as above, the model does not run on the example or cannot be traced, or no
            layer can be narrowed. Nothing is changed.
    """

    def __init__(
        self,
        model: nn.Module,
        optimizer: torch.optim.Optimizer,
        example: Tensor | tuple[Tensor, ...],
        *,
        criterion: str | Criterion = "l1",
        keep: float = 0.5,
        schedule: Schedule | None = None,
        controller: Tolerance | None = None,
        scope: str | Scope = "layer",
        least: float = 0.1,
        untouched: Sequence[str] = (),
        epochs: int | None = None,
        seed: int = 0,
    ) -> None:
        self._example = example if isinstance(example, tuple) else (example,)
        _check_model(model, optimizer, self._example, untouched)
        _check_settings(keep, least, schedule, controller, epochs)
        self._criterion: Criterion = _named("criterion", criterion, CRITERIA)
        self._scope: Scope = _named("scope", scope, SCOPES)
        self._model, self._optimizer, self._controller = model, optimizer, controller
        self._keep, self._least, self._untouched, self._epochs = keep, least, tuple(untouched), epochs
        self._schedule = OneCycle() if schedule is None else schedule
        self._held: State | None = None  # of the model that was within the tolerance
        self._generator = torch.Generator().manual_seed(seed)
        self.history: tuple[WidthRecord, ...] = ()
        groups, self.refused = self._groups()
        if not groups:
            raise ValueError(f"WidthScheduler: model must have layers that can be narrowed, got none: {self.refused}")
        self._widths = {group.name: group.size for group in groups}  # before the first cut
        self._sums: dict[str, tuple[Tensor, int]] = {}  # {layer: sum of each input [n] float64, number of values in it}
        wanted = getattr(self._criterion, "uses_activations", False)
        readers = [(name, m) for name, m in model.named_modules() if wanted and "in" in sides(m)]
        self._hooks = [m.register_forward_pre_hook(Hook(functools.partial(self._add, name))) for name, m in readers]

    @property
    def widths(self) -> dict[str, int]:
        """The number of channels now of each layer that could be narrowed at first."""
        return {name: len(self._model.get_parameter(f"{name}.weight")) for name in self._widths}

    def step(self, accuracy: float | None = None) -> WidthRecord:
        """Measure, decide and narrow; a controller needs the accuracy of the model as it is now. A step that raises has
        changed nothing and can be called again.

        Raises:
            ValueError: the weights are not finite, the optimizer's state cannot be cut, or a controller got no accuracy.
            RuntimeError: the run is over, no batch was trained for a criterion that uses activations, or the cut model would
                compute something else.
        """
        step, held, within = len(self.history) + 1, self._held, True
        if self._epochs is not None and step > self._epochs:
            raise RuntimeError(f"width.step: the run must have steps left, got step {step} of {self._epochs}")
        if self._controller is None:
            left = self._schedule(step, self._epochs or step, self._keep)
        elif accuracy is None or not math.isfinite(accuracy):
            raise ValueError(f"width.step: accuracy must be a finite number for a controller, got {accuracy!r}")
        else:
            known = [record.accuracy for record in self.history if record.accuracy is not None]
            left, best, within = self._controller([*known, accuracy], self._keep)
        groups, refused = self._groups()
        random, before = self._generator.clone_state(), sum(self.widths.values())
        if held is not None and not within:
            put(copy.deepcopy(held), self._model, self._optimizer)
            removed = before - sum(self.widths.values())
            reason = f"accuracy {accuracy:g} is not within the tolerance of {best:g}: the last state that was is back"
        else:
            if self._controller is not None:
                held = copy.deepcopy(state_of(self._model, self._optimizer))
            none = 0, f"no layer can be narrowed: {refused}"
            removed, reason = self._narrow(groups, left, random) if groups else none
        parameters = sum(parameter.numel() for parameter in self._model.parameters())
        record = WidthRecord(step, reason, left, removed, self.widths, parameters, accuracy)
        self.history, self.refused = (*self.history, record), refused
        self._held, self._generator, self._sums = held, random, {}
        if step == self._epochs:
            self.close()
        return record

    def close(self) -> None:
        """End the run: take off the hooks of a criterion that uses activations. The model stays as narrow as it is."""
        for hook in self._hooks:
            hook.remove()

    def __exit__(self, *_: object) -> None:
        self.close()

    def state_dict(self) -> dict[str, Any]:
        """Return the state as plain values and tensors, for `torch.save`. Model and optimizer are not in it."""
        state = state_of(self._model, self._optimizer)
        return {
            "history": [dataclasses.asdict(record) for record in self.history],
            "sizes": state["sizes"],
            "memory": {name: (tuple(tensor.shape), tensor.stride()) for name, tensor in state["tensors"].items()},
            "widths": dict(self._widths),
            "held": self._held,
            "generator": self._generator.get_state(),
            "activations": dict(self._sums),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Resume from a `state_dict()`: narrow the model to the widths it was saved with. Then load the model's state and
        the optimizer's, which have these widths. Until then, what was narrowed is zero.

        Raises:
            ValueError: the state is of another model or version, or only one of the two runs has a controller. Nothing is
                changed then.
        """
        if missing := sorted(self.state_dict().keys() - state.keys()):
            raise ValueError(f"WidthScheduler.load_state_dict: state must be of state_dict(), got none of {missing}")
        if state["history"] and (state["held"] is None) != (self._controller is None):
            of, got = ("without", "with") if self._controller is None else ("with", "without")
            raise ValueError(f"WidthScheduler.load_state_dict: state must be of a run {of} a controller, got one {got}")
        now = state_of(self._model, self._optimizer)
        if other := sorted(now["sizes"].keys() ^ state["sizes"].keys()):
            raise ValueError(f"WidthScheduler.load_state_dict: state must be of this model, got other layers: {other}")
        for name, sizes in now["sizes"].items():
            saved = state["sizes"][name]
            if big := [f"{saved[key]} for {width} of {name}" for key, width in sizes.items() if saved[key] > width]:
                raise ValueError(f"WidthScheduler.load_state_dict: state must be no wider than the model, got {big[0]}")
        device, kept = next(self._model.parameters()).device, (state["held"], state["activations"])
        held, sums = pytree.tree_map_only(Tensor, lambda t: t.to(device, copy=True), kept)
        history = tuple(WidthRecord(**record) for record in state["history"])
        for name, tensor in now["tensors"].items():
            shape, strides = state["memory"].get(name, (tensor.shape, ()))
            if tensor.shape != shape:
                now["tensors"][name] = tensor.new_empty_strided(shape, strides).zero_()
                now["optimizer"].pop(name, None)
        put(now | {"sizes": state["sizes"]}, self._model, self._optimizer)
        self._generator.set_state(state["generator"])
        self._widths, self.history, self._held, self._sums = dict(state["widths"]), history, held, sums

    def _narrow(self, groups: tuple[Group, ...], left: float, random: torch.Generator) -> tuple[int, str]:
        """Cut what the scope does not keep. Return the number of channels removed, and a reason."""
        seen = self._see(groups)
        scores = [self._criterion(of_group, random) for of_group in seen]
        for group, of_group in zip(groups, scores, strict=True):
            if not bool(of_group.isfinite().all()):
                raise ValueError(f"width.step: scores must be finite, got NaN or infinity in {group.name}")
        keeps = self._scope(scores, [self._widths.get(g.name, g.size) for g in groups], left, self._least)
        gone = [int((~keep).sum()) for keep in keeps]
        reason = f"{left:.3f} of the channels to be left"
        if not any(gone):
            return 0, f"{reason}: nothing to cut"
        factors = [keep.double() for keep in keeps]
        if isinstance(self._criterion, Coreset):
            factors = list(map(torch.mul, factors, map(self._criterion.scales, seen, scores, keeps)))
        self._cut(groups, factors)
        return sum(gone), f"{reason}: {sum(gone)} cut from {sum(map(bool, gone))} of {len(groups)} groups of layers"

    def _cut(self, groups: tuple[Group, ...], factors: Sequence[Tensor]) -> None:
        """Multiply what reads the groups' channels by the factors, and cut those with 0. Raise RuntimeError if the cut model
        computes something else than the one that is only multiplied; then nothing is changed."""
        before = state_of(self._model, self._optimizer)
        states, outputs = narrowed(before, groups, factors), []
        with self._aside(), torch.no_grad():
            try:
                for state in states:
                    put(state, self._model, self._optimizer)
                    found = pytree.tree_leaves(self._model(*self._example))
                    outputs.append([t for t in found if isinstance(t, Tensor) and t.is_floating_point()])
                wrong = "" if all(map(rows_agree, *outputs)) else "other outputs"
            except Exception as error:
                wrong = f"{type(error).__name__}: {error}"
            finally:
                put(before, self._model, self._optimizer)
        if wrong:
            cuts = [part.name for g, f in zip(groups, factors, strict=True) for part in g.parts if 0 in f[part.of]]
            raise RuntimeError(
                f"width.step: a cut must leave what the model computes from the other channels, got {wrong}; cut were "
                f"{', '.join(dict.fromkeys(cuts))}: give the guilty one as untouched="
            )
        put(states[1], self._model, self._optimizer)

    def _see(self, groups: tuple[Group, ...]) -> list[Seen]:
        """Return what is known of each group's channels. The norms of all filters are one launch."""
        share = self._criterion.share if isinstance(self._criterion, Zeros) else 0.0
        parts = [part for group in groups for part in group.parts if part.side != "norm"]
        weights = {(part.name, part.side): part.module.get_parameter("weight").detach() for part in parts}
        rows = [w.transpose(0, 1).contiguous() if side == "in" else w for (_, side), w in weights.items()]
        norms = dict(zip(weights, ops.filter_norms(rows, share=share).cpu().split(list(map(len, rows))), strict=True))
        outgoing = {key: torch.stack([norm[:, 1].sqrt(), norm[:, 2]], 1) for key, norm in norms.items()}
        means = {(name, "in"): (sums / count).cpu()[:, None] for name, (sums, count) in self._sums.items()}
        seen = []
        for g in groups:
            activation = g.mean("in", means)[:, 0] if self._hooks else None
            if activation is not None and not bool(activation.isfinite().all()):
                raise RuntimeError(f"width.step: wanted training batches since the last step, got none behind {g.name}")
            seen.append(Seen(g.mean("out", norms), g.mean("in", outgoing), activation))
        return seen

    def _groups(self) -> tuple[tuple[Group, ...], dict[str, str]]:
        """Return the groups that can be narrowed now, and why others cannot."""
        linear = getattr(self._criterion, "linear_only", False)
        with self._aside() as dropped:
            return find_groups(self._model, self._example, dropped, self._untouched, linear)

    @contextlib.contextmanager
    def _aside(self) -> Iterator[tuple[nn.Module, ...]]:
        """Leave the model as it is on leaving. Inside, it is in eval mode and dropped layers, which are given, run."""
        bypass = bypass_of(self._model)
        dropped = () if bypass is None else bypass.frozen
        with contextlib.nullcontext() if bypass is None else bypass.away(), preserved(self._model):
            self._model.eval()
            yield dropped

    def _add(self, name: str, module: nn.Module, args: tuple[Any, ...]) -> None:
        """Add up the absolute values that a layer reads in train mode, by channel."""
        if module.training and args:
            channels = args[0].detach().transpose(0, -1 if isinstance(module, nn.Linear) else 1)
            values = channels.abs()[:, None].flatten(1)
            sums, count = self._sums.get(name, (0.0, 0))
            self._sums[name] = sums + values.sum(1, dtype=torch.float64), count + values.shape[1]


def _named(argument: str, value: Any, known: Mapping[str, Any]) -> Any:
    """Return a function by its name, or the function itself."""
    found = known.get(value) if isinstance(value, str) else value
    if not callable(found) or isinstance(found, type):
        raise ValueError(f"WidthScheduler: {argument} must be one of {', '.join(known)} or a function, got {value!r}")
    return found


def _check_model(model: Any, optimizer: Any, example: tuple[Any, ...], untouched: Sequence[str]) -> None:
    """Raise TypeError or ValueError for a model, optimizer, example or layer names that are not as WidthScheduler says."""
    if not isinstance(model, nn.Module) or hasattr(model, "_orig_mod") or "DataParallel" in type(model).__name__:
        raise TypeError(f"WidthScheduler: model must be a plain torch.nn.Module, got a {type(model).__name__}")
    if sharded := [name for name, parameter in model.named_parameters() if hasattr(parameter, "placements")]:
        raise ValueError(f"WidthScheduler: model must not be sharded, got a DTensor for {sharded[0]}")
    if not isinstance(optimizer, torch.optim.Optimizer):
        raise TypeError(f"WidthScheduler: optimizer must be a torch.optim.Optimizer, got {type(optimizer).__name__}")
    held = {id(parameter) for group in optimizer.param_groups for parameter in group["params"]}
    if held.isdisjoint(map(id, model.parameters())):
        raise ValueError("WidthScheduler: optimizer must hold the model's parameters, got none of them")
    if wrong := [type(x).__name__ for x in example if not isinstance(x, Tensor)]:
        raise TypeError(f"WidthScheduler: example must be a tensor or a tuple of tensors, got {wrong[0]}")
    if unknown := sorted(set(untouched) - dict(model.named_modules()).keys()):
        raise ValueError(f"WidthScheduler: untouched must name layers of the model, got {', '.join(unknown)}")


def _check_settings(keep: Any, least: Any, schedule: Any, controller: Any, epochs: Any) -> None:
    """Raise TypeError or ValueError for settings that are not as WidthScheduler says."""
    if not isinstance(keep, int | float) or not 0 < keep <= 1:
        raise ValueError(f"WidthScheduler: keep must be above 0 and at most 1, got {keep!r}")
    if not isinstance(least, int | float) or not 0 <= least <= 1:
        raise ValueError(f"WidthScheduler: least must be within 0..1, got {least!r}")
    if controller is not None and (not isinstance(controller, Tolerance) or schedule is not None):
        got = f"{controller!r}, {schedule!r}"
        raise TypeError(f"WidthScheduler: controller must be a Tolerance and stand alone, got {got}")
    if schedule is not None and (not callable(schedule) or isinstance(schedule, type)):
        raise TypeError(f"WidthScheduler: schedule must be a function of a step, got {schedule!r}")
    if epochs is None and controller is None:
        raise ValueError("WidthScheduler: epochs must be known for a schedule, got None")
    if epochs is not None and (not isinstance(epochs, int) or epochs < 1):
        raise ValueError(f"WidthScheduler: epochs must be a whole number >= 1 or None, got {epochs!r}")
