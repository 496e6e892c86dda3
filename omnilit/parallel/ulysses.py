"""Ulysses: ranks that split a sequence trade it for heads, so attention sees every token.

Source: DeepSpeed-Ulysses, arXiv 2309.14509, section 3.
"""

# B batch, N heads, T tokens, U ranks, H head dim

from __future__ import annotations

from collections.abc import Sequence
from math import gcd

from torch import Tensor
from torch.autograd import Function
from torch.autograd.function import FunctionCtx
from torch.distributed import ProcessGroup

from omnilit.parallel.shares import HEADS, TOKENS, join_shares, share_out, trade_shares


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
    shares = [share_out(x, split, group.size()) for x in tensors]
    return tuple(join_shares(came, join) for came in trade_shares(shares, group))
