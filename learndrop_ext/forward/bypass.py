"""The model's own forward while its first layers are dropped: on rows, or on images whose rows are kept on the way.

Cuts are numbered by the layers before them: cut k is the output of layer k - 1.
"""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import nn
from torch.utils import _pytree as pytree

from learndrop_ext.forward.cuts import Layer, Recorded, has_plain_output, outermost
from learndrop_ext.forward.images import Feature, Form, Images, Standing, Unread
from learndrop_ext.forward.record import ModuleCall

#: Stands for the images among the arguments of a call that gets rows.
IMAGES = "the images of drop.loader"
#: (cut, ids [B], row [B, ...]) -> the row as the layers behind the cut get it
Keep = Callable[[int, torch.Tensor, torch.Tensor], torch.Tensor]


class Bypass:
    """Runs a model's own forward with its first layers frozen, or, given images that were not read, without them.

    While layers are dropped, the outermost modules before the cut and the module at the cut have a `forward` of their own
    on the instance, and the model has two hooks. Given images that were not read, modules before the cut return a `Feature`
    without running, and the module at the cut returns the row. Given images, they run in eval mode without gradients, and
    the row that arrives at the cut goes through `keep`. A copy of the model, by `copy` or `pickle`, is an ordinary model.

    Args:
        model: the model.
        recorded: its layers.
        keep: is given the rows of images of `drop.loader` in training; what it returns goes on.
        watch: is called with the images of each call, and whether it trains, before the forward.
    """

    def __init__(
        self,
        model: nn.Module,
        recorded: Recorded,
        *,
        keep: Keep | None = None,
        watch: Callable[[Images, bool], None] | None = None,
    ) -> None:
        self.model = model
        self.recorded = recorded
        self.inside: Standing | None = None  # what stands for the images on which the model's forward runs
        self.cuts: tuple[int, ...] = ()  # those in place, the last one behind all dropped layers
        self.frozen: tuple[nn.Module, ...] = ()
        self.calls = 0  # training calls on batches of drop.loader since the last `put`
        self._keep = keep
        self._watch = watch
        self._current: Images | None = None
        self._traced: torch.Tensor | None = None
        self._around: tuple[nn.Module, ...] = ()
        self._live_again: list[dict[str, Any]] = []  # modules around the cut that were in train mode
        self._modes: dict[nn.Module, tuple[bool, bool]] = {}  # of frozen modules and the model, before they were
        self._hooked: list[nn.Module] = []  # the frozen modules with hooks
        self._placed: list[_Instead] = []
        self._hooks: list[Any] = []

    def put(self, cuts: Sequence[int]) -> None:
        """Drop all layers before the last of `cuts`. Rows may enter at each of them, and are kept at each."""
        modes = self._modes
        self._take_away()
        self.cuts = tuple(cuts)
        if not cuts:
            self._modes = {}
            return
        calls = self.recorded.calls
        ends = [self._layer(k).cut for k in cuts]
        here = [end.call for end in ends if end is not None]
        last = here[-1]
        self._around = tuple(dict.fromkeys(c.module for c in calls if c.around(last)))
        stops = {id(call): k for call, k in zip(here, cuts, strict=True)}
        alone = _calls_before(calls, last)
        for call in self._replaced(last, here[:-1]):
            self._skip(call, alone)
        for call in here:
            runs = self._leaves_something(call)
            self._placed.append(_AtCut(self, call, stops[id(call)], runs=runs, is_last=call is last))
        self.frozen = tuple(dict.fromkeys(m for one in self._placed for m in one.module.modules()))
        self._hooked = [m for m in self.frozen if _has_hooks(m)]
        self._modes = {m: modes.get(m, (m.training, self.model.training)) for m in self.frozen}
        self._hooks = [
            self.model.register_forward_pre_hook(_Enter(self), with_kwargs=True),
            self.model.register_forward_hook(_Leave(self), always_call=True),
        ]
        self.hold_eval()

    def release(self) -> None:
        """Make all layers live again: modules get back the mode that they had, or the model's if that has changed."""
        modes = self._modes
        self.put(())
        training = self.model.training
        for module, (own, whole) in modes.items():
            module.training = own if training == whole else training

    @contextlib.contextmanager
    def away(self) -> Iterator[None]:
        """Take everything out of the model inside."""
        cuts, modes = self.cuts, self._modes
        self.put(())
        try:
            yield
        finally:
            self._modes = modes
            self.put(cuts)

    def hold_eval(self) -> None:
        """Put the frozen modules into eval mode again, in case of `model.train()`."""
        for module in self.frozen:
            if module.training:
                module.training = False

    def has_new_hooks(self) -> bool:
        """Return whether hooks of frozen modules have come or gone since the last `put`."""
        return self._hooked != [m for m in self.frozen if _has_hooks(m)]

    def check(self, images: Images) -> None:
        """Note a training call on images, before its forward."""
        self.calls += 1
        if self._watch is not None:
            self._watch(images, True)

    def forget_calls(self) -> None:
        """Reset the number of training calls."""
        self.calls = 0

    def modules_before(self, k: int) -> list[nn.Module]:
        """Return the outermost modules that only the first k layers run."""
        end = self._layer(k).cut
        assert end is not None
        return [*(call.module for call in self._replaced(end.call, ())), end.module]

    def modules_behind(self, k: int) -> list[nn.Module]:
        """Return the outermost modules that the first k layers do not run."""
        end = self._layer(k).cut
        assert end is not None
        passed = {m for before in self.modules_before(k) for m in before.modules()}
        passed |= {c.module for c in self.recorded.calls if c.around(end.call)}
        found: list[nn.Module] = []
        for module in self.model.modules():
            if module not in passed:
                found.append(module)
                passed |= set(module.modules())
        return found

    def trace(self, row: torch.Tensor, shape: Sequence[int], args: Any, kwargs: Any) -> Any:
        """Run the model on rows [B, ...] for a compiler. Zeros of the images' `shape` that take no memory stand for the
        images and for the outputs of dropped layers, so that nothing of them is in the graph."""
        images = row.new_zeros(()).expand(*shape)
        self._traced = row
        try:
            args, kwargs = pytree.tree_map(
                lambda a: images if isinstance(a, str) and a == IMAGES else a, (args, kwargs)
            )
            return self.model(*args, **kwargs)
        finally:
            self._traced = None

    def _layer(self, k: int) -> Layer:
        return self.recorded.layers[k - 1]

    def _replaced(self, last: ModuleCall, inside: Sequence[ModuleCall]) -> Iterator[ModuleCall]:
        """The outermost calls before the cut for whose output others can stand; within the others, their children's."""
        calls = self.recorded.calls
        waiting = outermost(calls, last, inside)
        while waiting:
            call = waiting.pop(0)
            if has_plain_output(call):
                yield call
            else:
                within = [c for c in calls if call.around(c)]
                waiting[:0] = [c for c in within if c.depth == call.depth + 1]

    def _skip(self, call: ModuleCall, alone: dict[nn.Module, int]) -> None:
        """Put a skipped module in place. One that leaves something for the loop, or that is called more than once, runs its
        own forward on `Feature`s; then the modules within are skipped."""
        if call.module not in alone or any(one.module is call.module for one in self._placed):
            return
        runs = self._leaves_something(call) or alone[call.module] > 1
        self._placed.append(_Skipped(self, call, runs=runs))
        if runs:
            for child in self.recorded.calls:
                if call.around(child) and child.depth == call.depth + 1:
                    self._skip(child, alone)

    def _leaves_something(self, call: ModuleCall) -> bool:
        """Whether a loss may use more of a module than its output: what a hook within it gets, a tensor that it stores."""
        within = list(call.module.modules())
        return any(map(_has_hooks, within[1:])) or any(module in self.recorded.storing for module in within)

    def _take_away(self) -> None:
        self._leave()
        for hook in self._hooks:
            hook.remove()
        for one in self._placed:
            one.remove()
        self._placed, self._hooks, self._around, self.frozen, self._hooked = [], [], (), (), []

    # --- called by what is put into the model ---------------------------------------------------------------------------
    def _enter(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, Any] | None:
        images = images_in(args, kwargs)
        self._restore()  # after a forward that was interrupted
        self.inside = None if images is None else images.standing
        training = self.model.training
        if training and self._traced is None:
            for module in self._around:
                held = module.__dict__
                if held["training"]:
                    held["training"] = False
                    self._live_again.append(held)
        if images is None or images.standing.owner is not self:
            self._current = None
            self.calls += training and torch.is_grad_enabled()
            self.hold_eval()
            return None
        trains = training and torch.is_grad_enabled()
        if not images.standing.checked:
            if trains:
                self.check(images)
            elif self._watch is not None:
                self._watch(images, False)
        self._current = images if trains or (training and self._watch is None) else None
        if images.pixels is None:
            if self.frozen[0].training:  # model.train() sets all of them
                self.hold_eval()
            return None
        self.hold_eval()
        changed: tuple[Any, Any] = pytree.tree_map_only(
            Images, lambda x: x.pixels if x is images else x, (args, kwargs)
        )
        return changed

    def _leave(self) -> None:
        self.inside = self._current = None
        self._restore()

    def _restore(self) -> None:
        for held in self._live_again:
            held["training"] = True
        self._live_again.clear()

    def _arrived(self, cut: int, output: Any) -> torch.Tensor:
        if not isinstance(output, torch.Tensor):
            raise RuntimeError(
                f"drop.loader: the output of {self._layer(cut).name} must stay a tensor while layers are dropped, got a "
                f"{type(output).__name__}"
            )
        row = output.detach()
        if self._current is None or self._keep is None:
            return row
        return self._keep(cut, self._current.standing.ids, row)


