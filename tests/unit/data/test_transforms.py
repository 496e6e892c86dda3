"""Lengths, chunks and what becomes of a record that is too long."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import numpy as np
import pytest
from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast

from omnilit.data.encode import Encoder, decode_spans
from omnilit.data.transforms import (
    Overlong,
    Side,
    TransformSettings,
    build_transform,
    encode_or_skip,
)
from omnilit.errors import ConfigError, DataError
from omnilit.types import IGNORE, Record
from tests.helpers.thinking import THINKING
from tests.helpers.tokenizers import CHATML, CHATML_MARKED, build_tokenizer

MESSAGES = [{"role": "user", "content": "a b c d e f"}, {"role": "assistant", "content": "x y z"}]


def _settings(size: int, overlong: Overlong = "truncate", side: Side = "right"):
    return TransformSettings(max_seq_len=size, overlong=overlong, truncation_side=side)


def test_truncation_keeps_the_other_side_and_is_counted(
    record: Callable[..., Record], tokenizer: PreTrainedTokenizerFast
):
    one = record(messages=MESSAGES)
    (whole,) = build_transform(_settings(999), tokenizer).encode([one]).samples
    size = len(whole) - 3
    cases: list[tuple[Side, slice]] = [("right", slice(size)), ("left", slice(3, None))]
    for side, kept in cases:
        outcome = build_transform(_settings(size, side=side), tokenizer).encode([one])
        (sample,) = outcome.samples
        assert outcome.num_truncated == 1
        assert sample.input_ids.tolist() == whole.input_ids[kept].tolist()
        assert sample.labels.tolist() == whole.labels[kept].tolist()
    exact = build_transform(_settings(len(whole)), tokenizer).encode([one])
    assert (exact.num_truncated, len(exact.samples[0])) == (0, len(whole))


def test_drop_leaves_the_record_out_and_counts_it(
    record: Callable[..., Record], tokenizer: PreTrainedTokenizerFast
):
    short = record(messages=[{"role": "assistant", "content": "x"}])
    transform = build_transform(_settings(12, "drop"), tokenizer)
    outcome = transform.encode([record(messages=MESSAGES), short])
    assert len(outcome.samples) == 1
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
    settings = TransformSettings("plaintext", text_keys=("text",), max_seq_len=size)
    transform = build_transform(settings, tokenizer)
    samples = transform.encode([record(text=text)]).samples
    ids = np.concatenate([s.input_ids for s in samples]).tolist()
    assert tokenizer.decode(ids) == text + "<|endoftext|>"
    assert all(len(s) == size for s in samples[:-1])
    assert all((s.labels == s.input_ids).all() for s in samples)


def test_plaintext_reads_content_split_by_default_and_only_strings(
    record: Callable[..., Record], tokenizer: PreTrainedTokenizerFast
):
    transform = build_transform(TransformSettings("plaintext"), tokenizer)
    (sample,) = transform.encode([record(content_split="x", text="y")]).samples
    assert decode_spans(sample, Encoder.of(tokenizer)) == [("x<|endoftext|>", True)]
    with pytest.raises(DataError, match="the text is empty, so no token of it is trained"):
        transform.encode([record(content_split="")])
    with pytest.raises(DataError, match="the field 'content_split' is a list, not a string"):
        transform.encode([record(content_split=["x"])])
    with pytest.raises(DataError, match="none of data_type: plaintext; its fields are: 'body'"):
        transform.encode([record(body="x")])


def test_plaintext_needs_an_end_of_text_token():
    with pytest.raises(ConfigError, match="the tokenizer has no eos_token") as caught:
        build_transform(TransformSettings("plaintext"), build_tokenizer(has_end=False))
    assert caught.value.problems[0].key == "model.tokenizer_path"


def test_an_unknown_data_type_and_a_tokenizer_without_offsets_are_refused(
    tokenizer: PreTrainedTokenizerFast,
):
    with pytest.raises(ConfigError, match=r"'plain_text' is not known\. Did you mean 'plaintext'"):
        build_transform(TransformSettings("plain_text"), tokenizer)
    with pytest.raises(ConfigError, match="PreTrainedTokenizerBase does not know which char"):
        build_transform(TransformSettings(), PreTrainedTokenizerBase())


def test_encoding_leaves_the_users_tokenizer_as_it_was(record: Callable[..., Record]):
    tokenizer = build_tokenizer(trim_offsets=True)
    tokenizer.backend_tokenizer.enable_truncation(3)
    before = tokenizer.backend_tokenizer.to_str()
    (sample,) = (
        build_transform(TransformSettings(), tokenizer).encode([record(messages=MESSAGES)]).samples
    )
    assert len(sample) > 3
    assert (sample.labels != IGNORE).any()
    assert tokenizer.backend_tokenizer.to_str() == before


def _turns(*lengths: int) -> list[dict[str, str]]:
    roles = ("user", "assistant")
    return [{"role": roles[i % 2], "content": "x " * n} for i, n in enumerate(lengths)]


@pytest.mark.parametrize("side", ["right", "left"])
def test_truncation_keeps_whole_trained_turns_where_one_fits(
    record: Callable[..., Record], tokenizer: PreTrainedTokenizerFast, side: Side
):
    messages = _turns(3, 4, 5, 6, 7, 8)
    (whole,) = build_transform(_settings(999), tokenizer).encode([record(messages=messages)])[0]
    settings = _settings(len(whole) - 2, side=side)
    outcome = build_transform(settings, tokenizer).encode([record(messages=messages)])
    (sample,) = outcome.samples
    assert (outcome.num_truncated, outcome.num_cut) == (1, 0)
    text = "".join(text for text, _ in decode_spans(sample, Encoder.of(tokenizer)))
    assert text.startswith("<|im_start|>user\n")
    assert text.rstrip().endswith("<|im_end|>")
    assert text.count("assistant") == 2
    assert text.startswith("<|im_start|>user\n" + "x " * 3 + "<") == (side == "right")


@pytest.mark.parametrize("template", [CHATML_MARKED, CHATML, THINKING, None])
@pytest.mark.parametrize("extra", [0, 1, 4])
def test_on_the_left_a_text_begins_with_the_first_whole_message_that_fits(
    record: Callable[..., Record], template: str | None, extra: int
):
    tokenizer = build_tokenizer(template)
    messages = [*_turns(1, 4, 1, 5), {"role": "assistant", "content": "x"}]
    messages = [{**message, "loss_mask": int(i == 3)} for i, message in enumerate(messages)]
    encoder = Encoder.of(tokenizer)
    (whole,) = build_transform(_settings(999), tokenizer).encode([record(messages=messages)])[0]
    text = "".join(text for text, _ in decode_spans(whole, encoder))
    # the last question, and the answer before it, which is not trained
    question = text.rfind("<|im_start|>user" if template else "User: ")
    answer = text.find("<|im_start|>assistant" if template else "Assistant: ")
    for start in (question, answer):
        tails = (encoder.decode(whole.input_ids[i:]) for i in range(len(whole)))
        size = len(whole) - next(i for i, tail in enumerate(tails) if tail == text[start:])
        settings = _settings(size + extra, side="left")
        outcome = build_transform(settings, tokenizer).encode([record(messages=messages)])
        (sample,) = outcome.samples
        assert (outcome.num_truncated, outcome.num_cut, len(sample)) == (1, 0, size)
        assert encoder.decode(sample.input_ids) == text[start:]


def test_on_the_left_an_answer_is_not_parted_from_its_question(
    record: Callable[..., Record], tokenizer: PreTrainedTokenizerFast
):
    outcome = build_transform(_settings(20, side="left"), tokenizer).encode(
        [record(messages=_turns(40, 1))]
    )
    assert (outcome.num_truncated, outcome.num_cut, len(outcome.samples[0])) == (1, 1, 20)


def test_a_turn_that_does_not_fit_at_all_is_cut_and_counted(
    record: Callable[..., Record], tokenizer: PreTrainedTokenizerFast
):
    outcome = build_transform(_settings(40), tokenizer).encode([record(messages=_turns(3, 99))])
    assert (outcome.num_truncated, outcome.num_cut) == (1, 1)
    assert len(outcome.samples[0]) == 40


def test_weights_of_messages_are_those_of_their_tokens(
    record: Callable[..., Record], tokenizer: PreTrainedTokenizerFast
):
    messages = [*_turns(2, 3), {"role": "assistant", "content": "y", "weight": 0.25}]
    (sample,) = build_transform(_settings(99), tokenizer).encode([record(messages=messages)])[0]
    assert sample.weights is not None
    assert set(sample.weights[sample.labels != IGNORE].tolist()) == {1.0, 0.25}


def test_a_pair_is_two_sequences_of_one_sample(
    record: Callable[..., Record], tokenizer: PreTrainedTokenizerFast
):
    settings = TransformSettings("dpo", max_seq_len=99)
    fields = {"prompt": "q", "chosen": "yes", "rejected": "no"}
    (sample,) = build_transform(settings, tokenizer).encode([record(**fields)]).samples
    start = sample.pair_start
    assert start is not None
    halves = (slice(0, start), slice(start, None))
    texts = [tokenizer.decode(sample.input_ids[half]) for half in halves]
    assert [text.count("<|im_start|>user") for text in texts] == [1, 1]
    trained = [t for t, is_label in decode_spans(sample, Encoder.of(tokenizer)) if is_label]
    assert trained == ["yes<|im_end|>", "no<|im_end|>"]


def test_a_class_is_the_label_of_the_last_token(
    record: Callable[..., Record], tokenizer: PreTrainedTokenizerFast
):
    settings = TransformSettings("classification", max_seq_len=4)
    outcome = build_transform(settings, tokenizer).encode([record(text="a b c d e f", label=3)])
    (sample,) = outcome.samples
    assert outcome.num_truncated == 1
    assert sample.labels.tolist() == [IGNORE, IGNORE, IGNORE, 3]


def test_a_text_of_a_class_that_is_too_long_is_dropped_or_refused_where_that_is_asked_for(
    record: Callable[..., Record], tokenizer: PreTrainedTokenizerFast
):
    records = [record(text="a b c d e f", label=3), record(text="a", label=1)]
    dropping = TransformSettings("classification", max_seq_len=4, overlong="drop")
    outcome = build_transform(dropping, tokenizer).encode(records)
    assert [sample.labels[-1] for sample in outcome.samples] == [1]
    assert (outcome.num_dropped, outcome.num_truncated) == (1, 0)
    refusing = build_transform(replace(dropping, overlong="error"), tokenizer)
    with pytest.raises(DataError, match=r"d\.jsonl:7: the record has \d+ tokens, .+ is 4\."):
        refusing.encode(records)
    assert len(refusing.encode(records[1:]).samples) == 1


def test_bad_records_are_skipped_one_by_one_only_where_that_is_asked_for(
    record: Callable[..., Record], tokenizer: PreTrainedTokenizerFast
):
    transform = build_transform(_settings(99), tokenizer)
    good, bad = record(messages=MESSAGES), record(messages="no")
    records = [good, bad, good, good, bad]
    outcome = encode_or_skip(transform, records, is_silent=True)
    assert len(outcome.samples) == 3
    assert [one.reason for one in outcome.bad] == [
        "the field 'messages' is a str, not a list of messages"
    ] * 2
    with pytest.raises(DataError, match=r"d\.jsonl:7: "):
        encode_or_skip(transform, records, is_silent=False)
