import json

import pytest
import yaml

from omnilit.cli.omni_cli import print_config
from omnilit.cli.plan import make_plan, read, resolved_tree
from omnilit.cli.raw import read_command
from omnilit.errors import ConfigError


@pytest.fixture
def base(tmp_path):
    """A configuration without a mistake, as a nested dict."""
    model = tmp_path / "model"
    model.mkdir()
    (model / "config.json").write_text(json.dumps({"model_type": "qwen3"}))
    (tmp_path / "train.jsonl").write_text("{}\n")
    return {
        "model": {"config_path": str(model)},
        "data": {"train_path": str(tmp_path / "train.jsonl")},
        "train": {"checkpoint": {"output_dir": str(tmp_path / "run")}},
        "trainer": {"accelerator": "cpu"},
    }


def command(tmp_path, tree, *flags):
    file = tmp_path / "run.yaml"
    file.write_text(yaml.safe_dump(tree))
    return read_command(["--config", str(file), *flags])


def plan(tmp_path, tree, *flags):
    return make_plan("fit", command(tmp_path, tree, *flags))


def problems(tmp_path, tree, *flags):
    with pytest.raises(ConfigError) as caught:
        plan(tmp_path, tree, *flags)
    return {problem.key: str(problem) for problem in caught.value.problems}


def test_five_mistakes_of_five_kinds_are_five_problems(tmp_path, base):
    base["data"]["train_path"] = str(tmp_path / "nowhere.jsonl")  # files
    base["train"]["micro_batch_sise"] = 2  # keys
    base["train"]["optimizer"] = {"lr": "fast"}  # types
    base["train"]["eval_steps"] = 5  # cross-field rules
    base["trainer"]["accelerator"] = "gpu"  # the machine
    found = problems(tmp_path, base)
    assert found.keys() == {
        "data.train_path",
        "train.micro_batch_sise",
        "train.optimizer.lr",
        "train.eval_steps",
        "trainer.accelerator",
    }
    assert "did you mean 'micro_batch_size'" in found["train.micro_batch_sise"]


def test_a_kernel_that_was_given_and_cannot_run_here_is_a_problem(tmp_path, base):
    flag = "--model.ops_implementation.attn_implementation"
    (message,) = problems(tmp_path, base, flag, "flash_attention_2").values()
    assert message.startswith("model.ops_implementation.attn_implementation: ")
    assert "cuda" in message


def test_kernels_that_were_not_given_fit_the_machine(tmp_path, base):
    names = plan(tmp_path, base).kernels.names()
    assert names["attn_implementation"] == "sdpa"
    assert names["cross_entropy_loss_implementation"] == "chunk_loss"


@pytest.mark.parametrize(
    ("group", "values", "key", "message"),
    [
        ("trainer", {"precision": "bf16-mixed"}, "trainer.precision", "mixed_precision instead"),
        ("trainer", {"max_stepz": 1}, "trainer.max_stepz", "Did you mean 'max_steps'"),
        ("train", {"tp_size": 2}, "train.tp_size", "write it as train.accelerator.tp_size"),
        ("data", {"data_type": "dpo"}, "data.data_type", "not available yet"),
        ("train", {"init_device": "cpu"}, "train.init_device", "default, meta"),
        ("train", {"dyn_bsz": False}, "train.dyn_bsz", "default, true"),
        ("train", {"checkpoint": {"manager": "zip"}}, "train.checkpoint.manager", "default, dcp"),
    ],
)
def test_a_setting_that_cannot_be_names_the_way_out(
    tmp_path, base, group, values, key, message
):
    base[group] |= values
    assert message in problems(tmp_path, base)[key]


@pytest.mark.parametrize("key", ["seed_everything", "ckpt_path"])
def test_lightnings_root_keys_name_ours(tmp_path, base, key):
    base[key] = 1
    assert "instead" in problems(tmp_path, base)[key]


def test_fields_beside_a_class_path_are_sent_under_init_args(tmp_path, base):
    base["model"]["class_path"] = "SFTModule"
    (message,) = problems(tmp_path, base).values()
    assert "config_path stands beside class_path" in message
    assert "model.init_args" in message


def test_both_ways_to_write_the_model_are_the_same_run(tmp_path, base):
    flat = plan(tmp_path, base)
    base["model"] = {"class_path": "SFTModule", "init_args": base["model"]}
    nested = plan(tmp_path, base)
    assert flat.view["model.config_path"] == nested.view["model.config_path"]
    assert flat.task.module_class is nested.task.module_class


