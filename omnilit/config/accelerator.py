"""`train.accelerator`: how a model is spread over devices, and in which precision."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal


@dataclass(frozen=True)
class MixedPrecisionConfig:
    """Which dtype is used where.

    Args:
        enable: Keep weights and moments in `master_dtype` and compute in `param_dtype`; false
            keeps and computes everything in `master_dtype`.
        param_dtype: Dtype of the gathered parameters and of the computation: bfloat16, float32,
            or auto for bfloat16 where this machine computes it fast and master_dtype elsewhere.
        reduce_dtype: Dtype in which gradients are summed over ranks: bfloat16 or float32.
        output_dtype: Dtype that floating-point outputs of the model are cast to; null leaves them.
        cast_forward_inputs: Cast floating-point inputs of each block to `param_dtype`.
        master_dtype: Dtype of the stored weights and of the optimizer's moments.
    """

    enable: bool = True
    param_dtype: str = "bfloat16"
    reduce_dtype: str = "float32"
    output_dtype: str | None = None
    cast_forward_inputs: bool = True
    master_dtype: str = "float32"


@dataclass(frozen=True)
class FSDPConfig:
    """How data-parallel ranks share the parameters.

    Args:
        fsdp_mode: fsdp2 shards parameters, gradients and moments; ddp gives each rank all.
        reshard_after_forward: Free gathered parameters after forward and gather them again for
            backward: less memory, more communication.
        reshard_after_backward: Free gathered parameters after the backward of each micro-batch;
            false keeps them until the last one of the step.
        forward_prefetch: Ask for the next block's parameters before one block computes.
        offload: Keep parameters, gradients and moments in host memory, where the optimizer then
            works too; a block is copied to the device when it computes.
        max_load_broadcast_size: Largest tensor, in GB, that rank 0 sends whole while weights are
            loaded; larger ones go in chunks.
        sync_each_micro_batch: Reduce gradients over ranks after every micro-batch of a step, not
            only after the last: less memory, more communication.
        mixed_precision: Which dtype is used where.
    """

    fsdp_mode: Literal["ddp", "fsdp2"] = "fsdp2"
    reshard_after_forward: bool = True
    reshard_after_backward: bool = True
    forward_prefetch: bool = True
    offload: bool = False
    max_load_broadcast_size: float = 20.0
    sync_each_micro_batch: bool = False
    mixed_precision: MixedPrecisionConfig = field(default_factory=MixedPrecisionConfig)


@dataclass(frozen=True)
class OffloadConfig:
    """Activations kept in host memory between forward and backward.

    Args:
        enable_activation: Move activations to host memory.
        activation_gpu_limit: Activations that may stay on the device, in GB.
    """

    enable_activation: bool = False
    activation_gpu_limit: float = 0.0


@dataclass(frozen=True)
class AcceleratorConfig:
    """Sizes of the parallel axes; their product is the number of ranks.

    Args:
        dp_replicate_size: Data-parallel groups that each hold a whole copy of the shards; -1 is
            what the other sizes leave.
        dp_shard_size: Data-parallel ranks that share one copy of the parameters; -1 is what the
            other sizes leave.
        tp_size: Ranks that split each matrix.
        ep_size: Ranks that split the experts.
        ep_outside: Lay the expert axis outside the axis that shards one expert.
        pp_size: Ranks that each hold a stage of the model's layers, and pass hidden states on.
        pp_schedule: In which order a stage runs the micro-batches of a step: 1f1b turns to
            backward as soon as it can, gpipe runs all of forward first, interleaved is 1f1b with
            several stages a rank.
        pp_stages_per_rank: Stages of each rank, for interleaved: more of them wait less, and send
            more.
        ulysses_size: Ranks that split a sequence and trade it for heads in attention.
        enable_async: Overlap the exchanges of Ulysses with the projections.
        cp_size: Ranks that split a sequence and pass keys and values on in attention.
        cp_method: How they do: gather gives each rank the keys and values of the whole row, ring
            passes them on from rank to rank.
        fsdp_config: How data-parallel ranks share the parameters.
        offload_config: Activations kept in host memory.
        timeout_s: Seconds after which a rank that waits for the others gives up.
    """

    dp_replicate_size: int = -1
    dp_shard_size: int = -1
    tp_size: int = 1
    ep_size: int = 1
    ep_outside: bool = False
    pp_size: int = 1
    pp_schedule: Literal["1f1b", "gpipe", "interleaved"] = "1f1b"
    pp_stages_per_rank: int = 1
    ulysses_size: int = 1
    enable_async: bool = False
    cp_size: int = 1
    cp_method: Literal["gather", "ring"] = "gather"
    fsdp_config: FSDPConfig = field(default_factory=FSDPConfig)
    offload_config: OffloadConfig = field(default_factory=OffloadConfig)
    timeout_s: float = 1800.0
