import json

import pytest
import yaml

from omnilit.__main__ import main
from omnilit.cli.plan import make_data_view
from omnilit.errors import ConfigError
from omnilit.tools.data import parse_request
from omnilit.tools.data_load import load_data
from omnilit.tools.data_report import build_tables
from tests.helpers.bad_records import ANSWER, BAD_LINES, USER, write_bad_records
from tests.helpers.training import write_conversations, write_model


def packed(part):
    assert part.packing is not None
    return part.packing


def known(values):
    assert values is not None
    return values


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return write_model(tmp_path_factory.mktemp("model"))


@pytest.fixture(autouse=True)
def _log_is_left_alone(monkeypatch):
    monkeypatch.setattr("omnilit.tools.data.show_on_rank_zero", lambda rank: None)


@pytest.fixture
def base(model, tmp_path, monkeypatch):
    """Words that name the model; data is cached in a folder of the test."""
    monkeypatch.setenv("OMNILIT_CACHE", str(tmp_path / "cache"))
    return ["data", "--model.config_path", str(model), "--data.max_seq_len", "64"]


def load(words, num_shown=0):
    view = make_data_view(parse_request([str(word) for word in words[1:]]).command)
    return load_data(view, num_shown=num_shown)


def write_lines(file, records):
    file.write_text("".join(json.dumps(record) + "\n" for record in records))
    return file


def messages(text):
    return {"messages": [{**USER, "content": text}, ANSWER]}