class _Instead:
    """A `forward` on the instance of a module, in place of the module's own."""

    def __init__(self, bypass: Bypass, call: ModuleCall) -> None:
        self.bypass = bypass
        self.name = call.path
        self.module = call.module
        self.had = "forward" in vars(call.module)
        self.run = call.module.forward
        vars(self.module)["forward"] = self

    def remove(self) -> None:
        """Give the module its own forward again."""
        if vars(self.module).get("forward") is self:
            if self.had:
                vars(self.module)["forward"] = self.run
            else:
                del vars(self.module)["forward"]

    def compute(self, args: Any, kwargs: Any) -> Any:
        """Run the module's own forward on tensors."""
        try:
            with torch.no_grad():
                return self.run(*args, **kwargs)
        except Exception:
            raise
        except BaseException:  # a KeyboardInterrupt, after which torch calls no hooks
            self.bypass._leave()
            raise

    def __deepcopy__(self, memo: Any) -> Any:
        return copy.deepcopy(self.run, memo)

    def __reduce__(self) -> Any:
        return _its_own, (self.module,)


def _has_hooks(module: nn.Module) -> bool:
    return bool(module._forward_hooks or module._forward_pre_hooks)


def _calls_before(calls: Sequence[ModuleCall], cut: ModuleCall) -> dict[nn.Module, int]:
    """How often each module is called, of those that are called before the cut alone."""
    found: dict[nn.Module, int] = {}
    for call in calls:
        found[call.module] = found.get(call.module, 0) + 1
    for call in calls:
        if call.order > cut.order:
            found.pop(call.module, None)
    return found


