"""The cache of tokenised data: what is in it, when it is found, and when it is not."""

from __future__ import annotations

import gzip
import json
import os
import pickle
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from transformers import PreTrainedTokenizerFast

from omnilit.data.cache import open_prepared, publish
from omnilit.data.files import DataFile
from omnilit.data.prepare import PreparedInfo, PrepareRequest, prepare, read_bad
from omnilit.data.quarantine import BadRecord
from omnilit.data.transforms import TransformSettings, build_transform
from omnilit.errors import DataError
from omnilit.types import IGNORE, Origin, Record
from tests.helpers.tokenizers import CHATML, build_tokenizer

Write = Callable[..., Path]


SAID = {"role": "assistant", "content": "a"}


def _chat(answer: str) -> dict[str, list[dict[str, str]]]:
    user = {"role": "user", "content": "the question"}
    return {"messages": [user, {"role": "assistant", "content": answer}]}


@pytest.fixture
def request_for(tmp_path: Path) -> Callable[..., PrepareRequest]:
    def build(*paths: Path, **settings: object) -> PrepareRequest:
        files = tuple(DataFile(str(path), "jsonl") for path in paths)
        transform = replace(TransformSettings(), **settings)  # type: ignore[arg-type]
        return PrepareRequest(files, transform, tmp_path / "cache", "train")

    return build


def test_prepared_samples_are_those_of_the_transform_with_their_origins(
    write_jsonl: Write,
    request_for: Callable[..., PrepareRequest],
    tokenizer: PreTrainedTokenizerFast,
    monkeypatch: pytest.MonkeyPatch,
):
    monkeypatch.setattr("omnilit.data.prepare.ROWS_PER_BATCH", 8)
    rows = [_chat("word " * (i % 5)) for i in range(19)]
    files = (write_jsonl(rows, "a.jsonl"), write_jsonl([_chat("b")], "b.jsonl"))
    info = prepare(request_for(*files), tokenizer)
    data = open_prepared(info["path"])
    transform = build_transform(TransformSettings(), tokenizer)
    assert len(data) == info["num_samples"] == info["num_records"] == len(rows) + 1
    for index in (0, 4, 7, 8, 15, 16, len(rows)):
        sample = data[index]
        is_last = index == len(rows)
        origin = Origin("train", str(files[is_last]), 1 if is_last else index + 1)
        one = Record(_chat("b") if is_last else rows[index], origin)
        (expected,) = transform.encode([one]).samples
        assert sample.origin == origin
        assert sample.input_ids.tolist() == expected.input_ids.tolist()
        assert sample.labels.tolist() == expected.labels.tolist()
        assert data.lengths[index] == len(sample)
        assert data.num_targets[index] == (sample.labels != IGNORE).sum()
    assert info["num_tokens"] == data.lengths.sum()
    assert info["num_targets"] == data.num_targets.sum()
    with pytest.raises(IndexError):
        data[len(data)]


def test_prepared_data_travels_by_its_path_and_its_info_as_json(
    write_jsonl: Write,
    request_for: Callable[..., PrepareRequest],
    tokenizer: PreTrainedTokenizerFast,
):
    info = prepare(request_for(write_jsonl([_chat("x")] * 50)), tokenizer)
    data = open_prepared(info["path"])
    packed = pickle.dumps(data)
    assert len(packed) < 400
    assert pickle.loads(packed)[3].input_ids.tolist() == data[3].input_ids.tolist()
    assert json.loads(json.dumps(info)) == info


def _mark(info: PreparedInfo) -> None:
    (Path(info["path"]) / "seen").touch()


def _is_marked(info: PreparedInfo) -> bool:
    return (Path(info["path"]) / "seen").exists()


def test_the_same_request_is_found_and_any_other_is_not(
    write_jsonl: Write,
    request_for: Callable[..., PrepareRequest],
    tokenizer: PreTrainedTokenizerFast,
):
    file = write_jsonl([_chat("x")])
    request = request_for(file)
    first = prepare(request, tokenizer)
    _mark(first)
    again = prepare(request_for(file, chat_template="tokenizer"), tokenizer)
    assert _is_marked(again)  # the defaults, written out
    assert again == first
    for other in (
        request_for(file, max_seq_len=2047),
        request_for(file, truncation_side="left"),
        request_for(file, overlong="drop"),
        request_for(file, chat_template="plain"),
        request_for(file, text_keys=("messages",)),
        request_for(write_jsonl([_chat("x")] * 2, "other.jsonl")),
    ):
        assert not _is_marked(prepare(other, tokenizer))
    assert not _is_marked(prepare(request, build_tokenizer(CHATML)))
    write_jsonl([_chat("y")])  # the same name and size
    assert not _is_marked(prepare(request, tokenizer))


