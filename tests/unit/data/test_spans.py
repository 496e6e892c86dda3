"""Turns that a template writes otherwise when others follow: what is trained of them, exactly."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest

from omnilit.data.encode import Encoder, decode_spans
from omnilit.data.transforms import TransformSettings, build_transform
from omnilit.errors import DataError
from omnilit.types import Origin, Record
from tests.helpers.thinking import (
    CHANNELS,
    DEMANDING,
    INSTRUCT,
    OPENING,
    STRIPPING,
    STRIPPING_MARKED,
    THINKING,
    build_thinking_tokenizer,
)
from tests.helpers.tokenizers import CHATML, CHATML_MARKED

USER = {"role": "user", "content": "what is it?"}
TOOL = {"role": "tool", "content": "42", "name": "f"}
CALL = {"type": "function", "function": {"name": "f", "arguments": {"x": 1}}}
CALLED = '<tool_call>\n{"name": "f", "arguments": {"x": 1}}\n</tool_call>'
EMPTY = "<think>\n\n</think>\n\n"


def _say(content: str, **fields: Any) -> dict[str, Any]:
    return {"role": "assistant", "content": content, **fields}


def _read(
    template: str,
    messages: list[dict[str, Any]],
    *,
    num_shown: int = 0,
    special: Sequence[str] = (),
) -> list[str]:
    """What is trained, span by span; the last `num_shown` characters before each one as well."""
    tokenizer = build_thinking_tokenizer(template)
    tokenizer.add_special_tokens({"additional_special_tokens": list(special)})
    transform = build_transform(TransformSettings(chat_template="tokenizer"), tokenizer)
    record = Record({"messages": messages}, Origin("train", "d.jsonl", 7))
    transform.check(record)
    (sample,) = transform.encode([record]).samples
    pieces = decode_spans(sample, Encoder.of(tokenizer))
    before = ["", *(text for text, _ in pieces)]
    return [
        before[i][len(before[i]) - num_shown :] + text
        for i, (text, is_label) in enumerate(pieces)
        if is_label
    ]


def test_a_call_is_trained_whole_with_its_end_token_where_the_turn_is_rewritten():
    messages = [USER, _say("let me see", tool_calls=[CALL]), TOOL, _say("it is 42")]
    answer = f"let me see\n{CALLED}<|im_end|>"
    assert _read(THINKING, messages) == [answer, f"{EMPTY}it is 42<|im_end|>"]
    more = [*messages, USER, _say("no")]
    assert _read(THINKING, more) == [answer, "it is 42<|im_end|>", f"{EMPTY}no<|im_end|>"]


@pytest.mark.parametrize("arguments", [{}, {"x": "a"}, {"x": None}, {"x": [1, {"y": 2}]}, "x = 1"])
def test_a_message_that_only_calls_is_found_by_its_calls(arguments: object):
    call = {"type": "function", "function": {"name": "f", "arguments": arguments}}
    messages = [USER, _say("", tool_calls=[CALL, call]), TOOL, TOOL, _say("it is 42")]
    first, last = _read(THINKING, messages)
    assert first.startswith(f'{CALLED}\n<tool_call>\n{{"name": "f", "arguments": ')
    assert first.endswith("\n</tool_call><|im_end|>")
    assert last == f"{EMPTY}it is 42<|im_end|>"
    # here the answers of the tools are headed by the name, and a thought is left out once answered
    messages[1]["reasoning_content"] = "hm"
    first, last = _read(CHANNELS, messages)
    assert first.startswith(' to=f<|message|>{"x": 1}<|call|><|start|>assistant to=f<|message|>')
    assert (first[-8:], last) == ("<|call|>", "<|channel|>final<|message|>it is 42<|return|>")


@pytest.mark.parametrize(
    "thought", ["<think>\nhm\n</think>\n\n", "<think>hm</think>", "hm</think>"]
)
def test_thoughts_within_the_content_are_trained_as_far_as_the_template_writes_them(thought: str):
    messages = [USER, _say(f"{thought}hello"), USER, _say(f"{thought}yes")]
    last = "<think>\nhm\n</think>\n\nyes<|im_end|>"
    assert _read(THINKING, messages) == ["hello<|im_end|>", last]
    assert _read(THINKING, [*messages[:3], _say("yes", reasoning_content="hm")])[1] == last
    said = _read(STRIPPING_MARKED, messages)
    assert [said[0].strip(), said[1]] == ["hello<|im_end|>", f"{thought}yes<|im_end|>"]


def test_a_turn_begins_where_the_prompt_ends_or_where_the_two_part():
    messages = [USER, _say("<think>hm</think>hello"), USER, _say("<think>hm</think>yes")]
    assert _read(OPENING, messages, num_shown=8) == [
        "sistant\nhello<|im_end|>",
        "<think>\nhm\n</think>\n\nyes<|im_end|>",
    ]
    assert _read(STRIPPING, messages, num_shown=11) == [
        "<|message|>hello<|end|>",
        "<|message|>yes<|end|>",
    ]
    called = [USER, _say("", tool_calls=[CALL]), TOOL, _say("42")]
    assert _read(OPENING, called) == [f"{CALLED}<|im_end|>", "\n</think>\n\n42<|im_end|>"]


def test_a_conversation_may_begin_with_the_assistant():
    first, rest = _say("welcome"), [USER, _say("yes")]
    assert _read(THINKING, [first, *rest]) == ["welcome<|im_end|>", f"{EMPTY}yes<|im_end|>"]
    assert _read(THINKING, [first]) == [f"{EMPTY}welcome<|im_end|>"]
    assert _read(OPENING, [first, *rest])[0] == "welcome<|im_end|>"
    assert _read(DEMANDING, [first, *rest], num_shown=10) == [
        "assistant\nwelcome<|im_end|>",
        "assistant\nyes<|im_end|>",
    ]
    picky = "{% if messages | selectattr('role', 'equalto', 'user') | list | length == 0 %}"
    picky += "{{ raise_exception('no question') }}{% endif %}"
    assert _read(picky + THINKING, [first, *rest])[0] == "welcome<|im_end|>"


def test_other_tokens_at_the_end_of_the_text_do_not_hide_that_of_a_turn():
    messages = [USER, _say("yes"), USER, _say("no")]
    final = "<|channel|>final<|message|>"
    assert _read(CHANNELS, messages) == [f"{final}yes<|end|>", f"{final}no<|return|>"]
    closed = CHATML + "{{ '<|endoftext|>' }}"
    assert _read(closed, messages)[0] == "yes<|im_end|>"


@pytest.mark.parametrize("template", [CHATML, CHATML_MARKED, THINKING])
@pytest.mark.parametrize("words", ["d", "user", "im_end", " x ", "", "\n"])
def test_a_trained_question_begins_with_its_words(template: str, words: str):
    question = {"role": "user", "content": words, "loss_mask": 1}
    said = _read(template, [question, _say("yes"), USER, _say("no")])
    assert said[:2] == [f"{words.lstrip()}<|im_end|>", "yes<|im_end|>"]


NO_END = THINKING.replace(
    "{{ '<|im_end|>\\n' }}{% elif m.role == 'tool'", "{% elif m.role == 'tool'"
)
ONE_CALL = THINKING.replace("in m.tool_calls or []", "in (m.tool_calls or [])[:1]")
NO_WORDS = THINKING.replace("{{ ns.words }}", "{{ ns.words if not m.tool_calls else '' }}")
OTHER_NAME = OPENING.replace("'<|im_start|>assistant\\n<think>", "'<|im_start|>model\\n<think>")
NEXT_ENDS = "{% for m in messages %}{{ '<|' + m.role + '|>' + m.content }}{% endfor %}"


@pytest.mark.parametrize(
    ("template", "message"),
    [
        (NO_END, "writes no end token after message 2"),
        (ONE_CALL, "leaves out a part of message 2, or changes it: it writes 's\\\\n<tool_call>"),
        (NO_WORDS, "leaves out a part of message 2"),
        (OTHER_NAME, "or begins it otherwise than its generation prompt"),
        (INSTRUCT, "leaves out a part of message 2"),
        (NEXT_ENDS + "{# tool_calls #}", "leaves out a part of message 2"),
    ],
)
def test_what_would_be_lost_or_guessed_is_refused(template: str, message: str):
    calls = [CALL, CALL]
    messages = [USER, _say("s", tool_calls=calls), TOOL, TOOL, _say("42"), USER, _say("no")]
    with pytest.raises(DataError, match=message):
        _read(template, messages)


def test_a_turn_that_only_the_next_header_ends_is_refused():
    with pytest.raises(DataError, match="writes no end token after message 2"):
        _read(NEXT_ENDS, [USER, _say("yes"), USER, _say("no")])


@pytest.mark.parametrize("words", ["", "what is it?"])
@pytest.mark.parametrize(
    "header", ["<|start|>{}<|message|>", "<|{}|>", "<|start|><|{}|>", "<|{}|><|message|>"]
)
def test_the_next_header_is_not_taken_for_an_end_token(header: str, words: str):
    written = "{{ '" + header.format("' + m.role + '") + "' + m.content }}"
    prompt = "{% if add_generation_prompt %}" + header.format("assistant") + "{% endif %}"
    template = f"{{% for m in messages %}}{written}{{% endfor %}}"
    asked = {"role": "user", "content": words}
    messages = [asked, _say("yes"), asked, _say("no")]
    special = ["<|user|>", "<|assistant|>"]
    with pytest.raises(DataError, match="message 2"):
        _read(f"{template}{{{{ eos_token }}}}{prompt}", messages, special=special)


def test_an_answer_that_shares_its_end_with_the_next_cannot_be_trained():
    tool = {**TOOL, "loss_mask": 1}
    with pytest.raises(DataError, match="rewrites message 3"):
        _read(THINKING, [USER, _say("", tool_calls=[CALL, CALL]), tool, tool, _say("42")])