def _its_own(module: nn.Module) -> Any:
    """The forward of a module's class, for an unpickled module."""
    return type(module).forward.__get__(module)


class _Skipped(_Instead):
    """A module before the cut: its output stays away if its input does. runs: whether its own forward runs all the same."""

    def __init__(self, bypass: Bypass, call: ModuleCall, *, runs: bool = False) -> None:
        super().__init__(bypass, call)
        self._runs = runs
        leaves, self._spec = pytree.tree_flatten(call.output)
        samples = bypass.recorded.samples
        self._forms: dict[int, list[Any]] = {}
        self._leaves = [
            (tuple(leaf.shape), leaf.stride(), leaf.dtype) if isinstance(leaf, torch.Tensor) else leaf
            for leaf in leaves
        ]
        self._is_tensor = [isinstance(leaf, torch.Tensor) for leaf in leaves]
        self._per_sample = [
            leaf.shape[0] // samples
            if isinstance(leaf, torch.Tensor) and leaf.dim() and leaf.shape[0] % samples == 0
            else 0
            for leaf in leaves
        ]

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        row = self.bypass._traced
        if row is not None:
            return self._output(len(row), lambda form: row.new_zeros((), dtype=form.dtype).expand(form.shape))
        x = args[0] if args and isinstance(args[0], Unread) else _unread_in(args, kwargs)
        if x is None:
            return self.compute(args, kwargs)
        return self.run(*args, **kwargs) if self._runs else self.feature(x)

    def feature(self, x: Unread) -> Any:
        """What the module would return, without values."""
        return self._output(len(x.standing.ids), lambda form: Feature(form, x.device, x.standing, self.name))

    def _output(self, B: int, made_of: Callable[[Form], Any]) -> Any:
        forms = self._forms.get(B)
        if forms is None:
            forms = self._forms[B] = [
                Form((B * per, *leaf[0][1:]) if per else leaf[0], leaf[1], leaf[2]) if is_tensor else leaf
                for leaf, per, is_tensor in zip(self._leaves, self._per_sample, self._is_tensor, strict=True)
            ]
        made = [made_of(form) if is_tensor else form for form, is_tensor in zip(forms, self._is_tensor, strict=True)]
        return made[0] if len(made) == 1 and self._spec.is_leaf() else pytree.tree_unflatten(made, self._spec)


