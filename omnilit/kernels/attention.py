"""Packed attention: every segment attends to itself only, and no mask of length squared is made.

A backend takes B rows of T tokens whose segments end at `bounds`, and returns what it computed
with the dimension of the tokens before that of the heads, as transformers wants it.
"""

# B batch, N heads, K key heads, T tokens, L keys, H head dim, V head dim of the values

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Final, Protocol

import torch
from torch import Tensor
from torch.nn.functional import dropout, scaled_dot_product_attention

SHORT: Final = 512  # keys up to which a CPU's fused backward is faster in float32 than in bfloat16


@dataclass(frozen=True, slots=True)
class AttentionRule:
    """Which keys a query sees, and how scores become weights.

    Args:
        scale: Factor on the scores; None for H ** -0.5.
        window: Keys that a query sees at most, itself included; None for all.
        softcap: Scores pass through `softcap * tanh(score / softcap)`; None for no cap.
        dropout: Probability that a weight is dropped.
        is_causal: Whether a query sees nothing after itself. With more keys than queries
            (generation with a cache) the queries are the last ones.
        sees: Whether queries see keys, by their places in the row, int64 [T, 1] and [1, L], in the
            place of `window` and `is_causal`; None where those say it.
    """

    scale: float | None = None
    window: int | None = None
    softcap: float | None = None
    dropout: float = 0.0
    is_causal: bool = True
    sees: Callable[[Tensor, Tensor], Tensor] | None = None

    def behind(self, start: int) -> AttentionRule:
        """The same for what begins at a place of the row."""
        sees = self.sees
        if sees is None or not start:
            return self
        return replace(self, sees=lambda query, key: sees(query + start, key + start))


class AttentionKernel(Protocol):
    """The signature of the slot `attention`."""

    def __call__(
        self,
        q_BNTH: Tensor,
        k_BKLH: Tensor,
        v_BKLV: Tensor,
        *,
        bounds: Sequence[int],
        rule: AttentionRule,
        sinks_N: Tensor | None = None,
    ) -> Tensor:
        """Attend within the segments.

        Args:
            q_BNTH: Queries [B, N, T, H].
            k_BKLH: Keys [B, K, L, H], N a multiple of K; L is T unless there is one segment.
            v_BKLV: Values [B, K, L, V].
            bounds: Ends of the segments, [0, ..., T].
            rule: Visibility and scores.
            sinks_N: A score a head for a key without value, [N]; None for none.

        Returns:
            Shape [B, T, N, V].
        """
        ...


def eager(
    q_BNTH: Tensor,
    k_BKLH: Tensor,
    v_BKLV: Tensor,
    *,
    bounds: Sequence[int],
    rule: AttentionRule,
    sinks_N: Tensor | None = None,
) -> Tensor:
    """The reference: scores, mask and float32 softmax written out; see `AttentionKernel`."""
    return _by_segment(_eager_segment, (q_BNTH, k_BKLH, v_BKLV), bounds, rule, sinks_N)


def sdpa(
    q_BNTH: Tensor,
    k_BKLH: Tensor,
    v_BKLV: Tensor,
    *,
    bounds: Sequence[int],
    rule: AttentionRule,
    sinks_N: Tensor | None = None,
) -> Tensor:
    """Torch's fused attention, one call a segment; see `AttentionKernel`.

    A capped score has no fused form and takes the reference's path.
    """
    segment = _eager_segment if rule.softcap is not None else _sdpa_segment
    return _by_segment(segment, (q_BNTH, k_BKLH, v_BKLV), bounds, rule, sinks_N)


_Segment = Callable[[Tensor, Tensor, Tensor, AttentionRule, Tensor | None], Tensor]


