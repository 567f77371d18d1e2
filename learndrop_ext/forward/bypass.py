"""The model's own forward while its first layers are dropped: on rows, or on images whose rows are kept on the way.

Cuts are numbered by the layers before them: cut k is the end of layer k - 1.
"""

from __future__ import annotations

import contextlib
import copy
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any

import torch
from torch import nn
from torch.utils import _pytree as pytree

from learndrop_ext.forward.cuts import Cut, Hook, Recorded
from learndrop_ext.forward.images import Feature, Form, Images, Standing, Unread
from learndrop_ext.forward.record import ModuleCall

#: Stands for the images among the arguments of a call that gets rows.
IMAGES = "the images of drop.loader"
#: (cut, ids [B], row [B, ...]) -> the row as the layers behind the cut get it
Keep = Callable[[int, torch.Tensor, torch.Tensor], torch.Tensor]


class ReachedError(Exception):
    """The forward has reached a cut, with a row [B, ...]."""

    def __init__(self, row: torch.Tensor) -> None:
        super().__init__()
        self.row = row


class Bypass:
    """Runs a model's own forward with its first layers frozen, or, given images that were not read, without them.

    While layers are dropped, the outermost modules before the cut have a `forward` of their own on the instance, and the
    model and the modules at the cuts have hooks. Given images that were not read, modules before the cut return a `Feature`
    without running, and the row takes its place at the cut. Given images, they run in eval mode without gradients, and the
    row that arrives at the cut goes through `keep`. A copy of the model, by `copy` or `pickle`, is an ordinary model.

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
        self._ends = False  # whether the forward ends at the last cut
        self._traced: torch.Tensor | None = None
        self._around: tuple[nn.Module, ...] = ()
        self._live_again: list[dict[str, Any]] = []  # modules around the cut that were in train mode
        self._modes: dict[nn.Module, tuple[bool, bool]] = {}  # of frozen modules and the model, before they were
        self._hooked: list[nn.Module] = []  # the frozen modules with hooks
        self._placed: list[Any] = []  # what `put` has put into the model

    def put(self, cuts: Sequence[int]) -> None:
        """Drop all layers before the last of `cuts`. Rows may enter at each of them, and are kept at each."""
        modes = self._modes
        self.leave()
        for one in self._placed:
            one.remove()
        self._placed, self._around, self.frozen, self._hooked, self._modes = [], (), (), [], {}
        self.cuts = tuple(cuts)
        if not cuts:
            return
        *inner, last = (self._cut(k).at for k in cuts)
        self._around = tuple(dict.fromkeys(c.module for c in self.recorded.calls if c.has_within(last)))
        skipped = self._skipped(last, inner)
        self.frozen = tuple(dict.fromkeys(m for one in skipped for m in one.module.modules()))
        self._hooked = [m for m in self.frozen if _has_hooks(m)]
        self._modes = {m: modes.get(m, (m.training, self.model.training)) for m in self.frozen}
        self._placed = [
            *skipped,
            *(self._cut(k).watch(partial(self._cross, k)) for k in cuts),
            self.model.register_forward_pre_hook(Hook(self._enter), with_kwargs=True),
            self.model.register_forward_hook(Hook(self.leave), always_call=True),
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
        if self.frozen and self.frozen[0].training:  # model.train() sets all of them
            self.hold_eval()
        if self._watch is not None:
            self._watch(images, True)

    def row(self, call: Callable[[], Any]) -> torch.Tensor:
        """Return the row with which the live layers begin when `call()` calls the model, kept on the way. The forward ends
        there."""
        self._ends = True
        try:
            call()
        except ReachedError as reached:
            return reached.row
        finally:
            self._ends = False
        raise RuntimeError(f"drop.model: the forward must pass {self._cut(self.cuts[-1]).path}, and did not")

    def forget_calls(self) -> None:
        """Reset the number of training calls."""
        self.calls = 0

    def modules_before(self, k: int) -> list[nn.Module]:
        """Return the outermost modules that only the first k layers run."""
        return [call.module for call in self._before(self._cut(k).at)]

    def modules_around(self, k: int) -> list[nn.Module]:
        """Return the modules that run some of the first k layers and others: the model itself, and parts of it."""
        return list(dict.fromkeys(c.module for c in self.recorded.calls if c.has_within(self._cut(k).at)))

    def modules_behind(self, k: int) -> list[nn.Module]:
        """Return the outermost modules that the first k layers do not run."""
        passed = {m for before in self.modules_before(k) for m in before.modules()}
        passed |= set(self.modules_around(k))
        found: list[nn.Module] = []
        for module in self.model.modules():
            if module not in passed:
                found.append(module)
                passed |= set(module.modules())
        return found

    def trace(self, row: torch.Tensor, shape: Sequence[int], args: Any, kwargs: Any) -> Any:
        """Run the model on rows [B, ...] for a compiler. Zeros of the images' `shape` that take no memory stand for the
        images, and NaN for the outputs of dropped layers, so that nothing of them is in the graph, and a loss that uses one
        is seen."""
        images = row.new_zeros(()).expand(*shape)
        self._traced = row
        try:
            args, kwargs = with_images(images, args, kwargs)
            return self.model(*args, **kwargs)
        finally:
            self._traced = None

    def _cut(self, k: int) -> Cut:
        cut = self.recorded.layers[k - 1].cut
        assert cut is not None
        return cut

    def _before(
        self, at: int, inside: Sequence[int] = (), opened: Callable[[ModuleCall], bool] = lambda call: False
    ) -> Iterator[ModuleCall]:
        """The outermost calls that have ended at a cut, of modules that are not called later, with none of the cuts `inside`
        within them; and those within calls that are `opened`."""
        last: dict[nn.Module, int] = {}
        for call in self.recorded.calls:
            last[call.module] = max(last.get(call.module, 0), call.end)
        until = 0
        for call in self.recorded.calls:  # in the order in which they began
            if call.begin >= until and last[call.module] <= at and not any(map(call.has_within, inside)):
                yield call
                until = until if opened(call) else call.end

    def _skipped(self, at: int, inside: Sequence[int]) -> list[_Skipped]:
        """Put what stands for the modules before a cut in place. One that leaves something for the loop, that is called more
        than once, or in whose output not all tensors can be seen, runs its own forward on `Feature`s; then the modules
        within are skipped."""
        times = Counter(call.module for call in self.recorded.calls)

        def runs(call: ModuleCall) -> bool:
            return not call.is_plain or times[call.module] > 1 or self._leaves_something(call)

        calls = {call.module: call for call in self._before(at, inside, runs)}
        return [_Skipped(self, call, runs=runs(call)) for call in calls.values()]

    def _leaves_something(self, call: ModuleCall) -> bool:
        """Whether a loss may use more of a module than its output: what a hook within it gets, a tensor that it stores."""
        within = list(call.module.modules())
        return any(map(_has_hooks, within[1:])) or any(module in self.recorded.storing for module in within)

    # --- called by what is put into the model ---------------------------------------------------------------------------
    def _enter(self, _: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, Any] | None:
        if self._traced is not None:  # what is read here would be guarded by the compiler
            return None
        images = images_in(args, kwargs)
        self._restore()  # after a forward that was interrupted
        self.inside = None if images is None else images.standing
        training = self.model.training
        if training:
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
            if self.frozen and self.frozen[0].training:  # model.train() sets all of them
                self.hold_eval()
            return None
        self.hold_eval()
        changed: tuple[Any, Any] = pytree.tree_map_only(
            Images, lambda x: x.pixels if x is images else x, (args, kwargs)
        )
        return changed

    def _cross(self, k: int, x: Any) -> Any:
        """Return what goes on from cut k, where x has arrived."""
        is_last = k == self.cuts[-1]
        if self._traced is not None:
            return self._traced if is_last else x
        if not isinstance(x, torch.Tensor):
            raise RuntimeError(
                f"drop.loader: the output of {self.recorded.layers[k - 1].name} must stay a tensor while layers are "
                f"dropped, got a {type(x).__name__}"
            )
        if not isinstance(x, Unread):
            x = x.detach()
            if self._current is not None and self._keep is not None:
                x = self._keep(k, self._current.standing.ids, x)
        elif x.standing.at == k:
            assert x.standing.rows is not None
            row = x.standing.rows  # the model may be called again, or a checkpoint may run again
            x = row.clone(memory_format=torch.preserve_format) if self._cut(k).written else row
        if is_last:
            self._restore()
        if is_last and self._ends:
            raise ReachedError(x)
        if self.recorded.reentrant and not isinstance(x, Unread):
            x = x.detach().requires_grad_(torch.is_grad_enabled())
        return x

    def leave(self, *_: Any) -> None:
        """End a forward."""
        if self._traced is not None:
            return
        self.inside = self._current = None
        self._restore()

    def _restore(self) -> None:
        for held in self._live_again:
            held["training"] = True
        self._live_again.clear()


class _Skipped:
    """The `forward` on the instance of a module before the cut: its output stays away if its input does.

    Args:
        bypass: what runs the model.
        call: the call of the module in the recorded forward.
        runs: whether its own forward runs all the same.
    """

    def __init__(self, bypass: Bypass, call: ModuleCall, *, runs: bool) -> None:
        self.bypass, self.call, self.module = bypass, call, call.module
        self._runs = runs
        # Number of samples -> what the module would return, with forms in the place of tensors.
        self._known: dict[int, Any] = {}
        self._had = "forward" in vars(self.module)
        self._run = self.module.forward
        vars(self.module)["forward"] = self

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        traced = self.bypass._traced
        if traced is not None:
            return self._run(*args, **kwargs) if self._runs else self._output(len(traced), partial(_nan, traced))
        x = args[0] if args and isinstance(args[0], Unread) else first_of(Unread, (args, kwargs))
        if x is not None:
            if self._runs:
                return self._run(*args, **kwargs)
            form = self._known.get(x.standing.count)
            if type(form) is Form:  # at each step
                return Feature(form, x.device, x.standing, self.call.path)
            return self._output(x.standing.count, lambda form: Feature(form, x.device, x.standing, self.call.path))
        try:
            with torch.no_grad():
                return self._run(*args, **kwargs)
        except Exception:
            raise
        except BaseException:  # a KeyboardInterrupt, after which torch calls no hooks
            self.bypass.leave()
            raise

    def remove(self) -> None:
        """Give the module its own forward again."""
        if vars(self.module).get("forward") is self:
            if self._had:
                vars(self.module)["forward"] = self._run
            else:
                del vars(self.module)["forward"]

    def _output(self, B: int, made_of: Callable[[Form], Any]) -> Any:
        """What the module would return for B samples, without values."""
        output = self._known.get(B)
        if output is None:
            recorded = self.bypass.recorded.samples
            output = self._known[B] = pytree.tree_map_only(Form, lambda form: form.of(B, recorded), self.call.output)
        return made_of(output) if type(output) is Form else pytree.tree_map_only(Form, made_of, output)

    def __deepcopy__(self, memo: Any) -> Any:
        return copy.deepcopy(self._run, memo)

    def __reduce__(self) -> Any:
        return _its_own, (self.module,)


def _nan(row: torch.Tensor, form: Form) -> torch.Tensor:
    """A tensor of this form that takes no memory, on the device of the row."""
    value = float("nan") if form.dtype.is_floating_point else 0
    return row.new_full((), value, dtype=form.dtype).expand(form.shape)


def _its_own(module: nn.Module) -> Any:
    """The forward of a module's class, for an unpickled module."""
    return type(module).forward.__get__(module)


def _has_hooks(module: nn.Module) -> bool:
    """Whether a module has hooks of the user."""
    return any(
        not isinstance(hook, Hook)
        for hooks in (module._forward_hooks, module._forward_pre_hooks)
        for hook in hooks.values()
    )


def images_in(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Images | None:
    """Return the images among the arguments of a call."""
    found = next((a for a in (*args, *kwargs.values()) if type(a) is Images), None)
    return first_of(Images, (args, kwargs)) if found is None else found


def with_images(images: torch.Tensor, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, Any]:
    """Return the arguments of a call with images in the place of `IMAGES`."""
    changed: tuple[Any, Any] = pytree.tree_map(
        lambda a: images if isinstance(a, str) and a == IMAGES else a, (args, kwargs)
    )
    return changed


def first_of(kind: type, values: Any) -> Any:
    """Return the first value of a type among nested ones, or None."""
    return next((value for value in pytree.tree_leaves(values) if isinstance(value, kind)), None)
