"""Experts in torch alone: rows sorted by expert once, then one expert after the other.

What an expert needs lies in the cache while it is worked on. Only the first product of all rows is
kept for backward, which makes the rest of it again.
"""

# T tokens, k experts of a token, S = T k rows, E experts, D hidden size, I intermediate size,
# F = 2 I with a gate and I without

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from itertools import pairwise
from typing import Any, Final

import torch
from torch import Tensor
from torch.nn.functional import silu

from omnilit.kernels import swiglu
from omnilit.kernels.moe_grouped import run_grouped
from omnilit.kernels.projections import Projections
from omnilit.kernels.routes import Routes, add_rows


def by_expert(
    experts: Any, hidden_TD: Tensor, top_k_index: Tensor, top_k_weights: Tensor
) -> Tensor:
    """As `kernels.moe.eager`, for all modules of experts that transformers has."""
    parts = Projections.of(experts)
    has_more = sum(1 for _ in experts.parameters()) > (4 if experts.has_bias else 2)
    # A norm comes between an expert and its weight, so weights cannot come first; and gradients of
    # parameters that are not the products' are left to autograd.
    if parts.behind is not None or has_more:
        return run_grouped(parts, hidden_TD, top_k_index, top_k_weights, multiply)
    routes = Routes.sort(top_k_index, parts.first.shape[0])
    # torch does not type Function.apply
    return _ByExpert.apply(  # type: ignore[return-value]
        hidden_TD,
        top_k_weights.to(hidden_TD.dtype),
        routes,
        parts.between,
        parts.first,
        parts.second,
        parts.first_bias,
        parts.second_bias,
    )


def multiply(rows_SD: Tensor, weights_EDF: Tensor, ends: Tensor) -> Tensor:
    """Multiply the rows of each expert with its weights, one expert after the other; [S, F]."""
    return _Product.apply(rows_SD, weights_EDF, ends)  # type: ignore[return-value]


def _spans(ends: Tensor) -> list[slice]:
    """The rows of each expert; a product of none writes zeros where a gradient belongs."""
    stops = ends.tolist()
    return [slice(a, b) for a, b in pairwise((0, *stops))]


_silu_backward: Final = torch.ops.aten.silu_backward.grad_input
_PullBack = Callable[[Tensor], Tensor]


def is_swiglu(between: Callable[[Tensor], Tensor]) -> bool:
    """Whether the module's gate is the usual one, which has its gradient below.

    Some clamp their values, at a limit of their configuration: so values past any limit are tried.
    """
    values = torch.tensor((-1e15, -2.0, -0.3, 0.3, 2.0, 1e15), device="cpu")
    probe = torch.cartesian_prod(values, values)
    found, expected = between(probe), swiglu.eager(*probe.chunk(2, dim=-1))
    return found.shape == expected.shape and torch.equal(found, expected)


def _open_swiglu(wide: Tensor) -> tuple[Tensor, _PullBack]:
    """The gated values, and what brings their gradient back; it overwrites the gradient."""
    gate, up = wide.chunk(2, dim=-1)
    active = silu(gate)

    def pull_back(grad_narrow: Tensor) -> Tensor:
        grad_wide = torch.empty_like(wide)
        grad_gate, grad_up = grad_wide.chunk(2, dim=-1)
        torch.mul(grad_narrow, active, out=grad_up)
        _silu_backward(grad_narrow.mul_(up), gate, grad_input=grad_gate)
        return grad_wide

    return active * up, pull_back


def _open(between: Callable[[Tensor], Tensor], wide: Tensor) -> tuple[Tensor, _PullBack]:
    """The same for any gate, by autograd."""
    with torch.enable_grad():
        leaf = wide.detach().requires_grad_()
        narrow = between(leaf)

    def pull_back(grad_narrow: Tensor) -> Tensor:
        (grad_wide,) = torch.autograd.grad(narrow, leaf, grad_narrow)
        return grad_wide

    return narrow.detach(), pull_back