def test_good_data_is_measured_as_training_sees_it(base, tmp_path, capsys):
    file = write_conversations(tmp_path / "a.jsonl", 30)
    (part,) = load([*base, "--data.train_path", file]).parts
    (source,) = part.sources
    assert (source.name, source.num_records, len(source.lengths)) == ("train", 30, 30)
    assert packed(part).num_tokens == source.lengths.sum()
    assert packed(part).budget == 64
    assert -(-packed(part).num_tokens // 64) <= packed(part).num_micro_batches < 30
    assert part.num_bad == 0
    assert part.failures == ()


def test_the_verb_prints_tables_histogram_and_samples(base, tmp_path, capsys):
    file = write_conversations(tmp_path / "a.jsonl", 30)
    page, png = tmp_path / "out" / "page.html", tmp_path / "out" / "data_lengths.png"
    words = [*base, "--data.train_path", file, "--data.eval_path", file, "--show", 2]
    assert main([str(word) for word in (*words, "--html", page, "--png")]) == 0
    out = capsys.readouterr().out
    for title in ("train: records", "train: packing", "eval: tokens", "train: tokens of a sample"):
        assert f"{title}\n" in out
    assert f"\nsample 1: train, {file}:1; " in out
    assert f"\nsample 16: train, {file}:16; " in out
    assert out.count("[[") == out.count("]]") >= 3
    assert page.read_text().count('<div class="sample">') == 2
    assert png.read_bytes().startswith(b"\x89PNG")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.jsonl", "cache", "out"]


def test_every_kind_of_bad_record_is_listed_with_its_line(base, tmp_path, capsys):
    file = tmp_path / "bad.jsonl"
    kinds = write_bad_records(file)
    assert main([*base, "--data.train_path", str(file)]) == 2
    captured = capsys.readouterr()
    (listing,) = [text for text in captured.out.split("\n\n") if ": bad records\n" in text]
    listed = [line.split()[0] for line in listing.splitlines()[1:]]
    assert listed == [f"{file}:{row}:" for row in kinds]
    assert listing.count(". To fix: ") == len(kinds)
    number, total = len(BAD_LINES), 3 * len(BAD_LINES)
    assert captured.err.endswith(
        f"fit would refuse this data: train: {number} of {total} records are bad, "
        "and data.silent_exception is false\n"
    )


def test_skipped_bad_records_are_no_failure_below_the_limit(base, tmp_path, capsys):
    file = tmp_path / "bad.jsonl"
    write_bad_records(file)
    words = [*base, "--data.train_path", str(file), "--data.silent_exception", "true"]
    assert main([*words, "--data.max_bad_fraction", "0.5"]) == 0
    assert main([*words, "--data.max_bad_fraction", "0.1"]) == 2
    assert "records are bad, more than data.max_bad_fraction 0.1" in capsys.readouterr().err


def test_of_many_bad_records_twenty_are_listed(base, tmp_path):
    file = write_lines(tmp_path / "a.jsonl", [messages("hi"), *([{"x": 1}] * 25)])
    (part,) = load([*base, "--data.train_path", file]).parts
    assert (len(part.bad), part.num_bad, part.num_records) == (20, 25, 26)
    assert [bad.row for bad in part.bad] == list(range(2, 22))


def test_data_of_which_nothing_is_left_is_still_explained(base, tmp_path, capsys):
    file = write_lines(tmp_path / "a.jsonl", [{"question": "?"}] * 3)
    assert main([*base, "--data.train_path", str(file), "--show", "1"]) == 2
    captured = capsys.readouterr()
    assert f"{file}:1" in captured.out
    assert "'question'" in captured.out
    assert "fit would refuse this data: train: " in captured.err
    assert "train: 3 of 3 records are bad" in captured.err


def test_duplicates_are_counted_by_their_tokens(base, tmp_path):
    records = [messages("one"), messages("two"), messages("one"), messages("one")]
    file = write_lines(tmp_path / "a.jsonl", records)
    (part,) = load([*base, "--data.train_path", file]).parts
    assert dict(zip(*_row(part), strict=True))["duplicates"] == "2"


def _row(part):
    table = build_tables(part)[0]
    return table.header, table.rows[-1]


def test_fit_finds_the_tokens_of_good_data(base, tmp_path):
    file = write_conversations(tmp_path / "a.jsonl", 5)
    load([*base, "--data.train_path", file])
    (before,) = (tmp_path / "cache" / "data").iterdir()
    load([*base, "--data.train_path", file, "--data.silent_exception", "false"])
    assert list((tmp_path / "cache" / "data").iterdir()) == [before]


def test_sources_of_a_mixture_have_a_row_and_a_share_each(base, tmp_path):
    one = write_conversations(tmp_path / "a.jsonl", 30)
    two = write_conversations(tmp_path / "b.jsonl", 10, seed=1)
    mixture = {
        "sources": [str(one), str(two)],
        "names": ["docs", "chats"],
        "schedule": [{"schedule_type": "const", "weights": [3, 1]}],
        "stopping_strategy": "never_exhausted",
    }
    (tmp_path / "mix.yaml").write_text(yaml.safe_dump(mixture))
    (part,) = load([*base, "--data.train_path", tmp_path / "mix.yaml"]).parts
    assert [source.name for source in part.sources] == ["docs", "chats"]
    assert [share.name for share in part.shares] == ["docs", "chats"]
    assert sum(share.num_samples for share in part.shares) == 40
    assert packed(part).num_tokens == sum(share.num_tokens for share in part.shares)


@pytest.mark.parametrize(
    ("words", "way", "budget"),
    [
        ([], "best fit over the pass", 64),
        (["--data.dyn_bsz_buffer_size", "5"], "first fit from 5 samples", 64),
        (["--data.datasets_type", "iterable"], "first fit from 200 samples", 64),
        (["--train.micro_batch_size", "3"], "best fit over the pass", 192),
        (
            ["--train.dyn_bsz", "false", "--train.micro_batch_size", "4", "--data.train_size",
             "10000000"],
            "4 samples each, dyn_bsz is off",
            None,
        ),
    ],
)  # fmt: skip
def test_packing_is_that_of_the_settings(base, tmp_path, words, way, budget):
    file = write_conversations(tmp_path / "a.jsonl", 30)
    (part,) = load([*base, "--data.train_path", file, *words]).parts
    assert (packed(part).way, packed(part).budget) == (way, budget)
    assert packed(part).num_tokens == part.lengths.sum()
    if budget is None:
        assert packed(part).num_micro_batches == 8


def test_iterable_data_says_that_it_was_measured_as_a_whole(base, tmp_path):
    file = write_conversations(tmp_path / "a.jsonl", 5)
    words = [*base, "--data.train_path", file, "--data.datasets_type", "iterable"]
    (note,) = load(words).parts[0].notes
    assert "read once" in note


def test_classes_are_counted_and_shown(base, tmp_path):
    records = [{"text": f"the fox {i}", "label": i % 3} for i in range(7)]
    file = write_lines(tmp_path / "a.jsonl", records)
    words = [*base, "--data.train_path", file, "--data.data_type", "classification"]
    found = load(words, num_shown=7)
    assert known(found.parts[0].sources[0].labels).tolist() == [i % 3 for i in range(7)]
    assert [sample.label for sample in found.samples] == [i % 3 for i in range(7)]


def test_classes_have_the_names_that_training_gives_them(base, tmp_path):
    records = [{"text": f"the fox {i}", "label": ("bad", "good", "odd")[i % 3]} for i in range(7)]
    file = write_lines(tmp_path / "a.jsonl", records)
    words = [*base, "--data.train_path", file, "--data.data_type", "classification"]
    given = ["--model.label_names", "[bad, good]"]
    (source,) = load([*words, *given]).parts[0].sources
    assert known(source.labels).tolist() == [i % 3 for i in range(7) if i % 3 < 2]
    assert source.num_bad == 2
    assert load(words).parts[0].failures  # without names any number is a class, and no word


def test_a_class_that_equals_the_last_token_is_counted(base, model, tmp_path):
    from transformers import AutoTokenizer

    last = AutoTokenizer.from_pretrained(model)("the fox")["input_ids"][-1]
    file = write_lines(tmp_path / "a.jsonl", [{"text": "the fox", "label": last}])
    words = [*base, "--data.train_path", file, "--data.data_type", "classification"]
    assert known(load(words).parts[0].sources[0].labels).tolist() == [last]


def test_pairs_have_the_lengths_of_both_answers(base, tmp_path):
    records = [{"prompt": "ask", "chosen": "yes " * n, "rejected": "no"} for n in (1, 5, 9)]
    file = write_lines(tmp_path / "a.jsonl", [*records, {"prompt": "ask", "chosen": "yes"}])
    words = [*base, "--data.train_path", file, "--data.data_type", "dpo"]
    found = load([*words, "--train.micro_batch_size", "2"], num_shown=1)
    (source,) = found.parts[0].sources
    assert source.num_bad == 1
    assert len(set(known(source.pair_starts).tolist())) == 3
    assert len(set((source.lengths - known(source.pair_starts)).tolist())) == 1
    assert [title for title, _ in found.samples[0].parts] == ["chosen", "rejected"]


def test_diffusion_records_are_checked_without_a_model(tmp_path, capsys):
    records = [{"prompt": "a fox", "image": "a.png"}, {"prompt": "a dog"}, {"image": "b.png"}]
    file = write_lines(tmp_path / "a.jsonl", records)
    words = ["data", "--data.train_path", str(file), "--data.data_type", "diffusion"]
    assert main([*words, "--png", str(tmp_path / "a.png")]) == 2
    captured = capsys.readouterr()
    assert "no histogram in " in captured.err
    assert not (tmp_path / "a.png").exists()
    assert f"{file}:2" in captured.out
    assert f"{file}:3" in captured.out
    assert "2 of 3 records are bad" in captured.err


def test_without_a_tokenizer_there_is_nothing_to_count(tmp_path):
    file = write_conversations(tmp_path / "a.jsonl", 2)
    with pytest.raises(ConfigError, match=r"model\.tokenizer_path: neither tokenizer_path"):
        load(["data", "--data.train_path", file])


def test_a_folder_without_data_is_refused_by_its_key(base, tmp_path):
    (tmp_path / "empty").mkdir()
    with pytest.raises(ConfigError, match=r"data\.train_path: the folder .* holds no data file"):
        load([*base, "--data.train_path", tmp_path / "empty"])
