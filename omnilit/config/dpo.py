"""`dpo_config`: preference optimisation."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final, Literal

# Losses that compare the policy's two answers with each other alone, by mean log-probabilities
ALONE: Final = ("orpo", "simpo")


@dataclass(frozen=True)
class DPOConfig:
    """The loss of direct preference optimisation and its reference model.

    Args:
        beta: How strongly the policy is held to the reference model; with orpo the weight of the
            odds ratio beside the likelihood of the chosen answer.
        label_smoothing: Share of pairs assumed to be labelled the wrong way round; sigmoid and
            robust only.
        reference_free: Compare with a uniform reference; no reference model is built or run.
        loss_type: sigmoid (DPO), ipo (identity preference optimisation), hinge, robust (to labels
            that are the wrong way round); orpo and simpo have no reference model and take mean
            log-probabilities.
        average_log_prob: Use the mean log-probability of a response's tokens, not their sum.
        refer_model_precision: Dtype of the frozen reference model.
        precompute_reference: Ask the reference model about all pairs before training, keep what it
            says on disk, and train without it.
        simpo_gamma: By how much the chosen answer's reward is to exceed the rejected one's, with
            `loss_type: simpo`.
    """

    beta: float = 0.1
    label_smoothing: float = 0.0
    reference_free: bool = False
    loss_type: Literal["sigmoid", "ipo", "hinge", "robust", "orpo", "simpo"] = "sigmoid"
    average_log_prob: bool = False
    refer_model_precision: Literal["float32", "bfloat16"] = "bfloat16"
    precompute_reference: bool = False
    simpo_gamma: float = 0.5
