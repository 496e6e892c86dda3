from __future__ import annotations

from typing import Any

import pytest

from omnilit.config.ranges import ALGORITHM, RANGES, Range
from omnilit.config.rules import all_rules, run_rules
from omnilit.config.schema import Field
from omnilit.config.view import View

GOOD = {"model.config_path": "m", "data.train_path": "d"}
MIXED = "train.accelerator.fsdp_config.mixed_precision"
STYLE = "train.optimizer.lr_decay_style"


def _problems(fields: list[Field], given: dict[str, Any], **options: Any) -> list[str]:
    known = {field.path: field for field in fields}
    assert given.keys() <= known.keys()
    return [str(problem) for problem in run_rules(View(known, GOOD | given, **options))]


def test_every_rule_reads_fields_that_exist(fields: list[Field]):
    paths = {field.path for field in fields}
    assert {path for rule in all_rules() for path in rule.reads} <= paths


def test_the_defaults_of_every_field_are_good(fields: list[Field]):
    given = {field.path: field.default for field in fields if not field.required}
    assert not _problems(fields, given | GOOD, world_size=2)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"train.optimizer.lr": -1.0}, ("train.optimizer.lr: -1.0 is out of range. To fix: use a "
         "number at least 0.")),
        ({"train.optimizer.betas": (0.9, 1.0)}, ("train.optimizer.betas: [0.9, 1.0] is out of "
         "range. To fix: use numbers at least 0 and below 1.")),
        ({"train.optimizer.eps": 0.0}, ("train.optimizer.eps: 0.0 is out of range. To fix: use a "
         "number above 0.")),
        ({"train.optimizer.lr_warmup_ratio": 1.5}, ("train.optimizer.lr_warmup_ratio: 1.5 is out "
         "of range. To fix: use a number at least 0 and at most 1.")),
        ({"train.accelerator.dp_shard_size": 0}, ("train.accelerator.dp_shard_size: 0 is out of "
         "range. To fix: use a number at least 1, or -1.")),
        ({"infer.top_p": 0.0}, ("infer.top_p: 0.0 is out of range. To fix: use a number above 0 "
         "and at most 1.")),
        ({"data.max_seq_len": 1}, ("data.max_seq_len: 1 is out of range. To fix: use a number at "
         "least 2.")),
        ({"train.seed": 2**32}, ("train.seed: 4294967296 is out of range. To fix: use a number at "
         "least 0 and at most 4294967295.")),
        ({f"{MIXED}.param_dtype": "float16"}, (f"{MIXED}.param_dtype: 'float16' needs a loss "
         "scaler, and there is none. To fix: use one of auto, bfloat16, float32.")),
        ({f"{MIXED}.output_dtype": "half"}, (f"{MIXED}.output_dtype: 'half' needs a loss scaler, "
         "and there is none. To fix: use one of bfloat16, float32.")),
        ({"train.accelerator.dp_replicate_size": 0}, ("train.accelerator.dp_replicate_size: 0 is "
         "out of range. To fix: use a number at least 1, or -1.")),
        ({f"{MIXED}.master_dtype": "int8"}, (f"{MIXED}.master_dtype: 'int8' is not known. To fix: "
         "use one of bfloat16, float32.")),
        ({ALGORITHM: "round_robin"}, (f"{ALGORITHM}: 'round_robin' is not known. To fix: use one "
         "of post_mbs_balancing_greedy_without_pad.")),
        ({STYLE: "poly"}, (f"{STYLE}: 'poly' is not known. To fix: use one of constant, linear, "
         "cosine.")),
        ({"train.optimizer.no_decay_params": ["bias", ""]}, ("train.optimizer.no_decay_params: an "
         "empty pattern would match every name. To fix: take it out of the list.")),
        ({"data.text_keys": ""}, ("data.text_keys: '' names no field of a record. To fix: name the "
         "field that holds the text, or leave it out for the one of data.data_type.")),
        ({"data.text_keys": []}, "data.text_keys: [] names no field of a record."),
        ({"model.config_path": None}, ("model.model_path: neither model.model_path nor "
         "model.config_path is given. To fix: give model_path to start from weights, or "
         "config_path to start from random ones.")),
        ({"data.train_path": ""}, ("data.train_path: no training data is given. To fix: name a "
         "file or a folder.")),
        ({"train.eval_steps": 5}, ("train.eval_steps: evaluation is due every 5 steps, but "
         "data.eval_path is not given. To fix: give data.eval_path, or set eval_steps: 0.")),
        ({"dpo_config.precompute_reference": True, "dpo_config.reference_free": True},
         ("dpo_config.precompute_reference: has no effect: reference_free: true has no reference "
          "model. To fix: leave it out.")),
        ({"dpo_config.precompute_reference": True, "dpo_config.loss_type": "simpo"},
         ("dpo_config.precompute_reference: has no effect: loss_type: simpo has no reference "
          "model. To fix: leave it out.")),
        ({"dpo_config.precompute_reference": True, "data.datasets_type": "iterable"},
         ("dpo_config.precompute_reference: needs all pairs before training, and datasets_type: "
          "iterable reads them as it goes. To fix: leave it out, or use datasets_type: mapping.")),
        ({"train.eval_samples": 2}, ("train.eval_samples: has no effect: data.eval_path, where the "
         "prompts are from, is not given. To fix: give data.eval_path, or set eval_samples: 0.")),
        ({"train.eval_samples": 2, "data.eval_path": "e", "data.data_type": "classification"},
         ("train.eval_samples: has no effect with data_type: classification, which asks for no "
          "text. To fix: leave it out.")),
        ({"train.eval_samples_max_tokens": 9}, ("train.eval_samples_max_tokens: has no effect: "
         "eval_samples is 0. To fix: give eval_samples too.")),
        ({"train.optimizer.lr_min": 1e-6}, ("train.optimizer.lr_min: 1e-06 has no effect, because "
         "lr_decay_style: constant never decays. To fix: leave it out, or set lr_decay_style to "
         "linear or cosine.")),
        ({"train.optimizer.lr_decay_ratio": 0.5}, ("train.optimizer.lr_decay_ratio: 0.5 has no "
         "effect")),
        ({STYLE: "cosine", "train.optimizer.lr_min": 1.0}, ("train.optimizer.lr_min: 1.0 is above "
         "lr 5e-05, so the rate would rise in its decay. To fix: choose lr_min at most lr.")),
        ({"data.dataloader.drop_last": False}, ("data.dataloader.drop_last: it governs batches "
         "without dyn_bsz only; with dyn_bsz: true the last step of a pass is always filled and "
         "kept. To fix: leave it out.")),
        ({"train.optimizer.lr_start": 1e-6}, ("train.optimizer.lr_start: 1e-06 has no effect, "
         "because lr_warmup_ratio: 0.0 leaves no warm-up. To fix: leave it out, or set "
         "lr_warmup_ratio above 0.")),
        ({"data.dataloader.type": "mine"}, ("data.dataloader.type: 'mine' is not known. To fix: "
         "use one of native.")),
        ({"train.dyn_bsz": False, "data.train_size": 5}, ("data.train_size: 5 has no effect, "
         "because dyn_bsz is false: an epoch is then one pass, or train_sample samples of unsized "
         "data. To fix: leave it out, or change train.dyn_bsz.")),
        ({"train.dyn_bsz": False, "data.dyn_bsz_buffer_size": 5}, ("data.dyn_bsz_buffer_size: 5 "
         "has no effect, because dyn_bsz is false: a micro-batch is then micro_batch_size")),
        ({"train.dyn_bsz": False, "train.pad_to_length": True}, ("train.pad_to_length: true has no "
         "effect, because dyn_bsz is false: there is no length to pad to.")),
        ({"train.dyn_bsz": False, "train.bsz_warmup_ratio": 0.1}, ("train.bsz_warmup_ratio: 0.1 "
         "has no effect, because dyn_bsz is false: there is no token budget to warm up.")),
        ({"train.bsz_warmup_init_mbtoken": 100}, ("train.bsz_warmup_init_mbtoken: 100 has no "
         "effect, because bsz_warmup_ratio: 0 leaves no warm-up.")),
        ({"train.bsz_warmup_ratio": 0.1, "data.max_seq_len": 100},
         ("train.bsz_warmup_init_mbtoken: 200 is above the 100 tokens of a micro-batch, so "
         "it would shrink. To fix: choose at most 100.")),
        ({"data.train_sample": 5}, ("data.train_sample: 5 has no effect, because with dyn_bsz: "
         "true an epoch is data.train_size tokens.")),
        ({"data.train_sample": 5, "train.dyn_bsz": False}, ("data.train_sample: 5 has no effect, "
         "because data with a length is trained pass by pass.")),
        ({"data.datasets_type": "iterable", "data.train_size": None}, ("data.train_size: null "
         "makes an epoch one pass, but the length of datasets_type: iterable is not known. To "
         "fix: give data.train_size or train.max_steps, or use datasets_type: mapping.")),
        ({"data.max_bad_fraction": 0.1}, ("data.max_bad_fraction: 0.1 has no effect, because "
         "silent_exception: false stops at the first bad record.")),
        ({"data.max_bad_fraction": 2.0, "data.silent_exception": True},
         "data.max_bad_fraction: 2.0 is out of range."),
        ({"data.multisource_datasets_type": "veomni_weighted_multisource"},
         ("data.multisource_datasets_type: veomni_weighted_multisource has no effect, because "
         "data.train_path is not a YAML file of several sources.")),
        ({"data.source_name": "a", "data.train_path": "mix.yaml"}, ("data.source_name: a has no "
         "effect, because the names stand in mix.yaml.")),
        ({"data.source_name": "a/b"}, ("data.source_name: 'a/b' cannot be part of a metric's "
         "name. To fix: use letters, digits, - or _.")),
        ({"data.data_type": "plaintext", "data.chat_template": "plain"}, ("data.chat_template: "
         "plain has no effect, because data_type: plaintext has no messages. To fix: leave it "
         "out, or change data.data_type.")),
        ({"data.data_type": "plaintext", "data.overlong": "drop"}, ("data.overlong: drop has no "
         "effect, because data_type: plaintext cuts a longer text in chunks. To fix: leave it "
         "out, or change data.data_type.")),
        ({"data.data_type": "plaintext", "data.truncation_side": "left"}, ("data.truncation_side: "
         "left has no effect, because data_type: plaintext cuts a longer text in chunks.")),
        ({"model.num_labels": 1}, "model.num_labels: 1 leaves nothing to tell apart."),
        ({"model.num_labels": 3, "model.label_names": ["a", "b"]},
         "model.num_labels: 3 classes, but label_names has 2."),
        ({"data.data_type": "classification", "data.truncation_side": "left"},
         ("data.truncation_side: left has no effect, because data_type: classification keeps the "
         "beginning of a longer text.")),
        ({"data.data_type": "diffusion", "data.text_keys": ["prompt"]}, ("data.text_keys: "
         "['prompt'] has no effect, because data_type: diffusion has fields of fixed names.")),
        ({"data.data_type": "diffusion", "data.chat_template": "plain"}, ("data.chat_template: "
         "plain has no effect, because data_type: diffusion has no messages.")),
        ({"data.data_type": "diffusion", "data.overlong": "drop"}, ("data.overlong: drop has no "
         "effect, because data_type: diffusion is not tokenised.")),
        ({"train.dyn_bsz": False, "data.train_size": None}, ("data.train_size: null has no "
         "effect, because dyn_bsz is false")),
        ({"data.overlong": "error", "data.truncation_side": "left"}, ("data.truncation_side: left "
         "has no effect, because overlong: error never truncates. To fix: leave it out, or "
         "change data.overlong.")),
        ({"train.checkpoint.load_path": "auto", "train.checkpoint.overwrite": True},
         ("train.checkpoint.overwrite: load_path: auto goes on from the checkpoints that "
         "overwrite: true gives up. To fix: keep one of the two.")),
    ],
)  # fmt: skip
def test_a_wrong_setting_is_one_problem_with_its_reason(
    given: dict[str, Any], message: str, fields: list[Field]
):
    (problem,) = _problems(fields, given)
    assert problem.startswith(message)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"train.accelerator.dp_shard_size": 3}, ("train.accelerator.dp_shard_size: dp_shard_size "
         "3 does not make up the 4 ranks of this run. To fix: set dp_shard_size: -1, or choose "
         "sizes whose product is the number of ranks.")),
        ({"train.global_batch_size": 20, "train.micro_batch_size": 3}, ("train.global_batch_size: "
         "20 is not a multiple of micro_batch_size 3 * 4 data-parallel ranks. To fix: use a "
         "multiple of 12, such as 12.")),
    ],
)  # fmt: skip
def test_sizes_must_fit_the_ranks_once_they_are_known(
    given: dict[str, Any], message: str, fields: list[Field]
):
    assert _problems(fields, given, world_size=4) == [message]
    assert not _problems(fields, given)


