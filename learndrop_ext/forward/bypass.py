"""The model's own forward while its first layers are dropped: on rows, or on images whose rows are kept on the way.

Cuts are numbered by the layers before them: cut k is the end of layer k - 1.
"""

from __future__ import annotations

import contextlib
import copy
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from sys import getrefcount
from types import SimpleNamespace
from typing import Any

import torch
from torch import nn
from torch.utils import _pytree as pytree

from learndrop_ext.forward.cuts import Hook, Recorded
from learndrop_ext.forward.images import Feature, Form, Images, Standing, Unread
from learndrop_ext.forward.record import ModuleCall

#: Stands for the images among the arguments of a call that gets rows.
IMAGES = "the images of drop.loader"
#: (cut, ids [B], row [B, ...]) -> the row as the layers behind the cut get it
Keep = Callable[[int, torch.Tensor, torch.Tensor], torch.Tensor]


class ReachedError(Exception):
    """The forward has reached a cut, with the row [B, ...] that is its argument."""


class Bypass:
    """Runs a model's own forward with its first layers frozen, or, given images that were not read, without them.

    While layers are dropped, the outermost modules before the cut have a `forward` of their own on the instance, and the
    model and the modules at the cuts have hooks. Given images that were not read, modules before the cut return a `Feature`
    without running, and the row takes its place at the cut. Given images, they run in eval mode without gradients, and the
    row that arrives at the cut goes through `keep`. Given a batch of which some images were read, the model's forward runs
    on these alone up to the cut, and then on the rows of all. A copy of the model, by `copy` or `pickle`, is an ordinary
    model.
    """

    def __init__(
        self,
        recorded: Recorded,
        *,
        keep: Keep = lambda cut, ids, row: row,  # is given the rows of training; what it returns goes on
        watch: Callable[[Images, bool], None] = lambda images, trains: None,  # is called before each forward on images
    ) -> None:
        self.model, self.recorded = recorded.model, recorded
        self.inside: Standing | None = None  # what stands for the images on which the model's forward runs
        self.cuts: tuple[int, ...] = ()  # those in place, the last one behind all dropped layers
        self.frozen: tuple[nn.Module, ...] = ()
        self.calls = 0  # training calls on batches of drop.loader since `forget_calls`
        self._keep, self._watch = keep, watch
        self._current: Images | None = None  # the images whose rows are kept
        self.differentiates = False  # whether the gradients of images are asked for, in eval mode
        self._end = 0  # the cut at which the forward ends
        self._opened = False  # whether it runs all modules before it
        self.passed: dict[int, int] = {}  # of the last trace, the number of operations before each cut
        self._traced: torch.Tensor | None = None
        self._across: list[nn.Module] = []  # modules that run on both sides of the last cut
        self._live_again: list[nn.Module] = []  # modules around the cut that were in train mode
        self._modes: dict[nn.Module, tuple[bool, bool]] = {}  # of frozen modules and the model, before they were
        self._placed: list[Any] = []  # what `put` has put into the model

    def put(self, cuts: Sequence[int]) -> None:
        """Drop all layers before the last of `cuts`. Rows may enter at each of them, and are kept at each."""
        self.leave()
        for one in self._placed:
            one.remove()
        self.cuts, self._placed, self._across, self.frozen = tuple(cuts), [], [], ()
        if not cuts:
            return
        self._across = self.recorded.across(cuts[-1])
        times = Counter(call.module for call in self.recorded.calls)
        within: dict[nn.Module, list[nn.Module]] = {}  # the modules in each one before the cut
        running = set()

        def runs(call: ModuleCall) -> bool:
            """Whether a module runs its own forward on `Feature`s: one that leaves something for the loop (what a hook
            within it gets, a tensor that it stores), that is called more than once, or in whose output not all tensors can
            be seen. Then the modules within are skipped."""
            module = call.module
            inner = within[module] = list(module.modules())
            leaves = any(m in self.recorded.storing or (m is not module and has_hooks(m)) for m in inner)
            if leaves or not call.is_plain or times[module] > 1:
                running.add(module)
            return module in running

        calls = {call.module: call for call in self.recorded.calls_before(cuts[-1], cuts[:-1], runs)}
        inner = (m for module in calls for m in within[module])
        self.frozen = tuple(dict.fromkeys((*inner, *self.recorded.ended(cuts[-1]))))
        self._modes = {m: self._modes.get(m, (m.training, self.model.training)) for m in self.frozen}
        self._placed = [
            *(_Skipped(self, call, runs=call.module in running) for call in calls.values()),
            *(self.recorded.cut(k).watch(partial(self._cross, k)) for k in cuts),
            self.model.register_forward_pre_hook(Hook(self._enter), with_kwargs=True),
            self.model.register_forward_hook(Hook(self.leave), always_call=True),
        ]
        self._hold_eval()

    def renew(self, recorded: Recorded) -> None:
        """Take another record of the same layers, after the widths of live ones have changed."""
        with self.away():
            self.recorded = recorded

    def release(self) -> None:
        """Make all layers live again: modules get back the mode that they had, or the model's if that has changed."""
        training = self.model.training
        self.put(())
        for module, (own, whole) in self._modes.items():
            module.training = own if training == whole else training
        self._modes = {}

    @contextlib.contextmanager
    def away(self) -> Iterator[None]:
        """Take everything out of the model inside."""
        cuts = self.cuts
        self.put(())
        try:
            yield
        finally:
            self.put(cuts)

    def check(self, images: Images, trains: bool) -> None:
        """Note a call on images, before its forward."""
        self.calls += trains
        self._watch(images, trains)

    def row(self, call: Callable[[], Any], *, at: int = 0, opened: bool = False) -> torch.Tensor:
        """Return what arrives at cut `at`, by default the last one, when `call()` calls the model, kept on the way. The
        forward ends there. opened: run the forwards of all modules before it, on images that were not read too."""
        before, end = (self._end, self._opened), at or self.cuts[-1]
        self._end, self._opened = end, opened
        try:
            call()
        except ReachedError as reached:
            row: torch.Tensor = reached.args[0]
            return row
        finally:
            self._end, self._opened = before
        cut = self.recorded.cut(end)
        gone = dict(self.model.named_modules()).get(cut.path) is not cut.module
        raise RuntimeError(
            f"drop.model: the forward must pass {cut.path}, and did not"
            + ("; another module is in its place: call drop.undrop() before modules are exchanged" if gone else "")
        )

    def forget_calls(self) -> None:
        """Reset the number of training calls."""
        self.calls = 0

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

    def _hold_eval(self) -> None:
        """Put the frozen modules into eval mode again, in case of `model.train()`."""
        for module in self.frozen:
            if module.training:
                module.training = False

    # --- called by what is put into the model ---------------------------------------------------------------------------
    def _enter(self, _: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, Any] | None:
        if self._traced is not None:  # what is read here would be guarded by the compiler
            return None
        self.leave()  # after a forward that was interrupted
        trains = self.model.training and torch.is_grad_enabled()
        images = images_in(args, kwargs)
        if images is None or images.standing.owner is not self:
            self.calls += trains
            differentiates = torch.is_grad_enabled() and self._asks_gradients(args, kwargs)
            if differentiates and self.model.training:
                raise no_gradients()
            self._begin(images, keeps=False)
            self.differentiates = differentiates
            return None
        if not images.standing.checked:
            self.check(images, trains)
        ready = images
        if images.standing.some is not None:
            ready = self._completed(images, args, kwargs, keeps=trains)
        self._begin(ready, keeps=trains)
        if ready is images and images.pixels is None:
            return None
        given = ready if ready.pixels is None else ready.pixels
        changed: tuple[Any, Any] = pytree.tree_map_only(Images, lambda x: given if x is images else x, (args, kwargs))
        return changed

    def _asks_gradients(self, args: Any, kwargs: Any) -> bool:
        """Whether images that were read require gradients: a tensor like those that were recorded."""
        like = self.recorded.image.shape
        given = (x for x in pytree.tree_leaves((args, kwargs)) if isinstance(x, torch.Tensor) and x.requires_grad)
        return any(x.dim() == len(like) and x.shape[1:2] == like[1:2] for x in given)

    def _begin(self, images: Images | None, *, keeps: bool) -> None:
        """Begin a forward on images. keeps: whether rows are kept."""
        ends = self.frozen[:1] + self.frozen[-1:]  # model.train() sets all of them
        if images is None or images.pixels is not None or self._opened or any(module.training for module in ends):
            self._hold_eval()
        if self.model.training:
            self._live_again = [module for module in self._across if module.training]
            for module in self._live_again:
                module.__dict__["training"] = False
        self.inside = None if images is None else images.standing
        self._current = images if keeps else None

    def _completed(self, images: Images, args: tuple[Any, ...], kwargs: dict[str, Any], *, keeps: bool) -> Images:
        """Compute the rows of the images that were read, without the hooks of the model itself, and return the batch with
        the rows of all."""
        part, some = images.part_read(), images.standing.some
        assert some is not None
        at = torch.nonzero(some).flatten()

        def of_part(value: torch.Tensor) -> Any:
            if value is images:
                return part.pixels
            per_sample = value.dim() and len(value) == len(some)
            return value.index_select(0, at.to(value.device)) if per_sample else value

        few, named = pytree.tree_map_only(torch.Tensor, of_part, (args, kwargs))
        self._begin(part, keeps=keeps)
        made = self.row(lambda: self.model.forward(*few, **named), at=images.standing.at)
        self.leave()
        return images.with_rows(made)

    def _cross(self, k: int, x: Any) -> Any:
        """Return what goes on from cut k, where x has arrived."""
        is_last = k == self.cuts[-1]
        if self._traced is not None:
            return self._traced if is_last else x
        if not isinstance(x, torch.Tensor):
            if self.inside is None:  # torch.fx looks at the model
                return x
            raise RuntimeError(
                f"drop.loader: the output of {self.recorded.layers[k - 1].name} must stay a tensor while layers are "
                f"dropped, got a {type(x).__name__}"
            )
        if isinstance(x, Unread) and x.standing.trace is not None:
            self.passed[k] = len(x.standing.trace)
        if not isinstance(x, Unread):
            x = x if self.differentiates else x.detach()
            if self._current is not None:
                x = self._keep(k, self._current.standing.ids, x)
        elif x.standing.at == k:
            assert x.standing.rows is not None
            row = x.standing.rows  # the model may be called again, or a checkpoint may run again
            x = row.clone(memory_format=torch.preserve_format) if self.recorded.cut(k).written else row
        if is_last:
            self._restore()
        if k == self._end:
            raise ReachedError(x)
        if self.recorded.reentrant and not isinstance(x, Unread):
            x = x.detach().requires_grad_(torch.is_grad_enabled())
        return x

    def leave(self, *_: Any) -> None:
        """End a forward."""
        if self._traced is None:
            self.inside, self._current, self.differentiates = None, None, False
            self._restore()

    def _restore(self) -> None:
        for module in self._live_again:
            module.__dict__["training"] = True
        self._live_again = []


