"""Liger's Triton kernels behind the signatures of our slots."""

from __future__ import annotations

import torch
from torch import Tensor

from omnilit.errors import KernelError
from omnilit.kernels import cross_entropy as reference
from omnilit.types import IGNORE


def rms_norm(x: Tensor, weight: Tensor, *, eps: float, offset: float = 0.0) -> Tensor:
    """As `kernels.rms_norm.eager`; an offset selects Gemma's order of casts."""
    from liger_kernel.transformers.functional import liger_rms_norm

    casting = "gemma" if offset else "llama"
    return liger_rms_norm(x, weight, eps, offset, casting, in_place=False)


def swiglu(gate: Tensor, up: Tensor) -> Tensor:
    """As `kernels.swiglu.eager`."""
    from liger_kernel.transformers.functional import liger_swiglu

    return liger_swiglu(gate, up)


def rotary(
    q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, unsqueeze_dim: int = 1
) -> tuple[Tensor, Tensor]:
    """As `kernels.rope.eager`."""
    from liger_kernel.transformers.rope import liger_rotary_pos_emb

    return liger_rotary_pos_emb(q, k, cos, sin, unsqueeze_dim=unsqueeze_dim)


def cross_entropy(
    hidden_RD: Tensor,
    weight_VD: Tensor,
    targets_R: Tensor,
    *,
    bias_V: Tensor | None = None,
    softcap: float | None = None,
) -> Tensor:
    """As `kernels.cross_entropy.HeadKernel`, for losses that weigh all their rows alike.

    Raises:
        KernelError: In backward, when rows are weighted differently: Liger makes its gradients in
            forward and scales them by one number.
    """
    from liger_kernel.transformers.functional import liger_fused_linear_cross_entropy

    if hidden_RD.shape[0] == 0:  # no grid to launch, but a graph is needed
        return reference.eager(hidden_RD, weight_VD, targets_R, bias_V=bias_V, softcap=softcap)
    losses_R = liger_fused_linear_cross_entropy(
        hidden_RD,
        weight_VD,
        targets_R,
        bias=bias_V,
        ignore_index=IGNORE,
        reduction="none",
        softcap=softcap,
        accum_dtype=torch.float32,
    )
    assert isinstance(losses_R, Tensor)  # its other result types are asked for by flags
    if losses_R.requires_grad:
        losses_R.register_hook(_refuse_uneven)
    return losses_R


def _refuse_uneven(grad_R: Tensor) -> None:
    if not bool((grad_R == grad_R[0]).all()):
        raise KernelError(
            key="model.ops_implementation.cross_entropy_loss_implementation",
            problem="'liger_kernel' has one weight for all rows, and this loss gives them several",
            fix="set it to chunk_loss",
        )
