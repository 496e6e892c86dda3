"""RMSNorm: the reference of the slot `rms_norm`, and the same with less work."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


def eager(x: Tensor, weight: Tensor, *, eps: float, offset: float = 0.0) -> Tensor:
    """Scale `x` to unit root mean square over its last dimension, then by `offset + weight`.

    The statistics are taken in float32. With an offset (Gemma's 1 + w) the weight is applied in
    float32 too; without one (Llama's w) after the cast back, as the two families do.

    Args:
        x: Shape [..., D].
        weight: Shape [D].
        eps: Added to the mean square.
        offset: 0.0 or 1.0; `models.bind` measures which one a module means.

    Returns:
        Shape [..., D], in the dtype of `x` (wider if the weight is and there is no offset).
    """
    wide = x.float()
    normed = wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + eps)
    if offset:
        return (normed * (offset + weight.float())).to(x.dtype)
    return weight * normed.to(x.dtype)


def lean(x: Tensor, weight: Tensor, *, eps: float, offset: float = 0.0) -> Tensor:
    """As `eager`, with its backward written out: half the work on a CPU, and less is kept.

    Kept for backward are the normalised values in the dtype of `x`, and one number a row.
    """
    # torch does not type Function.apply
    return _Lean.apply(x, weight, eps, offset)  # type: ignore[return-value]


class _Lean(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, eps: float, offset: float) -> Tensor:
        wide = x.float()
        scale = wide.square().mean(-1, keepdim=True).add_(eps).rsqrt_()
        normed = wide * scale
        narrow = normed.to(x.dtype)
        ctx.save_for_backward(narrow, weight, scale)
        ctx.offset = offset
        if offset:
            return (normed * (offset + weight.float())).to(x.dtype)
        return weight * narrow

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        (grad,) = grads
        narrow, weight, scale = ctx.saved_tensors
        normed = narrow.float()
        grad_weight = (grad * narrow).flatten(0, -2).sum(0, dtype=torch.float32)
        factor = ctx.offset + weight.float() if ctx.offset else weight
        grad_normed = (grad * factor).float()
        shared = torch.linalg.vecdot(grad_normed, normed)[..., None] / normed.shape[-1]
        grad_x = grad_normed.sub_(normed.mul_(shared)).mul_(scale)
        return grad_x.to(narrow.dtype), grad_weight.to(weight.dtype), None, None
