"""A tiny mixture of experts on several ranks, beside one process."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.distributed as dist
from torch import Tensor
from transformers import PreTrainedModel

from omnilit.models.bind import Binding, bind_kernels
from omnilit.parallel.fsdp import set_gradient_sync
from omnilit.parallel.mesh import Topology
from omnilit.types import MicroBatch
from tests.helpers.gradients import gradients_of
from tests.helpers.models import packed_batch
from tests.helpers.spread import cpu_kernels

LENGTHS = ((9, 4), (17,), (3, 3, 21), (6, 12), (30,), (5, 5), (2, 19), (11,))


def batches(number: int) -> list[MicroBatch]:
    """Micro-batches of very different lengths, and so of token counts."""
    return [packed_batch(LENGTHS[index], seed=index) for index in range(number)]


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