@pytest.mark.parametrize(
    ("group", "values", "task"),
    [
        ("dpo_config", {"beta": 0.2}, "DPOModule"),
        ("data", {"data_type": "dpo"}, "DPOModule"),
        ("data", {"data_type": "classification"}, "ClassificationModule"),
        ("data", {"mm_configs": {"fps": 1}}, "VLMModule"),
        ("train", {"freeze_vit": True}, "VLMModule"),
        ("model", {"encoder_data_balance": True}, "VLMModule"),
        ("train", {}, "SFTModule"),
    ],
)
def test_the_task_follows_what_is_given(tmp_path, base, group, values, task):
    base.setdefault(group, {}).update(values)
    assert read(command(tmp_path, base)).task.class_path == task


def test_settings_of_two_tasks_are_a_problem(tmp_path, base):
    base["dpo_config"] = {"beta": 0.2}
    base["train"]["freeze_vit"] = True
    message = problems(tmp_path, base)["model.class_path"]
    assert "dpo_config belongs to DPOModule, train.freeze_vit to VLMModule" in message


def test_settings_of_another_task_than_the_named_one_are_a_problem(tmp_path, base):
    base["dpo_config"] = {"beta": 0.2}
    found = problems(tmp_path, base, "--model", "SFTModule")
    assert "SFTModule was named, but dpo_config belongs to DPOModule" in found["model.class_path"]


@pytest.mark.parametrize(
    ("class_path", "message"),
    [
        ("SFTModul", "Did you mean 'SFTModule'"),
        ("no_such_package.Module", "cannot be imported"),
        ("json.JSONDecoder", "is not a subclass of OmniModule"),
    ],
)
def test_a_task_that_is_none_is_a_problem(tmp_path, base, class_path, message):
    assert message in problems(tmp_path, base, "--model", class_path)["model.class_path"]


def test_the_resolved_configuration_is_the_same_run_again(tmp_path, base, monkeypatch):
    monkeypatch.setenv("MY_RUN", base["train"]["checkpoint"]["output_dir"])
    base["train"]["checkpoint"]["output_dir"] = "${oc.env:MY_RUN}"
    first = plan(tmp_path, base, "--train.optimizer.lr", "1e-5")
    tree = resolved_tree(first)
    assert tree["train"]["checkpoint"]["output_dir"] == "${oc.env:MY_RUN}"
    second = plan(tmp_path, tree)
    assert {p: first.view[p] for p in first.view.fields if "implementation" not in p} == {
        p: second.view[p] for p in second.view.fields if "implementation" not in p
    }
    assert first.kernels.names() == second.kernels.names()


@pytest.mark.parametrize("task", ["SFTModule", "DPOModule", "VLMModule", "DiffusionModule"])
def test_the_printed_configuration_has_every_field_with_its_default(tmp_path, base, task):
    words = ["--model", task, "--train.optimizer.lr", "1e-5"]
    printed = yaml.safe_load(print_config(read(command(tmp_path, base, *words))))
    assert printed["model"]["class_path"] == task
    assert printed["train"]["optimizer"]["lr"] == 1e-5
    assert printed["train"]["accelerator"]["fsdp_config"]["fsdp_mode"] == "fsdp2"
    assert ("dpo_config" in printed) == (task == "DPOModule")
    again = read(command(tmp_path, printed))
    assert not again.problems


def test_printing_needs_no_files_and_no_machine(tmp_path, base):
    base["data"]["train_path"] = "nowhere.jsonl"
    base["trainer"]["accelerator"] = "gpu"
    base["train"]["gc_steps"] = 7  # a field of a later release
    assert "gc_steps: 7" in print_config(read(command(tmp_path, base)))
    with pytest.raises(ConfigError, match="unknown key 'sead'"):
        print_config(read(command(tmp_path, base, "--train.sead", "1")))


def test_checkpoints_of_another_run_are_found_before_the_start(tmp_path, base):
    (tmp_path / "run" / "checkpoints" / "global_step_3").mkdir(parents=True)
    (message,) = problems(tmp_path, base).values()
    assert "load_path: auto" in message
    assert "--train.checkpoint.overwrite true" in message
    assert plan(tmp_path, base, "--train.checkpoint.overwrite", "true").load_path is None
