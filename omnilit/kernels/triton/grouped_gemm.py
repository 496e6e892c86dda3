"""Products of the rows of each expert with its own matrix, forward and both gradients.

Every sum is taken by one program in one order: a row's bits do not depend on how many other rows
there are, and no gradient on which program came first. `tl.dot` has tensor cores from SM 80 on;
on SM 70 and 75 Triton makes fused multiply-adds of it.
"""

# S slots in the order of their experts, E experts, K columns that go in, N columns that come out

from __future__ import annotations

from typing import Final

import torch
import triton
import triton.language as tl
from torch import Tensor

from omnilit.kernels.triton.groups import TILE, Groups

TILE_N: Final = 64
TILE_K: Final = 32
TILE_S: Final = 32  # rows that a sum over an expert's rows takes at a time
LAUNCH: Final = {"num_warps": 4, "num_stages": 3}


@triton.jit
def rows_kernel(
    x_ptr,
    token_ptr,
    weight_ptr,
    bias_ptr,
    out_ptr,
    starts_ptr,
    tile_group_ptr,
    tile_start_ptr,
    num_experts,
    K,
    N,
    stride_xs,
    stride_we,
    stride_wk,
    stride_wn,
    HAS_TOKEN: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    TILE: tl.constexpr,
    TILE_N: tl.constexpr,
    TILE_K: tl.constexpr,
):
    """out[s] = x[s] @ weight[group of s] + bias[group of s], and 0 for skipped slots."""
    group = tl.load(tile_group_ptr + tl.program_id(0))
    if group <= num_experts:
        first = tl.load(tile_start_ptr + tl.program_id(0))
        end = tl.load(starts_ptr + group + 1)
        slot = first + tl.arange(0, TILE)
        is_row = slot < end
        column = tl.program_id(1) * TILE_N + tl.arange(0, TILE_N)
        is_column = column < N
        total = tl.zeros((TILE, TILE_N), tl.float32)
        if group < num_experts:
            row = slot
            if HAS_TOKEN:
                row = tl.load(token_ptr + slot, mask=is_row, other=0)
            x_row = x_ptr + row.to(tl.int64)[:, None] * stride_xs
            weight = weight_ptr + group.to(tl.int64) * stride_we + column[None, :] * stride_wn
            for start in range(0, K, TILE_K):
                inner = start + tl.arange(0, TILE_K)
                is_inner = inner < K
                a = tl.load(
                    x_row + inner[None, :], mask=is_row[:, None] & is_inner[None, :], other=0.0
                )
                b = tl.load(
                    weight + inner[:, None] * stride_wk,
                    mask=is_inner[:, None] & is_column[None, :],
                    other=0.0,
                )
                total = tl.dot(a, b, total, input_precision="ieee")
            if HAS_BIAS:
                bias = tl.load(
                    bias_ptr + group.to(tl.int64) * N + column, mask=is_column, other=0.0
                )
                total += bias.to(tl.float32)[None, :]
        tl.store(
            out_ptr + slot.to(tl.int64)[:, None] * N + column[None, :],
            total.to(out_ptr.dtype.element_ty),
            mask=is_row[:, None] & is_column[None, :],
        )


@triton.jit
def weight_kernel(
    x_ptr,
    token_ptr,
    grad_ptr,
    out_ptr,
    starts_ptr,
    K,
    N,
    stride_xs,
    stride_oe,
    stride_ok,
    stride_on,
    HAS_TOKEN: tl.constexpr,
    TILE_S: tl.constexpr,
    TILE_K: tl.constexpr,
    TILE_N: tl.constexpr,
):
    """out[e] = sum over the slots of e of the outer product of x[s] and grad[s]."""
    expert = tl.program_id(2)
    first, end = tl.load(starts_ptr + expert), tl.load(starts_ptr + expert + 1)
    inner = tl.program_id(0) * TILE_K + tl.arange(0, TILE_K)
    column = tl.program_id(1) * TILE_N + tl.arange(0, TILE_N)
    is_inner, is_column = inner < K, column < N
    total = tl.zeros((TILE_K, TILE_N), tl.float32)
    for start in range(first, end, TILE_S):
        slot = start + tl.arange(0, TILE_S)
        is_row = slot < end
        row = slot
        if HAS_TOKEN:
            row = tl.load(token_ptr + slot, mask=is_row, other=0)
        a = tl.load(
            x_ptr + row.to(tl.int64)[None, :] * stride_xs + inner[:, None],
            mask=is_inner[:, None] & is_row[None, :],
            other=0.0,
        )
        b = tl.load(
            grad_ptr + slot.to(tl.int64)[:, None] * N + column[None, :],
            mask=is_row[:, None] & is_column[None, :],
            other=0.0,
        )
        total = tl.dot(a, b, total, input_precision="ieee")
    out = out_ptr + expert.to(tl.int64) * stride_oe
    tl.store(
        out + inner[:, None] * stride_ok + column[None, :] * stride_on,
        total.to(out_ptr.dtype.element_ty),
        mask=is_inner[:, None] & is_column[None, :],
    )


