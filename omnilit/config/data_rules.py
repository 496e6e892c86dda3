"""Rules on the data and how it is batched: pure functions of the values."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Final

from omnilit.config.data import micro_batch_tokens
from omnilit.config.view import View
from omnilit.errors import Problem

KIND: Final = "data.data_type"
SIDE: Final = "data.truncation_side"
TRANSFORM: Final = "data.transform"
DYN: Final = "train.dyn_bsz"
DATASETS: Final = "data.datasets_type"
TRAIN_PATH: Final = "data.train_path"
SOURCE_NAME: Final = "data.source_name"
MIXING: Final = "data.multisource_datasets_type"
SAMPLES: Final = "data.train_sample"
TOKENS: Final = "data.train_size"
RATIO: Final = "train.bsz_warmup_ratio"
INIT: Final = "train.bsz_warmup_init_mbtoken"
# What a type of data never looks at, and why
NOT_READ: Final[Mapping[str, Mapping[str, str]]] = {
    "data.text_keys": {"diffusion": "has fields of fixed names"},
    "data.chat_template": dict.fromkeys(("plaintext", "diffusion"), "has no messages"),
    "data.overlong": {
        "plaintext": "cuts a longer text in chunks",
        "diffusion": "is not tokenised",
    },
    SIDE: {
        "plaintext": "cuts a longer text in chunks",
        "classification": "keeps the beginning of a longer text",
        "diffusion": "is not tokenised",
    },
}
# What acts with packing to a token budget only, and why
NEEDS_PACKING: Final = {
    TOKENS: "an epoch is then one pass, or train_sample samples of unsized data",
    "data.dyn_bsz_buffer_size": "a micro-batch is then micro_batch_size samples as they come",
    "train.pad_to_length": "there is no length to pad to",
    RATIO: "there is no token budget to warm up",
}


def text_keys_have_text(view: View) -> list[Problem]:
    """`text_keys` names fields."""
    keys = view["data.text_keys"]
    names = [keys] if isinstance(keys, str) else keys
    if names is None or (names and all(name.strip() for name in names)):
        return []
    return [
        Problem(
            "data.text_keys",
            f"{keys!r} names no field of a record",
            "name the field that holds the text, or leave it out for the one of data.data_type",
        )
    ]


def kind_reads_it(view: View, path: str) -> list[Problem]:
    """A field that the type of data never looks at is not given."""
    kind = view[KIND]
    if view[TRANSFORM] is not None:  # what it looks at is not known
        return []
    if kind not in NOT_READ[path] or not view.is_changed(path):
        return []
    return [_no_effect(view, path, f"data_type: {kind} {NOT_READ[path][kind]}", KIND)]


def side_has_a_cut(view: View) -> list[Problem]:
    """`truncation_side` is given only where something is truncated."""
    overlong = view["data.overlong"]
    if overlong == "truncate" or not view.is_changed(SIDE) or view[TRANSFORM] is not None:
        return []
    return [_no_effect(view, SIDE, f"overlong: {overlong} never truncates", "data.overlong")]


def packing_drops_no_batch(view: View) -> list[Problem]:
    """`drop_last` is given without packing only."""
    path = "data.dataloader.drop_last"
    if not view[DYN] or not view.is_changed(path):
        return []
    return [
        Problem(
            path,
            "it governs batches without dyn_bsz only; with dyn_bsz: true the last step of a pass "
            "is always filled and kept",
            "leave it out",
        )
    ]


def packing_is_on(view: View, path: str) -> list[Problem]:
    """A field of packing is not given without packing."""
    if view[DYN] or not view.is_changed(path):
        return []
    return [_no_effect(view, path, f"dyn_bsz is false: {NEEDS_PACKING[path]}", DYN)]


def warm_up_is_on(view: View) -> list[Problem]:
    """The warm-up's first budget is given with a warm-up only, and below the full budget."""
    if not view.is_changed(INIT) and not view[RATIO]:
        return []
    if not view[RATIO]:
        return [_no_effect(view, INIT, "bsz_warmup_ratio: 0 leaves no warm-up", RATIO)]
    full = micro_batch_tokens(view["train.micro_batch_size"], view["data.max_seq_len"], view[KIND])
    if view[INIT] <= full:
        return []
    problem = f"{view[INIT]} is above the {full} tokens of a micro-batch, so it would shrink"
    return [Problem(INIT, problem, f"choose at most {full}")]


def samples_are_counted(view: View) -> list[Problem]:
    """`train_sample` is given only where an epoch is counted in samples."""
    if not view.is_changed(SAMPLES) or (view[DATASETS] == "iterable" and not view[DYN]):
        return []
    reason = (
        "with dyn_bsz: true an epoch is data.train_size tokens"
        if view[DYN]
        else "data with a length is trained pass by pass"
    )
    return [_no_effect(view, SAMPLES, reason, f"{DYN} and {DATASETS}")]


def stream_has_an_end(view: View) -> list[Problem]:
    """Data of unknown length needs the epoch's length."""
    if view[DATASETS] != "iterable" or not view[DYN]:
        return []
    if view[TOKENS] is not None or view["train.max_steps"] is not None:
        return []
    return [
        Problem(
            TOKENS,
            "null makes an epoch one pass, but the length of datasets_type: iterable is not known",
            "give data.train_size or train.max_steps, or use datasets_type: mapping",
        )
    ]


def limit_has_skipping(view: View) -> list[Problem]:
    """`max_bad_fraction` is given only where bad records are skipped."""
    path = "data.max_bad_fraction"
    if view["data.silent_exception"] or not view.is_changed(path):
        return []
    reason = "silent_exception: false stops at the first bad record"
    return [_no_effect(view, path, reason, "data.silent_exception")]


def mixing_has_sources(view: View) -> list[Problem]:
    """The kind of mixing is given with several sources only."""
    path = view[TRAIN_PATH]
    if not path or path.endswith((".yaml", ".yml")) or not view.is_changed(MIXING):
        return []
    reason = "data.train_path is not a YAML file of several sources"
    return [_no_effect(view, MIXING, reason, TRAIN_PATH)]


def one_source_has_one_name(view: View) -> list[Problem]:
    """`source_name` names the one source there is."""
    path, name = view[TRAIN_PATH], view[SOURCE_NAME]
    if name is None or not path:
        return []
    if path.endswith((".yaml", ".yml")):
        return [_no_effect(view, SOURCE_NAME, f"the names stand in {path}", TRAIN_PATH)]
    if name.strip() and "/" not in name:
        return []
    problem = f"{name!r} cannot be part of a metric's name"
    return [Problem(SOURCE_NAME, problem, "use letters, digits, - or _")]


def _no_effect(view: View, path: str, reason: str, other: str) -> Problem:
    value = view[path]
    shown = json.dumps(value) if value is None or isinstance(value, bool) else value
    return Problem(
        path, f"{shown} has no effect, because {reason}", f"leave it out, or change {other}"
    )
