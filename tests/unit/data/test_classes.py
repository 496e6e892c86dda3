"""Records with a class: what is read of them, and where the class stands in a micro-batch."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from transformers import PreTrainedTokenizerFast

from omnilit.data.cache import open_prepared
from omnilit.data.collate import CollateSettings, collate, filler
from omnilit.data.files import list_files
from omnilit.data.prepare import PrepareRequest, prepare
from omnilit.data.records import to_labelled
from omnilit.data.transforms import TransformSettings, build_transform
from omnilit.errors import DataError
from omnilit.types import IGNORE, Origin, Record, Sample
from tests.helpers.tokenizers import build_tokenizer

Make = Callable[..., Record]
X = IGNORE
NAMES = ("ham", "spam", "2", "0")
CLASSES = CollateSettings(has_classes=True)


@pytest.mark.parametrize(
    ("label", "number"), [("spam", 1), ("2", 2), ("0", 3), (0, 0), ("1", 1), (" 3 ", 3)]
)
def test_a_label_is_a_name_or_else_a_number(record: Make, label: object, number: int):
    assert to_labelled(record(text="x", label=label), None, NAMES) == ("x", number)


@pytest.mark.parametrize("label", [4, -1, "eggs", True, 1.0, ["spam"], "Spam"])
def test_a_label_that_is_no_class_of_the_model_is_refused(record: Make, label: object):
    with pytest.raises(DataError) as caught:
        to_labelled(record(text="x", label=label), None, NAMES)
    assert str(caught.value).startswith(f"d.jsonl:7: the label is {label!r}, none of the model's 4")
    assert "(ham, spam, 2, 0)" in str(caught.value)


def test_of_many_classes_a_message_shows_some(record: Make):
    names = [f"class {number}" for number in range(100)]
    with pytest.raises(DataError, match=r"100 classes \(class 0, .+, class 7, \.\.\.\)"):
        to_labelled(record(text="x", label="none"), None, names)


@pytest.mark.parametrize("fields", [{"text": "x"}, {"text": "x", "label": None}])
def test_a_missing_label_is_refused(record: Make, fields: dict[str, object]):
    with pytest.raises(DataError, match="the record has no 'label'"):
        to_labelled(record(**fields), None, NAMES)


def encode(tokenizer: PreTrainedTokenizerFast, record: Record, **over: Any) -> Sample:
    settings = TransformSettings("classification", classes=NAMES, **over)
    (sample,) = build_transform(settings, tokenizer).encode([record]).samples
    return sample


def test_messages_are_the_text_that_the_template_makes_of_them(
    record: Make, tokenizer: PreTrainedTokenizerFast
):
    messages = [{"role": "user", "content": "buy"}, {"role": "assistant", "content": "no"}]
    expected = tokenizer.apply_chat_template(messages, tokenize=True, return_dict=False)
    for count in (1, 2):  # the assistant need not have said anything
        own = record(messages=messages[:count], label="spam")
        sample = encode(tokenizer, own)
        text = tokenizer.apply_chat_template(messages[:count], tokenize=True, return_dict=False)
        assert sample.input_ids.tolist() == text
    assert sample.input_ids.tolist() == expected
    assert sample.labels.tolist() == [*[X] * (len(expected) - 1), 1]
    shared = [{"from": "human", "value": "buy"}, {"from": "gpt", "value": "no"}]
    again = encode(tokenizer, record(conversations=shared, label="spam"))
    assert again.input_ids.tolist() == expected
    named = encode(tokenizer, record(talk=messages, label="spam"), text_keys=("talk",))
    assert named.input_ids.tolist() == expected


def test_texts_and_messages_of_a_batch_keep_their_order(
    record: Make, tokenizer: PreTrainedTokenizerFast
):
    talk = [{"role": "user", "content": "buy"}]
    records = [
        record(text="one", label=0),
        record(messages=talk, label=1),
        record(text="two", label=2),
    ]
    settings = TransformSettings("classification", classes=NAMES)
    samples = build_transform(settings, tokenizer).encode(records).samples
    assert [sample.labels[-1] for sample in samples] == [0, 1, 2]
    texts = [tokenizer.decode(sample.input_ids) for sample in samples]
    assert [("buy" in text, "im_start" in text) for text in texts] == [
        *((False, False), (True, True), (False, False)),
    ]


def test_messages_need_a_template_and_texts_do_not(record: Make):
    tokenizer = build_tokenizer(None)
    tokenizer.eos_token = None
    assert encode(tokenizer, record(text="buy", label=1)).labels[-1] == 1
    with pytest.raises(DataError, match="the record has messages, and the tokenizer has neither"):
        encode(tokenizer, record(messages=[{"role": "user", "content": "buy"}], label=1))


def test_truncation_moves_the_class_to_the_last_token_that_stays(
    record: Make, tokenizer: PreTrainedTokenizerFast
):
    for size in (1, 2, 5):
        sample = encode(tokenizer, record(text="a b c d e f", label=2), max_seq_len=size)
        assert sample.labels.tolist() == [*[X] * (size - 1), 2]


def _sample(ids: list[int], label: int, row: int) -> Sample:
    labels = np.full(len(ids), X, np.int32)
    labels[-1] = label
    return Sample(np.asarray(ids, np.int32), labels, Origin("s", "f", row))


def test_classes_are_not_shifted_not_even_of_a_single_token():
    samples = [_sample([1, 2, 3], 0, 4), _sample([4], 1, 5), _sample([5, 6], 2, 6)]
    batch = collate(samples, CLASSES)
    assert batch.labels.tolist() == [[X, X, 0, 1, X, 2]]
    assert batch.bounds == [0, 3, 4, 6]
    assert batch.counts == {"tokens": 3}
    assert batch.target_segments().tolist() == [0, 1, 2]
    padded = collate(samples, CollateSettings(pad_to=8, sources=("s",), has_classes=True))
    assert padded.labels.tolist() == [[X, X, 0, 1, X, 2, X, X]]
    assert padded.counts == {"tokens": 3, "tokens/s": 3}
    assert filler(CLASSES).counts == {"tokens": 0}


def test_prepared_classes_come_back_also_where_they_equal_a_token(
    write_jsonl: Callable[..., Path], tokenizer: PreTrainedTokenizerFast, tmp_path: Path
):
    (token,) = tokenizer("a")["input_ids"]
    names = tuple(map(str, range(token + 2)))
    rows = [{"text": "a", "label": token}, {"text": "a", "label": 1}, {"text": "b a", "label": 0}]
    files = tuple(list_files(str(write_jsonl(rows)), key="data.train_path"))
    settings = TransformSettings("classification", classes=names)
    info = prepare(PrepareRequest(files, settings, tmp_path / "cache"), tokenizer)
    data = open_prepared(info["path"])
    assert [data[index].labels[-1] for index in range(3)] == [token, 1, 0]
    assert data.num_targets.tolist()[1:] == [1, 1]
    bad = tuple(list_files(str(write_jsonl([*rows, {"text": "a", "label": "no"}], "bad.jsonl")),
                           key="data.eval_path"))  # fmt: skip
    with pytest.raises(DataError, match=r"bad\.jsonl:4: the label is 'no', none of"):
        prepare(PrepareRequest(bad, settings, tmp_path / "cache"), tokenizer)
