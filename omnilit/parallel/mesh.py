"""The device meshes of a run, one for each consumer."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch.distributed import ProcessGroup
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

from omnilit.config.parallel_sizes import ParallelSizes
from omnilit.parallel.grid import RankGrid, expert_grid, token_grid, used_axes, weight_grid

__all__ = ["ParallelSizes", "Topology"]


@dataclass(frozen=True, slots=True)
class Topology:
    """One device mesh for each consumer, all views of the same ranks.

    Keep to these objects: what torch flattened or reshaped cannot be sliced from the root again.

    Args:
        sizes: Resolved sizes.
        device: This rank's device.
        data: dp_replicate x dp_shard as one axis: samplers and data state.
        loss: Every rank that holds tokens of its own, as one axis: sums over tokens.
        fsdp: What dense parameters are sharded over: fsdp, made of dp_shard x cp x ulysses, or
            (dp_replicate, fsdp) where there are copies. Under DDP copies are all there are:
            (dp_replicate x cp x ulysses, 1).
        sparse: What experts are spread over: (efsdp, ep), or (dp_replicate, efsdp, ep); None
            where ep_size is 1.
        sequence: cp x ulysses as one axis: the ranks that hold parts of the same sequences, in
            the order of the parts.
        ulysses: Those that trade their part of a sequence for heads.
        cp: Those that exchange keys and values.
        tp: Those that split each matrix.
        pp: One rank of each pipeline stage.
    """

    sizes: ParallelSizes
    device: torch.device
    data: DeviceMesh
    loss: DeviceMesh
    fsdp: DeviceMesh
    sparse: DeviceMesh | None
    sequence: DeviceMesh
    ulysses: DeviceMesh
    cp: DeviceMesh
    tp: DeviceMesh
    pp: DeviceMesh

    @classmethod
    def build(cls, sizes: ParallelSizes, device: torch.device) -> Topology:
        """Cut the meshes; every rank of the run calls, inside its process group.

        Raises:
            ConfigError: The sizes do not fit the number of ranks.
        """
        sizes = sizes.resolve(dist.get_world_size())
        root = init_device_mesh(device.type, (sizes.world_size,), mesh_dim_names=("world",))
        tokens, weights = _cut(root, token_grid(sizes)), _cut(root, weight_grid(sizes))
        has_copies = sizes.replicate_size > 1 or sizes.is_ddp
        return cls(
            sizes=sizes,
            device=device,
            data=tokens["data"],
            loss=_flatten(tokens["data", "cp", "ulysses"], "loss"),
            fsdp=weights["dp_replicate", "fsdp"] if has_copies else weights["fsdp"],
            sparse=_expert_mesh(root, sizes) if sizes.ep_size > 1 else None,
            sequence=_flatten(tokens["cp", "ulysses"], "sequence"),
            ulysses=tokens["ulysses"],
            cp=tokens["cp"],
            tp=weights["tp"],
            pp=weights["pp"],
        )

    @property
    def efsdp(self) -> DeviceMesh | None:
        """What the experts that a rank holds are sharded over: efsdp, or (dp_replicate, efsdp)."""
        if self.sparse is None:
            return None
        has_copies = "dp_replicate" in (self.sparse.mesh_dim_names or ())
        return self.sparse["dp_replicate", "efsdp"] if has_copies else self.sparse["efsdp"]

    @property
    def data_rank(self) -> int:
        """This rank's place among the ranks that read different data."""
        return self.data.get_local_rank()

    @property
    def data_size(self) -> int:
        """Number of ranks that read different data."""
        return self.sizes.data_size

    @property
    def sequence_rank(self) -> int:
        """Which part of its sequences this rank holds."""
        return self.sequence.get_local_rank()

    @property
    def sequence_size(self) -> int:
        """Number of parts that sequences are split into."""
        return self.sizes.sequence_size

    @property
    def sequence_group(self) -> ProcessGroup | None:
        """The ranks that hold parts of the same sequences; None where each is whole."""
        return self.sequence.get_group() if self.sequence_size > 1 else None

    @property
    def tp_rank(self) -> int:
        """Which part of each matrix this rank holds."""
        return self.tp.get_local_rank()

    @property
    def pp_rank(self) -> int:
        """This rank's pipeline stage, counted from 0."""
        return self.pp.get_local_rank()

    @property
    def stages(self) -> ProcessGroup | None:
        """The ranks that hold the other stages of the model; None where it has one."""
        return self.pp.get_group() if self.sizes.pp_size > 1 else None

    @property
    def is_first_of_data(self) -> bool:
        """True on one rank of those that read the same data: it speaks for them."""
        return self.sequence_rank == self.tp_rank == self.pp_rank == 0

    def rows(self) -> tuple[tuple[str, ...], list[tuple[object, ...]]]:
        """Header and rows of the table that is logged at the start."""
        rank = dist.get_rank()
        rows: list[tuple[object, ...]] = [
            (axis.mesh, " x ".join(axis.parts), axis.size, axis.place(rank))
            for axis in used_axes(self.sizes)
        ]
        return ("mesh", "axes", "ranks", "this rank"), rows


# Torch's own names for these begin with an underscore; there are no others that share one root,
# without which FSDP2 cannot join its mesh with that of tensor or expert parallelism.


def _cut(root: DeviceMesh, grid: RankGrid) -> DeviceMesh:
    return root._unflatten(0, grid.shape, grid.axes)  # noqa: SLF001  # pyright: ignore[reportPrivateUsage]


def _flatten(mesh: DeviceMesh, name: str) -> DeviceMesh:
    return mesh._flatten(name)  # noqa: SLF001  # pyright: ignore[reportPrivateUsage]


def _expert_mesh(root: DeviceMesh, sizes: ParallelSizes) -> DeviceMesh:
    """The expert axes in one order of dimensions, whichever of them counts faster."""
    experts = _cut(root, expert_grid(sizes))
    names = ["dp_replicate"] if sizes.dp_replicate_size > 1 else []
    parts = [experts[name] for name in (*names, "efsdp", "ep")]
    return DeviceMesh._concatenate(parts)  # noqa: SLF001  # pyright: ignore[reportPrivateUsage]
