"""The experts of a mixture: the reference of the slot `moe`."""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

import torch
from torch import Tensor
from torch.nn.functional import linear


class Experts(Protocol):
    """The part of transformers' fused experts modules that kernels use.

    E experts, D hidden size, I intermediate size.
    """

    gate_up_proj: Tensor  # [E, 2 I, D]
    down_proj: Tensor  # [E, D, I]
    act_fn: Callable[[Tensor], Tensor]


def eager(
    experts: Experts, hidden_TD: Tensor, top_k_index: Tensor, top_k_weights: Tensor
) -> Tensor:
    """Run each expert on its own tokens, one expert after the other.

    Args:
        experts: The module with the stacked weights of all experts.
        hidden_TD: Tokens [T, D].
        top_k_index: The experts of each token [T, k]; an id past the last one is skipped.
        top_k_weights: Their weights [T, k].

    Returns:
        The weighted sum of each token's experts, [T, D].
    """
    out_TD = torch.zeros_like(hidden_TD)
    for expert in range(experts.gate_up_proj.shape[0]):
        token, place = (top_k_index == expert).nonzero(as_tuple=True)
        if token.numel() == 0:
            continue
        gate, up = linear(hidden_TD[token], experts.gate_up_proj[expert]).chunk(2, dim=-1)
        result = linear(experts.act_fn(gate) * up, experts.down_proj[expert])
        result = result * top_k_weights[token, place, None]
        out_TD = out_TD.index_add(0, token, result.to(out_TD.dtype))
    return out_TD
