"""Torch's flex attention over packed segments: a mask in blocks, made of the bounds alone."""

# B batch, N heads, K key heads, T queries, L keys, H head dim, V head dim of the values

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cache
from typing import Any, Final

import torch
from torch import Tensor
from torch.nn.attention import flex_attention as flex

from omnilit.errors import KernelError
from omnilit.kernels.attention import AttentionRule

BLOCK: Final = 128  # queries and keys of a block, torch's own default


def flex_attention(
    q_BNTH: Tensor,
    k_BKLH: Tensor,
    v_BKLV: Tensor,
    *,
    bounds: Sequence[int],
    rule: AttentionRule,
    sinks_N: Tensor | None = None,
) -> Tensor:
    """All segments in one compiled launch; see `kernels.attention.AttentionKernel`.

    A sink takes its share of the weight behind the kernel, by the log-normalisers.

    Raises:
        KernelError: Dropout, which flex attention does not have.
    """
    if rule.dropout:
        raise KernelError(
            key="model.ops_implementation.attn_implementation",
            problem="'flex_attention' has no dropout, and this model asks for it",
            fix="set it to sdpa",
        )
    run = _compiled() if q_BNTH.device.type == "cuda" else flex.flex_attention
    out, aux = run(
        q_BNTH,
        k_BKLH,
        v_BKLV,
        score_mod=None if rule.softcap is None else _cap(rule.softcap),
        block_mask=make_mask(bounds, k_BKLH.shape[2], rule, q_BNTH.device),
        scale=rule.scale,
        enable_gqa=q_BNTH.shape[1] != k_BKLH.shape[1],
        return_aux=flex.AuxRequest(lse=True),
    )
    if sinks_N is not None:
        assert aux.lse is not None, "asked for"
        share = torch.sigmoid(aux.lse - sinks_N.float()[:, None])  # of the keys, beside the sink
        out = (out * share[..., None]).to(out.dtype)
    return out.transpose(1, 2).contiguous()


def make_mask(
    bounds: Sequence[int], num_keys: int, rule: AttentionRule, device: torch.device
) -> flex.BlockMask:
    """Which blocks of keys each block of queries looks into, and what it sees there.

    Args:
        bounds: Ends of the segments, [0, ..., T].
        num_keys: L; other than T with one segment alone, whose last tokens the queries then are.
        rule: What a query sees.
        device: Of the mask.
    """
    num_queries = bounds[-1]
    offset = num_keys - num_queries
    starts = torch.tensor([0, *(b + offset for b in bounds[1:-1])], device=device)
    places = torch.arange(num_keys, device=device)
    segment_L = torch.bucketize(places, starts, right=True) - 1

    def is_visible(_batch: Tensor, _head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        place = query + offset
        keep = segment_L[place] == segment_L[key]
        if rule.is_causal:
            keep = keep & (place >= key)
        if rule.window is not None:
            keep = keep & ((place - key).abs() < rule.window)
        return keep

    some, all_ = _look(segment_L, num_queries, rule)
    return flex.BlockMask.from_kv_blocks(
        *_listed(some & ~all_),
        *_listed(all_),
        BLOCK_SIZE=BLOCK,
        mask_mod=is_visible,
        seq_lengths=(num_queries, num_keys),
    )


def _look(segment_L: Tensor, num_queries: int, rule: AttentionRule) -> tuple[Tensor, Tensor]:
    """Pairs of blocks that may hold a pair that sees each other, and those that hold no other."""
    num_keys = segment_L.shape[0]
    q_first, q_last = _edges(num_keys - num_queries, num_keys, segment_L.device)
    k_first, k_last = _edges(0, num_keys, segment_L.device)
    q_from, q_to = segment_L[q_first][:, None], segment_L[q_last][:, None]
    k_from, k_to = segment_L[k_first], segment_L[k_last]
    q_first, q_last = q_first[:, None], q_last[:, None]
    some = (q_from <= k_to) & (k_from <= q_to)
    all_ = (q_from == q_to) & (k_from == k_to) & (q_from == k_from)
    # a block that the row does not fill is looked into
    all_ &= (q_last - q_first == BLOCK - 1) & (k_last - k_first == BLOCK - 1)
    if rule.is_causal:
        some &= k_first <= q_last
        all_ &= k_last <= q_first
    if rule.window is not None:
        some &= (q_first - k_last < rule.window) & (k_first - q_last < rule.window)
        all_ &= (q_last - k_first < rule.window) & (k_last - q_first < rule.window)
    return some, all_


def _edges(start: int, end: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """The first and the last place of every block."""
    first = torch.arange(start, end, BLOCK, device=device)
    return first, (first + BLOCK - 1).clamp(max=end - 1)


def _listed(blocks: Tensor) -> tuple[Tensor, Tensor]:
    """How many blocks of keys each row has, and which they are, those first."""
    order = torch.argsort(blocks.int(), dim=1, descending=True, stable=True)
    return blocks.sum(1, dtype=torch.int32)[None, None], order.to(torch.int32)[None, None]


def _cap(softcap: float) -> Callable[..., Tensor]:
    def capped(score: Tensor, *_: Tensor) -> Tensor:
        return softcap * torch.tanh(score / softcap)

    return capped


@cache
def _compiled() -> Any:
    return torch.compile(flex.flex_attention, dynamic=True)
