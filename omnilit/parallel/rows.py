"""Rows of a tensor that change ranks, as many to each as it is to get."""

from __future__ import annotations

import torch.distributed as dist
from torch import Tensor
from torch.autograd import Function
from torch.autograd.function import FunctionCtx
from torch.distributed import ProcessGroup

from omnilit.types import RowCounts


def trade_rows(rows: Tensor, counts: RowCounts, group: ProcessGroup) -> Tensor:
    """Send each rank its rows, in one exchange; their gradients come back the same way.

    Args:
        rows: [R, ...], those for the first rank first; every rank has rows of one shape and type.
        counts: Rows to and from each rank; what one sends, the other receives.
        group: The ranks; all call alike, those with nothing to send or receive too.

    Returns:
        What came, those of the first rank first.
    """
    return _Trade.apply(rows, counts, group)


class _Trade(Function):
    @staticmethod
    def forward(ctx: FunctionCtx, rows: Tensor, counts: RowCounts, group: ProcessGroup) -> Tensor:
        ctx.trade = (counts, group)  # pyright: ignore[reportAttributeAccessIssue]
        return _trade(rows, counts, group)

    @staticmethod
    def backward(ctx: FunctionCtx, *gradients: Tensor) -> tuple[Tensor, None, None]:
        counts, group = ctx.trade  # pyright: ignore[reportAttributeAccessIssue]
        return _trade(gradients[0], RowCounts(counts.received, counts.sent), group), None, None


def _trade(rows: Tensor, counts: RowCounts, group: ProcessGroup) -> Tensor:
    came = rows.new_empty(sum(counts.received), *rows.shape[1:])
    dist.all_to_all_single(
        came, rows.contiguous(), list(counts.received), list(counts.sent), group=group
    )
    return came
