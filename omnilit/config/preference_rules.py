"""Rules on `dpo_config`: pure functions of the values."""

from __future__ import annotations

from typing import Final

from omnilit.config.dpo import ALONE
from omnilit.config.view import View
from omnilit.errors import Problem

LOSS: Final = "dpo_config.loss_type"
SMOOTHING: Final = "dpo_config.label_smoothing"
FREE: Final = "dpo_config.reference_free"
PRECISION: Final = "dpo_config.refer_model_precision"
LORA: Final = "model.lora.enable"
WHOLE: Final = "model.lora.modules_to_save"
PRECOMPUTE: Final = "dpo_config.precompute_reference"
DATASETS: Final = "data.datasets_type"
GAMMA: Final = "dpo_config.simpo_gamma"
SMOOTHED: Final = ("sigmoid", "robust")


def smoothing_has_its_loss(view: View) -> list[Problem]:
    """Labels are smoothed by the losses that know how."""
    if not view[SMOOTHING] or view[LOSS] in SMOOTHED:
        return []
    problem = f"has no effect with loss_type: {view[LOSS]}"
    return [Problem(SMOOTHING, problem, f"leave it out, or use {' or '.join(SMOOTHED)}")]


def margin_has_its_loss(view: View) -> list[Problem]:
    """`simpo_gamma` is given with simpo only."""
    if not view.is_changed(GAMMA) or view[LOSS] == "simpo":
        return []
    problem = f"has no effect with loss_type: {view[LOSS]}"
    return [Problem(GAMMA, problem, "leave it out, or set loss_type: simpo")]


def precision_has_a_reference(view: View) -> list[Problem]:
    """`refer_model_precision` is given where there is a reference model."""
    if not view.is_changed(PRECISION):
        return []
    if view[LOSS] in ALONE:
        why = f"loss_type: {view[LOSS]} has no reference model"
    elif view[FREE]:
        why = "reference_free: true builds no reference model"
    elif view[LORA] and not view[WHOLE]:
        why = "with model.lora the reference is the frozen model itself"
    else:
        return []
    return [Problem(PRECISION, f"has no effect: {why}", "leave it out")]


def precomputing_has_pairs(view: View) -> list[Problem]:
    """`precompute_reference` is given where there are a reference and pairs before training."""
    if not view[PRECOMPUTE]:
        return []
    if view[LOSS] in ALONE or view[FREE]:
        what = f"loss_type: {view[LOSS]}" if view[LOSS] in ALONE else "reference_free: true"
        problem = f"has no effect: {what} has no reference model"
        return [Problem(PRECOMPUTE, problem, "leave it out")]
    if view[DATASETS] == "iterable":
        problem = (
            "needs all pairs before training, and datasets_type: iterable reads them as it goes"
        )
        return [Problem(PRECOMPUTE, problem, "leave it out, or use datasets_type: mapping")]
    return []
