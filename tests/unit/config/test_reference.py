from __future__ import annotations

import subprocess
import sys
from types import ModuleType, UnionType
from typing import Any, Literal, Union, get_args, get_origin

import pytest

from omnilit.config.schema import Field, constructor_fields
from omnilit.config.status import TOPICS, load_status

WIDER = {
    "data.train_path": "omnilit validate needs no training data; a rule asks for it in fit",
    "data.train_size": "null makes an epoch one trip through the data",
    "data.data_type": "dpo is a data type too",
    "dpo_config.loss_type": "hinge, robust, orpo and simpo are added",
    "data.source_name": "its default is null",
    "data.text_keys": "its default is null, and several keys mean the first one present",
    "train.accelerator.fsdp_config.mixed_precision.output_dtype": "its default is null",
}
ADDED = {
    "data.collator",
    "data.max_bad_fraction",
    "data.overlong",
    "data.transform",
    "data.truncation_side",
    "dpo_config.precompute_reference",
    "dpo_config.simpo_gamma",
    "imports",
    "infer.mm_configs",
    "model.label_names",
    "model.lora.adapter_path",
    "model.lora.alpha",
    "model.lora.dropout",
    "model.lora.enable",
    "model.lora.exclude_modules",
    "model.lora.modules_to_save",
    "model.lora.rank",
    "model.lora.target_modules",
    "model.lora.target_parameters",
    "model.lora.use_rslora",
    "model.num_labels",
    "model.ops_implementation.preset",
    "model.strict",
    "model.trust_remote_code",
    "train.accelerator.cp_method",
    "train.accelerator.fsdp_config.mixed_precision.master_dtype",
    "train.accelerator.fsdp_config.sync_each_micro_batch",
    "train.accelerator.pp_schedule",
    "train.accelerator.pp_stages_per_rank",
    "train.accelerator.timeout_s",
    "train.checkpoint.export_dtype",
    "train.checkpoint.keep_last",
    "train.checkpoint.overwrite",
    "train.eval_samples",
    "train.eval_samples_max_tokens",
    "train.log_expert_load_steps",
    "train.log_layer_grad_norms_steps",
    "train.optimizer.betas",
    "train.optimizer.eps",
    "train.optimizer.max_skipped_steps",
    "train.optimizer.use_kahan_summation",
    "train.wandb.entity",
    "train.wandb.group",
    "train.wandb.tags",
}
TASKS = (
    "OmniModule",
    "SFTModule",
    "VLMModule",
    "DPOModule",
    "ClassificationModule",
    "OmniComposedModule",
    "DiffusionModule",
)


def _values(annotation: Any) -> set[Any]:
    """The types, or literal values, that an annotation admits."""
    if get_origin(annotation) in {Union, UnionType}:
        return set().union(*map(_values, get_args(annotation)))
    if get_origin(annotation) is Literal:
        return set(get_args(annotation))
    if get_origin(annotation) is dict:
        return {dict}
    return {annotation}


def _assert_same_fields(ours: dict[str, Field], theirs: dict[str, Field]) -> None:
    assert theirs
    for path, row in theirs.items():
        assert path in ours, f"{path} is missing"
        field = ours[path]
        if path == "train.wandb.project":
            assert field.default == "omnilit"
        elif not row.required:
            assert field.default == row.default, path
            assert type(field.default) is type(row.default) or row.default == 0, path
        assert field.required == row.required or path in WIDER, path
        mine, reference = _values(field.annotation), _values(row.annotation)
        assert mine >= reference, f"{path}: {mine} does not admit all of {reference}"
        assert mine == reference or path in WIDER, f"{path}: {mine} is wider than {reference}"
        assert field.description, f"{path} has no description"
    added = ours.keys() - theirs.keys()
    assert added <= ADDED, sorted(added - ADDED)


def test_dataclasses_have_the_fields_types_and_defaults_of_the_reference(
    reference: dict[str, Field], own_fields: dict[str, Field]
):
    groups = ("train.", "infer.", "dpo_config.", "data.dataloader.", "model.ops_implementation.")
    rows = {path: row for path, row in reference.items() if path.startswith(groups)}
    assert len(rows) > 100
    _assert_same_fields(own_fields, rows)


def test_constructors_of_all_tasks_have_the_fields_of_the_reference(
    modules: ModuleType, reference: dict[str, Field]
):
    ours: dict[str, Field] = {}
    for name in TASKS:
        hidden = frozenset({"train", "dpo_config"})
        found = constructor_fields(getattr(modules, name), "model", hidden=hidden)
        ours |= {field.path: field for field in found}
    data = constructor_fields(modules.OmniDataModule, "data", hidden=frozenset({"train"}))
    ours |= {field.path: field for field in data}
    _assert_same_fields(
        ours, {p: row for p, row in reference.items() if p.startswith(("model.", "data."))}
    )


def test_every_field_has_a_status_and_every_status_a_field(
    reference: dict[str, Field], own_fields: dict[str, Field]
):
    assert load_status().keys() == reference.keys() | own_fields.keys() | ADDED


def test_every_status_that_refuses_something_says_what_brings_it():
    for path, row in load_status().items():
        assert row.status in {"available", "later"}, path
        assert (row.issue is None) == (row.status == "available" and row.legal is None), path
        assert row.issue is None or row.issue in TOPICS, path


@pytest.mark.parametrize("module", ["omnilit.config", "omnilit.config.rules"])
def test_importing_the_argument_tree_does_not_import_torch(module: str):
    code = f"import sys, {module}; sys.exit('torch' in sys.modules or 'lightning' in sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)


def test_dataclasses_are_frozen_and_built_without_arguments():
    import omnilit.config

    for name in omnilit.config.__all__:
        cls = getattr(omnilit.config, name)
        assert cls.__dataclass_params__.frozen, name
        assert "__slots__" not in vars(cls), f"{name}: the command line needs its __dict__"
        if name != "InferArguments":
            assert cls() == cls(), name
    assert omnilit.config.InferArguments(model_path="m").max_tokens == 1024