class _ByExpert(torch.autograd.Function):
    """The weight of a token goes onto the input of the second product, which is its narrow side."""

    @staticmethod
    def forward(
        ctx: Any,
        x_TD: Tensor,
        weights_Tk: Tensor,
        routes: Routes,
        between: Callable[[Tensor], Tensor],
        *parameters: Tensor | None,
    ) -> Tensor:
        first, second, first_bias, second_bias = parameters
        assert first is not None
        assert second is not None
        weights_S = weights_Tk.flatten().index_select(0, routes.order)
        wide_SF = x_TD.new_empty(weights_S.shape[0], first.shape[2])
        out_SD = x_TD.new_empty(weights_S.shape[0], second.shape[2])
        spans = _spans(routes.ends)
        for expert, rows in enumerate(spans):
            wide, out, weight = wide_SF[rows], out_SD[rows], weights_S[rows, None]
            torch.mm(x_TD.index_select(0, routes.token[rows]), first[expert], out=wide)
            if first_bias is not None:
                wide += first_bias[expert]
            torch.mm(between(wide) * weight, second[expert], out=out)
            if second_bias is not None:
                out.addcmul_(weight, second_bias[expert])
        out_SD[spans[-1].stop :].zero_()
        sorting = (routes.token, routes.order, routes.place, routes.ends)
        ctx.save_for_backward(*sorting, x_TD, weights_S, wide_SF, *parameters)
        ctx.open = _open_swiglu if is_swiglu(between) else partial(_open, between)
        return add_rows(out_SD, routes.place)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        token, order, place, ends, x_TD, weights_S, wide_SF, *parameters = ctx.saved_tensors
        first, second, _, second_bias = parameters
        found = [
            torch.empty_like(parameter) if parameter is not None and is_needed else None
            for parameter, is_needed in zip(parameters, ctx.needs_input_grad[4:], strict=True)
        ]
        grad_x = x_TD.new_empty(token.shape[0], x_TD.shape[1])
        grad_weights = torch.zeros_like(weights_S)
        spans = _spans(ends)
        for expert, rows in enumerate(spans):
            tokens, weight = token[rows], weights_S[rows, None]
            given = grads[0].index_select(0, tokens)
            narrow, pull_back = ctx.open(wide_SF[rows])
            grad_narrow = given @ second[expert].t()
            grad_weights[rows] = torch.linalg.vecdot(grad_narrow, narrow)
            if second_bias is not None:
                grad_weights[rows] += given @ second_bias[expert]
            grad_wide = pull_back(grad_narrow.mul_(weight))
            torch.mm(grad_wide, first[expert].t(), out=grad_x[rows])
            if found[0] is not None:
                torch.mm(x_TD.index_select(0, tokens).t(), grad_wide, out=found[0][expert])
            if found[1] is not None:
                torch.mm((narrow * weight).t(), given, out=found[1][expert])
            if found[2] is not None:
                torch.sum(grad_wide, 0, out=found[2][expert])
            if found[3] is not None:
                torch.mv(given.t(), weight[:, 0], out=found[3][expert])
        grad_x[spans[-1].stop :].zero_()
        by_choice = torch.empty_like(grad_weights)
        by_choice[order] = grad_weights
        return add_rows(grad_x, place), by_choice.view_as(place), None, None, *found


class _Product(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, rows_SD: Tensor, weights: Tensor, ends: Tensor) -> Tensor:
        ctx.save_for_backward(rows_SD, weights, ends)
        out = rows_SD.new_zeros(rows_SD.shape[0], weights.shape[2])
        for expert, rows in enumerate(_spans(ends)):
            torch.mm(rows_SD[rows], weights[expert], out=out[rows])
        return out

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        rows_SD, weights, ends = ctx.saved_tensors
        grad_rows, grad_weights = torch.zeros_like(rows_SD), torch.zeros_like(weights)
        for expert, rows in enumerate(_spans(ends)):
            torch.mm(grads[0][rows], weights[expert].t(), out=grad_rows[rows])
            torch.mm(rows_SD[rows].t(), grads[0][rows], out=grad_weights[expert])
        return grad_rows, grad_weights, None
