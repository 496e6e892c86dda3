"""Rules on `train.accelerator` and recomputation: how a model is spread, before it is."""

from __future__ import annotations

from typing import Final

from omnilit.config.parallel_sizes import ACCELERATOR, DATA_SIZES, SHARING_SIZES, ParallelSizes
from omnilit.config.view import View
from omnilit.errors import Problem

REPLICATE: Final = f"{ACCELERATOR}.dp_replicate_size"
SHARD: Final = f"{ACCELERATOR}.dp_shard_size"
EXPERTS: Final = f"{ACCELERATOR}.ep_size"
OUTSIDE: Final = f"{ACCELERATOR}.ep_outside"
ULYSSES: Final = f"{ACCELERATOR}.ulysses_size"
ASYNC: Final = f"{ACCELERATOR}.enable_async"
CONTEXT: Final = f"{ACCELERATOR}.cp_size"
METHOD: Final = f"{ACCELERATOR}.cp_method"
STAGES: Final = f"{ACCELERATOR}.pp_size"
SCHEDULE: Final = f"{ACCELERATOR}.pp_schedule"
ATTENTION: Final = "model.ops_implementation.attn_implementation"
SIZES: Final = (*(f"{ACCELERATOR}.{name}" for name in (*DATA_SIZES, *SHARING_SIZES)), EXPERTS)
# Options that say how one axis works, with the size of that axis
OF_AXIS: Final = (
    (OUTSIDE, EXPERTS),
    (ASYNC, ULYSSES),
    (METHOD, CONTEXT),
    (SCHEDULE, STAGES),
)
OF_RING: Final = (CONTEXT, METHOD, ATTENTION)
FSDP: Final = f"{ACCELERATOR}.fsdp_config"
MODE: Final = f"{FSDP}.fsdp_mode"
MIXED: Final = f"{FSDP}.mixed_precision"
RECOMPUTE: Final = "train.gradient_checkpointing"
FROM_RANK0: Final = "train.broadcast_model_weights_from_rank0"
CHUNK: Final = f"{FSDP}.max_load_broadcast_size"
MOVED: Final = f"{ACCELERATOR}.offload_config.enable_activation"
KEPT: Final = f"{ACCELERATOR}.offload_config.activation_gpu_limit"
# What only ranks that share a model's parameters can do
FSDP2_ONLY: Final = (
    f"{FSDP}.reshard_after_forward",
    f"{FSDP}.reshard_after_backward",
    f"{FSDP}.forward_prefetch",
    f"{FSDP}.sync_each_micro_batch",
    f"{MIXED}.output_dtype",
    f"{MIXED}.cast_forward_inputs",
)


def sizes_of(view: View) -> ParallelSizes:
    """The sizes of the parallel axes, not resolved; every field of `SIZES` is there and good."""
    paths = (*SIZES, OUTSIDE)
    named = {path.removeprefix(f"{ACCELERATOR}."): view[path] for path in paths}
    return ParallelSizes(**named, is_ddp=view[MODE] == "ddp")


def sizes_fit(view: View) -> list[Problem]:
    """Problems where the sizes fit no number of ranks, or not the one that is known."""
    return sizes_of(view).problems(view.world_size)


def data_ranks(view: View) -> int | None:
    """Ranks that read different data, where the number of ranks is known."""
    if view.world_size is None:
        return None
    return view.world_size // sizes_of(view).sharing_size


def option_has_its_axis(view: View, path: str, *, size: str) -> list[Problem]:
    """A problem where an option of an axis is given, and the axis has one rank.

    Args:
        view: The values.
        path: The option.
        size: Path of the axis's size.
    """
    if not view.is_changed(path) or view[size] > 1:
        return []
    name = size.removeprefix(f"{ACCELERATOR}.")
    problem = f"{_shown(view[path])} has no effect, because {name} is {view[size]}"
    return [Problem(path, problem, f"leave it out, or set {name} above 1")]


def ring_attends_itself(view: View) -> list[Problem]:
    """A problem where a kernel of attention is given, and a ring goes past it."""
    if view[CONTEXT] == 1 or view[METHOD] != "ring" or not view.is_changed(ATTENTION):
        return []
    problem = f"{view[ATTENTION]} has no effect, because cp_method: ring attends by code of its own"
    return [Problem(ATTENTION, problem, "leave it out, or set cp_method: gather")]


def ddp_reads_it(view: View, path: str) -> list[Problem]:
    """A problem where a setting of sharded parameters is given to DDP."""
    if view[MODE] != "ddp" or not view.is_changed(path):
        return []
    shown = _shown(view[path])
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


def chunks_are_sent(view: View) -> list[Problem]:
    """A problem where the size of what rank 0 sends is given, and it sends nothing."""
    if view[FROM_RANK0] or not view.is_changed(CHUNK):
        return []
    problem = f"{view[CHUNK]} has no effect, because {FROM_RANK0}: false sends no tensor"
    return [Problem(CHUNK, problem, "leave it out, or let rank 0 send the weights")]


def activations_have_a_limit(view: View) -> list[Problem]:
    """A problem where activations may stay on the device up to a limit, and all of them stay."""
    if view[MOVED] or not view.is_changed(KEPT):
        return []
    problem = f"{view[KEPT]} has no effect, because enable_activation: false moves no activation"
    return [Problem(KEPT, problem, "leave it out, or set enable_activation: true")]


def _shown(value: object) -> str:
    """A value as it stands in a YAML file."""
    return str(value).lower() if isinstance(value, bool) else str(value)
