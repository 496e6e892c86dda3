"""Products, log-normalisers and means whose rows have the same bits whatever the other rows are.

Tiles have one size and sums one order: neither depends on the number of rows, and no sum is split
between programs. What calls these is in `kernels.batch_invariant`.
"""

# M and R rows, K summed, N columns

from __future__ import annotations

from typing import Final

import torch
import triton
import triton.language as tl
from torch import Tensor

TILE_M: Final = 64
TILE_N: Final = 64
TILE_K: Final = 32
COLUMNS: Final = 1024  # of a row that are summed at a time
LAUNCH: Final = {"num_warps": 4, "num_stages": 3}


@triton.jit
def product_kernel(
    a_ptr,
    b_ptr,
    out_ptr,
    M,
    K,
    N,
    stride_am,
    stride_ak,
    stride_bk,
    stride_bn,
    TILE_M: tl.constexpr,
    TILE_K: tl.constexpr,
    TILE_N: tl.constexpr,
):
    """A tile of the product of a and b."""
    row = (tl.program_id(0) * TILE_M + tl.arange(0, TILE_M)).to(tl.int64)
    column = (tl.program_id(1) * TILE_N + tl.arange(0, TILE_N)).to(tl.int64)
    is_row, is_column = row < M, column < N
    total = tl.zeros((TILE_M, TILE_N), tl.float32)
    for start in range(0, K, TILE_K):
        inner = (start + tl.arange(0, TILE_K)).to(tl.int64)
        is_inner = inner < K
        a = tl.load(
            a_ptr + row[:, None] * stride_am + inner[None, :] * stride_ak,
            mask=is_row[:, None] & is_inner[None, :],
            other=0.0,
        )
        b = tl.load(
            b_ptr + inner[:, None] * stride_bk + column[None, :] * stride_bn,
            mask=is_inner[:, None] & is_column[None, :],
            other=0.0,
        )
        total = tl.dot(a, b, total, input_precision="ieee")
    mask = is_row[:, None] & is_column[None, :]
    out = out_ptr + row[:, None] * N + column[None, :]
    tl.store(out, total.to(out_ptr.dtype.element_ty), mask=mask)


@triton.jit
def norm_kernel(x_ptr, out_ptr, N, COLUMNS: tl.constexpr):
    """Of the exponentials of a row the logarithm of the sum; it is read twice."""
    x = x_ptr + tl.program_id(0).to(tl.int64) * N
    highest = tl.full((COLUMNS,), float("-inf"), tl.float32)
    for start in range(0, N, COLUMNS):
        column = start + tl.arange(0, COLUMNS)
        part = tl.load(x + column, mask=column < N, other=float("-inf"))
        highest = tl.maximum(highest, part.to(tl.float32))
    top = tl.max(highest, 0)
    top = tl.where(top == float("-inf"), 0.0, top)
    total = tl.zeros((COLUMNS,), tl.float32)
    for start in range(0, N, COLUMNS):
        column = start + tl.arange(0, COLUMNS)
        part = tl.load(x + column, mask=column < N, other=float("-inf"))
        total += tl.exp(part.to(tl.float32) - top)
    tl.store(out_ptr + tl.program_id(0), top + tl.log(tl.sum(total, 0)))


@triton.jit
def mean_kernel(x_ptr, out_ptr, N, COLUMNS: tl.constexpr):
    """The mean of a row."""
    x = x_ptr + tl.program_id(0).to(tl.int64) * N
    total = tl.zeros((COLUMNS,), tl.float32)
    for start in range(0, N, COLUMNS):
        column = start + tl.arange(0, COLUMNS)
        total += tl.load(x + column, mask=column < N, other=0.0).to(tl.float32)
    mean = tl.sum(total, 0) / N
    tl.store(out_ptr + tl.program_id(0), mean.to(out_ptr.dtype.element_ty))


def multiply(a_MK: Tensor, b_KN: Tensor, dtype: torch.dtype) -> Tensor:
    """The product, summed in float32, given back as `dtype`; any strides."""
    num_rows, num_inner = a_MK.shape
    num_columns = b_KN.shape[1]
    out = a_MK.new_empty(num_rows, num_columns, dtype=dtype)
    if out.numel():
        grid = triton.cdiv(num_rows, TILE_M), triton.cdiv(num_columns, TILE_N)
        product_kernel[grid](
            a_MK,
            b_KN,
            out,
            num_rows,
            num_inner,
            num_columns,
            *a_MK.stride(),
            *b_KN.stride(),
            TILE_M=TILE_M,
            TILE_K=TILE_K,
            TILE_N=TILE_N,
            **LAUNCH,
        )
    return out


def log_norms(x_RN: Tensor) -> Tensor:
    """Of the exponentials of each row the logarithm of the sum, [R] in float32."""
    x_RN = x_RN.contiguous()
    out = x_RN.new_empty(x_RN.shape[0], dtype=torch.float32)
    if out.numel():
        norm_kernel[(x_RN.shape[0],)](x_RN, out, x_RN.shape[1], COLUMNS=COLUMNS)
    return out


def mean(x_RN: Tensor, dtype: torch.dtype) -> Tensor:
    """The mean of each row, in float32, given back as `dtype`."""
    x_RN = x_RN.contiguous()
    out = x_RN.new_empty(x_RN.shape[0], dtype=dtype)
    if out.numel():
        mean_kernel[(x_RN.shape[0],)](x_RN, out, x_RN.shape[1], COLUMNS=COLUMNS)
    return out
