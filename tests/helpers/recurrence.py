"""The gated delta rule as it is defined, token by token."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

import torch
from torch import Tensor


def delta_rule(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    log_decay: Tensor,
    beta: Tensor,
    *,
    bounds: Sequence[int],
) -> Tensor:
    """See `kernels.linear_attention.chunk_gated_delta_rule`; all of it in float64."""
    q, k, v, log_decay, beta = (x.double() for x in (q, k, v, log_decay, beta))
    repeats = v.shape[1] // k.shape[1]
    q, k = (x / (x.square().sum(-1, keepdim=True) + 1e-6).sqrt() for x in (q, k))
    q, k = (x.repeat_interleave(repeats, 1) for x in (q * q.shape[-1] ** -0.5, k))
    out = []
    for start, end in pairwise(bounds):
        state = v.new_zeros(v.shape[1], q.shape[-1], v.shape[-1])
        for t in range(start, end):
            state = state * log_decay[t].exp()[:, None, None]
            miss = v[t] - torch.einsum("nd,ndv->nv", k[t], state)
            state = state + torch.einsum("nd,nv->ndv", k[t], miss * beta[t, :, None])
            out.append(torch.einsum("nd,ndv->nv", q[t], state))
    return torch.stack(out)


def delta_inputs(
    num_tokens: int, *, dtype: torch.dtype = torch.float32
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Queries, keys, values, decays and betas of 2 key heads for 4 value heads, of other widths.

    One head forgets almost nothing and one almost all, as those of trained models do.
    """
    q, k = torch.randn(num_tokens, 2, 16), torch.randn(num_tokens, 2, 16)
    v, beta = torch.randn(num_tokens, 4, 8), torch.rand(num_tokens, 4)
    log_decay = -torch.rand(num_tokens, 4) * torch.tensor([0.01, 0.3, 3.0, 30.0])
    return (
        q.to(dtype).requires_grad_(),
        k.to(dtype).requires_grad_(),
        v.to(dtype).requires_grad_(),
        log_decay.requires_grad_(),
        beta.to(dtype).requires_grad_(),
    )
