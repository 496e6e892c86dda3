from __future__ import annotations

from typing import Any

import pytest
import yaml

from omnilit.config.check import Checked, check_values
from omnilit.config.schema import Field


def _check(text: str, fields: list[Field], **options: Any) -> Checked:
    return check_values(yaml.safe_load(text), fields, **options)


def test_good_values_are_coerced_and_nested(fields: list[Field]):
    checked = _check(
        "{train: {optimizer: {lr: 1e-5}, max_steps: 1e3}, data: {train_path: a}}", fields
    )
    assert checked == Checked(
        {
            "train": {"optimizer": {"lr": 1e-5}, "max_steps": 1000},
            "data": {"train_path": "a"},
        },
        [],
        frozenset(),
    )


def test_five_mistakes_are_five_problems_and_the_good_values_stay(fields: list[Field]):
    checked = _check(
        """
        train:
          max_stepz: 5
          optimizer: {lr: fast, lr_min: 0}
          accelerator: {fsdp_config: {fsdp_mode: fsdp}}
          dyn_bsz_buffer_size: 100
        data: everything
        """,
        fields,
    )
    assert [problem.key for problem in checked.problems] == [
        "train.max_stepz",
        "train.optimizer.lr",
        "train.accelerator.fsdp_config.fsdp_mode",
        "train.dyn_bsz_buffer_size",
        "data",
    ]
    assert checked.values["train"]["optimizer"] == {"lr_min": 0.0}


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (
            "{infer: {sed: 1}}",
            (
                "infer.sed: unknown key 'sed' (did you mean 'seed'?). To fix: use one of the keys "
                "under infer: model_path, tokenizer_path, seed, do_sample, temperature, top_p, "
                "max_tokens, mm_configs."
            ),
        ),
        (
            "{trian: {}}",
            (
                "trian: unknown key 'trian' (did you mean 'train'?). To fix: use one of the keys "
                "at the top: model, data, train, infer, dpo_config, trainer."
            ),
        ),
        (
            "{train: {text_keys: messages}}",
            "train.text_keys: text_keys is not a key here. To fix: write it as data.text_keys.",
        ),
        (
            "{optimizer: {lr: 1}}",
            "optimizer: optimizer is not a key here. To fix: write it as train.optimizer.",
        ),
        (
            "{train: {accelerator: {offload: {enable_activation: true}}}}",
            "train.accelerator.offload: unknown key 'offload' (did you mean 'offload_config'?)",
        ),
        (
            "{train: {wandb: true}}",
            (
                "train.wandb: True is not a group. To fix: write keys under it: enable, project, "
                "name, id, group, tags, entity."
            ),
        ),
        ("{train.max_steps: 3}", "train.max_steps: unknown key 'train.max_steps'"),
        ("{train: {seed: {}}}", "train.seed: {} is not a whole number. To fix: write a whole"),
    ],
)
def test_wrong_keys_and_groups_are_named_with_the_way_out(
    text: str, message: str, fields: list[Field]
):
    problems = _check(text, fields, others=("trainer",)).problems
    assert len(problems) == 1
    assert str(problems[0]).startswith(message)


def test_keys_of_other_owners_pass_and_empty_groups_give_nothing(fields: list[Field]):
    checked = _check("{trainer: {devices: 2}, train: , model: {}}", fields, others=("trainer",))
    assert not checked.problems
    assert not any(checked.values.values())
    assert "trainer" not in checked.values


def test_a_field_of_another_task_names_that_task(fields: list[Field]):
    mine = [field for field in fields if not field.path.startswith("dpo_config")]
    tasks = {"dpo_config.beta": "DPOModule"}
    (problem,) = _check("{dpo_config: {beta: 0.2}}", mine, tasks=tasks).problems
    assert str(problem) == (
        "dpo_config: only DPOModule reads it, and this run is another task. "
        "To fix: leave it out, or set model.class_path: DPOModule."
    )


def test_later_checks_are_told_what_not_to_judge(fields: list[Field]):
    checked = _check(
        "{model: {model_pth: x}, train: {seed: a, optimzer: {}, max_seq_len: 3, "
        "micro_batch_size: '${oc.env:MBS}'}}",
        fields,
    )
    assert checked.doubtful >= {
        "model.model_path",
        "train.seed",
        "train.optimizer",
        "data.max_seq_len",
        "train.micro_batch_size",
    }
    assert "train.micro_batch_size" not in {problem.key for problem in checked.problems}