def test_the_same_contents_are_found_at_another_path_and_tell_of_it(
    write_jsonl: Write,
    request_for: Callable[..., PrepareRequest],
    tokenizer: PreTrainedTokenizerFast,
):
    rows = [[_chat("x"), "{"], [_chat("y")]]
    old, new = ([write_jsonl(r, f"{d}/{i}.jsonl") for i, r in enumerate(rows)] for d in ("a", "b"))
    request = replace(request_for(*old), silent_exception=True, max_bad_fraction=0.5)
    moved = replace(request, files=request_for(*new).files)
    first = prepare(request, tokenizer)
    _mark(first)
    again = prepare(moved, tokenizer)
    assert _is_marked(again)
    data = open_prepared(again["path"], "s", again["files"])
    origins = [Origin("s", str(file), 1) for file in new]
    assert [data[0].origin, data[1].origin] == origins
    assert pickle.loads(pickle.dumps(data))[1].origin == origins[1]
    assert [one.file for one in read_bad(again)] == [str(new[0])]
    with pytest.raises(DataError, match=r"b/0\.jsonl:2: the line is not JSON"):
        prepare(replace(moved, silent_exception=False), tokenizer)
    # what was made first still says where it was
    assert open_prepared(first["path"])[0].origin == Origin("train", str(old[0]), 1)
    swapped = prepare(replace(moved, files=moved.files[::-1]), tokenizer)
    assert not _is_marked(swapped)


def test_what_was_cut_dropped_or_left_without_a_label_is_counted(
    write_jsonl: Write,
    request_for: Callable[..., PrepareRequest],
    tokenizer: PreTrainedTokenizerFast,
):
    file = write_jsonl(
        [
            _chat("x"),
            _chat("y " * 50),
            {
                "messages": [
                    {"role": "user", "content": "z " * 200},
                    {"role": "assistant", "content": "cut away"},
                ]
            },
        ]
    )
    whole = prepare(request_for(file), tokenizer)
    assert (whole["num_truncated"], whole["num_unsupervised"]) == (0, 0)
    cut = prepare(request_for(file, max_seq_len=60), tokenizer)
    assert (cut["num_truncated"], cut["num_unsupervised"], cut["num_samples"]) == (2, 1, 2)
    dropped = prepare(request_for(file, max_seq_len=60, overlong="drop"), tokenizer)
    assert (dropped["num_dropped"], dropped["num_samples"], dropped["num_records"]) == (2, 1, 3)


def test_plaintext_is_conserved_through_the_cache(
    write_jsonl: Write,
    request_for: Callable[..., PrepareRequest],
    tokenizer: PreTrainedTokenizerFast,
):
    texts = ["the quick brown fox " * n for n in (1, 9, 4)]
    request = request_for(
        write_jsonl([{"content_split": t} for t in texts]), data_type="plaintext", max_seq_len=8
    )
    data = open_prepared(prepare(request, tokenizer)["path"])
    ids = np.concatenate([data[i].input_ids for i in range(len(data))]).tolist()
    assert tokenizer.decode(ids) == "".join(t + "<|endoftext|>" for t in texts)


def test_data_that_cannot_train_is_refused_and_leaves_nothing_behind(
    write_jsonl: Write,
    request_for: Callable[..., PrepareRequest],
    tokenizer: PreTrainedTokenizerFast,
    tmp_path: Path,
):
    late = {"messages": [{"role": "user", "content": "z " * 99}, *_chat("x")["messages"][1:]]}
    good, silent = write_jsonl([_chat("x")]), write_jsonl([late] * 3, "silent.jsonl")
    with pytest.raises(DataError, match=r"silent\.jsonl: no token in the whole file is trained"):
        prepare(request_for(good, silent, max_seq_len=60), tokenizer)
    with pytest.raises(DataError, match=r"empty\.jsonl: the data set is empty: 0 records"):
        prepare(request_for(write_jsonl([], "empty.jsonl")), tokenizer)
    with pytest.raises(DataError, match="1 records, 1 of them dropped for their length"):
        prepare(request_for(good, max_seq_len=4, overlong="drop"), tokenizer)
    with pytest.raises(DataError, match=r"bad\.jsonl:2: the line is not JSON"):
        prepare(request_for(write_jsonl([_chat("x"), "{"], "bad.jsonl")), tokenizer)
    assert list((tmp_path / "cache").iterdir()) == []


