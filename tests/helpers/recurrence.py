"""The gated delta rule as it is defined, token by token."""

from __future__ import annotations

from collections.abc import Callable, Sequence
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
            state = state + k[t, :, :, None] @ (miss * beta[t, :, None])[:, None]
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


def check_rule(rule: Callable[..., Tensor], bounds: Sequence[int], *, bound: float) -> None:
    """Hold values and gradients of a kernel against the definition.

    Raises:
        AssertionError: One is further off than `bound`, relative to the largest entry.
    """
    inputs = delta_inputs(bounds[-1])
    found, expected = (f(*inputs, bounds=bounds) for f in (rule, delta_rule))
    along = torch.randn_like(found)
    ours = (found, *torch.autograd.grad(found, inputs, along))
    right = (expected, *torch.autograd.grad(expected, inputs, along.double()))
    names = ("out", "q", "k", "v", "decay", "beta")
    for name, got, exact in zip(names, ours, right, strict=True):
        far = (got - exact).abs().max() / exact.abs().max().clamp(min=1e-6)
        assert far < bound, f"{name} is off by {far:.1e}"
