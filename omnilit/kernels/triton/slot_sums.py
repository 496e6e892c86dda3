"""Tokens of the rows that their experts gave, and back: sums over a token's own slots."""

# T tokens, k slots of each, S slots in the order of their experts, D hidden size

from __future__ import annotations

from typing import Any, Final

import torch
import triton
import triton.language as tl
from torch import Tensor

TILE_T: Final = 16
TILE_D: Final = 128
LAUNCH: Final = {"num_warps": 4}


@triton.jit
def sum_kernel(
    y_ptr,
    place_ptr,
    weights_ptr,
    out_ptr,
    T,
    D,
    NUM_CHOICES: tl.constexpr,
    HAS_WEIGHTS: tl.constexpr,
    TILE_T: tl.constexpr,
    TILE_D: tl.constexpr,
):
    """out[t] = sum over j of weights[t, j] * y[place[t, j]], in the order of j, in float32."""
    token = tl.program_id(0) * TILE_T + tl.arange(0, TILE_T)
    column = tl.program_id(1) * TILE_D + tl.arange(0, TILE_D)
    is_token = token < T
    mask = is_token[:, None] & (column < D)[None, :]
    total = tl.zeros((TILE_T, TILE_D), tl.float32)
    for choice in range(NUM_CHOICES):
        entry = token.to(tl.int64) * NUM_CHOICES + choice
        place = tl.load(place_ptr + entry, mask=is_token, other=0).to(tl.int64)
        row = tl.load(y_ptr + place[:, None] * D + column[None, :], mask=mask, other=0.0)
        row = row.to(tl.float32)
        if HAS_WEIGHTS:
            row *= tl.load(weights_ptr + entry, mask=is_token, other=0.0).to(tl.float32)[:, None]
        total += row
    out = out_ptr + token.to(tl.int64)[:, None] * D + column[None, :]
    tl.store(out, total.to(out_ptr.dtype.element_ty), mask=mask)


@triton.jit
def spread_kernel(
    y_ptr,
    place_ptr,
    weights_ptr,
    grad_ptr,
    grad_y_ptr,
    grad_weights_ptr,
    T,
    D,
    NUM_CHOICES: tl.constexpr,
    TILE_T: tl.constexpr,
    TILE_D: tl.constexpr,
):
    """The gradients of `sum_kernel` with weights: each slot belongs to one token."""
    token = tl.program_id(0) * TILE_T + tl.arange(0, TILE_T)
    is_token = token < T
    entry = token.to(tl.int64) * NUM_CHOICES + tl.program_id(1)
    place = tl.load(place_ptr + entry, mask=is_token, other=0).to(tl.int64)
    weight = tl.load(weights_ptr + entry, mask=is_token, other=0.0).to(tl.float32)
    total = tl.zeros((TILE_T,), tl.float32)
    for start in range(0, D, TILE_D):
        column = start + tl.arange(0, TILE_D)
        mask = is_token[:, None] & (column < D)[None, :]
        inner = place[:, None] * D + column[None, :]
        outer = token.to(tl.int64)[:, None] * D + column[None, :]
        grad = tl.load(grad_ptr + outer, mask=mask, other=0.0).to(tl.float32)
        row = tl.load(y_ptr + inner, mask=mask, other=0.0).to(tl.float32)
        total += tl.sum(grad * row, 1)
        grad_y = (grad * weight[:, None]).to(grad_y_ptr.dtype.element_ty)
        tl.store(grad_y_ptr + inner, grad_y, mask=mask)
    tl.store(grad_weights_ptr + entry, total.to(grad_weights_ptr.dtype.element_ty), mask=is_token)


def sum_slots(y_SD: Tensor, place_Tk: Tensor, weights_Tk: Tensor | None) -> Tensor:
    """The weighted sum of each token's slots, [T, D] in the dtype of `y_SD`."""
    num_tokens, num_choices = place_Tk.shape
    size = y_SD.shape[-1]
    out = y_SD.new_empty(num_tokens, size)
    if out.numel() == 0:
        return out
    sum_kernel[(triton.cdiv(num_tokens, TILE_T), triton.cdiv(size, TILE_D))](
        y_SD,
        place_Tk,
        y_SD if weights_Tk is None else weights_Tk,
        out,
        num_tokens,
        size,
        NUM_CHOICES=num_choices,
        HAS_WEIGHTS=weights_Tk is not None,
        TILE_T=TILE_T,
        TILE_D=TILE_D,
        **LAUNCH,
    )
    return out


def weigh_slots(y_SD: Tensor, place_Tk: Tensor, weights_Tk: Tensor) -> Tensor:
    """As `sum_slots` with weights, with gradients for the rows and for the weights."""
    return _WeightedSum.apply(y_SD, place_Tk, weights_Tk)  # type: ignore[return-value]


class _WeightedSum(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, y_SD: Tensor, place_Tk: Tensor, weights_Tk: Tensor) -> Tensor:
        y_SD, weights_Tk = y_SD.contiguous(), weights_Tk.contiguous()
        ctx.save_for_backward(y_SD, place_Tk, weights_Tk)
        return sum_slots(y_SD, place_Tk, weights_Tk)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        y_SD, place_Tk, weights_Tk = ctx.saved_tensors
        grad_TD = grads[0].contiguous()
        grad_y, grad_weights = torch.empty_like(y_SD), torch.empty_like(weights_Tk)
        num_tokens, num_choices = place_Tk.shape
        if y_SD.numel():
            spread_kernel[(triton.cdiv(num_tokens, TILE_T), num_choices)](
                y_SD,
                place_Tk,
                weights_Tk,
                grad_TD,
                grad_y,
                grad_weights,
                num_tokens,
                y_SD.shape[-1],
                NUM_CHOICES=num_choices,
                TILE_T=TILE_T,
                TILE_D=TILE_D,
                **LAUNCH,
            )
        return grad_y, None, grad_weights
