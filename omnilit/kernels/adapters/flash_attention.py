"""FlashAttention's kernels for packed sequences behind the signature of our slot.

What a version cannot do is in `kernels.attention_limits`, which is asked when a model is bound.
"""

# B batch, N heads, K key heads, T queries, L keys, H head dim, V head dim of the values

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import pad

from omnilit.errors import KernelError
from omnilit.kernels.attention import AttentionRule

KEY = "model.ops_implementation.attn_implementation"


@dataclass(frozen=True, slots=True)
class _Packed:
    """The tokens of all rows one behind the other, and the arguments that say where each ends."""

    qkv: tuple[Tensor, Tensor, Tensor]
    shape: tuple[int, int, int, int]
    where: dict[str, Any]

    @classmethod
    def of(
        cls, q: Tensor, k: Tensor, v: Tensor, bounds: Sequence[int], *, has_one_dim: bool
    ) -> _Packed:
        batch, num_heads, num_queries, head_dim = q.shape
        num_keys, value_dim = v.shape[2:]
        if has_one_dim:  # for queries, keys and values
            v = pad(v, (0, head_dim - value_dim))
        # Without packing, each row of the batch is a segment of its own.
        q_ends = bounds if batch == 1 else range(0, batch * num_queries + 1, num_queries)
        is_same = batch == 1 and num_keys == num_queries
        k_ends = bounds if is_same else range(0, batch * num_keys + 1, num_keys)
        where = {
            "cu_seqlens_q": torch.tensor(list(q_ends), dtype=torch.int32, device=q.device),
            "cu_seqlens_k": torch.tensor(list(k_ends), dtype=torch.int32, device=q.device),
            "max_seqlen_q": max(b - a for a, b in pairwise(q_ends)),
            "max_seqlen_k": max(b - a for a, b in pairwise(k_ends)),
        }
        rows = tuple(x.transpose(1, 2).flatten(0, 1) for x in (q, k, v))
        return cls((rows[0], rows[1], rows[2]), (batch, num_queries, num_heads, value_dim), where)

    def unpack(self, out: Tensor) -> Tensor:
        """[B, T, N, V] from what a kernel gave."""
        return out[..., : self.shape[-1]].view(self.shape)


def flash_attention_2(
    q_BNTH: Tensor,
    k_BKLH: Tensor,
    v_BKLV: Tensor,
    *,
    bounds: Sequence[int],
    rule: AttentionRule,
    sinks_N: Tensor | None = None,
) -> Tensor:
    """All segments in one launch of flash-attn 2; see `kernels.attention.AttentionKernel`.

    Raises:
        KernelError: Attention sinks or float32, which this kernel does not know.
    """
    from flash_attn import flash_attn_varlen_func  # pyright: ignore[reportMissingImports]

    _refuse("flash_attention_2", q_BNTH, sinks=sinks_N)
    packed = _Packed.of(q_BNTH, k_BKLH, v_BKLV, bounds, has_one_dim=True)
    out = flash_attn_varlen_func(
        *packed.qkv,
        **packed.where,
        **_common(rule),
        dropout_p=rule.dropout,
        window_size=_window(rule, -1),
    )
    return packed.unpack(out)


def flash_attention_3(
    q_BNTH: Tensor,
    k_BKLH: Tensor,
    v_BKLV: Tensor,
    *,
    bounds: Sequence[int],
    rule: AttentionRule,
    sinks_N: Tensor | None = None,
) -> Tensor:
    """All segments in one launch of flash-attn 3; see `kernels.attention.AttentionKernel`.

    Raises:
        KernelError: Attention sinks, dropout or float32, which this kernel does not know.
    """
    from flash_attn_interface import (  # pyright: ignore[reportMissingImports]
        flash_attn_varlen_func,
    )

    _refuse("flash_attention_3", q_BNTH, sinks=sinks_N, dropout=rule.dropout)
    packed = _Packed.of(q_BNTH, k_BKLH, v_BKLV, bounds, has_one_dim=True)
    out = flash_attn_varlen_func(
        *packed.qkv, **packed.where, **_common(rule), window_size=_window(rule, -1)
    )
    return packed.unpack(out)


def flash_attention_4(
    q_BNTH: Tensor,
    k_BKLH: Tensor,
    v_BKLV: Tensor,
    *,
    bounds: Sequence[int],
    rule: AttentionRule,
    sinks_N: Tensor | None = None,
) -> Tensor:
    """All segments in one launch of flash-attn 4; see `kernels.attention.AttentionKernel`.

    Raises:
        KernelError: Dropout or float32, which this kernel does not know.
    """
    from flash_attn.cute import flash_attn_varlen_func  # pyright: ignore[reportMissingImports]

    _refuse("flash_attention_4", q_BNTH, dropout=rule.dropout)
    packed = _Packed.of(q_BNTH, k_BKLH, v_BKLV, bounds, has_one_dim=False)
    out, _ = flash_attn_varlen_func(
        *packed.qkv,
        **packed.where,
        **_common(rule),
        window_size=_window(rule, None),
        learnable_sink=sinks_N,
    )
    return packed.unpack(out)


def _common(rule: AttentionRule) -> dict[str, Any]:
    return {
        "softmax_scale": rule.scale,
        "causal": rule.is_causal,
        "softcap": rule.softcap or 0.0,
        "deterministic": torch.are_deterministic_algorithms_enabled(),
    }


def _window(rule: AttentionRule, everything: int | None) -> tuple[int | None, int | None]:
    """Keys seen before and after a query, where `everything` stands for no limit."""
    reach = everything if rule.window is None else rule.window - 1
    return reach, 0 if rule.is_causal else reach


def _refuse(backend: str, q: Tensor, *, sinks: Tensor | None = None, dropout: float = 0.0) -> None:
    reasons = [
        reason
        for reason, is_so in (
            ("has no attention sinks, and this model uses them", sinks is not None),
            ("has no dropout, and this model asks for it", dropout > 0),
            ("takes bfloat16, and was given float32", q.dtype is torch.float32),
        )
        if is_so
    ]
    if reasons:
        problem = f"{backend!r} {'; '.join(reasons)}"
        raise KernelError(key=KEY, problem=problem, fix="set it to sdpa")
