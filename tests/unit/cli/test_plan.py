import json

import pytest
import yaml

from omnilit.cli import main
from omnilit.cli.omni_cli import print_config
from omnilit.cli.plan import make_plan, read
from omnilit.cli.raw import read_command
from omnilit.cli.resolved import resolved_tree
from omnilit.config.view import View
from omnilit.errors import ConfigError, RestartError


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
        ("trainer", {"enable_model_summary": True}, "trainer.enable_model_summary", "use one of"),
        ("trainer", {"detect_anomaly": True}, "trainer.detect_anomaly", "is not a setting"),
        ("trainer", {"max_time": "1:0:0:0"}, "trainer.max_time", "is not a setting"),
        ("data", {"chat_template": "chatm"}, "data.chat_template", "plain, tokenizer, chatml"),
        ("train", {"tp_size": 2}, "train.tp_size", "write it as train.accelerator.tp_size"),
        ("data", {"data_type": "diffusion"}, "data.data_type", "not available yet"),
        ("train", {"init_device": "npu"}, "train.init_device", "npu: this run trains on cpu, and"),
        ("train", {"checkpoint": {"manager": "zip"}}, "train.checkpoint.manager", "one of dcp"),
    ],
)
def test_a_setting_that_cannot_be_names_the_way_out(tmp_path, base, group, values, key, message):
    base[group] |= values
    assert message in problems(tmp_path, base)[key]


@pytest.mark.parametrize("key", ["seed_everything", "ckpt_path"])
def test_lightnings_root_keys_name_ours(tmp_path, base, key):
    base[key] = 1
    assert "instead" in problems(tmp_path, base)[key]


def test_fields_beside_a_class_path_are_sent_under_init_args(tmp_path, base):
    base["model"] |= {"class_path": "SFTModule"}
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
    "flags",
    [
        ("--model", "SFTModule", "--model.strict", "false"),
        ("--model.strict", "false", "--model", "SFTModule"),
        ("--model.class_path", "SFTModule", "--model.strict", "false"),
        ("--model.strict", "false", "--model.class_path", "SFTModule"),
        ("--model.init_args.strict", "false", "--model.class_path=SFTModule"),
    ],
)
def test_a_flag_names_the_task_of_a_flat_file_in_any_way_and_order(tmp_path, base, flags):
    named = plan(tmp_path, base, *flags)
    assert named.raw.written["model"] == {
        "class_path": "SFTModule",
        "init_args": {**base["model"], "strict": False},
    }


@pytest.mark.parametrize("is_named_first", [True, False])
def test_one_of_two_files_may_name_the_task(tmp_path, base, is_named_first):
    flat, named = tmp_path / "flat.yaml", tmp_path / "named.yaml"
    flat.write_text(yaml.safe_dump(base))
    named.write_text("model: {class_path: SFTModule, init_args: {strict: false}}")
    files = (named, flat) if is_named_first else (flat, named)
    words = [word for file in files for word in ("--config", str(file))]
    found = make_plan("fit", read_command(words))
    assert found.task.reason == "model.class_path"
    assert found.view["model.config_path"] == base["model"]["config_path"]
    assert found.view["model.strict"] is False


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
        ("train", {"freeze_vit": False, "vit_lr": "1e-6"}, "SFTModule"),  # the defaults
    ],
)
def test_the_task_follows_what_is_given(tmp_path, base, group, values, task):
    base.setdefault(group, {}).update(values)
    assert read(command(tmp_path, base)).task.class_path == task


def test_a_default_given_by_flag_implies_no_task(tmp_path, base):
    words = ("--train.freeze_vit", "false", "--train.vit_lr", "1e-6")
    assert plan(tmp_path, base, *words).task.class_path == "SFTModule"


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


FIRST_FIT = ("--data.dyn_bsz_buffer_size", "200")  # its default: being given is what counts
CHUNKS = ("--model.ops_implementation.cross_entropy_loss_implementation", "chunk_loss")


