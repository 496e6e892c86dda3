"""One call of each of our Triton kernels, with sizes as large models have them."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import silu


def _backward(out: Tensor) -> None:
    out.backward(torch.empty_like(out))


def _empty(*shape: int, dtype: torch.dtype) -> Tensor:
    return torch.empty(shape, dtype=dtype, requires_grad=True)


def experts(dtype: torch.dtype) -> None:
    """Forward and backward with biases; 2,048 columns in, 1,536 inside."""
    from omnilit.kernels.triton import moe

    module: Any = SimpleNamespace(
        gate_up_proj=_empty(2, 1536, 2048, dtype=dtype),
        gate_up_proj_bias=_empty(2, 1536, dtype=dtype),
        down_proj=_empty(2, 2048, 768, dtype=dtype),
        down_proj_bias=_empty(2, 2048, dtype=dtype),
        act_fn=silu,
        _apply_gate=lambda x: silu(x[..., :768]) * x[..., 768:],
        has_gate=True,
        has_bias=True,
        is_transposed=False,
        has_post_expert_norm=False,
    )
    hidden, index = _empty(48, 2048, dtype=dtype), torch.randint(0, 2, (48, 8))
    _backward(moe.fused(module, hidden, index, _empty(48, 8, dtype=dtype)))


def rms_norm(dtype: torch.dtype) -> None:
    """Hidden size 4,096."""
    from omnilit.kernels.triton.rms_norm import rms_norm as norm

    _backward(norm(_empty(48, 4096, dtype=dtype), _empty(4096, dtype=dtype), eps=1e-6))


def rotary(dtype: torch.dtype) -> None:
    """Heads of 128."""
    from omnilit.kernels.triton.rope import rotary as turn

    q = _empty(1, 32, 48, 128, dtype=dtype)
    cos = torch.empty(1, 48, 128, dtype=dtype)
    _backward(turn(q, q, cos, cos)[0])


def load_balancing(dtype: torch.dtype) -> None:
    """128 experts, 8 of them a token."""
    from omnilit.kernels.triton.load_balancing import sums

    is_real = torch.ones(48, dtype=torch.bool)
    logits = [_empty(48, 128, dtype=dtype)]
    _backward(sums(logits, num_experts=128, top_k=8, is_real=is_real))


def row_sums(dtype: torch.dtype) -> None:
    """What batch-invariant mode puts in place of products, log-softmax and means."""
    from omnilit.kernels.triton import row_sums as rows

    with torch.no_grad():
        x = _empty(48, 2048, dtype=dtype)
        rows.multiply(x, x.t(), dtype)
        rows.log_norms(x)
        rows.mean(x, dtype)


CALLS: Mapping[str, Callable[[torch.dtype], None]] = {
    call.__name__: call for call in (experts, rms_norm, rotary, load_balancing, row_sums)
}
