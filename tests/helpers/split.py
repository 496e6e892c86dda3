"""Tiny models spread over meshes, as a run assembles them."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from torch.distributed.fsdp import MixedPrecisionPolicy
from transformers import PreTrainedModel

from omnilit.config import GradientCheckpointingConfig, OpsImplementationConfig
from omnilit.kernels.machine import Machine
from omnilit.kernels.resolve import changed_fields, resolve_kernels
from omnilit.models.bind import Binding, bind_kernels
from omnilit.models.blocks import decoder_blocks
from omnilit.models.experts import spread_experts
from omnilit.models.recompute import enable_recomputation
from omnilit.models.tensor_parallel import fit_kernels, split_model
from omnilit.parallel.fsdp import shard_experts, shard_model
from omnilit.parallel.mesh import ParallelSizes, Topology

CPU = torch.device("cpu")


def topology_of(**sizes: Any) -> Topology:
    """The meshes of all ranks; every rank calls."""
    return Topology.build(ParallelSizes(**sizes), CPU)


def spread(
    model: PreTrainedModel,
    topology: Topology,
    *,
    recompute: GradientCheckpointingConfig | None = None,
    ops: OpsImplementationConfig | None = None,
    policy: MixedPrecisionPolicy | None = None,
) -> Binding:
    """Bind kernels to a model, split its matrices and shard it, in the order of assembly."""
    ops = ops or OpsImplementationConfig()
    kernels = resolve_kernels(ops, given=changed_fields(ops), machine=Machine("cpu"))
    kernels = fit_kernels(kernels, tp_size=topology.sizes.tp_size, is_compiled=False)
    binding = bind_kernels(model, kernels)
    split_model(model, topology.tp, with_experts=topology.sizes.ep_size == 1)
    policy = policy or MixedPrecisionPolicy()
    experts: list[nn.Module] = []
    if topology.sparse is not None:
        experts = spread_experts(model, ep_mesh=topology.sparse["ep"], tp_mesh=topology.tp)
    enable_recomputation(model, recompute or GradientCheckpointingConfig(enable=False))
    if topology.efsdp is not None:
        shard_experts(experts, mesh=topology.efsdp, policy=policy, reshard_after_forward=True)
    shard_model(
        model,
        units=decoder_blocks(model),
        mesh=topology.fsdp,
        policy=policy,
        reshard_after_forward=True,
    )
    return binding
