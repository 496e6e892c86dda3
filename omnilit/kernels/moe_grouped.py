"""Experts by two grouped products over rows sorted by expert; backends bring the product."""

# T tokens, k experts of a token, S = T k rows, E experts, D hidden size, F columns

from __future__ import annotations

from typing import Any, Final, Protocol

import torch
from torch import Tensor

from omnilit.errors import KernelError
from omnilit.kernels.projections import Projections
from omnilit.kernels.routes import Routes

LINE: Final = 16  # bytes that torch's product wants rows to be multiples of


class GroupedProduct(Protocol):
    """A product of the rows of each expert with its weights, with a backward."""

    def __call__(self, rows_SD: Tensor, weights_EDF: Tensor, ends: Tensor) -> Tensor:
        """Multiply.

        Args:
            rows_SD: Sorted by expert.
            weights_EDF: In any layout.
            ends: Where the rows of each expert end; rows past the last may give anything.

        Returns:
            Shape [S, F].
        """
        ...


def run_grouped(
    parts: Projections,
    hidden_TD: Tensor,
    top_k_index: Tensor,
    top_k_weights: Tensor,
    multiply: GroupedProduct,
) -> Tensor:
    """As `kernels.moe.eager`, by a grouped product.

    Args:
        parts: Of the module of experts.
        hidden_TD: Tokens.
        top_k_index: The experts of each token [T, k]; an id past the last one is skipped.
        top_k_weights: Their weights [T, k].
        multiply: The product.
    """
    num_experts = parts.first.shape[0]
    routes = Routes.sort(top_k_index, num_experts)
    expert_S = top_k_index.flatten()[routes.order]
    is_past_S1 = (expert_S >= num_experts)[:, None]
    expert_S = expert_S.clamp(max=num_experts - 1)

    def project(rows_SD: Tensor, weights_EDF: Tensor, bias_EF: Tensor | None) -> Tensor:
        out_SF = multiply(rows_SD, weights_EDF, routes.ends)
        if bias_EF is not None:
            out_SF = out_SF + bias_EF[expert_S]
        return out_SF.masked_fill(is_past_S1, 0.0)  # a product leaves those rows as they were

    rows = routes.gather(hidden_TD).masked_fill(is_past_S1, 0.0)
    narrow = parts.between(project(rows, parts.first, parts.first_bias))
    out = project(narrow, parts.second, parts.second_bias)
    if parts.behind is not None:
        out = parts.behind(out)
    weights_S1 = top_k_weights.flatten()[routes.order, None].masked_fill(is_past_S1, 0.0)
    return routes.add_up((out * weights_S1).to(hidden_TD.dtype))


def grouped_mm(
    experts: Any, hidden_TD: Tensor, top_k_index: Tensor, top_k_weights: Tensor
) -> Tensor:
    """As `kernels.moe.eager`, by torch's own grouped product.

    Raises:
        KernelError: A row of the weights does not fill whole lines of 16 bytes.
    """
    parts = Projections.of(experts)
    for weights in (parts.first, parts.second):
        _refuse_uneven(weights)
    return run_grouped(parts, hidden_TD, top_k_index, top_k_weights, _multiply)


def _refuse_uneven(weights: Tensor) -> None:
    size = weights.element_size()
    if any(width * size % LINE for width in weights.shape[1:]):
        raise KernelError(
            key="model.ops_implementation.moe_implementation",
            problem=f"'grouped_mm' takes rows of whole {LINE} bytes, and experts of "
            f"{weights.shape[1]} by {weights.shape[2]} in {weights.dtype} have others",
            fix="set it to torch",
        )


def _multiply(rows_SD: Tensor, weights_EDF: Tensor, ends: Tensor) -> Tensor:
    return torch.nn.functional.grouped_mm(rows_SD, weights_EDF, offs=ends.to(torch.int32))