@pytest.mark.parametrize("flags", [(), FIRST_FIT, CHUNKS])
def test_the_resolved_configuration_is_the_same_run_again(tmp_path, base, monkeypatch, flags):
    monkeypatch.setenv("MY_RUN", base["train"]["checkpoint"]["output_dir"])
    base["train"]["checkpoint"]["output_dir"] = "${oc.env:MY_RUN}"
    first = plan(tmp_path, base, "--train.optimizer.lr", "1e-5", *flags)
    tree = resolved_tree(first)
    second = plan(tmp_path, tree)
    fields = first.view.fields
    assert {p: first.view[p] for p in fields} == {p: second.view[p] for p in fields}
    assert first.kernels.choices == second.kernels.choices
    assert first.given_kernels == second.given_kernels
    assert len(first.given_kernels) == (flags == CHUNKS)
    size = "data.dyn_bsz_buffer_size"
    assert first.view.is_given(size) is second.view.is_given(size) is (flags == FIRST_FIT)
    assert resolved_tree(second) == tree


def test_no_value_from_the_environment_is_in_the_resolved_configuration(
    tmp_path, base, monkeypatch
):
    monkeypatch.setenv("SECRET", "hunter2")
    base["model"]["tokenizer_path"] = "${oc.env:SECRET}/t"
    base["train"]["optimizer"] = {"no_decay_params": ["bias", "${oc.env:SECRET}"]}
    base["data"]["text_keys"] = "${model.tokenizer_path}"
    base["train"]["optimizer"]["no_decay_modules"] = "${train.optimizer.no_decay_params}"
    init_args = {"save_dir": str(tmp_path), "name": "${oc.env:SECRET}"}
    logger = {"class_path": "lightning.pytorch.loggers.CSVLogger", "init_args": init_args}
    base["trainer"]["logger"] = [logger]
    first = plan(tmp_path, base)
    assert first.view["data.text_keys"] == "hunter2/t"
    assert first.view["train.optimizer.no_decay_modules"] == ["bias", "hunter2"]
    assert first.trainer["logger"][0]["init_args"]["name"] == "hunter2"
    tree = resolved_tree(first)
    assert "hunter2" not in yaml.safe_dump(tree)
    assert tree["train"]["optimizer"]["no_decay_params"] == ["bias", "${oc.env:SECRET}"]
    assert tree["trainer"]["logger"] == [logger]
    second = plan(tmp_path, tree)
    assert second.view["data.text_keys"] == "hunter2/t"
    assert second.trainer == first.trainer
    assert "hunter2" not in print_config(read(command(tmp_path, base)))


@pytest.mark.parametrize("task", ["SFTModule", "DPOModule", "VLMModule", "DiffusionModule"])
def test_the_printed_configuration_has_every_field_with_its_default(tmp_path, base, task):
    base["data"]["data_type"] = "dpo" if task == "DPOModule" else "conversation"
    words = ["--model", task, "--train.optimizer.lr", "1e-5"]
    printed = yaml.safe_load(print_config(read(command(tmp_path, base, *words))))
    assert printed["model"]["class_path"] == task
    assert printed["train"]["optimizer"]["lr"] == 1e-5
    assert printed["train"]["accelerator"]["fsdp_config"]["fsdp_mode"] == "fsdp2"
    assert ("dpo_config" in printed) == (task == "DPOModule")
    again = read(command(tmp_path, printed))
    assert not again.problems


def test_the_printed_configuration_says_what_to_delete_before_it_is_run(tmp_path, base):
    text = print_config(read(command(tmp_path, base)))
    comment = [line for line in text.splitlines() if line.startswith("#")]
    assert text.splitlines()[: len(comment)] == comment
    assert "model.ops_implementation" in " ".join(comment)
    assert "data.dyn_bsz_buffer_size" in " ".join(comment)
    printed = yaml.safe_load(text)
    found = problems(tmp_path, printed)
    assert all(key.startswith("model.ops_implementation.") for key in found)
    del printed["model"]["init_args"]["ops_implementation"]
    del printed["data"]["dyn_bsz_buffer_size"]
    as_printed, as_given = plan(tmp_path, printed), plan(tmp_path, base)
    assert as_printed.kernels == as_given.kernels
    assert not as_printed.view.is_given("data.dyn_bsz_buffer_size")


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


