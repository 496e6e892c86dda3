"""Attention of blocks of queries to blocks of keys, joined as if all keys had been there at once.

Log-normalisers join what the blocks of a row give, as the softmax over all of its keys would have
it. Scores, sums and gradients that are added up are float32.

Source: the online softmax of FlashAttention, arXiv 2205.14135, algorithms 1 and 4.
"""

# B batch, N heads, K key heads, G heads of one key head, T queries, L keys, H head dim, V head dim
# of the values, R queries of all heads of one key head

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import accumulate, pairwise, product

import torch
from torch import Tensor

from omnilit.kernels.attention import AttentionRule
from omnilit.kernels.pieces import Span


@dataclass(frozen=True, slots=True)
class Block:
    """Queries and keys of one segment.

    Args:
        queries: Start and end among the queries that are here.
        keys: Start and end among the keys that are here.
        offset: Place in the row of the first query, less that of the first key.
    """

    queries: Span
    keys: Span
    offset: int

    def is_hidden(self, rule: AttentionRule, device: torch.device) -> Tensor | None:
        """[T, L], True where the query does not see the key; None where all see all."""
        num_queries, num_keys = (end - start for start, end in (self.queries, self.keys))
        ahead, behind = num_keys - 1 - self.offset, num_queries - 1 + self.offset
        is_cut = rule.window is not None and max(ahead, behind) >= rule.window
        if not is_cut and not (rule.is_causal and ahead > 0):
            return None
        queries = torch.arange(self.offset, self.offset + num_queries, device=device)
        distance = queries[:, None] - torch.arange(num_keys, device=device)
        hidden = distance < 0 if rule.is_causal else torch.zeros_like(distance, dtype=torch.bool)
        return hidden if rule.window is None else hidden | (distance.abs() >= rule.window)


def pair_blocks(
    spans: Sequence[Span], key_spans: Sequence[Span], bounds: Sequence[int], rule: AttentionRule
) -> Iterator[Block]:
    """All pairs of a query and a key of which one sees the other, in few rectangles.

    Args:
        spans: Where in the row the queries stand, one stretch behind the other.
        key_spans: The same of the keys.
        bounds: Ends of the row's segments.
        rule: What a query sees.
    """
    for (span, shift), (key_span, key_shift) in product(_placed(spans), _placed(key_spans)):
        first = bisect_right(bounds, max(span[0], key_span[0])) - 1
        for a, b in pairwise(bounds[first:]):
            if a >= min(span[1], key_span[1]):
                break
            seeing, seen = _visible(_clip(span, a, b), _clip(key_span, a, b), rule)
            if seeing[0] < seeing[1] and seen[0] < seen[1]:
                offset = seeing[0] - seen[0]
                yield Block(_move(seeing, shift), _move(seen, key_shift), offset)


def _placed(spans: Sequence[Span]) -> list[tuple[Span, int]]:
    """Each stretch, and what brings its places in the row to those among what is here."""
    ends = accumulate(end - start for start, end in spans)
    return [(span, end - span[1]) for span, end in zip(spans, ends, strict=True)]


def _visible(queries: Span, keys: Span, rule: AttentionRule) -> tuple[Span, Span]:
    """Less the queries that see none of the keys, and the keys that none of the queries sees."""
    if rule.window is not None:
        reach = rule.window - 1
        keys = _clip(keys, queries[0] - reach, queries[1] + reach)
        queries = _clip(queries, keys[0] - reach, keys[1] + reach)
    if rule.is_causal:
        keys = _clip(keys, keys[0], queries[1])
        queries = _clip(queries, keys[0], queries[1])
    return queries, keys


def _clip(span: Span, start: int, end: int) -> Span:
    return max(span[0], start), min(span[1], end)


def _move(span: Span, by: int) -> Span:
    return span[0] + by, span[1] + by


class JoinedAttention:
    """The attention of some queries, while the keys that they see come in parts.

    Args:
        q_BNTH: The queries.
        value_dim: Of the values.
        rule: Visibility and scores; without dropout.
        sinks_N: See `AttentionKernel`.
    """

    def __init__(
        self, q_BNTH: Tensor, value_dim: int, rule: AttentionRule, sinks_N: Tensor | None
    ) -> None:
        self._q, self._rule = q_BNTH, rule
        shape = q_BNTH.shape[:3]
        self._out = q_BNTH.new_zeros(*shape, value_dim, dtype=torch.float32)
        self._norms = self._out.new_full(shape, float("-inf"))
        if sinks_N is not None:  # a key without value, before all others
            self._norms = self._norms.copy_(sinks_N[:, None])

    def add(self, k_BKLH: Tensor, v_BKLV: Tensor, block: Block) -> None:
        """Let the queries of a block attend to its keys, of those that are here."""
        rows, columns = slice(*block.queries), slice(*block.keys)
        v = v_BKLV[:, :, columns]
        scores = _Scores.of(self._q[:, :, rows], k_BKLH[:, :, columns], block, self._rule)
        top = scores.wide.amax(-1, keepdim=True)
        top = top.masked_fill(top == float("-inf"), 0.0)  # of a query that sees none of the keys
        weights = (scores.wide - top).exp_()
        total = weights.sum(-1, keepdim=True)
        norms = _split_heads(total.log() + top, self._q)[..., 0]
        out = _split_heads((weights.to(v.dtype) @ v).float() / total.clamp(min=1e-30), self._q)
        before = self._norms[:, :, rows]
        joined = torch.logaddexp(before, norms)
        safe = joined.masked_fill(joined == float("-inf"), 0.0)
        kept = self._out[:, :, rows]
        kept *= (before - safe).exp_()[..., None]
        kept += out * (norms - safe).exp_()[..., None]
        self._norms[:, :, rows] = joined

    def finish(self) -> tuple[Tensor, Tensor]:
        """The outcome [B, N, T, V], and the float32 log-normalisers [B, N, T]."""
        return self._out.to(self._q.dtype), self._norms


