"""The real meshes have the groups that the arithmetic says."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Shard, distribute_tensor

from omnilit.errors import ConfigError
from omnilit.parallel.grid import mesh_axes
from omnilit.parallel.mesh import ParallelSizes, Topology
from omnilit.testing import run_ranks

pytestmark = pytest.mark.dist
CPU = torch.device("cpu")
LAYOUTS = {
    4: (
        ParallelSizes(),
        ParallelSizes(dp_replicate_size=2, ulysses_size=2),
        ParallelSizes(pp_size=2, tp_size=2, ep_size=2),
        ParallelSizes(cp_size=2, is_ddp=True),
    ),
    8: (ParallelSizes(dp_replicate_size=2, ulysses_size=2, ep_size=2, ep_outside=True),),
}


def all_groups() -> list[dict[tuple[str, str], tuple[tuple[int, ...], int]]]:
    """Of each layout, this rank's group and place on each axis of each mesh."""
    found: list[dict[tuple[str, str], tuple[tuple[int, ...], int]]] = []
    for sizes in LAYOUTS[dist.get_world_size()]:
        topology = Topology.build(sizes, CPU)
        meshes = [name for name in Topology.__slots__ if name not in ("sizes", "device")]
        own: dict[tuple[str, str], tuple[tuple[int, ...], int]] = {}
        for name in meshes:
            mesh: DeviceMesh | None = getattr(topology, name)
            for axis in (mesh.mesh_dim_names or ()) if mesh is not None else ():
                assert mesh is not None
                group = dist.get_process_group_ranks(mesh.get_group(axis))
                own[name, axis] = (tuple(group), mesh.get_local_rank(axis))
        found.append(own)
    return found


@pytest.mark.parametrize("num_ranks", [4, 8])
def test_meshes_have_the_groups_of_the_arithmetic(num_ranks: int, tmp_path: Path):
    ranks = run_ranks(all_groups, num_ranks, tmp_path=tmp_path)
    for number, sizes in enumerate(LAYOUTS[num_ranks]):
        axes = {(axis.mesh, axis.name): axis for axis in mesh_axes(sizes.resolve(num_ranks))}
        groups = {place: axis.groups() for place, axis in axes.items()}
        for rank, found in enumerate(ranks):
            expected = {
                place: (next(g for g in groups[place] if rank in g), axis.place(rank))
                for place, axis in axes.items()
            }
            assert found[number] == expected


def described() -> tuple[Any, ...]:
    topology = Topology.build(ParallelSizes(ulysses_size=2, tp_size=2), CPU)
    ranks = (topology.data_rank, topology.sequence_rank, topology.tp_rank, topology.pp_rank)
    sizes = (topology.data_size, topology.sequence_size)
    with pytest.raises(ConfigError, match="does not make up the 4 ranks"):
        Topology.build(ParallelSizes(pp_size=3), CPU)
    return ranks, sizes, topology.is_first_of_data, topology.rows()


def test_a_topology_says_where_its_rank_stands(tmp_path: Path):
    found = run_ranks(described, 4, tmp_path=tmp_path)
    assert [ranks for ranks, *_ in found] == [
        (0, 0, 0, 0),
        (0, 0, 1, 0),
        (0, 1, 0, 0),
        (0, 1, 1, 0),
    ]
    assert [is_first for _, _, is_first, _ in found] == [True, False, False, False]
    _, sizes, _, (header, rows) = found[3]
    assert sizes == (1, 2)
    assert header == ("mesh", "axes", "ranks", "this rank")
    assert rows == [
        ("data", "dp_replicate x dp_shard", 1, 0),
        ("loss", "dp_replicate x dp_shard x cp x ulysses", 2, 1),
        ("fsdp", "dp_shard x cp x ulysses", 2, 1),
        ("sequence", "cp x ulysses", 2, 1),
        ("ulysses", "ulysses", 2, 1),
        ("tp", "tp", 2, 1),
    ]


FULL = torch.arange(128.0).view(8, 16)


def sharded_twice() -> list[tuple[tuple[int, ...], bool]]:
    """One matrix over ep and efsdp in both orders, and over tp and fsdp."""
    found = []
    for sizes, inner in (
        (ParallelSizes(ep_size=2), "ep"),
        (ParallelSizes(ep_size=2, ep_outside=True), "ep"),
        (ParallelSizes(tp_size=2), "tp"),
    ):
        topology = Topology.build(sizes, CPU)
        mesh, outer = topology.tp, topology.fsdp
        if topology.sparse is not None:
            mesh, outer = topology.sparse["ep"], topology.sparse["efsdp"]
        layer = nn.Linear(16, 8, bias=False)
        split = distribute_tensor(FULL, mesh, [Shard(0)], src_data_rank=None)
        layer.weight = nn.Parameter(split)
        fully_shard(layer, mesh=outer, shard_placement_fn=lambda _: Shard(1))
        weight = layer.weight
        assert isinstance(weight, DTensor)
        half = FULL[4 * mesh.get_local_rank() :][:4]
        own = half[:, 8 * outer.get_local_rank() :][:, :8]
        assert torch.equal(weight.to_local(), own), inner
        found.append((tuple(weight.to_local().shape), torch.equal(weight.full_tensor(), FULL)))
    return found


def test_fsdp_joins_its_mesh_with_those_of_experts_and_matrices(tmp_path: Path):
    for found in run_ranks(sharded_twice, 4, tmp_path=tmp_path):
        assert found == [((4, 8), True)] * 3