def test_texts_without_a_trained_token_are_bad_and_never_the_whole_data(
    write_jsonl: Write,
    request_for: Callable[..., PrepareRequest],
    tokenizer: PreTrainedTokenizerFast,
):
    rows = [{"text": ""}] * 3
    request = request_for(write_jsonl(rows), data_type="plaintext")
    with pytest.raises(DataError, match=r"data\.jsonl:1: the text is empty, so no token of it is"):
        prepare(request, tokenizer)
    silent = replace(request, silent_exception=True, max_bad_fraction=1.0)
    with pytest.raises(DataError, match=r"the data set is empty: 3 records, .* 3 bad"):
        prepare(silent, tokenizer)
    write_jsonl([*rows, {"text": "x"}])
    info = prepare(silent, tokenizer)
    assert (info["num_bad"], info["num_samples"]) == (3, 1)


def test_a_cache_that_cannot_be_written_is_named_with_its_variable(
    write_jsonl: Write,
    request_for: Callable[..., PrepareRequest],
    tokenizer: PreTrainedTokenizerFast,
):
    file = write_jsonl([_chat("x")])
    blocked = replace(request_for(file), cache_dir=file / "cache")
    with pytest.raises(DataError, match=r"cannot be written .+ set OMNILIT_CACHE"):
        prepare(blocked, tokenizer)


def test_an_unfinished_folder_is_not_opened_and_is_made_anew(
    write_jsonl: Write,
    request_for: Callable[..., PrepareRequest],
    tokenizer: PreTrainedTokenizerFast,
):
    request = request_for(write_jsonl([_chat("x")]))
    info = prepare(request, tokenizer)
    (Path(info["path"]) / "COMPLETE").unlink()
    with pytest.raises(DataError, match="is not a finished folder of prepared data"):
        open_prepared(info["path"])
    assert prepare(request, tokenizer) == info
    assert len(open_prepared(info["path"])) == 1


def test_of_two_that_publish_the_same_folder_the_first_stays(tmp_path: Path):
    with publish(tmp_path / "f") as late:
        (late / "who").write_text("late")
        with publish(tmp_path / "f") as early:
            (early / "who").write_text("early")
    assert (tmp_path / "f" / "who").read_text() == "early"
    assert [entry.name for entry in tmp_path.iterdir()] == ["f"]


def test_what_killed_preparations_left_is_removed_and_nothing_of_those_at_work(tmp_path: Path):
    day = 24 * 3600
    with publish(tmp_path / "f") as live:
        dead = live.with_name(live.name.replace(f"-{os.getpid()}-", f"-{2**22 + 1}-"))
        elsewhere = tmp_path / "g.staged-0a1b2c3d-1-abc"
        unknown, old = tmp_path / "g.staged-abc", tmp_path / "g.staged-0a1b2c3d-1-old"
        for folder in (dead, elsewhere, unknown, old):
            folder.mkdir()
            (folder / "tokens").touch()
        late = time.time() - day - 60
        for path in (elsewhere, old, old / "tokens", live, unknown):
            os.utime(path, (late, late))  # where something was written since, it is at work
        with publish(tmp_path / "h"):
            kept = {path.name for path in tmp_path.iterdir() if not path.name.startswith("h")}
        assert kept == {live.name, elsewhere.name, unknown.name}
    assert (tmp_path / "f" / "COMPLETE").is_file()


@pytest.fixture
def spoilt(write_jsonl: Write) -> Path:
    return write_jsonl([_chat("x"), "{", _chat("y"), '{"messages": 3}', _chat("z")])


def test_bad_records_are_skipped_told_and_limited(
    spoilt: Path, request_for: Callable[..., PrepareRequest], tokenizer: PreTrainedTokenizerFast
):
    request = replace(request_for(spoilt), silent_exception=True, max_bad_fraction=0.4)
    info = prepare(request, tokenizer)
    assert (info["num_records"], info["num_samples"], info["num_bad"]) == (5, 3, 2)
    bad = list(read_bad(info))
    assert [(one.row, one.source, one.reason.split(" (")[0]) for one in bad] == [
        (2, "train", "the line is not JSON"),
        (4, "train", "the field 'messages' is a int, not a list of messages"),
    ]
    rows = [open_prepared(info["path"])[i].origin.row for i in range(3)]
    assert rows == [1, 3, 5]
    # found in the cache, and judged by the limit and the choice of today
    with pytest.raises(DataError, match=r"2 of 5 records are bad, more than .+: 0\.39"):
        prepare(replace(request, max_bad_fraction=0.39), tokenizer)
    with pytest.raises(DataError, match=r"data\.jsonl:2: the line is not JSON"):
        prepare(replace(request, silent_exception=False), tokenizer)


