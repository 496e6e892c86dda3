"""Lengths, chunks and what becomes of a record that is too long."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast

from omnilit.data.encode import decode_spans
from omnilit.data.transforms import Overlong, Side, TransformSettings, build_transform
from omnilit.errors import ConfigError, DataError
from omnilit.types import IGNORE, Record
from tests.helpers.tokenizers import build_tokenizer

MESSAGES = [{"role": "user", "content": "a b c d e f"}, {"role": "assistant", "content": "x y z"}]


def _settings(size: int, overlong: Overlong = "truncate", side: Side = "right"):
    return TransformSettings(max_seq_len=size, overlong=overlong, truncation_side=side)


def test_truncation_keeps_the_other_side_and_is_counted(
    record: Callable[..., Record], tokenizer: PreTrainedTokenizerFast
):
    one = record(messages=MESSAGES)
    (whole,) = build_transform(_settings(999), tokenizer).encode([one]).samples[0]
    size = len(whole) - 3
    cases: list[tuple[Side, slice]] = [("right", slice(size)), ("left", slice(3, None))]
    for side, kept in cases:
        outcome = build_transform(_settings(size, side=side), tokenizer).encode([one])
        (sample,) = outcome.samples[0]
        assert outcome.num_truncated == 1
        assert sample.input_ids.tolist() == whole.input_ids[kept].tolist()
        assert sample.labels.tolist() == whole.labels[kept].tolist()
    exact = build_transform(_settings(len(whole)), tokenizer).encode([one])
    assert (exact.num_truncated, len(exact.samples[0][0])) == (0, len(whole))


def test_drop_leaves_the_record_out_and_counts_it(
    record: Callable[..., Record], tokenizer: PreTrainedTokenizerFast
):
    short = record(messages=[{"role": "assistant", "content": "x"}])
    transform = build_transform(_settings(12, "drop"), tokenizer)
    outcome = transform.encode([record(messages=MESSAGES), short])
    assert [len(samples) for samples in outcome.samples] == [0, 1]
    assert (outcome.num_dropped, outcome.num_truncated) == (1, 0)


def test_error_names_the_record_and_both_lengths(
    record: Callable[..., Record], tokenizer: PreTrainedTokenizerFast
):
    with pytest.raises(DataError, match=r"d\.jsonl:7: the record has \d+ tokens, .+ is 9\."):
        build_transform(_settings(9, "error"), tokenizer).encode([record(messages=MESSAGES)])


@pytest.mark.parametrize("size", [1, 2, 7, 1000])
def test_plaintext_is_cut_in_chunks_that_hold_every_token(
    record: Callable[..., Record], tokenizer: PreTrainedTokenizerFast, size: int
):
    text = "the quick brown fox \u4f60\u597d\n" * 5
    settings = TransformSettings("plaintext", text_key="text", max_seq_len=size)
    transform = build_transform(settings, tokenizer)
    samples = transform(record(text=text))
    ids = np.concatenate([s.input_ids for s in samples]).tolist()
    assert tokenizer.decode(ids) == text + "<|endoftext|>"
    assert all(len(s) == size for s in samples[:-1])
    assert all((s.labels == s.input_ids).all() for s in samples)


def test_plaintext_reads_content_split_by_default_and_only_strings(
    record: Callable[..., Record], tokenizer: PreTrainedTokenizerFast
):
    transform = build_transform(TransformSettings("plaintext"), tokenizer)
    (sample,) = transform(record(content_split=""))
    assert decode_spans(sample, tokenizer) == [("<|endoftext|>", True)]
    with pytest.raises(DataError, match="the field 'content_split' is a list, not a string"):
        transform(record(content_split=["x"]))
    with pytest.raises(DataError, match="no field 'content_split'; its fields are: 'text'"):
        transform(record(text="x"))


def test_plaintext_needs_an_end_of_text_token():
    with pytest.raises(ConfigError, match="the tokenizer has no eos_token") as caught:
        build_transform(TransformSettings("plaintext"), build_tokenizer(has_end=False))
    assert caught.value.problems[0].key == "model.tokenizer_path"


def test_an_unknown_data_type_and_a_tokenizer_without_offsets_are_refused(
    tokenizer: PreTrainedTokenizerFast,
):
    with pytest.raises(ConfigError, match=r"'plain_text' cannot .+ Did you mean 'plaintext'"):
        build_transform(TransformSettings("plain_text"), tokenizer)
    with pytest.raises(ConfigError, match="PreTrainedTokenizerBase does not know which char"):
        build_transform(TransformSettings(), PreTrainedTokenizerBase())


def test_encoding_leaves_the_users_tokenizer_as_it_was(record: Callable[..., Record]):
    tokenizer = build_tokenizer(trim_offsets=True)
    tokenizer.backend_tokenizer.enable_truncation(3)
    before = tokenizer.backend_tokenizer.to_str()
    (sample,) = build_transform(TransformSettings(), tokenizer)(record(messages=MESSAGES))
    assert len(sample) > 3
    assert (sample.labels != IGNORE).any()
    assert tokenizer.backend_tokenizer.to_str() == before
