"""Ascend's kernels behind the signatures of our slots."""

# T tokens, k experts of a token, S rows, E experts, D and F columns

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from omnilit.kernels.moe_grouped import run_grouped
from omnilit.kernels.projections import Projections


def rms_norm(x: Tensor, weight: Tensor, *, eps: float, offset: float = 0.0) -> Tensor:
    """As `kernels.rms_norm.eager`."""
    import torch_npu  # pyright: ignore[reportMissingImports]

    if offset:  # Gemma's order of casts: the product is float32
        scale = offset + weight.float()
        return torch_npu.npu_rms_norm(x.float(), scale, epsilon=eps)[0].to(x.dtype)
    dtype = torch.promote_types(x.dtype, weight.dtype)  # it takes one type
    return torch_npu.npu_rms_norm(x.to(dtype), weight.to(dtype), epsilon=eps)[0]


def rotary(
    q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, unsqueeze_dim: int = 1
) -> tuple[Tensor, Tensor]:
    """As `kernels.rope.eager`."""
    import torch_npu  # pyright: ignore[reportMissingImports]

    cos, sin = cos.unsqueeze(unsqueeze_dim), sin.unsqueeze(unsqueeze_dim)
    return torch_npu.npu_rotary_mul(q, cos, sin), torch_npu.npu_rotary_mul(k, cos, sin)


def experts(experts: Any, hidden_TD: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
    """As `kernels.moe.eager`, for all modules of experts that transformers has."""
    parts = Projections.of(experts)
    return run_grouped(parts, hidden_TD, top_k_index, top_k_weights, _multiply)


def _multiply(rows_SD: Tensor, weights_EDF: Tensor, ends: Tensor) -> Tensor:
    return _GroupedMatmul.apply(rows_SD, weights_EDF, ends)  # type: ignore[return-value]


class _GroupedMatmul(torch.autograd.Function):
    """Backward is two more products; the one for the weights adds up over an expert's rows."""

    @staticmethod
    def forward(ctx: Any, rows: Tensor, weights: Tensor, ends: Tensor) -> Tensor:
        ctx.save_for_backward(rows, weights, ends)
        return _grouped(rows, weights, ends)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        rows, weights, ends = ctx.saved_tensors
        grad = grads[0].contiguous()
        grad_rows = _grouped(grad, weights.transpose(1, 2), ends)
        return grad_rows, _grouped(rows.t(), grad, ends, adds_rows=True), None


def _grouped(a: Tensor, b: Tensor, ends: Tensor, *, adds_rows: bool = False) -> Tensor:
    import torch_npu  # pyright: ignore[reportMissingImports]

    return torch_npu.npu_grouped_matmul(
        [a],
        [b],
        bias=None,
        group_list=ends.to(torch.int64),
        split_item=3 if adds_rows else 2,  # one tensor comes out
        group_type=2 if adds_rows else 0,  # groups lie along the rows that are added up, or stay
        group_list_type=0,  # where groups end, not how long they are
    )[0]