def test_evaluating_random_weights_is_a_problem_with_both_ways_out(tmp_path, base):
    base["data"]["eval_path"] = base["data"]["train_path"]
    for load_path in (None, "auto"):  # nothing was saved yet
        base["train"]["checkpoint"]["load_path"] = load_path
        with pytest.raises(ConfigError) as caught:
            make_plan("validate", command(tmp_path, base))
        (problem,) = caught.value.problems
        assert problem.key == "train.checkpoint.load_path"
        assert "random" in problem.problem
        assert "train.checkpoint.load_path: auto" in problem.fix
        assert "model.model_path" in problem.fix
    base["model"]["model_path"] = base["model"]["config_path"]
    assert make_plan("validate", command(tmp_path, base)).load_path is None


def test_a_validation_whose_checkpoint_is_wrong_is_that_one_problem(tmp_path, base):
    base["data"]["eval_path"] = base["data"]["train_path"]
    base["train"]["checkpoint"]["load_path"] = str(tmp_path / "gone")
    with pytest.raises(ConfigError, match="gone does not exist") as caught:
        make_plan("validate", command(tmp_path, base))
    assert len(caught.value.problems) == 1


def test_types_in_the_trainer_group_are_part_of_the_one_pass(tmp_path, base):
    base["trainer"] |= {"limit_val_batches": "many", "enable_progress_bar": "maybe"}
    base["trainer"]["logger"] = {"class_path": "CSVLogger", "init_args": {"nam": "x"}}
    base["train"]["seed"] = -1
    found = problems(tmp_path, base)
    assert found.keys() == {
        "trainer.limit_val_batches",
        "trainer.enable_progress_bar",
        "trainer.logger",
        "train.seed",
    }
    assert "many" in found["trainer.limit_val_batches"]
    assert "--help trainer" in found["trainer.limit_val_batches"]


def test_a_device_that_is_not_there_is_one_problem(tmp_path, base):
    base["trainer"]["accelerator"] = "gpu"
    base["model"]["ops_implementation"] = {"attn_implementation": "flash_attention_2"}
    base["train"]["accelerator"] = {"dp_shard_size": 8}
    assert problems(tmp_path, base).keys() == {"trainer.accelerator"}


@pytest.mark.parametrize("key", ["devices", "num_nodes"])
def test_a_number_of_processes_that_is_none_is_one_problem(tmp_path, base, key):
    base["trainer"][key] = "two"
    base["train"]["accelerator"] = {"dp_shard_size": 8}
    assert problems(tmp_path, base).keys() == {f"trainer.{key}"}


def test_a_missing_variable_in_the_model_group_is_one_problem(tmp_path, base):
    base["model"]["config_path"] = "${oc.env:NO_SUCH_VARIABLE}"
    found = problems(tmp_path, base, "--model", "SFTModule")
    assert found.keys() == {"model.init_args.config_path"}


def test_a_missing_variable_for_the_task_is_one_problem(tmp_path, base):
    base["dpo_config"] = {"beta": 0.2}
    base["data"]["data_type"] = "dpo"
    reading = read(command(tmp_path, base, "--model", "${oc.env:NO_SUCH_VARIABLE}"))
    assert [problem.key for problem in reading.problems] == ["model.class_path"]
    assert "cannot be resolved" in reading.problems[0].problem


def test_a_missing_variable_in_a_list_is_one_problem(tmp_path, base):
    base["train"]["optimizer"] = {"betas": ["${oc.env:NO_SUCH_VARIABLE}", 0.9]}
    assert problems(tmp_path, base).keys() == {"train.optimizer.betas.0"}


