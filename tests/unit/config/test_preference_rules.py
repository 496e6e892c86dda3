from __future__ import annotations

import pytest

from tests.helpers.rules import problems

DPO = "dpo_config"


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (
            {f"{DPO}.beta": 0.0},
            "dpo_config.beta: 0.0 is out of range",
        ),
        ({f"{DPO}.label_smoothing": 0.5}, "dpo_config.label_smoothing: 0.5 is out of range"),
        (
            {f"{DPO}.label_smoothing": 0.1, f"{DPO}.loss_type": "ipo"},
            "dpo_config.label_smoothing: has no effect with loss_type: ipo",
        ),
        (
            {f"{DPO}.simpo_gamma": 0.1},
            "dpo_config.simpo_gamma: has no effect with loss_type: sigmoid",
        ),
        (
            {f"{DPO}.refer_model_precision": "float32", f"{DPO}.reference_free": True},
            "dpo_config.refer_model_precision: has no effect: reference_free: true builds",
        ),
        (
            {
                f"{DPO}.refer_model_precision": "float32",
                "model.lora.enable": True,
                "model.model_path": "m",
            },
            "dpo_config.refer_model_precision: has no effect: with model.lora the reference",
        ),
        (
            {f"{DPO}.refer_model_precision": "float32", f"{DPO}.loss_type": "orpo"},
            "dpo_config.refer_model_precision: has no effect: loss_type: orpo has no",
        ),
    ],
)
def test_a_setting_without_effect_is_one_problem(fields, given, message):
    (problem,) = problems(fields, given)
    assert problem.startswith(message)


@pytest.mark.parametrize(
    "given",
    [
        {f"{DPO}.label_smoothing": 0.1, f"{DPO}.loss_type": "robust"},
        {f"{DPO}.simpo_gamma": 1.0, f"{DPO}.loss_type": "simpo", f"{DPO}.beta": 2.0},
        {f"{DPO}.reference_free": True, f"{DPO}.loss_type": "ipo"},
        {f"{DPO}.refer_model_precision": "float32", f"{DPO}.average_log_prob": True},
    ],
)
def test_settings_that_act_are_good(fields, given):
    assert not problems(fields, given)
