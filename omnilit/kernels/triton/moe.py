"""The experts of a mixture as grouped products: the backend `fused_triton` of the slot `moe`."""

# T tokens, k experts a token is sent to, S = T k slots, E experts, D hidden size

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from omnilit.kernels.projections import Projections
from omnilit.kernels.triton.grouped_gemm import bias_gradient, multiply_rows, weight_gradient
from omnilit.kernels.triton.groups import Groups, sort_slots
from omnilit.kernels.triton.slot_sums import sum_slots, weigh_slots


def fused(experts: Any, hidden_TD: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
    """As `kernels.moe.eager`, for all layouts, gates and biases of transformers' experts.

    What is weighted and summed over a token's experts is so in float32.
    """
    do = Projections.of(experts)
    groups = sort_slots(top_k_index, do.first.shape[0])
    inner = _Grouped.apply(hidden_TD, do.first, do.first_bias, groups, False)
    rows = _Grouped.apply(do.between(inner), do.second, do.second_bias, groups, True)  # type: ignore[arg-type]
    if do.behind is not None:
        rows = do.behind(rows)  # type: ignore[arg-type]
    return weigh_slots(rows, groups.place, top_k_weights)  # type: ignore[arg-type]


class _Grouped(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight_EKN: Tensor,
        bias_EN: Tensor | None,
        groups: Groups,
        is_sorted: bool,
    ) -> Tensor:
        ctx.save_for_backward(x, weight_EKN, bias_EN)
        ctx.groups, ctx.is_sorted = groups, is_sorted
        return multiply_rows(x, weight_EKN, bias_EN, groups, is_sorted=is_sorted)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        x, weight_EKN, bias_EN = ctx.saved_tensors
        groups, is_sorted = ctx.groups, ctx.is_sorted
        grad_SN = grads[0].contiguous()
        needs_x, needs_weight, needs_bias = ctx.needs_input_grad[:3]
        grad_x = grad_weight = grad_bias = None
        if needs_x:
            turned = weight_EKN.transpose(1, 2)
            grad_x = multiply_rows(grad_SN, turned, None, groups, is_sorted=True)
            if not is_sorted:
                grad_x = sum_slots(grad_x, groups.place, None)
        if needs_weight:
            grad_weight = weight_gradient(x, grad_SN, weight_EKN, groups, is_sorted=is_sorted)
        if needs_bias:
            grad_bias = bias_gradient(grad_SN, bias_EN, groups)
        return grad_x, grad_weight, grad_bias, None, None
