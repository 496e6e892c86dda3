"""Tiny models spread over meshes, as a run assembles them."""

from __future__ import annotations

from typing import Any

import torch
from torch.distributed.fsdp import MixedPrecisionPolicy
from transformers import PreTrainedModel

from omnilit.config import AcceleratorConfig, GradientCheckpointingConfig, OpsImplementationConfig
from omnilit.kernels.machine import Machine
from omnilit.kernels.resolve import KernelSet, changed_fields, resolve_kernels
from omnilit.models.bind import Binding, bind_kernels
from omnilit.models.blocks import sharding_units
from omnilit.models.experts import spread_experts
from omnilit.models.recompute import enable_recomputation
from omnilit.models.sequence import split_attention
from omnilit.models.tensor_parallel import fit_kernels, split_model
from omnilit.parallel.fsdp import shard_experts, shard_model
from omnilit.parallel.mesh import ParallelSizes, Topology

CPU = torch.device("cpu")


def topology_of(**sizes: Any) -> Topology:
    """The meshes of all ranks; every rank calls."""
    return Topology.build(ParallelSizes(**sizes), CPU)


def cpu_kernels(ops: OpsImplementationConfig = OpsImplementationConfig()) -> KernelSet:
    """What runs on a CPU."""
    return resolve_kernels(ops, given=changed_fields(ops), machine=Machine("cpu"))


def spread(
    model: PreTrainedModel,
    topology: Topology,
    *,
    ops: OpsImplementationConfig = OpsImplementationConfig(),
    accelerator: AcceleratorConfig | None = None,
    recompute: bool = False,
    reentrant: bool = False,
    policy: MixedPrecisionPolicy | None = None,
    forward_prefetch: bool = True,
) -> Binding:
    """Bind, split and shard `model` in the order of assembly.

    Args:
        model: Not bound yet.
        topology: How it is split and sharded.
        ops: Its kernels.
        accelerator: How attention reaches across ranks that share a row; default: not at all.
        recompute: Whether blocks are computed again in the backward pass.
        reentrant: Whether in torch's older form.
        policy: Dtypes; default: all float32.
        forward_prefetch: Whether a block asks for the next one's parameters.
    """
    kernels = fit_kernels(cpu_kernels(ops), tp_size=topology.sizes.tp_size, is_compiled=False)
    binding = bind_kernels(model, kernels)
    split_model(model, topology.tp, with_experts=topology.sizes.ep_size == 1)
    policy = policy or MixedPrecisionPolicy()
    experts = []
    if topology.sparse is not None:
        experts = spread_experts(model, ep_mesh=topology.sparse["ep"], tp_mesh=topology.tp)
    if accelerator is not None:
        split_attention(model, topology, accelerator)
    again = GradientCheckpointingConfig(enable=recompute, enable_reentrant=reentrant)
    enable_recomputation(model, again)
    if topology.efsdp is not None:
        shard_experts(experts, mesh=topology.efsdp, policy=policy, reshard_after_forward=True)
    units = sharding_units(model)
    shard_model(
        model,
        units=units.modules,
        last=units.last,
        mesh=topology.fsdp,
        policy=policy,
        reshard_after_forward=True,
        forward_prefetch=forward_prefetch,
    )
    return binding
