import io
import json
from datetime import UTC, datetime

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from transformers import AutoTokenizer, Qwen3ForCausalLM

from omnilit.config import InferArguments
from omnilit.errors import ConfigError, DataError
from omnilit.tools import infer_file
from omnilit.tools.chat import open_chat
from omnilit.tools.file_request import FileRequest
from omnilit.tools.generation import Sampler, complete
from omnilit.tools.infer import parse_request, run
from omnilit.tools.infer_file import answer_file

QUESTIONS = ["hi", "yo", "what?", "a", "bb", "so so", "zz", "q", "hm", "well"]


def chat_with(folder, **fields):
    arguments = InferArguments(model_path=str(folder), **{"max_tokens": 6, **fields})
    return open_chat(arguments, str(folder), "cpu", io.StringIO())


def write(file, records):
    file.write_text("".join(json.dumps(record) + "\n" for record in records))
    return str(file)


def read(file):
    return [json.loads(line) for line in file.read_text().splitlines()]


@pytest.fixture
def asked(tmp_path):
    records = [{"prompt": text, "id": number} for number, text in enumerate(QUESTIONS)]
    records[3] = {"messages": [{"role": "user", "content": QUESTIONS[3]}], "id": 3}
    return write(tmp_path / "asked.jsonl", records)


@pytest.mark.parametrize("batch_size", [1, 4])
def test_greedy_completions_are_those_of_a_chat(model_folder, asked, tmp_path, batch_size):
    out = tmp_path / "out.jsonl"
    chat = chat_with(model_folder, do_sample=False)
    assert answer_file(FileRequest(asked, out, batch_size), chat) == len(QUESTIONS)
    lines = read(out)
    assert [line["id"] for line in lines] == list(range(len(QUESTIONS)))
    for text, line in zip(QUESTIONS, lines, strict=True):
        assert line["completion"] == chat_with(model_folder, do_sample=False).ask(text)


def test_log_probabilities_are_those_of_the_model_on_the_whole_text(model_folder, asked, tmp_path):
    out = tmp_path / "out.jsonl"
    chat = chat_with(model_folder, seed=3, temperature=0.7, top_p=0.9)
    answer_file(FileRequest(asked, out, has_logprobs=True), chat)
    model = Qwen3ForCausalLM.from_pretrained(model_folder).eval()
    tokenizer = AutoTokenizer.from_pretrained(model_folder)
    prompts = list(infer_file.read_prompts(asked, chat))
    found = complete(
        chat.model,
        [prompts[2].question.input_ids.tolist()],
        [2],
        Sampler(chat.arguments),
        max_new_tokens=6,
        stop=[tokenizer.eos_token_id],
    )[0]
    line = read(out)[2]
    assert line["logprobs"] == pytest.approx(found.logprobs, abs=1e-5)
    ids = torch.tensor([prompts[2].question.input_ids.tolist() + found.tokens])
    with torch.inference_mode():
        logprobs = model(ids).logits[0].float().log_softmax(-1)
    start = len(prompts[2].question.input_ids.tolist()) - 1
    expected = [logprobs[start + i, token].item() for i, token in enumerate(found.tokens)]
    assert line["logprobs"] == pytest.approx(expected, abs=1e-4)


def test_a_seed_gives_the_same_text_whatever_runs_beside_it(model_folder, asked, tmp_path):
    texts = []
    for name, size, seed in (("one", 1, 5), ("four", 4, 5), ("other", 4, 6)):
        out = tmp_path / f"{name}.jsonl"
        answer_file(FileRequest(asked, out, size), chat_with(model_folder, seed=seed))
        texts.append([line["completion"] for line in read(out)])
    assert texts[0] == texts[1]
    assert texts[0] != texts[2]


def test_temperature_and_top_p_give_transformers_own_distribution(model_folder):
    arguments = InferArguments(model_path="m", temperature=0.5, top_p=0.8)
    sampler = Sampler(arguments)
    logits = torch.tensor([[2.0, 1.5, 1.0, -1.0]])
    drawn = torch.cat(
        [sampler.choose(logits, [sampler.generator(number)]) for number in range(2000)]
    )
    shares = torch.bincount(drawn, minlength=4) / 2000
    wide = (logits / 0.5).softmax(-1)[0]
    kept = wide * torch.tensor([1.0, 1.0, 0.0, 0.0])  # the first two reach 0.8
    torch.testing.assert_close(shares, kept / kept.sum(), atol=0.03, rtol=0)


def test_a_stopped_run_goes_on_behind_its_last_whole_line(model_folder, asked, tmp_path):
    whole, cut = tmp_path / "whole.jsonl", tmp_path / "cut.jsonl"
    answer_file(FileRequest(asked, whole), chat_with(model_folder))
    lines = whole.read_bytes().splitlines(keepends=True)
    cut.write_bytes(b"".join(lines[:4]) + lines[4][:9])
    assert answer_file(FileRequest(asked, cut), chat_with(model_folder)) == len(QUESTIONS) - 4
    assert cut.read_bytes() == whole.read_bytes()
    assert answer_file(FileRequest(asked, cut), chat_with(model_folder)) == 0


