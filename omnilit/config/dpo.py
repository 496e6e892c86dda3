"""`dpo_config`: preference optimisation."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True)
class DPOConfig:
    """The loss of direct preference optimisation and its reference model.

    Args:
        beta: How strongly the policy is held to the reference model.
        label_smoothing: Share of pairs assumed to be labelled the wrong way round.
        reference_free: Compare with a uniform reference; no reference model is built or run.
        loss_type: sigmoid (DPO) or ipo (identity preference optimisation).
        average_log_prob: Use the mean log-probability of a response's tokens, not their sum.
        refer_model_precision: Dtype of the frozen reference model.
    """

    beta: float = 0.1
    label_smoothing: float = 0.0
    reference_free: bool = False
    loss_type: Literal["sigmoid", "ipo"] = "sigmoid"
    average_log_prob: bool = False
    refer_model_precision: Literal["float32", "bfloat16"] = "bfloat16"
