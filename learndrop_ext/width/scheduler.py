"""WidthScheduler: takes channels out of a model while it trains, once per step, like a learning-rate scheduler."""

from __future__ import annotations

import contextlib
import dataclasses
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from learndrop_ext import ops
from learndrop_ext.forward.bypass import bypass_of
from learndrop_ext.preserve import preserved
from learndrop_ext.width.activations import Activations
from learndrop_ext.width.criteria import CRITERIA, Coreset, Criterion, Seen, Zeros
from learndrop_ext.width.groups import Cuts, Group, cuts_of, find_groups
from learndrop_ext.width.schedules import OneCycle, Pace, Schedule, Tolerance
from learndrop_ext.width.scopes import SCOPES, Scope
from learndrop_ext.width.surgery import State, copied, cut, cuts_to, masked, put, scaled, state_of

#: Largest difference between outputs of the cut and of the masked model, over the largest output; other dtypes: 0.05.
ROUNDING = {torch.float64: 1e-9, torch.float32: 1e-3}
STATE = {"step", "history", "sizes", "widths", "pace", "held", "generator", "activations"}


@dataclass(frozen=True)
class WidthRecord:
    """What one `step()` did.

    Args:
        step: number of `step()` calls so far.
        reason: what was done and why.
        left: share of the channels that was to be left.
        removed: number of channels taken out, negative if some came back.
        widths: {layer: number of its channels now}, of the layers that could be narrowed at first.
        parameters: number of the model's parameters now.
        accuracy: the one that was given.
    """

    step: int
    reason: str
    left: float
    removed: int
    widths: dict[str, int]
    parameters: int
    accuracy: float | None


