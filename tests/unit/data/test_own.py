"""A transform, a collator and a template of a user's own, in the places of ours."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from transformers import PreTrainedTokenizerFast

from omnilit.data.batches import WorkerSettings, load_batches
from omnilit.data.cache import open_prepared
from omnilit.data.collate import COLLATORS, CollateSettings, collate, make_batch
from omnilit.data.files import DataFile
from omnilit.data.prepare import PrepareRequest, prepare
from omnilit.data.templates import CHAT_TEMPLATES, select_template
from omnilit.data.transforms import TransformSettings, build_transform
from omnilit.errors import ConfigError, DataError
from omnilit.modules import OmniDataModule
from omnilit.types import Origin, Record, Sample
from tests.helpers import own
from tests.helpers.plugins import forget_imports
from tests.helpers.samples import CountingSource

BACKWARDS = TransformSettings(transform="tests.helpers.own:Backwards", max_seq_len=8)


def record(text: str) -> Record:
    return Record({"text": text}, Origin("train", "d.jsonl", 7))


def sample(*ids: int) -> Sample:
    row = np.asarray(ids, np.int32)
    return Sample(row, row, Origin("train", "f", 1))


def test_prepared_samples_are_those_of_the_users_transform(
    write_jsonl: Callable[..., Path], tokenizer: PreTrainedTokenizerFast, tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
):  # fmt: skip
    file = write_jsonl([{"text": "abc"}, {"text": "0123456789"}])
    request = PrepareRequest((DataFile(str(file), "jsonl"),), BACKWARDS, tmp_path / "cache")
    info = prepare(request, tokenizer)
    data = open_prepared(info["path"])
    assert [bytes(data[i].input_ids.tolist()) for i in range(2)] == [b"cba", b"98765432"]
    assert prepare(request, tokenizer)["path"] == info["path"]
    other = replace(request, transform=replace(BACKWARDS, chat_template="plain"))
    assert prepare(other, tokenizer)["path"] != info["path"]  # it may look at any setting
    monkeypatch.setattr(own.Backwards, "fingerprint", lambda self: "backwards-2")
    assert prepare(request, tokenizer)["path"] != info["path"]


@pytest.mark.parametrize(
    ("fault", "message"),
    [
        ("type", "data.transform gave a ndarray, not a Sample"),
        ("dtype", "d.jsonl:7: data.transform gave a sample whose ids are int64 (3,) and labels"),
        ("empty", "d.jsonl:7: data.transform gave a sample with 0 ids and 0 labels"),
        ("long", "a sample of 297 tokens, more than the 8 of data.max_seq_len"),
        ("weights", "a sample whose weights are float64 (3,), not float32 [T]"),
        ("labels", "a sample with labels that are neither its ids nor -100; they are shifted"),
    ],
)
def test_a_sample_that_nothing_can_be_built_on_is_refused(
    fault: str, message: str, tokenizer: PreTrainedTokenizerFast
):
    settings = replace(BACKWARDS, transform="tests.helpers.own:Faulty", chat_template=fault)
    with pytest.raises(DataError) as caught:
        build_transform(settings, tokenizer).encode([record("abc")])
    assert message in str(caught.value)


def test_the_two_sequences_of_a_pair_may_each_have_the_full_length():
    from omnilit.data.own_transform import check_samples

    pair = replace(sample(*range(16)), pair_start=8)
    check_samples([pair], max_seq_len=8)
    with pytest.raises(DataError, match="16 tokens, more than the 14"):
        check_samples([pair], max_seq_len=7)


def test_a_collator_makes_the_micro_batches_and_the_fillers():
    settings = CollateSettings(collator=own.longest_first)
    bins = [[0, 1, 2], []]
    source = CountingSource([1, 3, 2])
    made = load_batches(source, bins, workers=WorkerSettings(), settings=settings)
    batches = [one.batch for one in made]
    assert batches[0].bounds == [0, 3, 5, 6]
    assert batches[0].input_ids.tolist() == [[1, 1, 1, 2, 2, 0]]
    assert batches[1].counts == {"tokens": 0}


def test_no_samples_at_all_are_collated_to_a_filler():
    batch = collate([], CollateSettings(pad_to=5, sources=("a",)))
    assert (batch.num_tokens, batch.input_ids.shape) == (0, (1, 5))
    assert batch.counts == {"tokens": 0, "tokens/a": 0}


def test_what_is_no_micro_batch_is_refused():
    with pytest.raises(DataError, match=r"data\.collator gave a NoneType, not a MicroBatch"):
        make_batch([sample(1)], CollateSettings(collator=own.nothing))  # type: ignore[arg-type]


def test_the_data_module_takes_both_by_name_and_refuses_unknown_ones(
    monkeypatch: pytest.MonkeyPatch,
):
    forget_imports(monkeypatch)
    COLLATORS.register("own_longest", "tests.helpers.own:longest_first")
    data = OmniDataModule(
        train_path="x", transform="tests.helpers.own:Backwards", collator="own_longest"
    )
    assert data._settings.collator is own.longest_first
    assert data.transform.transform == "tests.helpers.own:Backwards"
    with pytest.raises(ConfigError, match=r"data\.collator: 'mine' is not known"):
        OmniDataModule(train_path="x", collator="mine")


def test_a_template_may_be_a_text_in_a_package(
    tokenizer: PreTrainedTokenizerFast, monkeypatch: pytest.MonkeyPatch
):
    forget_imports(monkeypatch)
    CHAT_TEMPLATES.register("own_arrow", "tests.helpers.own:TEMPLATE")
    for name in ("own_arrow", "tests.helpers.own:TEMPLATE"):
        template = select_template(name, tokenizer)
        assert (template.name, template.jinja) == (name, own.TEMPLATE)
    with pytest.raises(ConfigError, match="stands for a type, not for the text of a template"):
        select_template("tests.helpers.own:Backwards", tokenizer)
    with pytest.raises(ConfigError, match=r"gpt_oss, qwen2vl, .*, own_arrow, a file that ends in"):
        select_template("own_arow", tokenizer)
