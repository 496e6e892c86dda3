"""Rules on `train.accelerator` and recomputation: how a model is spread, before it is."""

from __future__ import annotations

from typing import Final

from omnilit.config.view import View
from omnilit.errors import Problem

ACCELERATOR: Final = "train.accelerator"
REPLICATE: Final = f"{ACCELERATOR}.dp_replicate_size"
SHARD: Final = f"{ACCELERATOR}.dp_shard_size"
FSDP: Final = f"{ACCELERATOR}.fsdp_config"
MODE: Final = f"{FSDP}.fsdp_mode"
MIXED: Final = f"{FSDP}.mixed_precision"
RECOMPUTE: Final = "train.gradient_checkpointing"
# What only ranks that share a model's parameters can do
FSDP2_ONLY: Final = (
    f"{FSDP}.reshard_after_forward",
    f"{FSDP}.reshard_after_backward",
    f"{FSDP}.forward_prefetch",
    f"{MIXED}.output_dtype",
    f"{MIXED}.cast_forward_inputs",
)


def fit_data_sizes(replicate: int, shard: int, *, ranks: int) -> tuple[int, int] | None:
    """Sizes of the two data-parallel axes with -1 filled in, so that they multiply to `ranks`.

    Args:
        replicate: Copies of the sharded model; -1 takes what the other leaves, or 1.
        shard: Ranks that share one copy; -1 takes what the other leaves.
        ranks: Those that read different data.

    Returns:
        Both sizes; None where they do not divide or do not make up the ranks.
    """
    known = max(replicate, 1) * max(shard, 1)
    if ranks % known:
        return None
    if shard == -1:
        replicate, shard = max(replicate, 1), ranks // known
    elif replicate == -1:
        replicate = ranks // known
    return (replicate, shard) if replicate * shard == ranks else None


def describe_sizes(replicate: int, shard: int) -> str:
    """The sizes that were chosen, as a product."""
    sizes = (("dp_replicate_size", replicate), ("dp_shard_size", shard))
    return " * ".join(f"{name} {size}" for name, size in sizes if size > 0)


def ddp_shards_nothing(view: View) -> list[Problem]:
    """A problem where ranks are to share what DDP gives each of them whole."""
    size = view[SHARD]
    if view[MODE] != "ddp" or size in {-1, 1}:
        return []
    return [
        Problem(
            SHARD,
            f"fsdp_mode: ddp gives each rank the whole model, so {size} ranks cannot share one",
            "leave dp_shard_size out, or set fsdp_mode: fsdp2",
        )
    ]


def sizes_are_the_ranks(view: View) -> list[Problem]:
    """A problem where the data-parallel sizes do not multiply to the number of ranks."""
    replicate, shard, ranks = view[REPLICATE], view[SHARD], view.world_size
    if view[MODE] == "ddp":
        shard = 1
    if ranks is None or fit_data_sizes(replicate, shard, ranks=ranks) is not None:
        return []
    if view[MODE] == "ddp":
        problem = f"fsdp_mode: ddp makes a copy a rank: {replicate} are not the {ranks} of this run"
        return [Problem(REPLICATE, problem, f"leave it out, or set it to {ranks}")]
    return [
        Problem(
            SHARD if shard > 0 else REPLICATE,
            f"{describe_sizes(replicate, shard)} does not make up the {ranks} ranks of this run",
            "set dp_shard_size: -1, or choose sizes whose product is the number of ranks",
        )
    ]


def ddp_reads_it(view: View, path: str) -> list[Problem]:
    """A problem where a setting of sharded parameters is given to DDP."""
    if view[MODE] != "ddp" or not view.is_changed(path):
        return []
    value = view[path]
    shown = str(value).lower() if isinstance(value, bool) else value
    return [
        Problem(
            path,
            f"{shown} has no effect, because fsdp_mode: ddp neither shards nor gathers parameters",
            "leave it out, or set fsdp_mode: fsdp2",
        )
    ]


def debugging_is_not_reentrant(view: View) -> list[Problem]:
    """A problem where the reentrant form is to record what only the other one can."""
    path = f"{RECOMPUTE}.debug"
    if not (view[f"{RECOMPUTE}.enable"] and view[path] and view[f"{RECOMPUTE}.enable_reentrant"]):
        return []
    return [
        Problem(
            path,
            "enable_reentrant: true recomputes without comparing, so there is nothing to record",
            "set enable_reentrant: false, or leave debug out",
        )
    ]
