"""Attention of a stretch of a row to the keys of the whole row, cut into calls of a kernel."""

# B batch, N heads, K key heads, T tokens of the stretch, L tokens of the row

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor
from torch.nn.functional import pad

from omnilit.kernels.attention import AttentionKernel, AttentionRule

Span = tuple[int, int]


@dataclass(frozen=True, slots=True)
class Piece:
    """Queries that one call of a kernel attends for.

    Args:
        queries: Their start and end in the row.
        keys: Start and end of the keys that they see.
        bounds: Ends of the segments among the queries, from 0 on.
    """

    queries: Span
    keys: Span
    bounds: tuple[int, ...]


def cut(span: Span, bounds: Sequence[int], rule: AttentionRule) -> Iterator[Piece]:
    """The calls that attend for the tokens of `span`.

    Segments whose keys and queries are the same tokens go together. One that began before the
    span, or one that looks beyond its end, has more keys than queries and goes alone.

    Args:
        span: Start and end in the row.
        bounds: Ends of the row's segments.
        rule: What a query sees.
    """
    start, end = span
    together: list[int] = []
    for piece in _cut_by_segment(start, end, bounds, rule):
        if piece.queries == piece.keys:
            together = together or [piece.queries[0]]
            together.append(piece.queries[1])
            continue
        yield from _join(together)
        together = []
        yield piece
    yield from _join(together)


def _cut_by_segment(
    start: int, end: int, bounds: Sequence[int], rule: AttentionRule
) -> Iterator[Piece]:
    reach = None if rule.window is None else rule.window - 1
    for a, b in pairwise(bounds[bisect_right(bounds, start) - 1 :]):
        if a >= end:
            return
        first, last = max(a, start), min(b, end)
        if first == last:
            continue
        keys_end = last if rule.is_causal else b
        if reach is None:
            keys = (a, keys_end)
        else:
            keys = (max(a, first - reach), min(keys_end, last + reach))
        yield Piece((first, last), keys, (0, last - first))


def _join(ends: Sequence[int]) -> Iterator[Piece]:
    if ends:
        span = (ends[0], ends[-1])
        yield Piece(span, span, tuple(end - ends[0] for end in ends))


def attend_spans(
    kernel: AttentionKernel,
    q_BNTH: Tensor,
    k_BKLH: Tensor,
    v_BKLV: Tensor,
    *,
    spans: Sequence[Span],
    bounds: Sequence[int],
    rule: AttentionRule,
    sinks_N: Tensor | None = None,
) -> Tensor:
    """Attend for some stretches of a row whose keys and values are all here.

    Args:
        kernel: Any backend.
        q_BNTH: The queries of the stretches, one behind the other.
        k_BKLH: Keys of the whole row.
        v_BKLV: Values of the whole row.
        spans: Start and end of each stretch in the row.
        bounds: Ends of the row's segments.
        rule: Visibility and scores.
        sinks_N: See `AttentionKernel`.

    Returns:
        Shape [B, T, N, V].
    """
    pieces = [piece for span in spans for piece in cut(span, bounds, rule)]
    queries = q_BNTH.split([end - start for start, end in (p.queries for p in pieces)], dim=2)
    parts = []
    for piece, q in zip(pieces, queries, strict=True):
        (start, end), size = piece.keys, q.shape[2]
        # a kernel takes queries for the last tokens: where keys go on behind them, so do queries
        behind = end - piece.queries[1] if rule.window is not None else 0
        out = kernel(
            pad(q, (0, 0, 0, behind)) if behind else q,
            k_BKLH[:, :, start:end],
            v_BKLV[:, :, start:end],
            bounds=(0, size + behind) if behind else piece.bounds,
            rule=rule,
            sinks_N=sinks_N,
        )
        parts.append(out[:, :size])
    return torch.cat(parts, dim=1)
