"""Deltas of sharded parameters: two gloo processes measure together what one measures alone."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from processes import FORKS
from torch import Tensor, nn
from torch.multiprocessing import start_processes
from torch.utils.data import DataLoader, TensorDataset

from learndrop_ext import DropScheduler
from learndrop_ext.decide.deltas import Deltas
from learndrop_ext.kernels.shards import as_sharded, local_part

pytestmark = pytest.mark.skipif(not torch.distributed.is_available(), reason="torch was built without distributed")

WORLD = 2
NO_COSINE = -9.0


def plain_layers() -> list[list[Tensor]]:
    """What the two ranks share: uneven shards, a shard that is empty on one rank, replicas, a plain tensor."""
    generator = torch.Generator().manual_seed(0)
    shapes = [[(5, 3), (1, 4)], [(4, 2), (7,)], [(6,)]]
    return [[torch.randn(shape, generator=generator) for shape in layer] for layer in shapes]


def moves() -> list[Tensor]:
    generator = torch.Generator().manual_seed(1)
    return [torch.randn((), generator=generator) for _ in range(3)]


def run(layers: list[list[Tensor]], shift: Any) -> list[list[Any]]:
    """Every measurement's changes as lists, the parameters moved in place by `shift` before each."""
    deltas = Deltas(layers)
    results = []
    for move in moves():
        for layer in layers:
            for tensor in layer:
                shift(tensor, move)
        results.append(
            [[NO_COSINE if value is None else value for value in vars(c).values()] for c in deltas.measure()]
        )
    return results


def shift_plain(tensor: Tensor, move: Tensor) -> None:
    tensor += move * torch.arange(tensor.numel()).view(tensor.shape).cos()


def fully_sharded(mesh: Any) -> bool:
    """Whether a network under fully_shard, trained for two steps, is measured as its gathered twin is."""
    from torch.distributed.fsdp import fully_shard

    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(5, 7), nn.ReLU(), nn.Linear(7, 3))
    fully_shard(net[0], mesh=mesh)
    fully_shard(net, mesh=mesh)
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
    deltas = Deltas([list(net[0].parameters()), list(net[2].parameters())], model=net)
    gathered = [[p.full_tensor().clone() for p in net[i].parameters()] for i in (0, 2)]
    twin = Deltas(gathered)
    for _ in range(2):
        net(torch.ones(4, 5)).square().sum().backward()
        optimizer.step()
        optimizer.zero_grad()
        for layer, i in zip(gathered, (0, 2), strict=True):
            for tensor, parameter in zip(layer, net[i].parameters(), strict=True):
                tensor.copy_(parameter.full_tensor())
        sharded, whole = deltas.measure(), twin.measure()
        for one, other in zip(sharded, whole, strict=True):
            if not one.l2 > 0 or list(vars(one).values())[:6] != pytest.approx(list(vars(other).values())[:6]):
                return False
            if other.cosine is not None and one.cosine != pytest.approx(other.cosine):
                return False
    return True


def refusal(layers: list[list[Tensor]]) -> str:
    try:
        Deltas(layers)
    except ValueError as error:
        return str(error)
    return "nothing was refused"


