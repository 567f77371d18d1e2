"""What several processes must agree on before a drop: the memory, the decision, and the buffers of the frozen layers."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import TypeVar

import torch
from torch import distributed

T = TypeVar("T")


def several_processes() -> bool:
    """Return whether this process is one of several in a group."""
    return distributed.is_available() and distributed.is_initialized() and distributed.get_world_size() > 1


def from_rank_zero(value: T) -> T:
    """Return rank 0's value on every rank; the value itself for a single process. It must be picklable.

    Decisions depend on timings, which differ between processes, and all ranks must drop the same layers.

    Raises:
        RuntimeError: another process has ended, or did not get here within the process group's timeout.
    """
    return _of_ranks(value)[0]


def smallest_of_ranks(values: Sequence[int]) -> tuple[int, ...]:
    """Return for each value the smallest of all ranks; the values themselves for a single process.

    Raises:
        RuntimeError: as `from_rank_zero`.
    """
    return tuple(map(min, zip(*_of_ranks(tuple(values)), strict=True)))


def _of_ranks(value: T) -> list[T]:
    """The values of all ranks, each of which waits for all others."""
    if not several_processes():
        return [value]
    values = [value] * distributed.get_world_size()
    try:
        distributed.all_gather_object(values, value)
    except RuntimeError as error:
        raise RuntimeError(
            f"drop.step: all {distributed.get_world_size()} processes must decide together, and rank "
            f"{distributed.get_rank()} waited in vain: another process has ended, or did not call drop.step() within the "
            f"timeout of init_process_group ({error})"
        ) from error
    return values


def share_buffers(buffers: Iterable[torch.Tensor]) -> None:
    """Copy rank 0's buffers to all ranks, in place.

    DistributedDataParallel broadcasts buffers before each forward pass, so after the last one of an epoch each rank's
    running statistics include a batch of its own. Frozen like that, they would give different rows on each rank.
    """
    if several_processes():
        for buffer in buffers:
            distributed.broadcast(buffer, src=0)
