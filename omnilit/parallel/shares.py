"""Shares of tensors, one a rank, and the one all-to-all that trades them."""

# B batch, N heads, T tokens, H head dim

from __future__ import annotations

from collections.abc import Sequence
from typing import Final

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import ProcessGroup

HEADS: Final = 1  # the dimension of [B, N, T, H] that is split while whole sequences are attended
TOKENS: Final = 2  # the one that is divided among the ranks that share a row


def share_out(x: Tensor, dim: int, num_ranks: int) -> Tensor:
    """The equal parts of a dimension, along a new first one."""
    return x.unflatten(dim, (num_ranks, -1)).movedim(dim, 0)


def join_shares(shares: Tensor, dim: int) -> Tensor:
    """The inverse of `share_out`."""
    return shares.movedim(0, dim).flatten(dim, dim + 1)


def trade_shares(shares: Sequence[Tensor], group: ProcessGroup) -> list[Tensor]:
    """Send each rank its share of several tensors, in one exchange without gradient.

    Args:
        shares: See `share_out`.
        group: The ranks; all call alike.

    Returns:
        Of each tensor the shares that came, the first of them from the first rank.
    """
    sent = torch.cat([share.reshape(group.size(), -1) for share in shares], dim=1)
    received = torch.empty_like(sent)
    dist.all_to_all_single(received, sent, group=group)
    columns = received.split([share[0].numel() for share in shares], dim=1)
    return [column.view(x.shape) for column, x in zip(columns, shares, strict=True)]