@triton.jit
def bias_kernel(grad_ptr, out_ptr, starts_ptr, N, TILE_S: tl.constexpr, TILE_N: tl.constexpr):
    """out[e] = sum of grad[s] over the slots of e."""
    expert = tl.program_id(1)
    first, end = tl.load(starts_ptr + expert), tl.load(starts_ptr + expert + 1)
    column = tl.program_id(0) * TILE_N + tl.arange(0, TILE_N)
    is_column = column < N
    total = tl.zeros((TILE_N,), tl.float32)
    for start in range(first, end, TILE_S):
        slot = start + tl.arange(0, TILE_S)
        grad = tl.load(
            grad_ptr + slot.to(tl.int64)[:, None] * N + column[None, :],
            mask=(slot < end)[:, None] & is_column[None, :],
            other=0.0,
        )
        total += tl.sum(grad.to(tl.float32), 0)
    tl.store(
        out_ptr + expert.to(tl.int64) * N + column,
        total.to(out_ptr.dtype.element_ty),
        mask=is_column,
    )


def multiply_rows(
    x: Tensor, weight_EKN: Tensor, bias_EN: Tensor | None, groups: Groups, *, is_sorted: bool
) -> Tensor:
    """Each slot's row times the matrix of its expert.

    Args:
        x: Rows of tokens [T, K], or of slots [S, K].
        weight_EKN: Any strides.
        bias_EN: Added, if any.
        groups: Of the slots.
        is_sorted: Whether `x` has a row a slot.

    Returns:
        [S, N] in the dtype of `x`; zeros for skipped slots.
    """
    num_inner, num_columns = weight_EKN.shape[1:]
    x = x if x.stride(-1) == 1 else x.contiguous()
    out = x.new_empty(groups.token.numel(), num_columns)
    if out.numel() == 0:
        return out
    rows_kernel[(groups.tile_group.numel(), triton.cdiv(num_columns, TILE_N))](
        x,
        groups.token,
        weight_EKN,
        weight_EKN if bias_EN is None else bias_EN.contiguous(),
        out,
        groups.starts,
        groups.tile_group,
        groups.tile_start,
        groups.num_experts,
        num_inner,
        num_columns,
        x.stride(0),
        *weight_EKN.stride(),
        HAS_TOKEN=not is_sorted,
        HAS_BIAS=bias_EN is not None,
        TILE=TILE,
        TILE_N=TILE_N,
        TILE_K=TILE_K,
        **LAUNCH,
    )
    return out


def weight_gradient(
    x: Tensor, grad_SN: Tensor, weight_EKN: Tensor, groups: Groups, *, is_sorted: bool
) -> Tensor:
    """The gradient of `weight_EKN` in `multiply_rows`, with its strides; 0 for idle experts."""
    out = torch.empty_like(weight_EKN)
    x = x if x.stride(-1) == 1 else x.contiguous()
    num_experts, num_inner, num_columns = weight_EKN.shape
    tiles = triton.cdiv(num_inner, TILE_N), triton.cdiv(num_columns, TILE_N)
    weight_kernel[(*tiles, num_experts)](
        x,
        groups.token,
        grad_SN,
        out,
        groups.starts,
        num_inner,
        num_columns,
        x.stride(0),
        *out.stride(),
        HAS_TOKEN=not is_sorted,
        TILE_S=TILE_S,
        TILE_K=TILE_N,
        TILE_N=TILE_N,
        **LAUNCH,
    )
    return out


def bias_gradient(grad_SN: Tensor, bias_EN: Tensor, groups: Groups) -> Tensor:
    """The gradient of `bias_EN` in `multiply_rows`."""
    out = torch.empty_like(bias_EN, memory_format=torch.contiguous_format)
    num_experts, num_columns = out.shape
    bias_kernel[(triton.cdiv(num_columns, TILE_N), num_experts)](
        grad_SN,
        out,
        groups.starts,
        num_columns,
        TILE_S=TILE_S,
        TILE_N=TILE_N,
        **LAUNCH,
    )
    return out
