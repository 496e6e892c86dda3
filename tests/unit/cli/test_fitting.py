"""A model that its ranks cannot divide is told before anything starts."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from omnilit.cli.fitting import find_misfits
from omnilit.cli.plan import task_fields
from omnilit.config.view import View
from omnilit.modules import SFTModule
from tests.helpers.models import tiny_config

ULYSSES = "train.accelerator.ulysses_size"
ASYNC = "train.accelerator.enable_async"
CP, METHOD = "train.accelerator.cp_size", "train.accelerator.cp_method"
CONFIG = "model.config_path"
FIELDS = {field.path: field for field in task_fields(SFTModule)}


def misfits(given: dict[str, Any], wrong: tuple[str, ...] = ()) -> list[str]:
    return [str(problem) for problem in find_misfits(View(FIELDS, given), wrong)]


@pytest.fixture
def folder(tmp_path: Path) -> str:
    tiny_config("qwen3").save_pretrained(tmp_path)
    return str(tmp_path)


@pytest.mark.parametrize("path", [CONFIG, "model.model_path"])
def test_sizes_are_held_against_the_models_numbers(path: str, folder: str):
    (problem,) = misfits({path: folder, ULYSSES: 3})
    assert problem.startswith(f"{ULYSSES}: ulysses_size 3 does not divide the 4 attention heads")
    assert misfits({path: folder, ULYSSES: 2}) == []


def test_a_configuration_that_cannot_be_read_is_the_problem(tmp_path: Path):
    (problem,) = misfits({CONFIG: str(tmp_path), ULYSSES: 2})
    assert problem.startswith(f"{CONFIG}: the folder {tmp_path} holds no config.json")


@pytest.mark.parametrize("wrong", [CONFIG, ULYSSES, "train.accelerator.tp_size"])
def test_what_has_a_problem_already_is_not_judged(wrong: str, folder: str):
    assert misfits({CONFIG: folder, ULYSSES: 3}, (wrong,)) == []


def test_without_an_axis_that_divides_the_model_nothing_is_read():
    assert misfits({CONFIG: "/no/such/folder", "train.accelerator.dp_replicate_size": 2}) == []


def test_heads_of_linear_attention_are_held_against_context_parallelism(tmp_path: Path):
    tiny_config("qwen3_5").save_pretrained(tmp_path)
    (problem,) = misfits({CONFIG: str(tmp_path), CP: 3})
    assert problem.startswith(f"{CP}: cp_size 3 does not divide the 4 value heads of linear")


def test_how_sequences_are_split_is_held_against_the_model(tmp_path: Path):
    tiny_config("gpt_oss", attention_dropout=0.1).save_pretrained(tmp_path)
    ring = {CP: 2, METHOD: "ring"}
    (problem,) = misfits({CONFIG: str(tmp_path), **ring})
    assert problem.startswith(f"{METHOD}: ring drops no attention weights")
    found = misfits({CONFIG: str(tmp_path), ULYSSES: 2, ASYNC: True, **ring})
    assert [problem.partition(":")[0] for problem in found] == [ASYNC, METHOD]
    assert misfits({CONFIG: str(tmp_path), ULYSSES: 2, ASYNC: True}, (ASYNC,)) == []


def test_matrices_that_do_not_split_evenly_are_told_before_anything_starts(tmp_path: Path):
    tp_size, ep_size = "train.accelerator.tp_size", "train.accelerator.ep_size"
    tiny_config("llama", intermediate_size=97).save_pretrained(tmp_path / "dense")
    first, *_ = misfits({CONFIG: str(tmp_path / "dense"), tp_size: 2})
    beginning = f"{tp_size}: 2 ranks cannot split dimension 0 of gate_proj.weight (97 entries)"
    assert first.startswith(beginning)
    tiny_config("qwen3_moe", moe_intermediate_size=33).save_pretrained(tmp_path / "experts")
    asked = {CONFIG: str(tmp_path / "experts"), tp_size: 2}
    assert "experts.gate_up_proj (66 entries, 2 matrices)" in misfits(asked)[0]
    assert misfits({**asked, ep_size: 2}) == []