def test_sizes_that_fit_the_ranks_are_good(fields: list[Field]):
    given = {"train.accelerator.dp_shard_size": 4, "train.global_batch_size": 24}
    assert not _problems(fields, given | {"train.micro_batch_size": 3}, world_size=4)


@pytest.mark.parametrize(
    ("verb", "message"),
    [
        ("validate", "data.eval_path: no evaluation data is given"),
        ("infer", "infer.model_path: no model is given"),
    ],
)
def test_each_verb_asks_for_what_it_reads_only(verb: str, message: str, fields: list[Field]):
    given = {"data.train_path": None, "model.config_path": None, "model.model_path": "m"}
    (problem,) = _problems(fields, given, verb=verb)
    assert problem.startswith(message)


@pytest.mark.parametrize(
    "given",
    [
        {"train.optimizer.lr_min": 1e-7},  # the default
        {STYLE: "linear", "train.optimizer.lr": 0.0},  # lr_min is not given
        {STYLE: "cosine", "train.optimizer.lr_min": 0.0, "train.optimizer.lr_decay_ratio": 0.5},
        {"train.eval_steps": 5, "data.eval_path": "e"},
        {"train.eval_samples": 2, "train.eval_samples_max_tokens": 9, "data.eval_path": "e"},
        {"data.dataloader.num_workers": 0, "data.dataloader.prefetch_factor": 2},
        {"data.dataloader.drop_last": True},
        {"data.train_size": None, "data.text_keys": ["a", "b"]},
        {"train.optimizer.max_grad_norm": 0.0, "infer.temperature": 0.0},
        {"train.checkpoint.load_path": "elsewhere", "train.checkpoint.overwrite": True},
        {"train.optimizer.lr_start": 1e-6, "train.optimizer.lr_warmup_ratio": 0.1},
        {"train.optimizer.lr_start": 0.0, "train.optimizer.lr_warmup_ratio": 0.0},
        {"data.truncation_side": "left", "data.chat_template": "tokenizer"},
        {"data.overlong": "drop", "data.truncation_side": "right"},
        # a transform of the user's own may look at anything
        {"data.transform": "m:T", "data.data_type": "plaintext", "data.chat_template": "plain"},
        {"data.transform": "m:T", "data.overlong": "drop", "data.truncation_side": "left"},
        {"data.data_type": "classification", "data.overlong": "drop", "data.text_keys": "t"},
        {"data.data_type": "classification", "data.chat_template": "plain"},
        {"model.num_labels": 2, "model.label_names": ["a", "b"]},
        {"data.data_type": "dpo", "data.overlong": "drop", "data.chat_template": "plain"},
        {"data.data_type": "dpo", "data.text_keys": "t", "data.truncation_side": "left"},
        {"train.dyn_bsz": False, "data.dataloader.drop_last": False},
        {"train.dyn_bsz": False, "data.datasets_type": "iterable", "data.train_sample": 5},
        {"train.bsz_warmup_ratio": 0.1, "train.bsz_warmup_init_mbtoken": 2048},
        {"data.datasets_type": "iterable", "data.train_size": None, "train.max_steps": 3},
        {"data.silent_exception": True, "data.max_bad_fraction": 0.0},
        {"data.train_path": "m.yml", "data.multisource_datasets_type": "interleave"},
        {"data.source_name": "docs", "train.pad_to_length": True},
        {
            "data.data_type": "plaintext",
            "data.overlong": "truncate",
            "data.truncation_side": "right",
            "data.chat_template": "default",
        },
    ],
)
def test_settings_that_look_odd_but_mean_something_are_good(
    given: dict[str, Any], fields: list[Field]
):
    assert not _problems(fields, given)


def test_a_rule_is_skipped_where_a_field_that_it_reads_is_wrong_already(fields: list[Field]):
    known = {field.path: field for field in fields}
    view = View(known, {"train.eval_steps": -1, "train.micro_batch_size": 0}, 2)
    keys = [problem.key for problem in run_rules(view, doubtful={"model.model_path", "data"})]
    assert keys == ["train.micro_batch_size", "train.eval_steps"]


def test_a_rule_is_skipped_where_the_task_has_no_such_field(fields: list[Field]):
    known = {f.path: f for f in fields if f.path.startswith("train.")}
    assert not run_rules(View(known, {"train.eval_steps": 5}))


def test_ranges_keep_their_ends_apart():
    assert 0 in Range(0, 1)
    assert 1 in Range(0, 1)
    assert 0 not in Range(0, open_low=True)
    assert 1 not in Range(0, 1, open_high=True)
    assert -1 in Range(1, also=-1)
    assert -2 not in Range(1, also=-1)
    assert all(str(interval) for interval in RANGES.values())
