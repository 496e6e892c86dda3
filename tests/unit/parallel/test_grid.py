"""Which ranks share what, against an array of ranks."""

from __future__ import annotations

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from omnilit.config.parallel_sizes import ParallelSizes
from omnilit.parallel.grid import MeshAxis, RankGrid, mesh_axes
from tests.helpers.sizes import resolved_sizes

NAMES = ("pp", "dp_replicate", "dp_shard", "cp", "ulysses", "tp")


def groups_along(sizes: ParallelSizes, parts: tuple[str, ...]) -> set[tuple[int, ...]]:
    """The ranks that differ along `parts`, by moving these axes of an array to its end."""
    shape = [getattr(sizes, f"{name}_size") for name in NAMES]
    ranks = np.arange(sizes.world_size).reshape(shape)
    dims = [NAMES.index(part) for part in parts]
    moved = np.moveaxis(ranks, dims, range(-len(dims), 0))
    size = np.prod([shape[dim] for dim in dims], dtype=int)
    return {tuple(row) for row in moved.reshape(-1, size).tolist()}


def named(sizes: ParallelSizes) -> dict[tuple[str, str], MeshAxis]:
    return {(axis.mesh, axis.name): axis for axis in mesh_axes(sizes)}


@settings(max_examples=60)
@given(resolved_sizes())
def test_groups_of_every_dense_axis_are_the_ranks_that_differ_along_its_parts(
    sizes: ParallelSizes,
):
    found = {place: axis for place, axis in named(sizes).items() if place[0] != "sparse"}
    for axis in found.values():
        groups = axis.groups()
        assert set(groups) == groups_along(sizes, axis.parts)
        assert sorted(rank for group in groups for rank in group) == list(range(sizes.world_size))
        assert all(axis.place(rank) == n for group in groups for n, rank in enumerate(group))
    two_dims = sizes.is_ddp or sizes.dp_replicate_size > 1
    assert (("fsdp", "dp_replicate") in found) == two_dims


@settings(max_examples=60)
@given(resolved_sizes())
def test_expert_axes_divide_up_the_ranks_of_one_copy(sizes: ParallelSizes):
    found = named(sizes)
    if sizes.ep_size == 1:
        assert not any(mesh == "sparse" for mesh, _ in found)
        return
    copies = groups_along(sizes, ("dp_shard", "cp", "ulysses", "tp"))
    efsdp, ep = found["sparse", "efsdp"], found["sparse", "ep"]
    for ranks in copies:
        places = {(efsdp.place(rank), ep.place(rank)) for rank in ranks}
        assert len(places) == len(ranks) == efsdp.size * ep.size
    inner, outer = (efsdp, ep) if sizes.ep_outside else (ep, efsdp)
    assert all(np.diff(group).tolist() == [1] * (inner.size - 1) for group in inner.groups())
    assert all(set(np.diff(group).tolist()) <= {inner.size} for group in outer.groups())
    assert (("sparse", "dp_replicate") in found) == (sizes.dp_replicate_size > 1)
    if sizes.dp_replicate_size > 1:
        groups = set(found["sparse", "dp_replicate"].groups())
        assert groups == groups_along(sizes, ("dp_replicate",))


@settings(max_examples=60)
@given(resolved_sizes())
def test_ranks_of_a_sequence_tensor_or_pipeline_group_read_the_same_data(sizes: ParallelSizes):
    found = named(sizes)
    data = found["data", "data"]
    for name in ("sequence", "tp", "pp"):
        for group in found[name, name].groups():
            assert len({data.place(rank) for rank in group}) == 1
    first = [
        data.place(rank)
        for rank in range(sizes.world_size)
        if all(found[name, name].place(rank) == 0 for name in ("sequence", "tp", "pp"))
    ]
    assert sorted(first) == list(range(sizes.data_size))


@given(st.permutations(["a", "b", "c"]))
def test_axes_taken_together_count_the_last_one_fastest(order: list[str]):
    grid = RankGrid(("a", "b", "c"), (2, 3, 4))
    ranks = np.arange(24).reshape(2, 3, 4).transpose([grid.axes.index(name) for name in order])
    assert [grid.place(rank, order) for rank in ranks.flatten().tolist()] == list(range(24))


def test_the_layout_of_the_documentation():
    sizes = ParallelSizes(dp_shard_size=2, ulysses_size=2, tp_size=2, ep_size=4).resolve(8)
    found = {axis.name: axis.groups() for axis in mesh_axes(sizes)}
    assert found["data"] == [(0, 4), (1, 5), (2, 6), (3, 7)]
    assert found["fsdp"] == [(0, 2, 4, 6), (1, 3, 5, 7)]
    assert found["ulysses"] == [(0, 2), (1, 3), (4, 6), (5, 7)]
    assert found["tp"] == [(0, 1), (2, 3), (4, 5), (6, 7)]
    assert found["ep"] == [(0, 1, 2, 3), (4, 5, 6, 7)]
    assert found["efsdp"] == [(0, 4), (1, 5), (2, 6), (3, 7)]
