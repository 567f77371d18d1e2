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


def process_rank() -> int:
    """Return the rank of this process, 0 where there is one process."""
    return distributed.get_rank() if several_processes() else 0


def from_rank_zero(value: T) -> T:
    """Rank 0's value on every rank, and the value itself where there is one process. It must be picklable.

    Decisions depend on timings and free memory, which differ between processes; all ranks must drop the same layers.

    Raises:
        RuntimeError: another process has ended, or did not come to this point within the process group's timeout.
    """
    if not (distributed.is_available() and distributed.is_initialized()):
        return value
    box = [value]
    try:
        # A broadcast alone would let rank 0 pass without the others.
        distributed.barrier()
        distributed.broadcast_object_list(box, src=0)
    except RuntimeError as error:
        raise RuntimeError(
            f"drop.step: all {distributed.get_world_size()} processes must decide together, and rank "
            f"{distributed.get_rank()} waited in vain: another process has ended, or did not call drop.step() within the "
            f"timeout of init_process_group ({error})"
        ) from error
    return box[0]


def share_buffers(buffers: Iterable[torch.Tensor]) -> None:
    """Give every rank rank 0's buffers, in place.

    DistributedDataParallel shares them before a forward pass, so after the last one of an epoch each rank's running
    statistics hold a batch of its own; frozen like that, the ranks' rows would differ.
    """
    if distributed.is_available() and distributed.is_initialized():
        for buffer in buffers:
            distributed.broadcast(buffer, src=0)
