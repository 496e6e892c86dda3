"""A tiny mixture of experts on several ranks, through the functions that a run uses."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from types import MethodType

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.fsdp import MixedPrecisionPolicy
from transformers import PreTrainedModel

from omnilit.config import GradientCheckpointingConfig, OpsImplementationConfig
from omnilit.kernels.machine import Machine
from omnilit.kernels.resolve import KernelSet, resolve_kernels
from omnilit.models.bind import Binding, bind_kernels
from omnilit.models.blocks import decoder_blocks
from omnilit.models.experts import spread_experts
from omnilit.models.places import is_experts
from omnilit.models.recompute import enable_recomputation
from omnilit.parallel.fsdp import set_gradient_sync, shard_experts, shard_model
from omnilit.parallel.mesh import ParallelSizes, Topology
from omnilit.types import MicroBatch
from tests.helpers.gradients import gradients_of
from tests.helpers.models import packed_batch

LENGTHS = ((9, 4), (17,), (3, 3, 21), (6, 12), (30,), (5, 5), (2, 19), (11,))


def cpu_kernels() -> KernelSet:
    """What runs on a CPU."""
    machine = Machine.detect("cpu")
    return resolve_kernels(OpsImplementationConfig(), given=frozenset(), machine=machine)


def batches(number: int) -> list[MicroBatch]:
    """Micro-batches of very different lengths, and so of token counts."""
    return [packed_batch(LENGTHS[index], seed=index) for index in range(number)]


def spread(
    model: PreTrainedModel,
    sizes: ParallelSizes,
    *,
    recompute: bool = False,
    experts: Callable[..., Tensor] | None = None,
) -> tuple[Binding, Topology]:
    """Bind, split and shard `model` as a run with these sizes does.

    Args:
        model: Not bound yet.
        sizes: Of the parallel axes.
        recompute: Whether blocks are computed again in the backward pass.
        experts: What experts compute with, bound as kernels are; default: the model's own.
    """
    topology = Topology.build(sizes, torch.device("cpu"))
    binding = bind_kernels(model, cpu_kernels())
    if experts is not None:
        for module in filter(is_experts, model.modules()):
            module.forward = MethodType(experts, module)
    policy = MixedPrecisionPolicy()
    if topology.sparse is not None and topology.efsdp is not None:
        held = spread_experts(model, ep_mesh=topology.sparse["ep"], tp_mesh=topology.tp)
        enable_recomputation(model, GradientCheckpointingConfig(enable=recompute))
        shard_experts(held, mesh=topology.efsdp, policy=policy, reshard_after_forward=True)
    shard_model(
        model,
        units=decoder_blocks(model),
        mesh=topology.fsdp,
        policy=policy,
        reshard_after_forward=True,
        forward_prefetch=True,
    )
    return binding, topology


def train_once(
    model: PreTrainedModel, binding: Binding, parts: Sequence[MicroBatch], num_targets: float
) -> float:
    """Gradients of this rank's micro-batches, reduced on the last one; returns its loss."""
    loss = 0.0
    for index, batch in enumerate(parts):
        set_gradient_sync(model, is_on=index == len(parts) - 1)
        losses = binding.head.forward(model, batch).token_losses.sum() / num_targets
        losses.backward()
        loss += float(losses.detach())
    return loss


def alone(model: PreTrainedModel, number: int) -> tuple[float, dict[str, Tensor]]:
    """Loss and gradients of `number` micro-batches on one process, nothing split or sharded."""
    parts, binding = batches(number), bind_kernels(model, cpu_kernels())
    num_targets = sum(batch.counts["tokens"] for batch in parts)
    loss = 0.0
    for batch in parts:
        losses = binding.head.forward(model, batch).token_losses.sum() / num_targets
        losses.backward()
        loss += float(losses.detach())
    return loss, gradients_of(model)


def summed(loss: float, topology: Topology) -> float:
    """A number added up over the ranks that hold tokens of their own."""
    total = torch.tensor(loss, dtype=torch.float64)
    dist.all_reduce(total, group=topology.loss.get_group())
    return float(total)
