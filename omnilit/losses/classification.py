"""The loss of a classifier of sequences."""

# R sequences with a label, C classes

from __future__ import annotations

from typing import Final

from torch import Tensor
from torch.nn.functional import cross_entropy

from omnilit.losses.lm import BALANCE
from omnilit.types import LossTerm

CLASS: Final = "class"
ACCURACY: Final = "accuracy"


def class_losses(logits_RC: Tensor, labels: Tensor) -> Tensor:
    """Negative log-likelihood of the class of each sequence, [R].

    Args:
        logits_RC: In float32.
        labels: Number of the class, [R].
    """
    return cross_entropy(logits_RC, labels, reduction="none")


def class_terms(
    losses: Tensor, is_right: Tensor, *, balance: Tensor | None = None
) -> dict[str, LossTerm]:
    """Sums whose means over a step's labels are its loss and its accuracy.

    A sequence has one label, so the supervised tokens of a micro-batch are its labels.

    Args:
        losses: Of each sequence, [R].
        is_right: Whether the likeliest class is the right one, [R].
        balance: The router's balance loss where the model has one, a scalar: counted once a
            label of its micro-batch.
    """
    terms = {CLASS: LossTerm(losses.sum(), by_token=losses.detach())}
    if balance is not None:
        terms[BALANCE] = LossTerm(balance)
    return terms | {ACCURACY: LossTerm(is_right.double().sum(), is_trained=False)}