def test_answers_to_other_records_are_not_gone_on_from(model_folder, asked, tmp_path):
    out = tmp_path / "out.jsonl"
    write(out, [{"prompt": "another", "id": 0, "completion": "x"}])
    with pytest.raises(DataError, match=r"out.jsonl:1: the line is no answer to the input"):
        answer_file(FileRequest(asked, out), chat_with(model_folder))
    assert len(read(out)) == 1


def test_a_file_that_is_no_output_loses_nothing(model_folder, asked, tmp_path):
    contents = ["a note without an end of line", '{"prompt": "hi", "id": 0}', '{"prompt": "h"\n{']
    for number, content in enumerate(contents):
        foreign = tmp_path / f"{number}.jsonl"
        foreign.write_text(content)
        with pytest.raises(DataError, match="the line is no answer"):
            answer_file(FileRequest(asked, foreign), chat_with(model_folder))
        assert foreign.read_text() == content


def test_answers_without_the_log_probabilities_now_asked_for_are_not_gone_on_from(
    model_folder, asked, tmp_path
):
    out = tmp_path / "out.jsonl"
    answer_file(FileRequest(asked, out), chat_with(model_folder))
    with pytest.raises(DataError, match=r"out.jsonl:1: the line has no logprobs"):
        answer_file(FileRequest(asked, out, has_logprobs=True), chat_with(model_folder))


def test_messages_may_be_text_and_have_parts(model_folder, tmp_path):
    messages = [{"role": "user", "content": "hi"}]
    parts = [{"role": "user", "content": [{"type": "text", "text": "hi"}]}]
    records = [{"messages": value} for value in (messages, json.dumps(messages), parts)]
    source = write(tmp_path / "asked.jsonl", records)
    plain, text, parted = infer_file.read_prompts(source, chat_with(model_folder))
    assert len({one.question.input_ids.tobytes() for one in (plain, text, parted)}) == 1


def write_table(path, **columns):
    pq.write_table(pa.table(columns), path)
    return FileRequest(str(path), path.with_suffix(".out"))


def test_dates_of_a_table_are_written_as_text_and_gone_on_from(model_folder, tmp_path):
    when = datetime(2026, 11, 27, 2, 30, tzinfo=UTC)
    request = write_table(tmp_path / "in.parquet", prompt=["Why?"], at=[when], day=[when.date()])
    chat = chat_with(model_folder)
    assert answer_file(request, chat) == 1
    [line] = read(request.output)
    assert (line["at"], line["day"]) == ("2026-11-27T02:30:00+00:00", "2026-11-27")
    assert answer_file(request, chat) == 0


def test_what_json_has_no_form_for_is_told_before_any_record_is_answered(model_folder, tmp_path):
    request = write_table(tmp_path / "in.parquet", prompt=["Why?", "How?"], raw=[None, b"x"])
    with pytest.raises(DataError, match="bytes has no form in JSON") as caught:
        answer_file(request, chat_with(model_folder))
    assert caught.value.row == 2
    assert not request.output.exists()


@pytest.mark.parametrize(
    ("record", "message"),
    [
        ({"text": "x"}, "neither 'messages' nor 'prompt'"),
        ({"prompt": "x" * 70}, "the prompt has 73 tokens, the model's context 64"),
        ({"prompt": 5}, "the field 'prompt'"),
        ({"messages": []}, "'messages' is empty"),
        (
            {"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]},
            "the last message is the assistant's",
        ),
    ],
)
def test_a_bad_record_is_told_before_any_is_answered(model_folder, tmp_path, record, message):
    source = write(tmp_path / "asked.jsonl", [{"prompt": "hi"}, record])
    with pytest.raises(DataError, match=message) as caught:
        answer_file(FileRequest(source, tmp_path / "out.jsonl"), chat_with(model_folder))
    assert caught.value.row == 2
    assert not (tmp_path / "out.jsonl").exists()


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--input", "a"], "--input: acts with --input and --output together"),
        (["--logprobs"], "--logprobs: acts with"),
        (["--logprobs=false"], "--logprobs: takes no value"),
        (["--input", "a", "--output", "b", "--prompt", "c"], "--prompt: stands beside --input"),
        (["--input", "a", "--output", "b", "--batch-size", "0"], "'0' is no number of prompts"),
        (["--input"], "--input: has no text. To fix: write a file of records after it"),
    ],
)
def test_flags_that_do_not_fit_are_refused(words, message):
    with pytest.raises(ConfigError, match=message):
        parse_request(["--infer.model_path", ".", *words])


def test_the_command_line_answers_a_file(model_folder, asked, tmp_path, capsys):
    out = tmp_path / "new" / "out.jsonl"
    words = ["--infer.model_path", str(model_folder), "--infer.max_tokens", "4", "--logprobs"]
    assert run([*words, "--input", asked, "--output", str(out), "--batch-size=3"]) == 0
    assert len(read(out)) == len(QUESTIONS)
    assert {"completion", "logprobs", "id"} <= read(out)[0].keys()
