from __future__ import annotations

from typing import Any

import pytest

from omnilit.config.schema import Field
from tests.helpers.rules import problems

ANY = {"train.optimizer.type": "anyprecision_adamw"}
DEBUG = "train.gradient_checkpointing.debug"
MASTER = "train.accelerator.fsdp_config.mixed_precision.master_dtype"


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"train.optimizer.use_kahan_summation": True},
         ("train.optimizer.use_kahan_summation: true has no effect, because type: adamw has no "
          "Kahan summation. To fix: leave it out, or set type: anyprecision_adamw.")),
        ({**ANY, "train.optimizer.use_kahan_summation": True},
         ("train.optimizer.use_kahan_summation: true has no effect, because weights of "
          "master_dtype: float32 are stored as they are computed, and nothing is rounded off. To "
          "fix: leave it out, or set mixed_precision.master_dtype: bfloat16.")),
        ({**ANY, "train.optimizer.betas": (0.9, 0.999)},
         ("train.optimizer.betas: [0.9, 0.999] holds an average that could never fall: type: "
          "anyprecision_adamw keeps it in bfloat16, which rounds such a small change away. To "
          "fix: use numbers up to 0.996, or type: adamw.")),
        ({"train.enable_compile": True, DEBUG: True},
         (f"{DEBUG}: true watches every operation of a block, so enable_compile: true compiles "
          "none. To fix: set enable_compile: false while you debug.")),
    ],
)  # fmt: skip
def test_settings_that_cannot_act_together_are_one_problem(
    given: dict[str, Any], message: str, fields: list[Field]
):
    assert problems(fields, given) == [message]


@pytest.mark.parametrize(
    "given",
    [
        ANY,
        {**ANY, "train.optimizer.use_kahan_summation": True, MASTER: "bfloat16"},
        {**ANY, "train.optimizer.betas": (0.996, 0.996)},
        {"train.optimizer.betas": (0.9, 0.999)},
        {"train.optimizer.use_kahan_summation": False},  # the default
        {"train.enable_compile": True},
        {"train.enable_compile": True, DEBUG: True, "train.gradient_checkpointing.enable": False},
    ],
)
def test_settings_that_fit_are_good(given: dict[str, Any], fields: list[Field]):
    assert not problems(fields, given)
