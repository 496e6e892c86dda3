"""Ulysses with its exchanges under way while other things are computed, in both directions."""

# B batch, N heads, T tokens, U ranks, H head dim

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd import Function
from torch.distributed import ProcessGroup, Work

from omnilit.parallel.shares import HEADS, TOKENS, join_shares, share_out


@dataclass(slots=True)
class _Exchange:
    """One exchange at a time: the tensors of the forward, later their gradients."""

    group: ProcessGroup
    _work: Work | None = None
    _sent: Tensor | None = None

    def start(self, x: Tensor, dim: int) -> Tensor:
        """Send each rank its share of a dimension; what comes is undefined before `wait`."""
        self._sent = share_out(x, dim, self.group.size()).contiguous()  # kept until it is gone
        received = torch.empty_like(self._sent)
        self._work = dist.all_to_all_single(received, self._sent, group=self.group, async_op=True)
        return received

    def wait(self) -> None:
        assert self._work is not None, "nothing is under way"
        self._work.wait()
        self._work = self._sent = None


def start_to_heads(x_BNTH: Tensor, group: ProcessGroup) -> Callable[[], Tensor]:
    """Begin to trade a split sequence for split heads.

    In backward, too, the exchange of the gradient is begun where this one is waited for, and
    waited for where this one is begun; nothing may look at the gradient between the two.

    Args:
        x_BNTH: [B, N, T / U, H]; U divides N.
        group: The ranks that hold parts of one sequence, in order; all call alike.

    Returns:
        Waits, and gives all tokens of this rank's heads, [B, N / U, T, H]; to be called once.
    """
    exchange = _Exchange(group)
    pending = _Start.apply(x_BNTH, exchange)
    return lambda: _Finish.apply(pending, exchange)


class _Start(Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, exchange: _Exchange) -> Tensor:
        ctx.exchange = exchange
        return exchange.start(x, HEADS)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        ctx.exchange.wait()
        return join_shares(gradients[0], HEADS), None


class _Finish(Function):
    @staticmethod
    def forward(ctx: Any, pending: Tensor, exchange: _Exchange) -> Tensor:
        ctx.exchange = exchange
        exchange.wait()
        return join_shares(pending, TOKENS)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        return ctx.exchange.start(gradients[0], TOKENS), None