class _Skipped:
    """The `forward` on the instance of a module before the cut: its output stays away if its input does.

    runs: whether its own forward runs all the same.
    """

    def __init__(self, bypass: Bypass, call: ModuleCall, *, runs: bool) -> None:
        self.bypass, self.call, self.module, self.runs = bypass, call, call.module, runs
        # Number of samples -> what the module would return, with forms in the place of tensors.
        self._known: dict[int, Any] = {}
        self._spare: Feature | None = None  # what was returned last: making another takes 4 us
        self._had = vars(self.module).get("forward")
        self._run = self.module.forward
        vars(self.module)["forward"] = self

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        bypass = self.bypass
        if bypass._traced is not None:
            nan = partial(_nan, bypass._traced)
            return self._run(*args, **kwargs) if self.runs else self._filled(len(bypass._traced), nan)
        x = args[0] if args else None
        if not isinstance(x, Unread):
            x = next((value for value in pytree.tree_leaves((args, kwargs)) if isinstance(value, Unread)), None)
        if x is not None:
            standing = x.standing
            if type(x) is Images and not standing.inside():
                raise RuntimeError(
                    f"drop.loader: while layers are dropped, images must go through the model, and {self.call.path}, a part "
                    "of it, was called on them; give DropScheduler a module whose forward does what the loop does"
                )
            if self.runs or bypass._opened:
                return self._run(*args, **kwargs)
            if self._spare is not None and _references(self) == ALONE and self._may_stand_for(standing):
                self._spare.standing = standing
                return self._spare
            made = self._filled(standing.count, lambda form: Feature(form, x.device, standing, self.call.path))
            self._spare = made if type(made) is Feature else None
            return made
        try:
            with torch.set_grad_enabled(bypass.differentiates):
                return self._run(*args, **kwargs)
        except Exception:
            raise
        except BaseException:  # a KeyboardInterrupt, after which torch calls no hooks
            self.bypass.leave()
            raise

    def remove(self) -> None:
        """Give the module its own forward again."""
        if vars(self.module).get("forward") is self:
            del vars(self.module)["forward"]
            if self._had is not None:
                vars(self.module)["forward"] = self._had

    def _may_stand_for(self, standing: Standing) -> bool:
        """Whether the last output, which no Python object holds any more, is like that for other samples, and nothing in C++
        holds it, such as a reentrant checkpoint that will run again."""
        spare: Any = self._spare
        return bool(spare.standing.count == standing.count and spare._use_count() == 1 and not spare.requires_grad)

    def _filled(self, B: int, made_of: Callable[[Form], Any]) -> Any:
        """What the module would return for B samples, without values."""
        if B not in self._known:
            recorded = self.bypass.recorded.samples
            self._known[B] = pytree.tree_map_only(Form, lambda form: form.of(B, recorded), self.call.output)
        output = self._known[B]
        return made_of(output) if type(output) is Form else pytree.tree_map_only(Form, made_of, output)

    def __deepcopy__(self, memo: Any) -> Any:
        return copy.deepcopy(self._run, memo)

    def __reduce__(self) -> Any:
        return getattr, (self.module, "forward")  # that of its class: attributes are unpickled later


