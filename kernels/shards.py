"""Sharded parameters: which part of a DTensor is measured on this rank, and how the ranks' sums become one.

Letters: L layers, K columns of the sums (column 2 is a maximum, the others add).
"""

from __future__ import annotations

import sys
from collections.abc import Iterable
from typing import TYPE_CHECKING

import torch
from torch import Tensor

if TYPE_CHECKING:
    from torch.distributed.device_mesh import DeviceMesh
    from torch.distributed.tensor import DTensor

MAXIMUM = 2


def as_sharded(tensor: Tensor) -> DTensor | None:
    """Return the tensor if it is a DTensor, else None."""
    # Not imported: there is no DTensor before somebody imports the module, and its import takes a second.
    module = sys.modules.get("torch.distributed.tensor")
    return tensor if module is not None and isinstance(tensor, module.DTensor) else None


def local_part(tensor: Tensor) -> Tensor:
    """Return what this rank holds of `tensor`: the shard of a DTensor, else the tensor itself."""
    sharded = as_sharded(tensor)
    if sharded is None:
        return tensor
    with torch.no_grad():
        return sharded.to_local()


def common_mesh(tensors: Iterable[Tensor]) -> DeviceMesh | None:
    """Return the one mesh of all DTensors among `tensors`, or None without any.

    Raises:
        ValueError: for several meshes, and for a DTensor with a Partial placement, whose ranks hold summands of it.
    """
    mesh: DeviceMesh | None = None
    for tensor in tensors:
        sharded = as_sharded(tensor)
        if sharded is None:
            continue
        if mesh is not None and sharded.device_mesh != mesh:
            raise ValueError(f"build_table: layers must lie on one device mesh, got {mesh} and {sharded.device_mesh}")
        if any(placement.is_partial() for placement in sharded.placements):
            raise ValueError(
                f"build_table: a DTensor must be sharded or replicated, got placements {sharded.placements}"
            )
        mesh = sharded.device_mesh
    return mesh


def counts_here(tensor: Tensor, mesh: DeviceMesh | None) -> bool:
    """Return whether this rank's sums include `tensor`, so that each element is counted once over the mesh.

    Along a sharded dimension every rank counts, along a replicated one the first. A plain tensor beside DTensors is
    taken to be the same on every rank.
    """
    if mesh is None:
        return True
    sharded = as_sharded(tensor)
    if sharded is None:
        return all(mesh.get_local_rank(dim) == 0 for dim in range(mesh.ndim))
    return all(
        not placement.is_replicate() or mesh.get_local_rank(dim) == 0
        for dim, placement in enumerate(sharded.placements)
    )


def join(
    sums: Tensor,  # [L, K] float64
    mesh: DeviceMesh | None,
) -> Tensor:
    """Return the sums over all ranks of `mesh`, [L, K] float64, the same bits on each rank.

    One all-reduce for each dimension of the mesh. The maxima travel with the sums, in one more column for each rank,
    which is zero on the other ranks.
    """
    if mesh is None:
        return sums
    K = sums.shape[1]
    for dim in range(mesh.ndim):
        wide = sums.new_zeros(sums.shape[0], K + mesh.size(dim))
        wide[:, :K] = sums
        wide[:, MAXIMUM] = 0
        wide[:, K + mesh.get_local_rank(dim)] = sums[:, MAXIMUM]
        torch.distributed.all_reduce(wide, group=mesh.get_group(dim))
        sums = wide[:, :K].clone()
        sums[:, MAXIMUM] = wide[:, K:].amax(1)
    return sums
