"""Ulysses: ranks that split a sequence trade it for heads, so attention sees every token.

Source: DeepSpeed-Ulysses, arXiv 2309.14509, section 3.
"""

# B batch, N heads, T tokens, U ranks, H head dim

from __future__ import annotations

from collections.abc import Sequence
from math import gcd

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd import Function
from torch.autograd.function import FunctionCtx
from torch.distributed import ProcessGroup

HEADS = 1  # the dimension of [B, N, T, H] that is split while whole sequences are attended
TOKENS = 2


def sequence_to_heads(tensors: Sequence[Tensor], group: ProcessGroup) -> tuple[Tensor, ...]:
    """Trade a split sequence for split heads, several tensors in one exchange.

    Args:
        tensors: Each [B, N, T / U, H] with N and H of its own; U divides N.
        group: The ranks that hold parts of one sequence, in order; all call alike.

    Returns:
        Of each all tokens of this rank's heads, [B, N / U, T, H].
    """
    return _Exchange.apply(group, HEADS, TOKENS, *tensors)


def heads_to_sequence(x_BNTH: Tensor, group: ProcessGroup) -> Tensor:
    """The inverse of `sequence_to_heads` for one tensor.

    Args:
        x_BNTH: All tokens of this rank's heads, [B, N / U, T, H].
        group: The same.

    Returns:
        This rank's tokens of all heads, [B, N, T / U, H].
    """
    (out,) = _Exchange.apply(group, TOKENS, HEADS, x_BNTH)
    return out


def repeat_heads(x_BNTH: Tensor, num_ranks: int) -> Tensor:
    """Repeat the heads of keys or values as often as it takes for `num_ranks` to divide them.

    Each query head still finds its key head among those of its rank.
    """
    repeats = num_ranks // gcd(x_BNTH.shape[HEADS], num_ranks)
    return x_BNTH.repeat_interleave(repeats, HEADS) if repeats > 1 else x_BNTH


class _Exchange(Function):
    """Splits one dimension over the ranks and joins another; backward does the reverse."""

    @staticmethod
    def forward(
        ctx: FunctionCtx, group: ProcessGroup, split: int, join: int, *tensors: Tensor
    ) -> tuple[Tensor, ...]:
        ctx.exchange = (group, split, join)  # pyright: ignore[reportAttributeAccessIssue]
        return exchange(tensors, group, split=split, join=join)

    @staticmethod
    def backward(ctx: FunctionCtx, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        group, split, join = ctx.exchange  # pyright: ignore[reportAttributeAccessIssue]
        return None, None, None, *exchange(gradients, group, split=join, join=split)


def exchange(
    tensors: Sequence[Tensor], group: ProcessGroup, *, split: int, join: int
) -> tuple[Tensor, ...]:
    """Send each rank its share of dimension `split`, and join along `join` what comes back.

    One all-to-all for all tensors, without gradient.
    """
    num_ranks = group.size()
    shares = [share_out(x, split, num_ranks) for x in tensors]
    sent = torch.cat([share.reshape(num_ranks, -1) for share in shares], dim=1)
    received = torch.empty_like(sent)
    dist.all_to_all_single(received, sent, group=group)
    columns = received.split([share[0].numel() for share in shares], dim=1)
    return tuple(
        join_shares(column.view(share.shape), join)
        for column, share in zip(columns, shares, strict=True)
    )


def share_out(x: Tensor, dim: int, num_ranks: int) -> Tensor:
    """The equal parts of a dimension, along a new first one."""
    return x.unflatten(dim, (num_ranks, -1)).movedim(dim, 0)


def join_shares(shares: Tensor, dim: int) -> Tensor:
    """The inverse of `share_out`."""
    return shares.movedim(0, dim).flatten(dim, dim + 1)
