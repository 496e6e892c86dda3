"""Every form of a record says the same conversation, pair, text or label."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from omnilit.data.messages import Turn
from omnilit.data.records import (
    check_diffusion,
    to_conversation,
    to_labelled,
    to_pair,
    to_text,
)
from omnilit.errors import DataError
from omnilit.types import Record

USER = {"role": "user", "content": "q"}
SAID = {"role": "assistant", "content": "a"}
TURNS = (Turn("user", "q", 0.0), Turn("assistant", "a", 1.0))
SYSTEM = Turn("system", "s", 0.0)
Make = Callable[..., Record]


@pytest.mark.parametrize(
    "fields",
    [
        {"messages": [USER, SAID]},
        {"messages": '[{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]'},
        {"messages": [{"from": "human", "value": "q"}, {"from": "gpt", "value": "a"}]},
        {"conversations": [{"from": "human", "value": "q"}, {"from": "gpt", "value": "a"}]},
        {"conversations": [USER, SAID]},
        {"instruction": "q", "input": "", "output": "a"},
        {"instruction": "q", "output": "a"},
        {"prompt": "q", "completion": "a"},
        {"prompt": [USER], "completion": [SAID]},
        {"prompt": "q", "response": "a"},
        {"question": "q", "answer": "a", "id": 3},
    ],
)
def test_every_form_of_a_conversation_reads_the_same(record: Make, fields: dict[str, Any]):
    assert to_conversation(record(**fields), None).turns == TURNS


@pytest.mark.parametrize(
    "fields",
    [
        {"conversations": [{"from": "human", "value": "q"}, {"from": "gpt", "value": "a"}]},
        {"instruction": "q", "output": "a"},
        {"prompt": "q", "completion": "a"},
    ],
)
def test_a_system_prompt_beside_the_turns_comes_first(record: Make, fields: dict[str, Any]):
    assert to_conversation(record(**fields, system="s"), None).turns == (SYSTEM, *TURNS)


def test_the_input_of_alpaca_follows_the_instruction(record: Make):
    turns = to_conversation(record(instruction="q", input="x", output="a"), None).turns
    assert turns[0].content == "q\n\nx"


def test_a_function_call_of_sharegpt_is_a_tool_call(record: Make):
    call = {"from": "function_call", "value": '{"name": "f", "arguments": {"x": 1}}'}
    answer = {"from": "observation", "value": "2"}
    turns = to_conversation(record(conversations=[call, answer]), None).turns
    assert turns[0].tool_calls[0]["function"] == {"name": "f", "arguments": {"x": 1}}
    assert turns[1].role == "tool"


def test_the_first_text_key_that_is_there_counts(record: Make):
    one = record(b=[USER, SAID], messages="not read")
    assert to_conversation(one, ["a", "b"]).turns == TURNS
    assert to_text(record(b="x", c="y"), ["a", "b", "c"]) == "x"
    with pytest.raises(DataError, match="no field 'x' or 'y'; its fields are: 'b'"):
        to_text(record(b="x"), ["x", "y"])


def test_an_unknown_form_shows_the_fields_the_known_forms_and_what_else_fits(record: Make):
    with pytest.raises(DataError) as caught:
        to_conversation(record(text="x", label=1), None)
    text = str(caught.value)
    assert "its fields are: 'text', 'label'" in text
    assert "They fit data.data_type: plaintext or classification" in text
    assert "Known are: messages; conversations; instruction + output; prompt + completion" in text
    assert "name the field in data.text_keys" in text


@pytest.mark.parametrize("key", ["content_split", "text", "content"])
def test_plain_text_has_three_names(record: Make, key: str):
    assert to_text(record(**{key: "x"}), None) == "x"
    with pytest.raises(DataError, match=f"the field {key!r} is a int, not a string"):
        to_text(record(**{key: 1}), None)


@pytest.mark.parametrize("label", [3, "3", " 3 "])
def test_a_label_is_the_number_of_a_class(record: Make, label: object):
    assert to_labelled(record(text="x", label=label), None) == ("x", 3)
    assert to_labelled(record(text="x", label=2**31 - 1), None).label == 2**31 - 1


@pytest.mark.parametrize("label", [True, -1, 1.5, "cat", 2**31, 2**40, "9" * 5000])
def test_any_other_label_is_refused(record: Make, label: object):
    with pytest.raises(DataError, match="not the number of a class"):
        to_labelled(record(text="x", label=label), None)


def test_a_missing_label_is_named(record: Make):
    with pytest.raises(DataError, match="the record has no 'label'"):
        to_labelled(record(text="x"), None)


@pytest.mark.parametrize(
    "fields",
    [
        {"prompt": "q", "chosen": "a", "rejected": "b"},
        {"chosen": [USER, SAID], "rejected": [USER, {**SAID, "content": "b"}]},
        {"prompt": [USER], "chosen": [SAID], "rejected": [{**SAID, "content": "b"}]},
    ],
)
def test_every_form_of_a_pair_trains_the_last_answer_only(record: Make, fields: dict[str, Any]):
    pair = to_pair(record(**fields), None)
    assert pair.chosen.turns == TURNS
    assert pair.rejected.turns == (TURNS[0], Turn("assistant", "b", 1.0))


def test_earlier_answers_of_a_pair_are_not_trained(record: Make):
    turns = [SAID, USER, SAID]
    pair = to_pair(record(chosen=turns, rejected=[*turns[:2], {**SAID, "content": "b"}]), None)
    assert [turn.weight for turn in pair.chosen.turns] == [0, 0, 1]


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"chosen": "a", "rejected": "a"}, "'chosen' and 'rejected' are equal"),
        ({"chosen": "a"}, "none of data_type: dpo"),
        ({"rejected": "a"}, "none of data_type: dpo"),
        ({"chosen": [USER], "rejected": "b"}, "'chosen' does not end with an assistant message"),
    ],
)
def test_a_pair_that_prefers_nothing_is_refused(record: Make, fields: dict[str, Any], message: str):
    with pytest.raises(DataError, match=message):
        to_pair(record(**fields), None)


def test_a_diffusion_record_has_a_prompt_and_something_to_make(record: Make):
    check_diffusion(record(prompt="a cat", image="cat.png"))
    check_diffusion(record(text="a cat", latents=[1.0]))
    for fields in ({"prompt": "a cat"}, {"image": "cat.png"}):
        with pytest.raises(DataError, match="none of data_type: diffusion"):
            check_diffusion(record(**fields))
    with pytest.raises(DataError, match="the field 'prompt' is a int"):
        check_diffusion(record(prompt=1, image="cat.png"))