def test_bad_records_are_told_before_a_limit_or_an_error_stops_the_run(
    spoilt: Path,
    write_jsonl: Write,
    request_for: Callable[..., PrepareRequest],
    tokenizer: PreTrainedTokenizerFast,
):
    request = replace(request_for(spoilt), silent_exception=True, max_bad_fraction=0.1)
    told: list[BadRecord] = []
    with pytest.raises(DataError, match=r"2 of 5 records are bad, more than"):
        prepare(request, tokenizer, on_bad=told.extend)
    assert [one.row for one in told] == [2, 4]
    assert all((one.source, one.file) == ("train", str(spoilt)) for one in told)
    # where the limit stops it midway, which leaves nothing in the cache
    many = write_jsonl(["{"] * 3000 + [_chat("x")], "many.jsonl")
    told.clear()
    with pytest.raises(DataError, match=r"records are bad, more than"):
        prepare(
            replace(request, files=(DataFile(str(many), "jsonl"),)), tokenizer, on_bad=told.extend
        )
    assert 1000 <= len(told) < 3000
    # found in the cache
    told.clear()
    prepare(replace(request, max_bad_fraction=0.5), tokenizer, on_bad=told.extend)
    assert [one.row for one in told] == [2, 4]
    told.clear()
    with pytest.raises(DataError, match=r"2 of 5 records are bad, more than"):
        prepare(request, tokenizer, on_bad=told.extend)
    assert [one.row for one in told] == [2, 4]
    # by another file
    cut = spoilt.with_name("cut.jsonl.gz")
    cut.write_bytes(gzip.compress(spoilt.read_bytes() * 500)[:-40])
    told.clear()
    files = (*request.files, DataFile(str(cut), "jsonl"))
    with pytest.raises(DataError, match=r"cut\.jsonl\.gz: the file cannot be read"):
        prepare(replace(request, files=files, max_bad_fraction=0.5), tokenizer, on_bad=told.extend)
    assert [one.row for one in told[:2]] == [2, 4]


def test_workers_prepare_what_one_process_prepares(
    write_jsonl: Write,
    request_for: Callable[..., PrepareRequest],
    tokenizer: PreTrainedTokenizerFast,
    tmp_path: Path,
):
    rows = [_chat("word " * (i % 7)) for i in range(1300)]
    request = request_for(write_jsonl(rows))
    alone = open_prepared(prepare(request, tokenizer)["path"])
    other = replace(request, num_workers=2, cache_dir=tmp_path / "other")
    helped = open_prepared(prepare(other, tokenizer)["path"])
    assert len(alone) == len(helped) == 1300
    for index in range(0, 1300, 97):
        assert alone[index].origin == helped[index].origin
        assert alone[index].labels.tolist() == helped[index].labels.tolist()


def test_weights_pairs_and_classes_come_back_from_the_cache(
    write_jsonl: Write,
    request_for: Callable[..., PrepareRequest],
    tokenizer: PreTrainedTokenizerFast,
):
    weighted = {"messages": [*_chat("x")["messages"], {**SAID, "weight": 0.5}]}
    cases = {
        "conversation": weighted,
        "dpo": {"prompt": "q", "chosen": "a", "rejected": "b"},
        "classification": {"text": "some words", "label": 5},
    }
    for kind, row in cases.items():
        file = write_jsonl([row], f"{kind}.jsonl")
        info = prepare(request_for(file, data_type=kind), tokenizer)
        transform = build_transform(TransformSettings(kind), tokenizer)
        origin = Origin("train", str(file), 1)
        (expected,) = transform.encode([Record(row, origin)]).samples
        found = open_prepared(info["path"])[0]
        assert found.labels.tolist() == expected.labels.tolist()
        assert found.pair_start == expected.pair_start
        is_label = expected.labels != IGNORE
        if expected.weights is not None:
            assert found.weights is not None
            assert found.weights[is_label].tolist() == expected.weights[is_label].tolist()
        assert info["num_weighted"] == (kind == "conversation")
