"""FlashAttention's kernels for packed sequences behind the signature of our slot."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

import torch
from torch import Tensor
from torch.nn.functional import pad

from omnilit.errors import KernelError
from omnilit.kernels.attention import AttentionRule


def flash_attention_2(
    q_BNTH: Tensor,
    k_BKLH: Tensor,
    v_BKLV: Tensor,
    *,
    bounds: Sequence[int],
    rule: AttentionRule,
    sinks_N: Tensor | None = None,
) -> Tensor:
    """All segments in one launch; see `kernels.attention.AttentionKernel`.

    Raises:
        KernelError: The model has attention sinks, which this kernel does not know.
    """
    from flash_attn import flash_attn_varlen_func  # pyright: ignore[reportMissingImports]

    if sinks_N is not None:
        raise KernelError(
            key="model.ops_implementation.attn_implementation",
            problem="'flash_attention_2' has no attention sinks, and this model uses them",
            fix="set it to sdpa",
        )
    batch, num_heads, num_queries, head_dim = q_BNTH.shape
    num_keys, value_dim = v_BKLV.shape[2:]
    # Without packing, each row of the batch is a segment of its own.
    q_ends = bounds if batch == 1 else range(0, batch * num_queries + 1, num_queries)
    k_ends = (
        bounds
        if batch == 1 and num_keys == num_queries
        else range(0, batch * num_keys + 1, num_keys)
    )
    values = pad(v_BKLV, (0, head_dim - value_dim))  # one head dim for all three
    q, k, v = (x.transpose(1, 2).flatten(0, 1) for x in (q_BNTH, k_BKLH, values))
    reach = -1 if rule.window is None else rule.window - 1
    out = flash_attn_varlen_func(
        q,
        k,
        v,
        cu_seqlens_q=torch.tensor(list(q_ends), dtype=torch.int32, device=q.device),
        cu_seqlens_k=torch.tensor(list(k_ends), dtype=torch.int32, device=q.device),
        max_seqlen_q=max(b - a for a, b in pairwise(q_ends)),
        max_seqlen_k=max(b - a for a, b in pairwise(k_ends)),
        dropout_p=rule.dropout,
        softmax_scale=rule.scale,
        causal=rule.is_causal,
        window_size=(reach, 0 if rule.is_causal else reach),
        softcap=rule.softcap or 0.0,
        deterministic=torch.are_deterministic_algorithms_enabled(),
    )
    return out[..., :value_dim].view(batch, num_queries, num_heads, value_dim)