class WidthScheduler:
    """Takes filters and neurons out of a model while it trains, and their entries out of the optimizer's state.

    Call `step()` once per epoch. Parameters and the optimizer stay the same objects, so that parameter groups and the
    learning-rate schedule go on. Before a cut the narrow model is compared on the example with one in which nothing reads
    the channels that go. Layers dropped by a DropScheduler, and all channels that they write, stay. `history` holds a
    `WidthRecord` per step, `refused` says which layers cannot be narrowed and why.

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
        _check_model(model, optimizer, example, untouched)
        _check_settings(keep, least, schedule, controller, epochs)
        self._criterion: Criterion = _named("criterion", criterion, CRITERIA)
        self._scope: Scope = _named("scope", scope, SCOPES)
        self._model, self._optimizer = model, optimizer
        self._example = example if isinstance(example, tuple) else (example,)
        self._keep, self._least, self._untouched, self._epochs = keep, least, tuple(untouched), epochs
        self._schedule: Schedule = OneCycle() if schedule is None else schedule
        self._controller = controller
        self._pace = None if controller is None else Pace(rate=controller.rate)
        self._held: State | None = None  # of the model that was within the tolerance
        self._generator = torch.Generator().manual_seed(seed)
        self._activations = Activations()
        self._history: list[WidthRecord] = []
        self._step = 0
        groups, self._refused = self._groups()
        if not groups:
            raise ValueError(f"WidthScheduler: model must have layers that can be narrowed, got none: {self._refused}")
        self._widths = {group.name: group.size for group in groups}  # before the first cut
        self._watch()

    @property
    def history(self) -> tuple[WidthRecord, ...]:
        """One record per step."""
        return tuple(self._history)

    @property
    def refused(self) -> dict[str, str]:
        """The layers that cannot be narrowed now, and why, by the first layer of each group."""
        return dict(self._refused)

    @property
    def widths(self) -> dict[str, int]:
        """The number of channels now of each layer that could be narrowed at first."""
        modules = dict(self._model.named_modules())
        return {name: len(_weight(modules[name])) for name in self._widths}

    def step(self, accuracy: float | None = None) -> WidthRecord:
        """Measure, decide and narrow. A step that raises has changed nothing and can be called again.

        Args:
            accuracy: of the model as it is now, for a controller.

        Raises:
            ValueError: the weights are not finite, the optimizer's state cannot be cut, or a controller got no accuracy.
            RuntimeError: the run is over, the criterion needs activations and no batch was trained, or the cut model
                computes something else than the model without these channels.
        """
        step = self._step + 1
        pace = self._decide(step, accuracy)
        groups, refused = self._groups()
        held = self._held
        if pace is None or pace.within:
            left = pace.left if pace is not None else self._schedule(step, self._epochs or step, self._keep)
            held = None if pace is None else copied(state_of(self._model, self._optimizer))
            removed, reason = self._narrow(groups, left) if groups else (0, f"no layer can be narrowed: {refused}")
        else:
            assert held is not None, "the first accuracy is within the tolerance"
            before = sum(self.widths.values())
            put(copied(held), self._model, self._optimizer)
            left, removed = pace.left, before - sum(self.widths.values())
            reason = (
                f"accuracy {accuracy:g} is not within the tolerance of {pace.best:g}: the last state that was is back"
            )
        self._held, self._refused = held, refused
        self._step, self._pace = step, pace
        record = WidthRecord(
            step=step,
            reason=reason,
            left=left,
            widths=self.widths,
            removed=removed,
            parameters=sum(p.numel() for p in self._model.parameters()),
            accuracy=accuracy,
        )
        self._history.append(record)
        if step == self._epochs:
            self.close()
        else:
            self._watch()
        return record

    def close(self) -> None:
        """End the run: take off the hooks of a criterion that uses activations. The model stays as narrow as it is."""
        self._activations.stop()

    def __enter__(self) -> WidthScheduler:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def state_dict(self) -> dict[str, Any]:
        """Return the state as plain values and tensors, for `torch.save`. Model and optimizer are not in it."""
        return {
            "step": self._step,
            "history": [dataclasses.asdict(record) for record in self._history],
            "sizes": {name: dict(sizes) for name, sizes in state_of(self._model, self._optimizer).sizes.items()},
            "widths": dict(self._widths),
            "pace": None if self._pace is None else dataclasses.asdict(self._pace),
            "held": None if self._held is None else vars(self._held),
            "generator": self._generator.get_state(),
            "activations": dict(self._activations.sums),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Resume from a `state_dict()`: narrow the model to the widths it was saved with. Then load the model's state and
        the optimizer's, which have these widths.

        Raises:
            ValueError: the state is of another model, or of a run with a controller where this has none. Nothing is
                changed then.
        """
        if missing := STATE - state.keys():
            raise ValueError(
                f"WidthScheduler.load_state_dict: state must be of state_dict(), got none of {sorted(missing)}"
            )
        if (state["pace"] is None) != (self._pace is None):
            wanted, got = ("without", "with") if self._pace is None else ("with", "without")
            raise ValueError(
                f"WidthScheduler.load_state_dict: state must be of a run {wanted} a controller, got one {got}"
            )
        device = next(self._model.parameters()).device
        held = None if state["held"] is None else copied(State(**state["held"]), device)
        pace = None if state["pace"] is None else Pace(**state["pace"])
        history = [WidthRecord(**record) for record in state["history"]]
        narrow = cut(state_of(self._model, self._optimizer), self._model, cuts_to(state["sizes"], self._model))
        put(narrow, self._model, self._optimizer)
        self._step, self._widths, self._history = state["step"], dict(state["widths"]), history
        self._pace, self._held = pace, held
        self._generator.set_state(state["generator"])
        self._watch()
        self._activations.sums = {
            name: (sums.to(device), count) for name, (sums, count) in state["activations"].items()
        }

    def _decide(self, step: int, accuracy: float | None) -> Pace | None:
        """Return where a controller goes on, or None without one."""
        if self._epochs is not None and step > self._epochs:
            raise RuntimeError(f"width.step: the run must have steps left, got step {step} of {self._epochs}")
        if self._controller is None or self._pace is None:
            return None
        if accuracy is None or not math.isfinite(accuracy):
            raise ValueError(f"width.step: accuracy must be a finite number for a controller, got {accuracy!r}")
        return self._controller(self._pace, accuracy, self._keep)

    def _narrow(self, groups: tuple[Group, ...], left: float) -> tuple[int, str]:
        """Cut what the scope does not keep. Return the number of channels removed, and a reason."""
        seen = self._see(groups)
        random = self._generator.get_state()
        try:
            scores = [self._criterion(of_group, self._generator) for of_group in seen]
            for group, of_group in zip(groups, scores, strict=True):
                if not bool(of_group.isfinite().all()):
                    raise ValueError(f"width.step: scores must be finite, got NaN or infinity in {group.name}")
            keeps = self._scope(scores, [self._widths.get(g.name, g.size) for g in groups], left, self._least)
            removed = sum(int((~keep).sum()) for keep in keeps)
            reason = f"{left:.3f} of the channels to be left"
            if not removed:
                return 0, f"{reason}: nothing to cut"
            cuts = cuts_of(groups, keeps)
            after = self._prove(cuts)
        except BaseException:
            self._generator.set_state(random)
            raise
        if isinstance(self._criterion, Coreset):
            channels = map(self._criterion.scales, seen, scores, keeps)
            after = scaled(after, _by_reader(groups, list(channels), cuts))
        put(after, self._model, self._optimizer)
        narrowed = sum(not bool(keep.all()) for keep in keeps)
        return removed, f"{reason}: {removed} cut from {narrowed} of {len(groups)} groups of layers"

    def _prove(self, cuts: Cuts) -> State:
        """Return the state after the cuts, if it computes the same as the model in which nothing reads what they leave out.
        Raise RuntimeError if it does not. Model and optimizer are as before in any case."""
        before = state_of(self._model, self._optimizer)
        after = cut(before, self._model, cuts)
        outputs = []
        with self._whole(), preserved(self._model), torch.no_grad():
            self._model.eval()
            try:
                for state in (masked(before, cuts), after):
                    put(state, self._model, self._optimizer)
                    outputs.append(pytree.tree_leaves(self._model(*self._example)))
                wrong = "" if all(map(_same, *outputs)) else "other outputs"
            except Exception as error:
                wrong = f"{type(error).__name__}: {error}"
            finally:
                put(before, self._model, self._optimizer)
        if wrong:
            layers = ", ".join(dict.fromkeys(name for name, _ in cuts))
            raise RuntimeError(
                f"width.step: a cut must leave what the model computes from the other channels, got {wrong}; cut were "
                f"{layers}: give the guilty one as untouched="
            )
        return after

    def _see(self, groups: tuple[Group, ...]) -> list[Seen]:
        """Return what is known of each group's channels. The norms of all filters are one launch."""
        share = self._criterion.share if isinstance(self._criterion, Zeros) else 0.0
        writers = {part.name: _weight(part.module) for g in groups for part in g.parts if part.role == "out"}
        readers = {part.name: _weight(part.module) for g in groups for part in g.parts if part.role == "in"}
        norms = ops.filter_norms(list(writers.values()), share=share).cpu().split([len(w) for w in writers.values()])
        incoming = dict(zip(writers, norms, strict=True))
        outgoing = {name: _outgoing(weight) for name, weight in readers.items()}
        seen = []
        for group in groups:
            activation = self._activations.means(group) if self._uses_activations else None
            if self._uses_activations and activation is None:
                raise RuntimeError(
                    f"width.step: wanted training batches since the last step, got none behind {group.name}"
                )
            seen.append(Seen(group.mean("out", incoming), group.mean("in", outgoing), activation))
        return seen

    def _groups(self) -> tuple[tuple[Group, ...], dict[str, str]]:
        """Return the groups that can be narrowed now, and why others cannot."""
        with self._whole() as dropped:
            groups, refused = find_groups(
                self._model, lambda: self._model(*self._example), dropped=dropped, untouched=self._untouched
            )
        if getattr(self._criterion, "linear_only", False):
            others = [g for g in groups if not all(isinstance(part.module, nn.Linear) for part in g.parts)]
            refused |= {group.name: "the criterion is for fully connected layers" for group in others}
        return tuple(group for group in groups if group.name not in refused), refused

    @contextlib.contextmanager
    def _whole(self) -> Iterator[frozenset[nn.Module]]:
        """Make dropped layers run inside, and give them."""
        bypass = bypass_of(self._model)
        if bypass is None:
            yield frozenset()
            return
        frozen = frozenset(bypass.frozen)
        with bypass.away():
            yield frozen

    @property
    def _uses_activations(self) -> bool:
        return getattr(self._criterion, "uses_activations", False)

    def _watch(self) -> None:
        if self._uses_activations:
            self._activations.start(self._groups()[0])


