"""`drop.model` with `wrap=`: the live part of the model, wrapped anew after each drop."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import nn
from torch.utils import _pytree as pytree

from learndrop_ext.forward.bypass import IMAGES, Bypass, images_in
from learndrop_ext.forward.chain import Chain, Suffix

Wrap = Callable[[nn.Module], nn.Module]


class WrappedModel(nn.Module):
    """The model to train where it is wrapped, always the same object.

    At first it calls `wrap(model)`. After a drop, a batch of `drop.loader` gives a row, which goes through `wrap` of a
    module that takes rows and holds the live layers only.
    """

    def __init__(self, chain: Chain, bypass: Bypass, wrap: Wrap) -> None:
        super().__init__()
        self._held = chain, bypass  # in a tuple, so that the model is not a submodule
        self._wrap = wrap
        self.show(self.wrapped(0), behind=0)

    def wrapped(self, k: int) -> nn.Module:
        """Return the wrapped model behind its first k layers. Raises TypeError if `wrap` does not return a module."""
        chain, bypass = self._held
        body = self._wrap(chain.model if k == 0 else Suffix(chain, k, bypass))
        if not isinstance(body, nn.Module):
            raise TypeError(f"DropScheduler: wrap must return a torch.nn.Module, got {type(body).__name__}")
        return body

    def show(self, body: nn.Module, *, behind: int) -> None:
        """Call this module from now on, what `wrapped(behind)` gave."""
        self.body, self._behind = body, behind

    def train(self, mode: bool = True) -> WrappedModel:
        """Set the mode of the user's model, which is that of all of its layers."""
        self.training = mode
        self._held[0].model.train(mode)
        return self

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        chain, bypass = self._held
        if not bypass.cuts:
            if self._behind:  # the guards have released all layers
                self.show(self.wrapped(0), behind=0)
            return self.body(*args, **kwargs)
        images = images_in(args, kwargs)
        if images is None or images.standing.owner is not bypass:
            return chain.model(*args, **kwargs)
        if images.pixels is None and images.standing.at == bypass.cuts[-1]:
            bypass.check(images, True)
            row = images.standing.rows
        else:
            row = bypass.row(lambda: chain.model(*args, **kwargs))
        if not kwargs and len(args) == 1 and args[0] is images:  # for a wrapper that takes one argument
            return self.body(row)
        args, kwargs = pytree.tree_map(lambda a: IMAGES if a is images else a, (args, kwargs))
        return self.body(row, *args, **kwargs)

    def __reduce_ex__(self, protocol: Any) -> Any:
        raise TypeError(
            "drop.model: copies and averages must be of the whole model, which keeps its parameters through a drop; got a "
            "copy of drop.model, which changes with each drop"
        )
