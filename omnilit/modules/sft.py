"""Supervised fine-tuning and pre-training of causal language models."""

from __future__ import annotations

from typing_extensions import override

from omnilit.losses.lm import lm_terms
from omnilit.modules.base import OmniModule
from omnilit.types import IGNORE, LossTerm, MicroBatch


class SFTModule(OmniModule):
    """Trains a causal language model on its supervised tokens.

    With a mixture-of-experts model whose configuration asks for it, the router's balance loss is
    a second term.
    """

    @override
    def loss_terms(self, batch: MicroBatch) -> dict[str, LossTerm]:
        output = self.assembled.forward(batch)
        weights = batch.weights
        return lm_terms(
            output.token_losses,
            weights=None if weights is None else weights[batch.labels != IGNORE],
            balance=output.balance,
        )