@pytest.mark.parametrize(
    ("words", "path", "value"),
    [
        (("--train.checkpoint.output_dir", "2024"), "train.checkpoint.output_dir", "2024"),
        (("--train.wandb.name=null",), "train.wandb.name", None),
        (("--data.text_keys", "on"), "data.text_keys", "on"),
        (("--model.tokenizer_path", "1e3"), "model.tokenizer_path", "1e3"),
        (
            ("--train.optimizer.no_decay_params", "norm"),
            "train.optimizer.no_decay_params",
            ["norm"],
        ),
        (
            ("--train.optimizer.no_decay_params", "norm", "1"),
            "train.optimizer.no_decay_params",
            ["norm", "1"],
        ),
        (("--train.optimizer.betas", "0.5", "0.6"), "train.optimizer.betas", (0.5, 0.6)),
        (("--train.optimizer.betas=[0.5, 0.6]",), "train.optimizer.betas", (0.5, 0.6)),
        (("--train.optimizer.lr", "1e-4"), "train.optimizer.lr", 1e-4),
        (("--train.optimizer", "{lr: 1e-4}"), "train.optimizer.lr", 1e-4),
        (("--model.strict",), "model.strict", True),
        (("--data.mm_configs.fps", "2"), "data.mm_configs", {"fps": 2}),
    ],
)
def test_the_words_of_a_flag_are_what_its_field_takes(tmp_path, base, words, path, value):
    reading = read(command(tmp_path, base, *words))
    assert not reading.problems
    assert View.of(reading.checked, list(reading.fields))[path] == value


def test_flags_of_the_trainer_group_are_yaml(tmp_path, base):
    flags = ("--trainer.limit_val_batches", "3", "--trainer.devices", "[0]")
    assert plan(tmp_path, base, *flags).trainer == {
        "accelerator": "cpu",
        "limit_val_batches": 3,
        "devices": [0],
    }


def test_a_flag_without_its_value_is_one_problem(tmp_path, base):
    found = problems(tmp_path, base, "--data.train_path", "--train.seed")
    assert found["data.train_path"] == (
        "data.train_path: the flag has no value. To fix: write text after it."
    )
    assert found["train.seed"].endswith("To fix: write a whole number after it.")
    assert len(found) == 2


def test_the_flags_of_a_class_from_elsewhere_are_read_by_its_own_types(tmp_path, base, monkeypatch):
    (tmp_path / "own_task.py").write_text(OWN_TASK)
    monkeypatch.syspath_prepend(tmp_path)
    words = ("--model", "own_task.OwnModule", "--model.label", "007")
    assert plan(tmp_path, base, *words).view["model.label"] == "007"


OWN_TASK = """
from typing import Any
from omnilit.modules import SFTModule

class OwnModule(SFTModule):
    def __init__(self, *, label: str = "", **kwargs: Any) -> None:
        super().__init__(**kwargs)
"""


def test_fields_of_a_class_that_cannot_be_imported_are_not_judged(tmp_path, base):
    init_args = {**base["model"], "gamma": 2.0, "strict": "perhaps"}
    base["model"] = {"class_path": "no_such_package.Module", "init_args": init_args}
    found = problems(tmp_path, base)
    assert found.keys() == {"model.class_path", "model.strict"}
    assert "PYTHONPATH" in found["model.class_path"]


def test_blocks_cannot_be_compiled_without_a_compiler(tmp_path, base, monkeypatch):
    base["train"]["enable_compile"] = True
    monkeypatch.setenv("CXX", "no-such-compiler")
    assert problems(tmp_path, base) == {
        "train.enable_compile": "train.enable_compile: there is no C++ compiler "
        "(no-such-compiler). To fix: install it, or set train.enable_compile: false."
    }
    base["train"]["enable_compile"] = False
    plan(tmp_path, base)


@pytest.mark.parametrize("is_on", [True, False])
def test_a_deterministic_run_asks_for_hashes_that_are_fixed(tmp_path, base, monkeypatch, is_on):
    base["train"] |= {"enable_full_determinism": is_on, "seed": 7}
    monkeypatch.delenv("PYTHONHASHSEED", raising=False)
    made = plan(tmp_path, base)
    if is_on:
        with pytest.raises(RestartError) as caught:
            main._need_fixed_hashes(made)
        assert caught.value.environment == {"PYTHONHASHSEED": "7"}
        monkeypatch.setenv("PYTHONHASHSEED", "1")
    main._need_fixed_hashes(made)
