"""Which ranks share what: the parallel axes as grids of ranks, without a process."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import prod

from omnilit.config.parallel_sizes import ParallelSizes


@dataclass(frozen=True, slots=True)
class RankGrid:
    """All ranks of a run counted along axes, the last one fastest.

    Args:
        axes: Names, outermost first.
        shape: Ranks along each.
    """

    axes: tuple[str, ...]
    shape: tuple[int, ...]

    def size(self, axes: Sequence[str]) -> int:
        """Ranks along `axes` together."""
        return prod(self.shape[self.axes.index(axis)] for axis in axes)

    def place(self, rank: int, axes: Sequence[str]) -> int:
        """A rank's place along `axes` taken together, the last one fastest."""
        place = 0
        for axis in axes:
            dim = self.axes.index(axis)
            stride = prod(self.shape[dim + 1 :])
            place = place * self.shape[dim] + rank // stride % self.shape[dim]
        return place

    def groups(self, axes: Sequence[str]) -> list[tuple[int, ...]]:
        """The ranks that differ along `axes` only, group by group, each in the order of places."""
        others = [axis for axis in self.axes if axis not in axes]
        ranks = range(prod(self.shape))
        found: list[list[int]] = [[] for _ in range(len(ranks) // self.size(axes))]
        for rank in sorted(ranks, key=lambda rank: self.place(rank, axes)):
            found[self.place(rank, others)].append(rank)
        return [tuple(group) for group in found]


@dataclass(frozen=True, slots=True)
class MeshAxis:
    """One axis of a mesh of `Topology`.

    Args:
        mesh: Name of the mesh.
        name: Of the axis in it.
        parts: The sizes' axes that it is made of, outermost first.
        grid: The ranks.
        axes: Its axes there.
    """

    mesh: str
    name: str
    parts: tuple[str, ...]
    grid: RankGrid
    axes: tuple[str, ...]

    @property
    def size(self) -> int:
        """Ranks of one group."""
        return self.grid.size(self.axes)

    def place(self, rank: int) -> int:
        """A rank's place in its group."""
        return self.grid.place(rank, self.axes)

    def groups(self) -> list[tuple[int, ...]]:
        """All groups, each in the order of its ranks' places."""
        return self.grid.groups(self.axes)


def token_grid(sizes: ParallelSizes) -> RankGrid:
    """Ranks by what they do with tokens.

    Args:
        sizes: Resolved.
    """
    shape = (sizes.pp_size, sizes.data_size, sizes.cp_size, sizes.ulysses_size, sizes.tp_size)
    return RankGrid(("pp", "data", "cp", "ulysses", "tp"), shape)


def weight_grid(sizes: ParallelSizes) -> RankGrid:
    """Ranks by what they hold of dense parameters.

    Args:
        sizes: Resolved.
    """
    shape = (sizes.pp_size, sizes.replicate_size, sizes.fsdp_size, sizes.tp_size)
    return RankGrid(("pp", "dp_replicate", "fsdp", "tp"), shape)


def expert_grid(sizes: ParallelSizes) -> RankGrid:
    """Ranks by what they hold of experts.

    Args:
        sizes: Resolved.
    """
    inner = [("efsdp", sizes.efsdp_size), ("ep", sizes.ep_size)]
    if sizes.ep_outside:
        inner.reverse()
    axes = [("pp", sizes.pp_size), ("dp_replicate", sizes.dp_replicate_size), *inner]
    return RankGrid(tuple(name for name, _ in axes), tuple(size for _, size in axes))


def mesh_axes(sizes: ParallelSizes) -> list[MeshAxis]:
    """Every axis of every mesh of `Topology`.

    Args:
        sizes: Resolved.
    """
    tokens, weights, experts = token_grid(sizes), weight_grid(sizes), expert_grid(sizes)
    data, sequence = ("dp_replicate", "dp_shard"), ("cp", "ulysses")
    copies, shared = ("dp_replicate",), ("dp_shard", *sequence)
    if sizes.is_ddp:
        copies, shared = ("dp_replicate", *sequence), ("dp_shard",)
    found = [
        MeshAxis("data", "data", data, tokens, ("data",)),
        MeshAxis("loss", "loss", (*data, *sequence), tokens, ("data", *sequence)),
        MeshAxis("fsdp", "fsdp", shared, weights, ("fsdp",)),
        MeshAxis("sequence", "sequence", sequence, tokens, sequence),
        *(MeshAxis(name, name, (name,), tokens, (name,)) for name in sequence),
        *(MeshAxis(name, name, (name,), weights, (name,)) for name in ("tp", "pp")),
    ]
    if sizes.replicate_size > 1 or sizes.is_ddp:
        found.insert(2, MeshAxis("fsdp", "dp_replicate", copies, weights, ("dp_replicate",)))
    if sizes.ep_size > 1:
        if sizes.dp_replicate_size > 1:
            name = "dp_replicate"
            found.append(MeshAxis("sparse", name, (name,), experts, (name,)))
        found += [MeshAxis("sparse", n, (n,), experts, (n,)) for n in ("efsdp", "ep")]
    return found


def used_axes(sizes: ParallelSizes) -> list[MeshAxis]:
    """The axes of more than one rank, and the two that every run has.

    Args:
        sizes: Resolved.
    """
    return [axis for axis in mesh_axes(sizes) if axis.size > 1 or axis.name in ("data", "fsdp")]
