from __future__ import annotations

from typing import Any

import pytest

from omnilit.config.rules import run_rules
from omnilit.config.schema import Field
from omnilit.config.view import View

GOOD = {"model.config_path": "m", "data.train_path": "d"}
NO_SAVES = {"save_epochs": 0}
NO_EXPORTS = {"save_hf_weights": False}
NO_SAVES_WHY = "has no effect, because save_steps: 0 and save_epochs: 0 save nothing. To fix: "
NO_EXPORTS_WHY = "has no effect, because save_hf_weights: false turns all exports off. To fix: "


def _problems(fields: list[Field], given: dict[str, Any]) -> list[str]:
    known = {field.path: field for field in fields}
    values = {f"train.checkpoint.{name}": value for name, value in given.items()}
    assert values.keys() <= known.keys()
    return [str(problem) for problem in run_rules(View(known, GOOD | values))]


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"save_async": True, **NO_SAVES}, (f"save_async: true {NO_SAVES_WHY}leave it out, or set "
         "one of the two above 0.")),
        ({"keep_last": 2, **NO_SAVES}, f"keep_last: 2 {NO_SAVES_WHY}"),
        ({"hf_save_steps": 5, **NO_EXPORTS}, (f"hf_save_steps: 5 {NO_EXPORTS_WHY}leave it out, or "
         "set save_hf_weights: true.")),
        ({"hf_save_epochs": 1, **NO_EXPORTS}, f"hf_save_epochs: 1 {NO_EXPORTS_WHY}"),
        ({"export_dtype": "bfloat16", **NO_EXPORTS}, f"export_dtype: bfloat16 {NO_EXPORTS_WHY}"),
        ({"keep_last": 0}, "keep_last: 0 is out of range. To fix: use a number at least 1."),
        ({"hf_save_steps": -1}, "hf_save_steps: -1 is out of range."),
        ({"hf_save_epochs": -1}, "hf_save_epochs: -1 is out of range."),
        ({"export_dtype": "fp16"}, ("export_dtype: 'fp16' is not known. To fix: use one of auto, "
         "bfloat16, float32, float16.")),
        ({"manager": "zip"}, "manager: 'zip' is not known. To fix: use one of dcp."),
    ],
)  # fmt: skip
def test_a_wrong_setting_is_one_problem_with_its_reason(
    given: dict[str, Any], message: str, fields: list[Field]
):
    (problem,) = _problems(fields, given)
    assert problem.startswith(f"train.checkpoint.{message}")


@pytest.mark.parametrize(
    "given",
    [
        {"save_async": True, "keep_last": 1},  # an epoch is saved by default
        {"save_async": True, "save_steps": 2, **NO_SAVES},
        {"save_async": False, "keep_last": None, **NO_SAVES},
        {"hf_save_steps": 0, "export_dtype": "auto", **NO_EXPORTS},
        {"hf_save_steps": 2, "hf_save_epochs": 1, "export_dtype": "float16", **NO_SAVES},
    ],
)
def test_settings_that_mean_something_are_good(given: dict[str, Any], fields: list[Field]):
    assert not _problems(fields, given)
