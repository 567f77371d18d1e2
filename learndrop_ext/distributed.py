"""What several processes have to agree on before a drop: the decision, and the statistics of what is frozen."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TypeVar

import torch
from torch import distributed

T = TypeVar("T")


def several_processes() -> bool:
    """Whether this process is one of a group."""
    return distributed.is_available() and distributed.is_initialized() and distributed.get_world_size() > 1


def from_rank_zero(value: T) -> T:
    """Rank 0's value on every rank, and the value itself where there is one process. It must be picklable.

    Decisions depend on timings and free memory, which differ between processes; all ranks must drop the same layers.
    """
    if not (distributed.is_available() and distributed.is_initialized()):
        return value
    box = [value]
    distributed.broadcast_object_list(box, src=0)
    return box[0]


def share_buffers(buffers: Iterable[torch.Tensor]) -> None:
    """Give every rank rank 0's buffers, in place.

    DistributedDataParallel shares them before a forward pass, so after the last one of an epoch each rank's running
    statistics hold a batch of its own; frozen like that, the ranks' rows would differ.
    """
    if distributed.is_available() and distributed.is_initialized():
        for buffer in buffers:
            distributed.broadcast(buffer, src=0)
