"""What transformers' modules of stacked experts compute, whatever their layout, gate and biases."""

# E experts, D hidden size, I intermediate size, F = 2 I with a gate and I without, S rows

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch import Tensor


@dataclass(frozen=True, slots=True)
class Projections:
    """The two products of every expert and what lies between and behind them.

    Args:
        first: Weights of the first product, [E, D, F].
        second: Weights of the second, [E, I, D].
        first_bias: [E, F], added to what the first gives; None for none.
        second_bias: [E, D], added to what the second gives; None for none.
        between: From a row [F] of the first product to one [I] of the second: gate or activation.
        behind: Normalises what an expert gives, before it is weighted; None for none.
    """

    first: Tensor
    second: Tensor
    first_bias: Tensor | None
    second_bias: Tensor | None
    between: Callable[[Tensor], Tensor]
    behind: Callable[[Tensor], Tensor] | None

    @classmethod
    def of(cls, experts: Any) -> Projections:
        """Read them off a module that transformers' `use_experts_implementation` has decorated.

        Args:
            experts: The module; its flags say which parameters it has and how they lie.
        """
        name = "gate_up_proj" if experts.has_gate else "up_proj"
        first, second = getattr(experts, name), experts.down_proj
        if not experts.is_transposed:
            first, second = first.transpose(1, 2), second.transpose(1, 2)
        return cls(
            first,
            second,
            getattr(experts, f"{name}_bias") if experts.has_bias else None,
            experts.down_proj_bias if experts.has_bias else None,
            experts._apply_gate if experts.has_gate else experts.act_fn,  # noqa: SLF001
            experts.post_expert_norm if experts.has_post_expert_norm else None,
        )