class _AtCut(_Skipped):
    """The module at a cut: gives the row, or the output of the module after it was kept."""

    def __init__(self, bypass: Bypass, call: ModuleCall, cut: int, *, runs: bool, is_last: bool) -> None:
        super().__init__(bypass, call, runs=runs)
        self._cut = cut
        self._is_last = is_last
        end = bypass.recorded.layers[cut - 1].cut
        self._written = end is not None and end.written

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        if self.bypass._traced is not None:
            return self.bypass._traced
        x = args[0] if args and isinstance(args[0], Unread) else _unread_in(args, kwargs)
        if x is None:
            row = self.bypass._arrived(self._cut, self.compute(args, kwargs))
            if self.bypass.recorded.reentrant:
                row = row.detach().requires_grad_(torch.is_grad_enabled())
        elif x.standing.at == self._cut:
            assert x.standing.rows is not None
            if self._runs:
                self.run(*args, **kwargs)  # for what it leaves behind
            row = x.standing.rows
            if self.bypass.recorded.reentrant:
                row = row.detach().requires_grad_(torch.is_grad_enabled())
            if self._written:  # the model may be called again, or a checkpoint may run again
                row = row.clone(memory_format=torch.preserve_format)
        else:
            return self.run(*args, **kwargs) if self._runs else self.feature(x)
        if self._is_last:
            self.bypass._restore()
        return row


class _Hook:
    """A hook on the model. Its copies do nothing."""

    def __init__(self, bypass: Bypass) -> None:
        self.bypass = bypass

    def __deepcopy__(self, memo: Any) -> Any:
        return _nothing

    def __reduce__(self) -> Any:
        return _no_hook, ()


class _Enter(_Hook):
    def __call__(self, module: nn.Module, args: Any, kwargs: Any) -> Any:
        return self.bypass._enter(args, kwargs)


class _Leave(_Hook):
    def __call__(self, module: nn.Module, args: Any, output: Any) -> None:
        self.bypass._leave()


def _nothing(*_: Any) -> None:
    """What a copy of the model has in place of the hooks."""


def _no_hook() -> Callable[..., None]:
    return _nothing


def images_in(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Images | None:
    """The images among the arguments of a call."""
    for value in (*args, *kwargs.values()):
        if type(value) is Images:
            return value
    for value in pytree.tree_leaves((args, kwargs)):
        if type(value) is Images:
            return value
    return None


def _unread_in(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Unread | None:
    """The first tensor without values among the arguments of a call."""
    for value in pytree.tree_leaves((args, kwargs)):
        if isinstance(value, Unread):
            return value
    return None
