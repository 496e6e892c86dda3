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
    aux_loss: Tensor | None = None,
    aux_coefficient: float = 0.0,
) -> dict[str, LossTerm]:
    """Sums whose mean over a step's supervised tokens is its loss.

    With weights it is the weighted mean: the sum of weight times loss over the sum of weights.

    The router's balance loss belongs to a micro-batch as a whole. Counted once a supervised
    token, it enters the step's mean with the micro-batch's share of the step's tokens.

    Args:
        token_losses: Negative log-likelihoods [R] of the R supervised tokens.
        weights: How much each of them counts, [R]; None where all count 1.
        aux_loss: The balance loss, a scalar, where the model has one.
        aux_coefficient: Its weight beside the token losses.
    """
    total = (token_losses if weights is None else token_losses * weights).sum()
    count = TOKENS if weights is None else WEIGHT
    terms = {LM: LossTerm(total, count, token_losses.detach())}
    if aux_loss is not None:
        terms[BALANCE] = LossTerm(aux_coefficient * token_losses.numel() * aux_loss)
    return terms
