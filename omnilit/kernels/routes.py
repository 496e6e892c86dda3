"""Rows of tokens in the order of their experts, and back: how all fused experts begin and end."""

# T tokens, k experts of a token, S = T k rows, E experts

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import embedding_bag


@dataclass(frozen=True, slots=True)
class Routes:
    """Which row of the sorted ones belongs to which token, the rows of an expert together.

    Args:
        token: The token of each row, [S].
        order: Which of the T k choices each row is, [S].
        place: The row of each choice, [T, k].
        ends: Where the rows of each expert end, [E]. Rows past the last of them have no expert.
    """

    token: Tensor
    order: Tensor
    place: Tensor
    ends: Tensor

    @classmethod
    def sort(cls, top_k_index: Tensor, num_experts: int) -> Routes:
        """Sort the choices by expert, those of one expert by token.

        Args:
            top_k_index: The experts of each token [T, k]; ids past the last one have no expert.
            num_experts: E.
        """
        flat = top_k_index.flatten()
        order = torch.argsort(flat, stable=True)
        place = torch.empty_like(order)
        place[order] = torch.arange(order.numel(), device=order.device)
        counts = torch.bincount(flat, minlength=num_experts)[:num_experts]
        token = torch.div(order, top_k_index.shape[1], rounding_mode="floor")
        return cls(token, order, place.view_as(top_k_index), counts.cumsum(0))

    def gather(self, x_TD: Tensor) -> Tensor:
        """The token of every row, [S, D]."""
        return _Gather.apply(x_TD, self.token, self.place)  # type: ignore[return-value]

    def add_up(self, rows_SD: Tensor) -> Tensor:
        """The sum of each token's rows, [T, D]; the transpose of `gather`."""
        return _AddUp.apply(rows_SD, self.token, self.place)  # type: ignore[return-value]


def add_rows(rows_SD: Tensor, place: Tensor) -> Tensor:
    """Sum the rows of each token, always in the same order, without a copy of them; [T, D]."""
    if place.numel() == 0:
        return rows_SD.new_zeros(place.shape[0], rows_SD.shape[1])
    return embedding_bag(place, rows_SD, mode="sum")


class _Gather(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, token: Tensor, place: Tensor) -> Tensor:
        ctx.save_for_backward(place)
        return x.index_select(0, token)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        return add_rows(grads[0].contiguous(), *ctx.saved_tensors), None, None


class _AddUp(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, rows: Tensor, token: Tensor, place: Tensor) -> Tensor:
        ctx.save_for_backward(token)
        return add_rows(rows, place)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        (token,) = ctx.saved_tensors
        return grads[0].index_select(0, token), None, None
