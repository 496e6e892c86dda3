"""Losses of preference pairs, from log-probabilities of the chosen and the rejected answer."""

# P pairs

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

from omnilit.config import DPOConfig
from omnilit.config.dpo import ALONE


@dataclass(frozen=True, slots=True)
class PairScores:
    """Log-probabilities of the answers of P pairs under one model.

    Args:
        chosen: [P], in float64 where the device has it.
        rejected: [P], in float64 where the device has it.
    """

    chosen: Tensor
    rejected: Tensor

    @property
    def margin(self) -> Tensor:
        """By how much the chosen answer is the likelier one, [P]."""
        return self.chosen - self.rejected


def needs_reference(config: DPOConfig) -> bool:
    """Whether the loss compares the policy with a model that stays as it was."""
    return not config.reference_free and config.loss_type not in ALONE


def takes_means(config: DPOConfig) -> bool:
    """Whether an answer's log-probability is the mean over its tokens, not their sum."""
    return config.average_log_prob or config.loss_type in ALONE


def pair_losses(policy: PairScores, reference: PairScores | None, config: DPOConfig) -> Tensor:
    """The loss of each pair, [P].

    With h the policy's margin less the reference's (the policy's alone without a reference):

    - sigmoid: -(1 - e) log s(beta h) - e log s(-beta h), e the label smoothing.
    - ipo: (h - 1 / (2 beta))^2.
    - hinge: max(0, 1 - beta h).
    - robust: (-(1 - e) log s(beta h) + e log s(-beta h)) / (1 - 2 e), which on labels that are
      wrong with probability e has the expectation of the loss on right ones.
    - orpo: -log p(chosen) - beta log s(log odds of chosen - log odds of rejected).
    - simpo: -log s(beta h - gamma).

    Args:
        policy: The model that is trained.
        reference: None for a uniform one.
        config: The loss and its constants.

    Source: DPO, arXiv 2305.18290, equation 7; label smoothing, Mitchell, A note on DPO with noisy
    preferences and relationship to IPO, 2023; IPO, 2310.12036, equation 17; hinge, SLiC,
    2305.10425; robust, 2403.00409; ORPO, 2403.07691, equations 6 and 7; SimPO, 2405.14734,
    equation 6.
    """
    h, smoothing = policy.margin, config.label_smoothing
    if reference is not None:
        h = h - reference.margin
    scaled = config.beta * h
    match config.loss_type:
        case "sigmoid":
            return -(1 - smoothing) * logsigmoid(scaled) - smoothing * logsigmoid(-scaled)
        case "ipo":
            return (h - 1 / (2 * config.beta)) ** 2
        case "hinge":
            return torch.relu(1 - scaled)
        case "robust":
            right, wrong = -logsigmoid(scaled), -logsigmoid(-scaled)
            return ((1 - smoothing) * right - smoothing * wrong) / (1 - 2 * smoothing)
        case "orpo":
            odds = _log_odds(policy.chosen) - _log_odds(policy.rejected)
            return -policy.chosen - config.beta * logsigmoid(odds)
        case "simpo":
            return -logsigmoid(scaled - config.simpo_gamma)


def pair_metrics(
    policy: PairScores, reference: PairScores | None, config: DPOConfig
) -> dict[str, Tensor]:
    """What is shown of each pair beside its loss, [P] each, without gradient.

    The reward of an answer is beta times its log-probability less the reference's; a pair counts
    as right where the chosen answer's reward is the larger one.
    """
    chosen, rejected = policy.chosen.detach(), policy.rejected.detach()
    base = PairScores(torch.zeros_like(chosen), torch.zeros_like(rejected))
    base = base if reference is None else reference
    rewards = config.beta * (chosen - base.chosen), config.beta * (rejected - base.rejected)
    return {
        "rewards/chosen": rewards[0],
        "rewards/rejected": rewards[1],
        "rewards/margins": rewards[0] - rewards[1],
        "rewards/accuracies": (rewards[0] > rewards[1]).float(),
        "logps/chosen": chosen,
        "logps/rejected": rejected,
    }


def _log_odds(log_p: Tensor) -> Tensor:
    """log(p / (1 - p)); p is the geometric mean of token probabilities, so below 1."""
    return log_p - torch.log1p(-torch.exp(log_p.clamp(max=-1e-6)))
