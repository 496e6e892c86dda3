"""What the settings of adapters must be, by themselves and together with others."""

from __future__ import annotations

from typing import Any

import pytest

from omnilit.config.schema import Field
from tests.helpers.rules import problems

ON: dict[str, Any] = {"model.lora.enable": True, "model.model_path": "m"}
REENTRANT = "train.gradient_checkpointing.enable_reentrant"
TP = "train.accelerator.tp_size"


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"rank": 0}, "model.lora.rank: 0 is out of range. To fix: use 8, or above."),
        ({"alpha": 0.0}, "model.lora.alpha: 0.0 is out of range."),
        ({"dropout": 1.0}, "model.lora.dropout: 1.0 is out of range."),
        ({"dropout": 0.1, "target_parameters": ["a"]},
         "model.lora.dropout: 0.1 is not possible with target_parameters, whose inputs"),
        ({"target_modules": []}, "model.lora.target_modules: nothing is to be adapted."),
        ({"target_modules": ["q_proj", " "]}, "model.lora.target_modules: an empty name matches"),
        ({"exclude_modules": ""}, "model.lora.exclude_modules: an empty name matches nothing."),
        ({"modules_to_save": [""]}, "model.lora.modules_to_save: an empty name matches nothing."),
        ({"model.model_path": None},
         "model.lora.enable: adapters are trained beside the weights of a model, and model_path"),
        ({TP: 2, "target_parameters": ["a"]},
         "model.lora.target_parameters: parameters cannot be adapted with tp_size: 2"),
        ({TP: 2, "dropout": 0.1},
         "model.lora.dropout: 0.1 is not possible with tp_size: 2: ranks would drop other inputs."),
        ({REENTRANT: True},
         f"{REENTRANT}: the reentrant form passes no gradient to adapters behind a frozen"),
    ],
)  # fmt: skip
def test_adapters_that_cannot_be_trained_are_refused(
    given: dict[str, Any], message: str, fields: list[Field]
):
    own = {name if "." in name else f"model.lora.{name}": value for name, value in given.items()}
    (problem,) = problems(fields, ON | own)
    assert problem.startswith(message)
    is_about_others = any("." in name for name in given)
    left = problems(fields, ON | own | {"model.lora.enable": False})
    assert left == ([] if is_about_others else [problem])  # a group that is off is checked too


def test_adapters_that_can_be_trained_are_good(fields: list[Field]):
    more = {"model.lora.use_rslora": True, "model.lora.adapter_path": "a", TP: 2}
    assert not problems(fields, ON | more)
    assert not problems(fields, ON | {"model.lora.target_parameters": ["experts.down_proj"]})


def test_adapters_that_are_not_turned_on_are_told(fields: list[Field]):
    given = {"model.lora.rank": 16, "model.lora.target_modules": ["q_proj"]}
    (problem,) = problems(fields, given)
    assert problem.startswith(
        "model.lora.enable: is not given, so the whole model would be trained, and rank,"
        " target_modules ignored. To fix: set enable: true"
    )
    assert not problems(fields, given | {"model.lora.enable": False})


def test_an_index_of_files_has_no_effect_on_adapters(fields: list[Field]):
    (problem,) = problems(fields, ON | {"model.safetensor_idx_path": "i"})
    assert problem.startswith("model.safetensor_idx_path: has no effect with model.lora")