def _weight(module: nn.Module) -> Tensor:
    return module.get_parameter("weight").detach()


def _outgoing(weight: Tensor) -> Tensor:
    """Return the l2 norm and the largest absolute value of the weights [C, n, ...] that read each channel, [n, 2]."""
    by_input = weight.transpose(0, 1).flatten(1).double()
    return torch.stack([by_input.norm(dim=1), by_input.abs().amax(1)], dim=1).cpu()


def _same(masked: Any, cut: Any) -> bool:
    """Whether two outputs are the same but for the order in which sums are rounded."""
    if not isinstance(masked, Tensor) or not isinstance(cut, Tensor) or not masked.is_floating_point():
        return True
    largest = float(masked.abs().amax()) if masked.numel() else 0.0
    return masked.shape == cut.shape and torch.allclose(masked, cut, 0.0, ROUNDING.get(masked.dtype, 0.05) * largest)


def _by_reader(groups: Sequence[Group], channels: Sequence[Tensor], cuts: Cuts) -> dict[str, Tensor]:
    """Return factors of the inputs that each layer has left, {layer: [n]}. channels: those of each group, [C]."""
    factors: dict[str, Tensor] = {}
    for group, of_group in zip(groups, channels, strict=True):
        for part in group.parts:
            if (left := cuts.get((part.name, "in"))) is not None and part.role == "in":
                of_part = torch.where(part.of < 0, 1.0, of_group[part.of])[left]
                factors[part.name] = factors.get(part.name, 1.0) * of_part
    return factors


