"""Gated linear attention: references of three slots, which respect the bounds of packing."""

# T packed tokens, C channels, W width of the convolution, N value heads, K key heads,
# D key dim, V value dim

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

import torch
from torch import Tensor
from torch.nn.functional import conv1d, normalize, pad, silu


def rms_norm_gated(x: Tensor, gate: Tensor, weight: Tensor, *, eps: float) -> Tensor:
    """RMSNorm of `x` times the SiLU of `gate`, both [..., D]; statistics and gate in float32."""
    wide = x.float()
    normed = wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + eps)
    return ((weight * normed.to(x.dtype)) * silu(gate.float())).to(x.dtype)


def causal_conv1d(
    x_TC: Tensor, weight_CW: Tensor, bias_C: Tensor | None, *, bounds: Sequence[int]
) -> Tensor:
    """Convolve each channel with its past, never across a bound, then apply SiLU.

    Args:
        x_TC: Packed tokens [T, C].
        weight_CW: One filter a channel [C, W]; the last tap meets the token itself.
        bias_C: [C], or None.
        bounds: Ends of the segments, [0, ..., T].

    Returns:
        Shape [T, C].
    """
    width, taps = weight_CW.shape[-1], weight_CW[:, None]
    parts = [
        conv1d(pad(x_TC[a:b].t()[None], (width - 1, 0)), taps, bias_C, groups=len(taps))[0].t()
        for a, b in pairwise(bounds)
    ]
    return silu(torch.cat(parts))


def chunk_gated_delta_rule(
    q_TKD: Tensor,
    k_TKD: Tensor,
    v_TNV: Tensor,
    log_decay_TN: Tensor,
    beta_TN: Tensor,
    *,
    bounds: Sequence[int],
) -> Tensor:
    """The gated delta rule token by token, its state set to zero at every bound.

    The state S [N, D, V] decays, is corrected towards the value at the key, and is read at the
    query: S <- exp(g) S; S <- S + k (beta (v - k S)); out = q S. Queries and keys are
    normalised, queries scaled by D ** -0.5.

    Args:
        q_TKD: Queries [T, K, D].
        k_TKD: Keys [T, K, D].
        v_TNV: Values [T, N, V]; each key head serves N / K of their heads.
        log_decay_TN: Logarithm of the decay, at most 0, [T, N].
        beta_TN: How much of the correction is written, [T, N].
        bounds: Ends of the segments, [0, ..., T].

    Returns:
        Shape [T, N, V], in the dtype of the values.

    Source: Gated Delta Networks, arXiv 2412.06464.
    """
    repeats = v_TNV.shape[1] // k_TKD.shape[1]
    q, k = (
        normalize(x.float(), dim=-1, eps=1e-6).repeat_interleave(repeats, 1) for x in (q_TKD, k_TKD)
    )
    q, v, beta = q * q.shape[-1] ** -0.5, v_TNV.float(), beta_TN.float()
    decay = log_decay_TN.float().exp()
    out = []
    for a, b in pairwise(bounds):
        state = v.new_zeros(v.shape[1], q.shape[-1], v.shape[-1])
        for t in range(a, b):
            state = state * decay[t, :, None, None]
            miss = v[t] - torch.einsum("nd,ndv->nv", k[t], state)
            state = state + torch.einsum("nd,nv->ndv", k[t], miss * beta[t, :, None])
            out.append(torch.einsum("nd,ndv->nv", q[t], state))
    return torch.stack(out).to(v_TNV.dtype)