def _references(holder: Any) -> int:
    return getrefcount(holder._spare)


#: References to an output that its holder alone has.
ALONE = _references(SimpleNamespace(_spare=object()))


def _nan(row: torch.Tensor, form: Form) -> torch.Tensor:
    """A tensor of this form that takes no memory, on the device of the row."""
    value = float("nan") if form.dtype.is_floating_point else 0
    return row.new_full((), value, dtype=form.dtype).expand(form.shape)


def no_gradients() -> RuntimeError:
    """Say that images must not require gradients."""
    return RuntimeError(
        "drop.loader: images must not require gradients while layers are dropped, because no gradient passes the cut; call "
        "drop.undrop() before adversarial training, or before another network makes the images"
    )


def bypass_of(model: nn.Module) -> Bypass | None:
    """Return what has dropped layers of a model, or None if all are live."""
    forwards = (vars(module).get("forward") for module in model.modules())
    return next((forward.bypass for forward in forwards if isinstance(forward, _Skipped)), None)


def has_hooks(module: nn.Module) -> bool:
    """Whether a module has hooks of the user."""
    hooks = (*module._forward_hooks.values(), *module._forward_pre_hooks.values())
    return any(not isinstance(hook, Hook) for hook in hooks)


def images_in(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Images | None:
    """Return the images among the arguments of a call. Raises RuntimeError if there are two batches of them."""
    if len(args) == 1 and not kwargs and type(args[0]) is Images:
        return args[0]
    found = {id(value): value for value in pytree.tree_leaves((args, kwargs)) if type(value) is Images}
    if len(found) > 1:
        raise RuntimeError(
            f"drop.loader: the model must get one batch of images in a call, got {len(found)}: call it on each, or on "
            "torch.cat of them"
        )
    return next(iter(found.values()), None)


def with_images(images: torch.Tensor, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, Any]:
    """Return the arguments of a call with images in the place of `IMAGES`."""
    changed: tuple[Any, Any] = pytree.tree_map(
        lambda a: images if isinstance(a, str) and a == IMAGES else a, (args, kwargs)
    )
    return changed