def _by_segment(
    attend: _Segment,
    qkv: tuple[Tensor, Tensor, Tensor],
    bounds: Sequence[int],
    rule: AttentionRule,
    sinks_N: Tensor | None,
) -> Tensor:
    q, k, v = qkv
    if len(bounds) == 2:
        return attend(q, k, v, rule, sinks_N).transpose(1, 2).contiguous()
    sizes = [b - a for a, b in pairwise(bounds)]
    # split, not slices: the backward of a slice fills and adds a whole tensor for each segment
    pieces = zip(q.split(sizes, 2), k.split(sizes, 2), v.split(sizes, 2), strict=True)
    starts = bounds[:-1]
    parts = [
        attend(*piece, rule.behind(start), sinks_N)
        for start, piece in zip(starts, pieces, strict=True)
    ]
    return torch.cat(parts, dim=2).transpose(1, 2).contiguous()


def _is_visible(
    num_queries: int, num_keys: int, rule: AttentionRule, device: torch.device
) -> Tensor:
    """[T, L], True where the query of the row sees the key of the column."""
    query = torch.arange(num_keys - num_queries, num_keys, device=device)[:, None]
    key = torch.arange(num_keys, device=device)[None]
    if rule.sees is not None:
        return rule.sees(query, key)
    keep = query >= key if rule.is_causal else torch.ones_like(query >= key)
    if rule.window is not None:
        keep &= (query - key).abs() < rule.window
    return keep


def _eager_segment(
    q: Tensor, k: Tensor, v: Tensor, rule: AttentionRule, sinks_N: Tensor | None
) -> Tensor:
    repeats = q.shape[1] // k.shape[1]
    k, v = k.repeat_interleave(repeats, 1), v.repeat_interleave(repeats, 1)
    scale = q.shape[-1] ** -0.5 if rule.scale is None else rule.scale
    scores = (q @ k.transpose(-1, -2)).float() * scale
    if rule.softcap is not None:
        scores = rule.softcap * torch.tanh(scores / rule.softcap)
    is_visible = _is_visible(q.shape[2], k.shape[2], rule, q.device)
    scores = scores.masked_fill(~is_visible, float("-inf"))
    if sinks_N is not None:
        sink = sinks_N.float().view(1, -1, 1, 1).expand(*scores.shape[:-1], 1)
        scores = torch.cat((scores, sink), dim=-1)
    weights = scores.softmax(-1)[..., : k.shape[2]].to(q.dtype)
    return dropout(weights, rule.dropout) @ v


def _sdpa_segment(
    q: Tensor, k: Tensor, v: Tensor, rule: AttentionRule, sinks_N: Tensor | None
) -> Tensor:
    num_queries, num_keys = q.shape[2], k.shape[2]
    dtype = q.dtype
    if dtype is torch.bfloat16 and q.device.type == "cpu" and num_keys <= SHORT:
        q, k, v = q.float(), k.float(), v.float()
    bias = None
    is_plain = rule.sees is None and (rule.window is None or rule.window >= num_keys)
    is_aligned = not rule.is_causal or num_queries == num_keys
    if sinks_N is not None:
        k, v, bias = _append_sink(q, k, v, rule, sinks_N)
    elif not (is_plain and is_aligned):
        bias = _is_visible(num_queries, num_keys, rule, q.device)
    return scaled_dot_product_attention(
        q,
        k,
        v,
        attn_mask=bias,
        dropout_p=rule.dropout,
        is_causal=bias is None and rule.is_causal and num_queries > 1,
        scale=rule.scale,
        enable_gqa=q.shape[1] != k.shape[1],
    ).to(dtype)


def _append_sink(
    q: Tensor, k: Tensor, v: Tensor, rule: AttentionRule, sinks_N: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """A sink as one more key of zeros with value zero, whose score is the additive bias."""
    is_visible = _is_visible(q.shape[2], k.shape[2], rule, q.device)
    bias = torch.zeros(is_visible.shape, dtype=q.dtype, device=q.device)
    bias = bias.masked_fill(~is_visible, float("-inf")).expand(q.shape[1], -1, -1)
    sink = sinks_N.to(q.dtype)[:, None, None].expand(-1, q.shape[2], 1)
    k = torch.cat((k, k.new_zeros(*k.shape[:2], 1, k.shape[3])), dim=2)
    v = torch.cat((v, v.new_zeros(*v.shape[:2], 1, v.shape[3])), dim=2)
    return k, v, torch.cat((bias, sink), dim=-1)[None]
