"""`drop.model` with `wrap=`: the live part of the model, wrapped anew after each drop."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import nn
from torch.utils import _pytree as pytree

from learndrop_ext.forward.bypass import IMAGES, Bypass, images_in
from learndrop_ext.forward.chain import Chain, Suffix
from learndrop_ext.forward.images import Form

Wrap = Callable[[nn.Module], nn.Module]


class WrappedModel(nn.Module):
    """The model to train where it is wrapped, always the same object.

    At first it calls `wrap(model)`. After a drop, a batch to train on gives a row, which goes through `wrap` of a module
    that takes rows and holds the live layers only.
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

    def no_sync(self) -> AbstractContextManager[None]:
        """Accumulate gradients inside without averaging them over the ranks, as DistributedDataParallel does."""
        body: Any = self.body
        return body.no_sync()  # type: ignore[no-any-return]

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        chain, bypass = self._held
        if not bypass.cuts:
            if self._behind:  # the guards have released all layers
                self.show(self.wrapped(0), behind=0)
            return self.body(*args, **kwargs)
        row: torch.Tensor | None
        images = images_in(args, kwargs)
        if images is None or images.standing.owner is not bypass:
            if not (chain.model.training and torch.is_grad_enabled()):
                return chain.model(*args, **kwargs)
            # Dropped layers without rows: what is live trains as it was wrapped, as with rows.
            row = bypass.row(lambda: chain.model(*args, **kwargs))
            given = _images_read(args, kwargs, chain.recorded.image)
        elif images.pixels is None and images.standing.at == bypass.cuts[-1]:
            bypass.check(images, chain.model.training and torch.is_grad_enabled())
            row, given = images.standing.rows, images
        else:
            row, given = bypass.row(lambda: chain.model(*args, **kwargs)), images
        if not kwargs and len(args) == 1 and args[0] is given:  # for a wrapper that takes one argument
            return self.body(row)
        args, kwargs = pytree.tree_map(lambda a: IMAGES if a is given else a, (args, kwargs))
        return self.body(row, *args, **kwargs)

    def __reduce_ex__(self, protocol: Any) -> Any:
        raise TypeError(
            "drop.model: copies and averages must be of the whole model, which keeps its parameters through a drop; got a "
            "copy of drop.model, which changes with each drop"
        )


def _images_read(args: Any, kwargs: Any, like: Form) -> torch.Tensor:
    """The images among the arguments of a call on a batch that was read: the first tensor with as many dimensions and
    channels as those that were recorded."""
    for value in pytree.tree_leaves((args, kwargs)):
        if isinstance(value, torch.Tensor) and value.dim() == len(like.shape) and value.shape[1] == like.shape[1]:
            return value
    raise RuntimeError(
        f"drop.model: it must be called with images like {list(like.shape)}, got none among its arguments"
    )