class JoinedGradients:
    """Gradients of `JoinedAttention`, while the keys come in parts once more.

    Args:
        q_BNTH: The queries.
        out_BNTV: What they got.
        norms_BNT: Their log-normalisers.
        grad_BNTV: Gradient of what they got.
        rule: The same.
    """

    def __init__(
        self,
        q_BNTH: Tensor,
        out_BNTV: Tensor,
        norms_BNT: Tensor,
        grad_BNTV: Tensor,
        rule: AttentionRule,
    ) -> None:
        self._q, self._norms, self._grad, self._rule = q_BNTH, norms_BNT, grad_BNTV, rule
        self._drift = (out_BNTV.float() * grad_BNTV.float()).sum(-1)
        self._grad_q = torch.zeros_like(
            q_BNTH, dtype=torch.float32, memory_format=torch.contiguous_format
        )

    def add(self, kv: tuple[Tensor, Tensor], grads: tuple[Tensor, Tensor], block: Block) -> None:
        """Add a block's gradients of keys and values, and keep those of the queries.

        Args:
            kv: The keys and values that are here.
            grads: Sums of theirs so far, float32.
            block: One of those that `JoinedAttention` was given.
        """
        rows, columns = slice(*block.queries), slice(*block.keys)
        k, v = (x[:, :, columns] for x in kv)
        q, grad = self._q[:, :, rows], self._grad[:, :, rows]
        scores = _Scores.of(q, k, block, self._rule)
        weights = (scores.wide - _join_heads(self._norms[:, :, rows, None], k)).exp_()
        given = _join_heads(grad, k)
        slopes = (given @ v.transpose(-1, -2)).float()
        slopes -= _join_heads(self._drift[:, :, rows, None], k)
        slopes = scores.to_raw(slopes.mul_(weights)).to(k.dtype)
        self._grad_q[:, :, rows] += _split_heads(slopes @ k, self._q)
        grads[0][:, :, columns] += slopes.transpose(-1, -2) @ _join_heads(q, k)
        grads[1][:, :, columns] += weights.to(v.dtype).transpose(-1, -2) @ given

    def finish(self, sinks_N: Tensor | None) -> tuple[Tensor, Tensor | None]:
        """The gradients of the queries and of the sinks."""
        grad_sinks = None
        if sinks_N is not None:
            shares = (sinks_N.float()[:, None] - self._norms).exp_()
            grad_sinks = -(shares * self._drift).sum((0, 2)).to(sinks_N.dtype)
        return self._grad_q.to(self._q.dtype), grad_sinks


@dataclass(frozen=True, slots=True)
class _Scores:
    """Scores of a block, float32 [B, K, R, L], -inf where nothing is seen."""

    wide: Tensor
    scale: float
    softcap: float | None

    @classmethod
    def of(cls, q: Tensor, k: Tensor, block: Block, rule: AttentionRule) -> _Scores:
        scale = q.shape[-1] ** -0.5 if rule.scale is None else rule.scale
        wide = (_join_heads(q, k) @ k.transpose(-1, -2)).float() * scale
        if rule.softcap is not None:
            wide = rule.softcap * torch.tanh(wide / rule.softcap)
        hidden = block.is_hidden(rule, q.device)
        if hidden is not None:
            by_head = wide.unflatten(2, (-1, q.shape[2]))
            wide = by_head.masked_fill(hidden, float("-inf")).flatten(2, 3)
        return cls(wide, scale, rule.softcap)

    def to_raw(self, slopes: Tensor) -> Tensor:
        """From the gradient of the scores to that of the products of queries and keys."""
        if self.softcap is not None:
            capped = self.wide.masked_fill(self.wide == float("-inf"), 0.0)
            slopes = slopes * (1 - (capped / self.softcap) ** 2)
        return slopes * self.scale


def _join_heads(x_BNTH: Tensor, k_BKLH: Tensor) -> Tensor:
    """[B, K, R, H]: the heads that share a key head as further rows, so that no key is copied."""
    return x_BNTH.unflatten(1, (k_BKLH.shape[1], -1)).flatten(2, 3)


def _split_heads(x_BKRH: Tensor, q_BNTH: Tensor) -> Tensor:
    """The inverse of `_join_heads`: [B, N, T, H]."""
    groups = q_BNTH.shape[1] // x_BKRH.shape[1]
    return x_BKRH.unflatten(2, (groups, -1)).flatten(1, 2)
