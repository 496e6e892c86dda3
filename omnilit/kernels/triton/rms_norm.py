"""RMSNorm that gives the same bits every time: the backend `triton` of the slot `rms_norm`.

A row is one program's, whatever the other rows are. The weight's gradient is a sum over chunks of
rows of one size, added up in one order; there are no atomics.
"""

# R rows, D normalised dimension

from __future__ import annotations

from typing import Any, Final

import torch
import triton
import triton.language as tl
from torch import Tensor

from omnilit.kernels.triton.launch import count_warps, fit_block

CHUNK: Final = 32  # rows whose part of the weight's gradient is added up by one program


@triton.jit
def forward_kernel(
    x_ptr,
    weight_ptr,
    out_ptr,
    scale_ptr,
    D,
    eps,
    offset,
    HAS_OFFSET: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """A row: normalised, and times `offset + weight`, or `weight` once it is cast back."""
    row = tl.program_id(0).to(tl.int64)
    column = tl.arange(0, BLOCK)
    is_column = column < D
    x = tl.load(x_ptr + row * D + column, mask=is_column, other=0.0)
    wide = x.to(tl.float32)
    scale = 1.0 / tl.sqrt_rn(tl.sum(wide * wide, 0) / D + eps)
    tl.store(scale_ptr + row, scale)
    normed = wide * scale
    weight = tl.load(weight_ptr + column, mask=is_column, other=0.0).to(tl.float32)
    if HAS_OFFSET:
        out = normed * (offset + weight)
    else:
        out = normed.to(x.dtype).to(tl.float32) * weight
    tl.store(out_ptr + row * D + column, out.to(out_ptr.dtype.element_ty), mask=is_column)


@triton.jit
def backward_kernel(
    x_ptr,
    weight_ptr,
    scale_ptr,
    grad_ptr,
    grad_x_ptr,
    part_ptr,
    num_rows,
    D,
    offset,
    HAS_OFFSET: tl.constexpr,
    CHUNK: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """The gradients of a chunk of rows, and its part of the weight's."""
    chunk = tl.program_id(0).to(tl.int64)
    column = tl.arange(0, BLOCK)
    is_column = column < D
    weight = tl.load(weight_ptr + column, mask=is_column, other=0.0).to(tl.float32)
    if HAS_OFFSET:
        weight = offset + weight
    part = tl.zeros((BLOCK,), tl.float32)
    for step in range(tl.minimum(CHUNK, num_rows - chunk * CHUNK)):
        place = (chunk * CHUNK + step) * D + column
        x = tl.load(x_ptr + place, mask=is_column, other=0.0)
        scale = tl.load(scale_ptr + chunk * CHUNK + step)
        grad = tl.load(grad_ptr + place, mask=is_column, other=0.0).to(tl.float32)
        normed = x.to(tl.float32) * scale
        if HAS_OFFSET:
            part += grad * normed
        else:
            part += grad * normed.to(x.dtype).to(tl.float32)
        grad *= weight
        shared = tl.sum(grad * normed, 0) / D
        grad_x = (grad - normed * shared) * scale
        tl.store(grad_x_ptr + place, grad_x.to(x.dtype), mask=is_column)
    tl.store(part_ptr + chunk * D + column, part, mask=is_column)


def rms_norm(x: Tensor, weight: Tensor, *, eps: float, offset: float = 0.0) -> Tensor:
    """As `kernels.rms_norm.eager`, without rounding between the steps of backward."""
    return _RMSNorm.apply(x, weight, eps, offset)  # type: ignore[return-value]


class _RMSNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, eps: float, offset: float) -> Tensor:
        rows_RD, weight = x.reshape(-1, x.shape[-1]).contiguous(), weight.contiguous()
        num_rows, size = rows_RD.shape
        dtype = x.dtype if offset else torch.promote_types(x.dtype, weight.dtype)
        out_RD = torch.empty_like(rows_RD, dtype=dtype)
        scale_R = rows_RD.new_empty(num_rows, dtype=torch.float32)
        ctx.save_for_backward(rows_RD, weight, scale_R)
        ctx.offset = offset
        if num_rows:
            block = fit_block(size)
            forward_kernel[(num_rows,)](
                rows_RD,
                weight,
                out_RD,
                scale_R,
                size,
                eps,
                offset,
                HAS_OFFSET=bool(offset),
                BLOCK=block,
                **count_warps(block),
            )
        return out_RD.view(x.shape)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        rows_RD, weight, scale_R = ctx.saved_tensors
        num_rows, size = rows_RD.shape
        grad_RD = grads[0].reshape(num_rows, size).contiguous()
        grad_x = torch.empty_like(rows_RD)
        num_chunks = triton.cdiv(num_rows, CHUNK)
        parts = rows_RD.new_empty(num_chunks, size, dtype=torch.float32)
        if num_rows:
            block = fit_block(size)
            backward_kernel[(num_chunks,)](
                rows_RD,
                weight,
                scale_R,
                grad_RD,
                grad_x,
                parts,
                num_rows,
                size,
                ctx.offset,
                HAS_OFFSET=bool(ctx.offset),
                CHUNK=CHUNK,
                BLOCK=block,
                **count_warps(block),
            )
        return grad_x.view(grads[0].shape), parts.sum(0).to(weight.dtype), None, None
