"""The Triton kernels of flash-linear-attention behind the signatures of our slots."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def rms_norm_gated(x: Tensor, gate: Tensor, weight: Tensor, *, eps: float) -> Tensor:
    """As `kernels.linear_attention.rms_norm_gated`."""
    from fla.modules.fused_norm_gate import (  # pyright: ignore[reportMissingImports]
        rms_norm_gated as fused,
    )

    return fused(x, gate, weight, None, "swish", eps=eps)


def causal_conv1d(
    x_TC: Tensor, weight_CW: Tensor, bias_C: Tensor | None, *, bounds: Sequence[int]
) -> Tensor:
    """As `kernels.linear_attention.causal_conv1d`."""
    from fla.modules.convolution import (  # pyright: ignore[reportMissingImports]
        causal_conv1d as convolve,
    )

    out, _ = convolve(x_TC[None], weight_CW, bias_C, activation="silu", **_ends(bounds, x_TC))
    return out[0]


def chunk_gated_delta_rule(
    q_TKD: Tensor,
    k_TKD: Tensor,
    v_TNV: Tensor,
    log_decay_TN: Tensor,
    beta_TN: Tensor,
    *,
    bounds: Sequence[int],
) -> Tensor:
    """As `kernels.linear_attention.chunk_gated_delta_rule`."""
    from fla.ops.gated_delta_rule import (  # pyright: ignore[reportMissingImports]
        chunk_gated_delta_rule as rule,
    )

    q, k, v = q_TKD[None], k_TKD[None], v_TNV[None]
    out, _ = rule(
        q,
        k,
        v,
        log_decay_TN[None],
        beta_TN[None],
        use_qk_l2norm_in_kernel=True,
        **_ends(bounds, v),
    )
    return out[0]


def _ends(bounds: Sequence[int], x: Tensor) -> dict[str, Tensor]:
    """The bounds on both sides, so that nothing waits for the device to tell them."""
    ends = torch.tensor(bounds)
    return {"cu_seqlens": ends.to(x.device, non_blocking=True), "cu_seqlens_cpu": ends}