def worker(rank: int, folder: str) -> None:
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import DTensor, Partial, Replicate, Shard, distribute_tensor

    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=WORLD)
    mesh = init_device_mesh("cpu", (WORLD,))
    square = init_device_mesh("cpu", (WORLD, 1), mesh_dim_names=("replicate", "shard"))

    def shift_sharded(tensor: Tensor, move: Tensor) -> None:
        sharded = as_sharded(tensor)
        if sharded is None:
            return shift_plain(tensor, move)
        whole = sharded.full_tensor()
        shift_plain(whole, move)
        local_part(tensor).copy_(distribute_tensor(whole, sharded.device_mesh, sharded.placements).to_local())
        return None

    def on(some: Any, first: Any, second: Any) -> list[list[Tensor]]:
        (a, b), (c, d), (e,) = plain_layers()
        return [
            [distribute_tensor(a, some, first), distribute_tensor(b, some, first)],
            [distribute_tensor(c, some, second), d],
            [distribute_tensor(e, some, second)],
        ]

    torch.manual_seed(rank)
    nan = distribute_tensor(torch.zeros(4), mesh, [Shard(0)])
    deltas = Deltas([[nan]])
    if rank == 1:
        local_part(nan)[0] = torch.nan
    (broken,) = deltas.measure()
    results = {
        "one dimension": run(on(mesh, [Shard(0)], [Replicate()]), shift_sharded),
        "two dimensions": run(on(square, [Replicate(), Shard(0)], [Replicate(), Replicate()]), shift_sharded),
        "nan": [broken.nonfinite, broken.maximum != broken.maximum],
        "fully_shard": fully_sharded(mesh),
        "scheduler": scheduler_refusal(mesh),
        "partial": refusal([[DTensor.from_local(torch.ones(2), mesh, [Partial()])]]),
        "meshes": refusal([[nan], [distribute_tensor(torch.zeros(4), square, [Replicate(), Shard(0)])]]),
    }
    (Path(folder) / f"{rank}.json").write_text(json.dumps(results))
    torch.distributed.destroy_process_group()


def scheduler_refusal(mesh: Any) -> str:
    """What a DropScheduler says of a network under fully_shard."""
    from torch.distributed.fsdp import fully_shard

    net = nn.Sequential(nn.Linear(5, 7), nn.ReLU(), nn.Linear(7, 3))
    fully_shard(net, mesh=mesh)
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
    with pytest.raises(ValueError, match="DropScheduler") as refused:
        DropScheduler(net, optimizer, DataLoader(TensorDataset(torch.randn(4, 5), torch.zeros(4)), 2))
    return str(refused.value)


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """What each rank measured."""
    folder = tmp_path_factory.mktemp("gloo")
    start_processes(worker, args=(str(folder),), nprocs=WORLD, start_method=FORKS.get_start_method())
    return [json.loads((folder / f"{rank}.json").read_text()) for rank in range(WORLD)]


@pytest.mark.parametrize("mesh", ["one dimension", "two dimensions"])
def test_sharded_deltas_equal_those_of_the_whole(results: list[dict[str, Any]], mesh: str) -> None:
    wanted = run(plain_layers(), shift_plain)
    for rank in results:
        for measured, whole in zip(rank[mesh], wanted, strict=True):
            for one, other in zip(measured, whole, strict=True):
                assert one == pytest.approx(other, rel=1e-12)


def test_sharded_deltas_are_the_same_bits_on_every_rank(results: list[dict[str, Any]]) -> None:
    assert results[0]["one dimension"] == results[1]["one dimension"]


def test_sharded_deltas_show_one_rank_s_nan_to_all(results: list[dict[str, Any]]) -> None:
    assert [rank["nan"] for rank in results] == [[1, True], [1, True]]


def test_deltas_of_a_fully_sharded_network_equal_those_of_the_whole(results: list[dict[str, Any]]) -> None:
    assert all(rank["fully_shard"] for rank in results)


def test_a_scheduler_refuses_sharded_parameters(results: list[dict[str, Any]]) -> None:
    for rank in results:
        assert "DropScheduler: model must have whole parameters, got a sharded one" in rank["scheduler"]
        assert "0.weight; give DistributedDataParallel as wrap= instead" in rank["scheduler"]


def test_deltas_refuse_shards_that_are_summands_or_on_several_meshes(results: list[dict[str, Any]]) -> None:
    for rank in results:
        assert rank["partial"].startswith("build_table: a DTensor must be sharded or replicated, got placements (Part")
        assert rank["meshes"].startswith("build_table: layers must lie on one device mesh, got DeviceMesh")
