"""Sums over ranks that hold equal values, in the one direction of autograd that needs them."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd import Function
from torch.distributed import ProcessGroup


def sum_values(part: Tensor, group: ProcessGroup) -> Tensor:
    """The sum of all ranks' parts; each part's gradient is that of the sum.

    Args:
        part: This rank's.
        group: Ranks that all go on with the same sum, so that its gradient is equal on them.
    """
    return _SumValues.apply(part, group)  # type: ignore[return-value]


def sum_gradients(value: Tensor, group: ProcessGroup) -> Tensor:
    """The same value, whose gradient is the sum of what all ranks find.

    Args:
        value: Equal on all ranks, each of which applies it to something else.
        group: The ranks.
    """
    return _SumGradients.apply(value, group)  # type: ignore[return-value]


class _SumValues(Function):
    @staticmethod
    def forward(_: Any, part: Tensor, group: ProcessGroup) -> Tensor:
        total = part.clone()
        dist.all_reduce(total, group=group)
        return total

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:  # noqa: ARG004
        return grads[0], None


class _SumGradients(Function):
    @staticmethod
    def forward(ctx: Any, value: Tensor, group: ProcessGroup) -> Tensor:
        ctx.group = group
        return value.view_as(value)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        total = grads[0].clone(memory_format=torch.contiguous_format)
        dist.all_reduce(total, group=ctx.group)
        return total, None
