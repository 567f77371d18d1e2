"""The running statistics of batch norms, computed anew for layers that are about to be frozen.

In training a batch norm divides by the statistics of the batch. The running ones, by which a frozen one divides from then
on, are averages over the last 20 steps or so, under the weights of these steps: where weights change fast, of another
network. What that costs is measured in docs/paper.md.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.utils import _pytree as pytree

from learndrop_ext.forward.chain import Chain, row_at
from learndrop_ext.forward.cuts import Hook
from learndrop_ext.forward.images import Images
from learndrop_ext.preserve import autocast_of, preserved, under_autocast

#: Training calls from which batch norms get their statistics before they are frozen, and one on which these are tried.
CALLS = 4 + 1


@dataclass
class _Call:
    """A call of a model by the training loop."""

    args: Any
    kwargs: Any
    versions: list[tuple[torch.Tensor, int]]  # of the tensors that it was given
    autocast: torch.dtype | None


class TrainingCalls:
    """The first calls of a model by the training loop since `listen`, with all that the loop did to their images.

    They can be repeated, so what they were given is held until `forget`.
    """

    def __init__(self, model: nn.Module, device: torch.device) -> None:
        self._model, self._device = model, device  # as the loop calls it
        self._hook: Any = None
        self._calls: list[_Call] = []

    def listen(self, frozen: Sequence[nn.Module]) -> None:
        """Note the next calls, in the place of those noted before, if there are batch norms that are not `frozen`."""
        self.forget()
        if any(isinstance(module, _BatchNorm) for module in {*self._model.modules()}.difference(frozen)):
            # At first: other hooks may change the arguments.
            self._hook = self._model.register_forward_pre_hook(Hook(self._note), with_kwargs=True, prepend=True)

    def end(self) -> None:
        """Note no more calls."""
        if self._hook is not None:
            self._hook.remove()
            self._hook = None

    def forget(self) -> None:
        """Forget the calls."""
        self.end()
        self._calls = []

    def repeats(self, model: nn.Module) -> list[Callable[[], Any]]:
        """Return functions that call `model` as the loop did, one for each call of which no tensor was written to since."""
        unchanged = (c for c in self._calls if all(tensor._version == version for tensor, version in c.versions))
        return [partial(self._repeat, model, call) for call in unchanged]

    def _repeat(self, model: nn.Module, call: _Call) -> Any:
        with under_autocast(self._device, call.autocast):
            return model(*call.args, **call.kwargs)

    def _note(self, _: nn.Module, args: Any, kwargs: Any) -> None:
        if not self._model.training or not torch.is_grad_enabled() or torch.compiler.is_compiling():
            return
        try:
            args, kwargs = pytree.tree_map_only(torch.Tensor, _held, (args, kwargs))
        except RuntimeError:  # a tensor without memory of its own: a sparse one, or one of torch.func
            return
        tensors = (x.pixels if type(x) is Images else x for x in pytree.tree_leaves((args, kwargs)))
        known = (x for x in tensors if isinstance(x, torch.Tensor) and not x.is_inference())
        self._calls.append(_Call(args, kwargs, [(x, x._version) for x in known], autocast_of(self._device)))
        if len(self._calls) == CALLS:
            self.end()


def _held(x: torch.Tensor) -> torch.Tensor:
    """An input without its graph, and not in the memory that the workers of a loader share."""
    if type(x) is Images:
        return x
    return x.detach().clone() if x.is_shared() else x.detach()


def batches_seen(model: nn.Module) -> dict[nn.Module, int]:
    """Return the number of batches of which the running statistics of each batch norm were averaged."""
    counts = {m: m.num_batches_tracked for m in model.modules() if isinstance(m, _BatchNorm)}
    found = {norm: count for norm, count in counts.items() if count is not None}
    return dict(zip(found, torch.stack([*found.values()]).tolist(), strict=True)) if found else {}


def recalibrate(
    chain: Chain, first: int, last: int, calls: Sequence[Callable[[], Any]], *, norms: Sequence[Any]
) -> bool:
    """Give `norms`, batch norms in layers first..last-1, the mean statistics of some calls, under the weights that the
    layers have, if these are better than the running averages: on the last call, which is held out if there are several,
    the layers in eval mode then come closer to what they compute in train mode. Return whether they are.

    Each of `calls` calls the model. The layers before `first`, and other batch norms, run in eval mode. All else in the
    model stays as it is.
    """
    frozen = {module for one in chain.recorded.before(first) for module in one.modules()}
    others = (module for one in chain.recorded.before(last) for module in one.modules() if module not in norms)
    frozen |= {module for module in others if isinstance(module, _BatchNorm)}

    def row(call: Callable[[], Any], *, momentum: float | None = None) -> torch.Tensor:
        """The row of a call in train mode, whose statistics get the weight `momentum`, or in eval mode."""
        chain.model.train(momentum is not None)
        for module in frozen:
            module.training = False
        for norm in norms:
            norm.momentum = momentum
        return row_at(chain, last, call).float()

    held = calls[-1]
    with torch.no_grad():
        with preserved(chain.model):
            wanted, before = row(held, momentum=0.0), row(held)
            for i, call in enumerate(calls[:-1] or calls):
                row(call, momentum=1 / (i + 1))  # the mean over all calls
            is_better = bool((row(held) - wanted).norm() < (before - wanted).norm())
            buffers = [one for norm in norms for one in (norm.running_mean, norm.running_var)]
            values = [one.clone() for one in buffers]
        if is_better:
            torch._foreach_copy_(buffers, values)
    return is_better
