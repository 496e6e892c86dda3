"""Rotary position embedding: the backend `triton` of the slot `rotary_pos_emb`."""

# B batch, T tokens, N heads, H head dimension

from __future__ import annotations

from typing import Any, Final

import torch
import triton
import triton.language as tl
from torch import Tensor

from omnilit.kernels.triton.launch import fit_block

HEADS: Final = 4  # of a token that a program rotates
LAUNCH: Final = {"num_warps": 4}


@triton.jit
def rotate_kernel(
    x_ptr,
    cos_ptr,
    sin_ptr,
    out_ptr,
    T,
    N,
    half,
    stride_xb,
    stride_xn,
    stride_xt,
    stride_ob,
    stride_on,
    stride_ot,
    stride_cb,
    stride_ct,
    IS_BACKWARD: tl.constexpr,
    HEADS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Turn the halves of some heads of a token by its angles; backward turns them back."""
    batch, token = (tl.program_id(0) // T).to(tl.int64), (tl.program_id(0) % T).to(tl.int64)
    head = (tl.program_id(1) * HEADS + tl.arange(0, HEADS)).to(tl.int64)
    column = tl.arange(0, BLOCK)
    is_column = column < half
    mask = (head < N)[:, None] & is_column[None, :]
    angle = batch * stride_cb + token * stride_ct + column
    cos1 = tl.load(cos_ptr + angle, mask=is_column, other=0.0).to(tl.float32)[None, :]
    cos2 = tl.load(cos_ptr + angle + half, mask=is_column, other=0.0).to(tl.float32)[None, :]
    sin1 = tl.load(sin_ptr + angle, mask=is_column, other=0.0).to(tl.float32)[None, :]
    sin2 = tl.load(sin_ptr + angle + half, mask=is_column, other=0.0).to(tl.float32)[None, :]
    x = x_ptr + batch * stride_xb + token * stride_xt + head[:, None] * stride_xn + column[None, :]
    x1 = tl.load(x, mask=mask, other=0.0).to(tl.float32)
    x2 = tl.load(x + half, mask=mask, other=0.0).to(tl.float32)
    if IS_BACKWARD:
        out1 = x1 * cos1 + x2 * sin2
        out2 = x2 * cos2 - x1 * sin1
    else:
        out1 = x1 * cos1 - x2 * sin1
        out2 = x2 * cos2 + x1 * sin2
    out = out_ptr + batch * stride_ob + token * stride_ot + head[:, None] * stride_on
    tl.store(out + column[None, :], out1.to(out_ptr.dtype.element_ty), mask=mask)
    tl.store(out + half + column[None, :], out2.to(out_ptr.dtype.element_ty), mask=mask)


def rotary(
    q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, unsqueeze_dim: int = 1
) -> tuple[Tensor, Tensor]:
    """As `kernels.rope.eager`, rounding once; the angles have no gradient."""
    turned = [_Rotate.apply(x, cos, sin, unsqueeze_dim) for x in (q, k)]
    return turned[0], turned[1]  # type: ignore[return-value]


class _Rotate(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, cos: Tensor, sin: Tensor, head_dim: int) -> Tensor:
        cos, sin = cos.contiguous(), sin.contiguous()
        ctx.save_for_backward(cos, sin)
        ctx.head_dim, ctx.dtype = head_dim, x.dtype
        out_dtype = torch.promote_types(x.dtype, cos.dtype)
        return _rotate(x, cos, sin, head_dim, dtype=out_dtype, is_backward=False)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        cos, sin = ctx.saved_tensors
        grad = _rotate(grads[0], cos, sin, ctx.head_dim, dtype=ctx.dtype, is_backward=True)
        return grad, None, None, None


def _rotate(
    x: Tensor, cos: Tensor, sin: Tensor, head_dim: int, *, dtype: torch.dtype, is_backward: bool
) -> Tensor:
    x = x if x.stride(-1) == 1 else x.contiguous()
    out = torch.empty_like(x, dtype=dtype)
    x_BNTH, out_BNTH = (y if head_dim == 1 else y.transpose(1, 2) for y in (x, out))
    batch, heads, tokens, size = x_BNTH.shape
    if out.numel() == 0:
        return out
    rotate_kernel[(batch * tokens, triton.cdiv(heads, HEADS))](
        x_BNTH,
        cos,
        sin,
        out_BNTH,
        tokens,
        heads,
        size // 2,
        *x_BNTH.stride()[:3],
        *out_BNTH.stride()[:3],
        0 if cos.shape[0] == 1 else cos.stride(0),
        cos.stride(1),
        IS_BACKWARD=is_backward,
        HEADS=HEADS,
        BLOCK=fit_block(size // 2),
        **LAUNCH,
    )
    return out
