"""Settings of the profiler and the loggers that cannot be, each with its way out."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from omnilit.config.machine_checks import check_paths
from omnilit.config.rules import run_rules
from omnilit.config.schema import Field
from omnilit.config.view import View

GOOD = {"model.config_path": "m", "data.train_path": "d"}
ON = {"train.profile.enable": True}


def _problems(fields: list[Field], given: dict[str, Any]) -> list[str]:
    known = {field.path: field for field in fields}
    assert given.keys() <= known.keys()
    return [str(problem) for problem in run_rules(View(known, GOOD | given))]


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"train.profile.start_step": 5, "train.profile.end_step": 3}, ("train.profile.end_step: 3 "
         "ends the range before its first step, start_step 5. To fix: choose end_step above "
         "start_step, such as 6.")),
        ({"train.profile.start_step": 5, "train.profile.end_step": 5}, ("train.profile.end_step: 5 "
         "ends the range before its first step")),
        ({"train.profile.start_step": 2}, "train.profile.end_step: 2 ends the range"),
        ({"train.profile.start_step": 0}, ("train.profile.start_step: 0 is out of range. To fix: "
         "use a number at least 1.")),
        (ON | {"train.profile.start_step": 9, "train.profile.end_step": 10, "train.max_steps": 4,
               "train.num_train_epochs": 2}, ("train.profile.start_step: 9 is never reached: "
         "max_steps * num_train_epochs ends the run at step 8. To fix: choose an earlier step, or "
         "a longer run.")),
        ({"train.gc_steps": -1}, "train.gc_steps: -1 is out of range. To fix: use a number at "),
        ({"train.empty_cache_steps": -1}, "train.empty_cache_steps: -1 is out of range."),
        ({"train.log_expert_load_steps": -1}, "train.log_expert_load_steps: -1 is out "),
        ({"train.log_layer_grad_norms_steps": -1}, ("train.log_layer_grad_norms_steps: -1 is out "
         "of range.")),
        ({"train.wandb.project": ""}, ("train.wandb.project: '' is no name. To fix: use 1 to 128 "
         "characters.")),
        ({"train.wandb.name": "x" * 129}, f"train.wandb.name: '{'x' * 129}' is no name."),
        ({"train.wandb.group": " "}, "train.wandb.group: ' ' is no name."),
        ({"train.wandb.id": "a/b:c"}, ("train.wandb.id: 'a/b:c' holds / :, and it becomes part of "
         "an address. To fix: use letters, digits, - and _.")),
        ({"train.wandb.entity": "a/b"}, "train.wandb.entity: 'a/b' holds /,"),
        ({"train.wandb.tags": ["good", ""]}, ("train.wandb.tags: '' is no tag. To fix: use 1 to "
         "64 characters a tag.")),
    ],
)  # fmt: skip
def test_a_wrong_setting_is_one_problem_with_its_reason(
    given: dict[str, Any], message: str, fields: list[Field]
):
    (problem,) = _problems(fields, given)
    assert problem.startswith(message)


@pytest.mark.parametrize(
    "given",
    [
        ON | {"train.profile.start_step": 8, "train.profile.end_step": 20, "train.max_steps": 8},
        {"train.profile.start_step": 9, "train.profile.end_step": 10, "train.max_steps": 8},  # off
        {"train.wandb.name": "a: b", "train.wandb.group": "all/of them"},  # shown, in no address
        {"train.wandb.id": "abc-1", "train.wandb.entity": "team", "train.wandb.tags": ["a", "b"]},
        {"train.gc_steps": 0, "train.empty_cache_steps": 0, "train.log_layer_grad_norms_steps": 1},
    ],
)
def test_settings_that_look_odd_but_mean_something_are_good(
    given: dict[str, Any], fields: list[Field]
):
    assert not _problems(fields, given)


def test_a_folder_of_traces_that_cannot_be_is_found_before_the_run(
    fields: list[Field], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "model").mkdir()
    (tmp_path / "d").write_text("")
    (tmp_path / "file").write_text("")
    known = {field.path: field for field in fields}
    base = {"model.config_path": "model", "data.train_path": "d"}

    def found(**profile: Any) -> list[str]:
        given = {f"train.profile.{name}": value for name, value in profile.items()}
        return [str(problem) for problem in check_paths(View(known, base | given))]

    assert found(enable=True, trace_dir="new/traces") == []
    assert found(enable=False, trace_dir="file") == []
    (problem,) = found(enable=True, trace_dir="file/traces")
    assert problem == (
        f"train.profile.trace_dir: {tmp_path / 'file'} is not a folder. To fix: choose another "
        "folder."
    )
    monkeypatch.setattr("os.access", lambda *_: False)
    (problem,) = found(enable=True, trace_dir="new")
    assert problem.startswith(f"train.profile.trace_dir: {tmp_path} is read-only.")
