"""The running statistics of batch norms, computed anew for layers that are about to be frozen.

In training a batch norm divides by the statistics of the batch. The running ones, by which a frozen one divides from then
on, are averages over the last 20 steps or so, under the weights of these steps: where weights change fast, of another
network. What that costs is measured in docs/paper.md.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from learndrop_ext.forward.chain import Chain, row_at
from learndrop_ext.preserve import preserved


def batches_seen(model: nn.Module) -> dict[nn.Module, int]:
    """Return the number of batches of which the running statistics of each batch norm were averaged."""
    counts = {m: m.num_batches_tracked for m in model.modules() if isinstance(m, _BatchNorm)}
    found = {norm: count for norm, count in counts.items() if count is not None}
    return dict(zip(found, torch.stack([*found.values()]).tolist(), strict=True)) if found else {}


def recalibrate(
    chain: Chain, first: int, last: int, run: Callable[[Any], Any], batches: Sequence[Any], *, norms: Sequence[Any]
) -> bool:
    """Give `norms`, batch norms in layers first..last-1, the mean statistics of some batches, under the weights that the
    layers have, if these are better than the running averages: on the last batch, which is held out if there are several,
    the layers in eval mode then come closer to what they compute in train mode. Return whether they are.

    `run(batch)` calls the model. The layers before `first`, and other batch norms, run in eval mode. All else in the model
    stays as it is.
    """
    frozen = {module for one in chain.recorded.before(first) for module in one.modules()}
    others = (module for one in chain.recorded.before(last) for module in one.modules() if module not in norms)
    frozen |= {module for module in others if isinstance(module, _BatchNorm)}

    def row(batch: Any, *, momentum: float | None = None) -> torch.Tensor:
        """The row of a batch in train mode, whose statistics get the weight `momentum`, or in eval mode."""
        chain.model.train(momentum is not None)
        for module in frozen:
            module.training = False
        for norm in norms:
            norm.momentum = momentum
        return row_at(chain, last, partial(run, batch)).float()

    held = batches[-1]
    with torch.no_grad():
        with preserved(chain.model):
            wanted, before = row(held, momentum=0.0), row(held)
            for i, batch in enumerate(batches[:-1] or batches):
                row(batch, momentum=1 / (i + 1))  # the mean over all batches
            is_better = bool((row(held) - wanted).norm() < (before - wanted).norm())
            buffers = [one for norm in norms for one in (norm.running_mean, norm.running_var)]
            values = [one.clone() for one in buffers]
        if is_better:
            torch._foreach_copy_(buffers, values)
    return is_better
