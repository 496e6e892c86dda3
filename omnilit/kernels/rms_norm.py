"""RMSNorm: the reference of the slot `rms_norm`."""

from __future__ import annotations

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
