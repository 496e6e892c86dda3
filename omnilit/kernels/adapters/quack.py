"""QuACK's grouped products on Hopper and later behind the signature of the slot `moe`."""

# T tokens, k experts of a token, S rows, E experts, D and F columns

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import pad

from omnilit.errors import KernelError
from omnilit.kernels.moe_grouped import run_grouped
from omnilit.kernels.projections import Projections


def experts(experts: Any, hidden_TD: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
    """As `kernels.moe.eager`, for all modules of experts that transformers has.

    Raises:
        KernelError: Weights are float32, which these kernels do not take.
    """
    parts = Projections.of(experts)
    if parts.first.dtype is torch.float32:
        raise KernelError(
            key="model.ops_implementation.moe_implementation",
            problem="'fused_quack' takes bfloat16, and was given float32",
            fix="set it to torch, or compute in bfloat16",
        )
    return run_grouped(parts, hidden_TD, top_k_index, top_k_weights, _multiply)


def _multiply(rows_SD: Tensor, weights_EDF: Tensor, ends: Tensor) -> Tensor:
    return _Gemm.apply(rows_SD, weights_EDF, ends)  # type: ignore[return-value]


class _Gemm(torch.autograd.Function):
    """Groups lie along the rows of the outcome, or along those that a product adds up."""

    @staticmethod
    def forward(ctx: Any, rows: Tensor, weights: Tensor, ends: Tensor) -> Tensor:
        from quack.gemm_interface import gemm  # pyright: ignore[reportMissingImports]

        bounds = pad(ends, (1, 0)).to(torch.int32)
        ctx.save_for_backward(rows, weights, bounds)
        return gemm(rows, weights, cu_seqlens_m=bounds)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        from quack.gemm_interface import gemm  # pyright: ignore[reportMissingImports]

        rows, weights, bounds = ctx.saved_tensors
        grad = grads[0].contiguous()
        grad_rows = gemm(grad, weights.transpose(1, 2), cu_seqlens_m=bounds)
        return grad_rows, gemm(rows.t(), grad, cu_seqlens_k=bounds), None