def _named(argument: str, value: Any, known: Mapping[str, Any]) -> Any:
    """Return a function by its name, or the function itself."""
    if isinstance(value, str) and value in known:
        return known[value]
    if not callable(value) or isinstance(value, type):
        raise ValueError(f"WidthScheduler: {argument} must be one of {', '.join(known)} or a function, got {value!r}")
    return value


def _check_model(model: Any, optimizer: Any, example: Any, untouched: Sequence[str]) -> None:
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
    if wrong := [x for x in (example if isinstance(example, tuple) else (example,)) if not isinstance(x, Tensor)]:
        raise TypeError(
            f"WidthScheduler: example must be a tensor or a tuple of tensors, got {type(wrong[0]).__name__}"
        )
    if unknown := sorted(set(untouched) - dict(model.named_modules()).keys()):
        raise ValueError(f"WidthScheduler: untouched must name layers of the model, got {', '.join(unknown)}")


def _check_settings(keep: Any, least: Any, schedule: Any, controller: Any, epochs: Any) -> None:
    """Raise TypeError or ValueError for settings that are not as WidthScheduler says."""
    if not isinstance(keep, int | float) or not 0 < keep <= 1:
        raise ValueError(f"WidthScheduler: keep must be above 0 and at most 1, got {keep!r}")
    if not isinstance(least, int | float) or not 0 <= least <= 1:
        raise ValueError(f"WidthScheduler: least must be within 0..1, got {least!r}")
    if controller is not None and (not isinstance(controller, Tolerance) or schedule is not None):
        raise TypeError(
            f"WidthScheduler: controller must be a Tolerance and stand alone, got {controller!r}, {schedule!r}"
        )
    if schedule is not None and (not callable(schedule) or isinstance(schedule, type)):
        raise TypeError(f"WidthScheduler: schedule must be a function of a step, got {schedule!r}")
    if epochs is None and controller is None:
        raise ValueError("WidthScheduler: epochs must be known for a schedule, got None")
    if epochs is not None and (not isinstance(epochs, int) or epochs < 1):
        raise ValueError(f"WidthScheduler: epochs must be a whole number >= 1 or None, got {epochs!r}")
