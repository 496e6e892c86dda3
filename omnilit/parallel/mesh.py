"""Sizes of the parallel axes, and the device meshes cut from them."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

from omnilit.config import AcceleratorConfig
from omnilit.config.parallel_rules import describe_sizes, fit_data_sizes
from omnilit.errors import ConfigError

KEY = "train.accelerator"


@dataclass(frozen=True, slots=True)
class ParallelSizes:
    """How many ranks each parallel axis has; names as in `train.accelerator`.

    Args:
        dp_replicate_size: Copies of the sharded model; -1 takes what the other leaves.
        dp_shard_size: Ranks that share one copy; -1 takes what the other leaves.
    """

    dp_replicate_size: int = -1
    dp_shard_size: int = -1

    @classmethod
    def of(cls, config: AcceleratorConfig) -> ParallelSizes:
        """The sizes that a configuration asks for; under DDP every rank holds a copy of its own.

        Raises:
            ConfigError: DDP is to shard.
        """
        shard = config.dp_shard_size
        if config.fsdp_config.fsdp_mode == "ddp":
            if shard not in {-1, 1}:
                raise ConfigError(
                    key=f"{KEY}.dp_shard_size",
                    problem=f"fsdp_mode: ddp shards nothing, and {shard} ranks are to share a copy",
                    fix="leave dp_shard_size out, or set fsdp_mode: fsdp2",
                )
            shard = 1
        return cls(config.dp_replicate_size, shard)

    @property
    def data_size(self) -> int:
        """Ranks that read different data."""
        return self.dp_replicate_size * self.dp_shard_size

    def resolve(self, world_size: int) -> ParallelSizes:
        """The same sizes with -1 filled in, so that they multiply to `world_size`.

        Both at -1 means one copy, sharded over all ranks.

        Raises:
            ConfigError: The sizes do not divide or do not multiply to `world_size`.
        """
        replicate, shard = self.dp_replicate_size, self.dp_shard_size
        for name, size in (("dp_replicate_size", replicate), ("dp_shard_size", shard)):
            if size != -1 and size < 1:
                raise ConfigError(
                    key=f"{KEY}.{name}",
                    problem=f"{size} is neither -1 nor a positive number of ranks",
                    fix="give -1 to take what the other sizes leave, or a number of ranks",
                )
        fitting = fit_data_sizes(replicate, shard, ranks=world_size)
        if fitting is None:
            raise _does_not_fit(replicate, shard, world_size)
        return ParallelSizes(*fitting)


def _does_not_fit(replicate: int, shard: int, world_size: int) -> ConfigError:
    key = "dp_shard_size" if shard > 0 else "dp_replicate_size"
    sizes = describe_sizes(replicate, shard)
    return ConfigError(
        key=f"{KEY}.{key}",
        problem=f"{sizes} does not make up the {world_size} ranks of this run",
        fix="set dp_shard_size: -1, or choose sizes whose product is the number of ranks",
    )


@dataclass(frozen=True, slots=True)
class Topology:
    """One device mesh for each consumer, all cut from one root mesh.

    Args:
        sizes: Resolved sizes.
        device: This rank's device.
        data: dp_replicate x dp_shard as one axis: samplers and data state.
        loss: Every rank that holds tokens of its own: the token count.
        fsdp: What dense parameters are sharded over: dp_shard, or dp_replicate and dp_shard.
    """

    sizes: ParallelSizes
    device: torch.device
    data: DeviceMesh
    loss: DeviceMesh
    fsdp: DeviceMesh

    @classmethod
    def build(cls, sizes: ParallelSizes, device: torch.device) -> Topology:
        """Cut the meshes; every rank of the run calls, inside its process group.

        Raises:
            ConfigError: The sizes do not fit the number of ranks.
        """
        sizes = sizes.resolve(dist.get_world_size())
        root = init_device_mesh(
            device.type,
            (sizes.dp_replicate_size, sizes.dp_shard_size),
            mesh_dim_names=("dp_replicate", "dp_shard"),
        )
        data = root._flatten("data")  # noqa: SLF001  # pyright: ignore[reportPrivateUsage]
        fsdp = root if sizes.dp_replicate_size > 1 else root["dp_shard"]
        return cls(sizes=sizes, device=device, data=data, loss=data, fsdp=fsdp)

    @property
    def data_rank(self) -> int:
        """This rank's place among the ranks that read different data."""
        return self.data.get_local_rank()

    @property
    def data_size(self) -> int:
        """Number of ranks that read different data."""
        return self.sizes.data_size

    def rows(self) -> tuple[tuple[str, ...], list[tuple[object, ...]]]:
        """Header and rows of the table that is logged at the start."""
        rows: list[tuple[object, ...]] = [
            ("data", "dp_replicate x dp_shard", self.data_size, self.data_rank)
        ]
        names = self.fsdp.mesh_dim_names or ()
        for dim, name in enumerate(names):
            rows.append(("fsdp", name, self.fsdp.size(dim), self.fsdp.get_local_rank(dim)))
        return ("mesh", "axes", "ranks", "this rank"), rows
