"""cuDNN's choice of algorithms in passes that are not the user's."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import torch


@contextlib.contextmanager
def without_benchmark(device: torch.device, *, deterministic: bool = False) -> Iterator[None]:
    """Keep cuDNN from timing its algorithms inside, as `torch.backends.cudnn.benchmark` asks it to for each new shape.

    A pass of two samples, or one without autocast, would have every convolution timed for a shape that training never has:
    on an H200, where an epoch of EfficientNet-Lite0 takes 1.3 s, the first DropScheduler of a process took 46 s to make
    with it and 18 s, for loading kernels, without. All other settings stay as they are; `torch.backends.cudnn.flags` would
    also turn cuDNN off unless told not to.

    Args:
        device: where the pass runs; nothing is changed for a CPU.
        deterministic: also use the same algorithm in each call, so that equal inputs give equal bits.
    """
    if device.type != "cuda":
        yield
        return
    cudnn = torch.backends.cudnn
    before = cudnn.benchmark, cudnn.deterministic
    try:
        cudnn.benchmark, cudnn.deterministic = False, deterministic or before[1]
        yield
    finally:
        cudnn.benchmark, cudnn.deterministic = before
