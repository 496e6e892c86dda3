"""The terms of a language model's loss."""

from __future__ import annotations

from typing import Final

from torch import Tensor

from omnilit.types import TOKENS, WEIGHT, LossTerm

LM: Final = "lm"
BALANCE: Final = "balance"


def lm_terms(
    token_losses: Tensor,
    *,
    weights: Tensor | None = None,
    balance: Tensor | None = None,
) -> dict[str, LossTerm]:
    """Sums whose mean over a step's supervised tokens is its loss.

    With weights it is the weighted mean: the sum of weight times loss over the sum of weights.

    Args:
        token_losses: Negative log-likelihoods [R] of the R supervised tokens.
        weights: How much each of them counts, [R]; None where all count 1.
        balance: The router's balance loss where the model has one, a scalar: counted once a
            supervised token of its micro-batch, since it belongs to that as a whole.
    """
    total = (token_losses if weights is None else token_losses * weights).sum()
    count = TOKENS if weights is None else WEIGHT
    terms = {LM: LossTerm(total, count, token_losses.detach())}
    if balance is not None:
        terms[BALANCE] = LossTerm(balance)
    return terms
