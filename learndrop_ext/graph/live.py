"""The model being trained: the whole model or, after a drop, its suffix."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from learndrop_ext.graph.call import ModelCall
from learndrop_ext.graph.chain import Chain, Segment
from learndrop_ext.graph.freeze import FrozenPrefix

Wrap = Callable[[nn.Module], nn.Module]

#: If the loop passes another tensor than the loader's (a cast, another memory format), all values are compared in so many
#: batches, and one sample in each later batch.
FULLY_COMPARED = 4


class _BehindFrozen(nn.Module):
    """The suffix behind frozen layers that run at each step, in eval mode and without gradients."""

    def __init__(self, frozen: Segment, suffix: nn.Module) -> None:
        super().__init__()
        self.frozen = frozen
        self.suffix = suffix

    def forward(self, x: torch.Tensor, *others: torch.Tensor) -> Any:
        # A dropout module shared with the suffix follows model.train().
        shared = [m for m in self.frozen.modules() if m.training]
        for module in shared:
            module.training = False
        try:
            with torch.no_grad():
                x = self.frozen(x)
        finally:
            for module in shared:
                module.training = True
        return self.suffix(x, *others)


class LiveModel(nn.Module):
    """The model being trained, always the same object: at first the whole model, after a drop the suffix.

    Each training call checks that the input is the loader's, unchanged, and that the frozen layers have not changed. It
    records the autocast dtype, under which the frozen layers must run too.

    Args:
        body: the module to run.
        base: the whole model, whose mode is followed.
        input_name: name of the model's input, for calls by keyword.
        call: how the loop calls the model, if with more than the image. Other tensors are passed to the live layers.
    """

    def __init__(self, body: nn.Module, base: nn.Module, input_name: str, *, call: ModelCall | None = None) -> None:
        super().__init__()
        self.body = body
        self.device = next((p.device for p in base.parameters()), torch.device("cpu"))
        self.input_name = input_name
        self.call = call
        self.row_shape: tuple[int, ...] | None = None
        self.image_shape: tuple[int, ...] | None = None
        self.frozen: FrozenPrefix | None = None
        self.stale: Callable[[], str | None] | None = None  # Chain.stale, while layers are dropped
        self.check_input = True
        self.calls = 0
        self.eval_calls = 0
        self.foreign: str | None = None
        self.autocast: torch.dtype | None = None
        self.told_autocast: torch.dtype | None = None  # under which the first rows were computed
        self._base = (base,)  # in a tuple, so that it is not a submodule
        self._base_mode = base.training
        self._expected: tuple[torch.Tensor, int] | None = None
        self._compared = 0
        self._other: torch.Tensor | None = None  # on a GPU: whether a value was not the loader's

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        self._follow_mode()
        if self.call is not None and self.frozen is None and not self.training:
            self.eval_calls += 1
            return self.body(*args, **kwargs)
        others: tuple[torch.Tensor, ...] = ()
        if self.call is None:
            x = self._input(args, kwargs)
        else:
            x, others = self.call.split(args, kwargs)
        if self.row_shape is not None and tuple(x.shape[1:]) != self.row_shape:
            raise ValueError(
                f"drop.model: x must be cached rows [B, {', '.join(map(str, self.row_shape))}] from drop.loader, "
                f"got {list(x.shape)}; to evaluate on images, call the whole model"
            )
        if self.training:
            self._note(x)
        else:
            self.eval_calls += 1
            self._check_rows(x)
        if self.call is not None and self.frozen is None:
            return self.body(*args, **kwargs)
        return self.body(x, *others)

    def __reduce_ex__(self, protocol: Any) -> Any:
        raise TypeError(
            "drop.model: copies and averages must be of the whole model, which keeps its parameters through a drop; got a "
            "copy of drop.model, which changes with each drop"
        )

    def set_mode(self, training: bool, *, but: nn.Module) -> None:
        """Set the mode of all modules except those of the whole model `but`, which are the caller's."""
        own = set(but.modules())
        for module in self.modules():
            if module not in own:
                module.training = training

    def expect(self, x: torch.Tensor) -> None:
        """Expect training calls to get `x`, or some rows of it, from now on."""
        self._expected = x, x._version

    def take_foreign(self) -> str | None:
        """Return a description of what was given in place of the loader's input since the last call, or None."""
        if self._other is not None and bool(self._other):
            self.foreign = self.foreign or "other values"
        found, self.foreign, self._other = self.foreign, None, None
        return found

    def check_frozen(self) -> None:
        """Raise RuntimeError, naming the layer, if a frozen weight or buffer has changed since the rows were computed."""
        if self.frozen is None or self.frozen.first_change() is None:
            return
        layer = self.frozen.first_changed_value()
        if layer is not None:
            raise RuntimeError(
                f"drop.model: the weights and buffers of the dropped layers must stay as they are, and those of {layer} "
                "have changed since its rows were computed; change them between epochs, when rows are computed again, or "
                "call drop.undrop() first, or exclude the dropped layers from what changes them (weight decay by hand, "
                "averaging, a loaded checkpoint, a second optimizer)"
            )

    def _check_rows(self, x: torch.Tensor) -> None:
        """Raise ValueError in eval mode for an input that may be images, if they have the shape of rows."""
        if self.row_shape is None or self.row_shape != self.image_shape or not self.check_input:
            return
        if self._expected is not None and (x is self._expected[0] or _is_slice(x, self._expected[0])):
            return
        raise ValueError(
            f"drop.model: in eval mode x must be the batch of cached rows that drop.loader gave last, got another tensor "
            f"{list(x.shape)}, which may be images; to evaluate on images, call the whole model"
        )

    def _check_code(self) -> None:
        """Raise RuntimeError if the live layers read something from their modules that has changed in this epoch."""
        moved = self.stale() if self.stale is not None else None
        if moved is not None:
            raise RuntimeError(
                f"drop.model: what forward reads from its modules must stay within an epoch while layers are dropped, and "
                f"{moved}; set it between two epochs, or keep a number that changes from step to step in a buffer"
            )

    def _follow_mode(self) -> None:
        """Adopt the mode of the user's model, to which the layers of a chain and their wrappers do not belong."""
        base = self._base[0]
        if base.training == self._base_mode:
            return
        self._base_mode = base.training
        theirs = set(base.modules())
        for module in self.modules():
            if module not in theirs:
                module.training = base.training

    def _input(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> torch.Tensor:
        given = [*args, *kwargs.values()]
        named = not kwargs or self.input_name in kwargs
        if len(given) != 1 or not named or not isinstance(given[0], torch.Tensor):
            kinds = [type(v).__name__ for v in args] + [f"{k}={type(v).__name__}" for k, v in kwargs.items()]
            raise TypeError(
                f"drop.model: wanted one tensor, {self.input_name}, which is what the dropped layers' rows can stand "
                f"for; got ({', '.join(kinds)}); say with inputs= what else the model is called with"
            )
        return given[0]

    def _note(self, x: torch.Tensor) -> None:
        self.calls += 1
        kind = self.device.type
        self.autocast = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else None
        if self.frozen is None or self.autocast == self.told_autocast:
            self.told_autocast = None
        if self.told_autocast is not None:
            raise RuntimeError(
                f"drop.model: training steps must run under torch.autocast of {self.told_autocast}, as DropScheduler was "
                f"told, got {'no autocast' if self.autocast is None else self.autocast}"
            )
        self.check_frozen()
        if self.calls & (self.calls - 1) == 0:  # at calls 1, 2, 4, 8, ..., because it reads all modules
            self._check_code()
        if self._expected is None or not self.check_input:
            return
        wanted, version = self._expected
        if wanted._version != version:
            self.foreign = self.foreign or "one that was changed in place"
        elif x is not wanted and not _is_slice(x, wanted):
            self._compare(x, wanted)

    def _compare(self, x: torch.Tensor, wanted: torch.Tensor) -> None:
        if x.shape[1:] != wanted.shape[1:] or len(x) > len(wanted):
            self.foreign = self.foreign or str(list(x.shape))
            return
        one, other = x.detach(), wanted[: len(x)].detach()
        if self._compared >= FULLY_COMPARED and len(x):
            i = self._compared % len(x)
            one, other = one[i : i + 1], other[i : i + 1]
        self._compared += 1
        bound = 0.0 if one.dtype == other.dtype else 1e-2  # wide enough for a cast to 16 bits
        differ = ~torch.isclose(one.float(), other.float(), rtol=bound, atol=bound, equal_nan=True).all()
        if self.device.type == "cuda":
            self._other = differ if self._other is None else self._other | differ
        elif bool(differ):
            self.foreign = self.foreign or str(list(x.shape))


def live_body(model: nn.Module, chain: Chain, cut: int, prefix: int, wrap: Wrap | None) -> nn.Module:
    """Return the wrapped model to train with `prefix` frozen layers on rows after `cut` of them."""
    live: nn.Module = model if prefix == 0 else chain.suffix(prefix)
    if wrap is not None:
        live = wrap(live)
        if not isinstance(live, nn.Module):
            raise TypeError(f"DropScheduler: wrap must return a torch.nn.Module, got {type(live).__name__}")
    return _BehindFrozen(chain.segment(cut, prefix), live) if cut < prefix else live


def _is_slice(x: torch.Tensor, whole: torch.Tensor) -> bool:
    """Whether x is a slice of consecutive rows of a tensor."""
    if x.device != whole.device or x.dtype != whole.dtype or x.shape[1:] != whole.shape[1:]:
        return False
    if x.stride() != whole.stride() or x.untyped_storage().data_ptr() != whole.untyped_storage().data_ptr():
        return False
    return whole.stride(0) == 0 or (x.storage_offset() - whole.storage_offset()) % whole.stride(0) == 0
