import json
import re

import pytest
from transformers import AutoConfig, AutoTokenizer

from tests.helpers.examples import load_example

MODULES = ("bisect", "copy", "json")


@pytest.fixture(scope="module")
def docs():
    return load_example("stdlib_docs")


@pytest.fixture(scope="module")
def written(docs, tmp_path_factory):
    out = tmp_path_factory.mktemp("docs")
    docs.write_dataset(out, MODULES)
    return out


def read(path):
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def test_pairs_have_the_right_answer_and_another_symbols(written):
    for name in ("train.jsonl", "eval.jsonl"):
        talks, pairs = read(written / name), read(written / "pairs" / name)
        answers = {talk["messages"][1]["content"] for talk in talks}
        assert [pair["chosen"] for pair in pairs] == [talk["messages"] for talk in talks]
        for pair in pairs:
            question, wrong = pair["rejected"]
            assert question == pair["chosen"][0]
            assert wrong["content"] in answers - {pair["chosen"][1]["content"]}


def test_texts_to_classify_never_say_their_module(written, docs):
    train, evaluate = (read(written / "classes" / name) for name in ("train.jsonl", "eval.jsonl"))
    assert {record["label"] for record in train} == set(docs.CLASSES)
    for record in train + evaluate:
        words = re.findall(r"[a-z]+", record["text"].lower())
        assert not [word for word in words if word.startswith(record["label"])]
        assert 40 <= len(record["text"]) <= docs.MAX_TEXT
    trained = {(record["text"], record["label"]) for record in train}
    assert not trained & {(record["text"], record["label"]) for record in evaluate}


def test_two_runs_write_the_same_bytes(docs, written, tmp_path):
    docs.write_dataset(tmp_path, reversed(MODULES))
    files = sorted(p.relative_to(written) for p in written.rglob("*") if p.is_file())
    assert files == sorted(p.relative_to(tmp_path) for p in tmp_path.rglob("*") if p.is_file())
    assert all((written / f).read_bytes() == (tmp_path / f).read_bytes() for f in files)


def test_records_are_a_question_and_an_answer(written):
    for record in read(written / "train.jsonl"):
        assert [m["role"] for m in record["messages"]] == ["user", "assistant"]
        assert all(m["content"] for m in record["messages"])


def test_no_question_of_the_evaluation_is_trained(written):
    train, evaluate = (
        {r["messages"][0]["content"] for r in read(written / name)}
        for name in ("train.jsonl", "eval.jsonl")
    )
    assert train
    assert evaluate
    assert not train & evaluate


def test_question_of_the_demo_is_trained(written):
    questions = {r["messages"][0]["content"] for r in read(written / "train.jsonl")}
    assert "What does json.dumps do?" in questions


@pytest.mark.parametrize(
    ("doc", "summary"),
    [
        ("One. Two.\n\nThree.", "One. Two. Three."),
        ("Wrapped over\n    two lines.", "Wrapped over two lines."),
        ("Kept.\n\n>>> dropped()\n", "Kept."),
        ("f(x) -> y\n\nProse.", ""),
        ("No sentence", ""),
        ("", ""),
    ],
)
def test_summary_is_prose_in_whole_sentences(docs, doc, summary):
    assert docs.summarize(doc) == summary


def test_summary_is_cut_after_the_last_sentence_that_fits(docs):
    assert docs.summarize("Aaa. Bbb. Ccc.", limit=10) == "Aaa. Bbb."


def test_tokenizer_reads_back_any_text(written):
    tokenizer = AutoTokenizer.from_pretrained(written / "model")
    text = "def f(x):\n\treturn  'h\u00e9 \u4f60'"
    assert tokenizer.decode(tokenizer(text)["input_ids"]) == text


def test_mask_of_the_template_covers_answer_and_end_token_only(written):
    tokenizer = AutoTokenizer.from_pretrained(written / "model")
    record = read(written / "train.jsonl")[0]["messages"]
    encoded = tokenizer.apply_chat_template(
        record, return_dict=True, return_assistant_tokens_mask=True
    )
    pairs = zip(encoded["input_ids"], encoded["assistant_masks"], strict=True)
    trained = [token for token, is_trained in pairs if is_trained]
    assert tokenizer.decode(trained) == record[1]["content"] + "<|im_end|>"


def test_generation_prompt_is_a_prefix_of_the_whole_conversation(written):
    tokenizer = AutoTokenizer.from_pretrained(written / "model")
    record = read(written / "train.jsonl")[0]["messages"]
    prompt = tokenizer.apply_chat_template(record[:1], add_generation_prompt=True, tokenize=False)
    assert tokenizer.apply_chat_template(record, tokenize=False).startswith(prompt)


def test_model_configuration_fits_the_tokenizer(written):
    config = AutoConfig.from_pretrained(written / "model")
    tokenizer = AutoTokenizer.from_pretrained(written / "model")
    assert config.model_type == "qwen3"
    assert config.tie_word_embeddings
    assert len(tokenizer) <= config.vocab_size
    assert config.eos_token_id == tokenizer.eos_token_id


def test_command_line_says_what_it_wrote(docs, monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(docs, "MODULES", ("bisect",))
    assert docs.main(["--out", str(tmp_path)]) == 0
    count = len(read(tmp_path / "train.jsonl"))
    assert f"{tmp_path / 'train.jsonl'}: {count} conversations" in capsys.readouterr().out
