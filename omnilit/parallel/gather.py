"""Context parallelism's gathered form: each rank gets the keys and values of the whole row."""

# B batch, K key heads, T tokens, H head dim

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd import Function
from torch.autograd.function import FunctionCtx
from torch.distributed import ProcessGroup

from omnilit.parallel.shares import TOKENS, share_out, trade_shares


def gather_row(
    tensors: Sequence[Tensor], group: ProcessGroup, order: Sequence[int]
) -> tuple[Tensor, ...]:
    """The whole row of several tensors, of which each rank holds some chunks.

    Their gradients are summed over the ranks, in float32, and each rank gets those of its chunks.

    Args:
        tensors: Each this rank's part, [B, K, T / ranks, H] with K and H of its own.
        group: The ranks that hold the parts; all call alike.
        order: Which chunk of the row stands where, counted through the parts of all ranks.

    Returns:
        Of each [B, K, T, H].
    """
    return _Gather.apply(group, tuple(order), *tensors)


class _Gather(Function):
    @staticmethod
    def forward(
        ctx: FunctionCtx, group: ProcessGroup, order: tuple[int, ...], *tensors: Tensor
    ) -> tuple[Tensor, ...]:
        ctx.gather = (group, order)  # pyright: ignore[reportAttributeAccessIssue]
        return _gather(tensors, group, order)

    @staticmethod
    def backward(ctx: FunctionCtx, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        group, order = ctx.gather  # pyright: ignore[reportAttributeAccessIssue]
        return None, None, *_scatter_sums(gradients, group, order)


def _gather(
    tensors: Sequence[Tensor], group: ProcessGroup, order: tuple[int, ...]
) -> tuple[Tensor, ...]:
    num_ranks = group.size()
    sent = torch.cat([x.flatten() for x in tensors])
    received = sent.new_empty(num_ranks * sent.numel())
    dist.all_gather_single(received, sent, group=group)
    columns = received.view(num_ranks, -1).split([x.numel() for x in tensors], dim=1)
    rows = []
    for column, x in zip(columns, tensors, strict=True):
        parts = [part.view(x.shape) for part in column]
        chunks = [c for part in parts for c in part.chunk(len(order) // num_ranks, TOKENS)]
        place = {chunk: held for held, chunk in enumerate(order)}
        rows.append(torch.cat([chunks[place[chunk]] for chunk in sorted(order)], TOKENS))
    return tuple(rows)


def _scatter_sums(
    gradients: Sequence[Tensor], group: ProcessGroup, order: tuple[int, ...]
) -> tuple[Tensor, ...]:
    """The reverse of gathering: a reduce-scatter whose sums are not rounded on the way."""
    shares = []
    for gradient in gradients:
        chunks = gradient.chunk(len(order), TOKENS)
        by_rank = torch.cat([chunks[chunk] for chunk in order], TOKENS)
        shares.append(share_out(by_rank, TOKENS, group.size()))
    came = trade_shares(shares, group)
    return tuple(parts.sum(0, dtype=torch.float32).to(parts.dtype) for parts in came)
