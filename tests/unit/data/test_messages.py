"""What a conversation may look like, and what is said of one that does not."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from omnilit.data.messages import Turn
from omnilit.data.records import to_conversation
from omnilit.errors import DataError
from omnilit.types import Record

USER = {"role": "user", "content": "q"}
SAID = {"role": "assistant", "content": "a"}
CALL = {"type": "function", "function": {"name": "f", "arguments": {"x": 1}}}
Make = Callable[..., Record]


def test_the_assistant_is_trained_unless_the_message_says_otherwise(record: Make):
    messages = [USER, SAID, {**USER, "loss_mask": 1}, {**SAID, "loss_mask": 0}]
    messages.append({**SAID, "weight": 0.5})
    turns = to_conversation(record(messages=messages), None).turns
    assert [turn.weight for turn in turns] == [0, 1, 1, 0, 0.5]
    assert turns[:2] == (Turn("user", "q", 0.0), Turn("assistant", "a", 1.0))
    assert [turn.is_trained for turn in turns] == [False, True, True, False, True]


def test_a_known_role_counts_however_it_is_written(record: Make):
    messages = [{"role": "User", "content": "q"}, {"role": "Assistant", "content": "a"}]
    messages += [
        {"role": "ASSISTANT ", "content": "b", "name": "x"},
        {"role": "Ann", "content": ""},
    ]
    turns = to_conversation(record(messages=messages), None).turns
    assert [turn.role for turn in turns] == ["user", "assistant", "assistant", "Ann"]
    assert [turn.weight for turn in turns] == [0, 1, 1, 0]


def test_text_parts_are_joined(record: Make):
    parts = [{"type": "text", "text": "one "}, {"type": "text", "text": "two"}]
    turns = to_conversation(record(m=[{"role": "assistant", "content": parts}]), ["m"]).turns
    assert turns[0].content == "one two"


@pytest.mark.parametrize("name", ["reasoning_content", "reasoning", "thinking"])
def test_thoughts_and_tool_calls_are_read_in_every_spelling(record: Make, name: str):
    as_text = {"function": {"name": "f", "arguments": '{"x": 1}'}}
    bare = {"name": "f", "arguments": {"x": 1}}
    calls = [CALL, as_text, bare]
    said = {"role": "assistant", "content": None, name: "hm", "tool_calls": calls}
    answer = {"role": "tool", "content": "2", "name": "f", "tool_call_id": "7"}
    tools = '[{"type": "function", "function": {"name": "f"}}]'
    found = to_conversation(record(messages=[USER, said, answer], tools=tools), None)
    assert found.turns[1] == Turn("assistant", "", 1.0, "hm", (CALL, CALL, CALL))
    assert found.turns[2] == Turn("tool", "2", 0.0, "", (), "f", "7")
    assert found.tools == ({"type": "function", "function": {"name": "f"}},)


def test_arguments_that_are_no_json_stay_what_was_said(record: Make):
    call = {"function": {"name": "f", "arguments": "x = 1"}}
    turns = to_conversation(record(messages=[{**SAID, "tool_calls": [call]}]), None).turns
    assert turns[0].tool_calls[0]["function"]["arguments"] == "x = 1"


@pytest.mark.parametrize(
    ("messages", "message"),
    [
        ([USER], r"no assistant message \(roles: user\)"),
        ([{**SAID, "weight": 0}], "no message is trained: all have the weight 0"),
        ([], r"no assistant message \(roles: no message\)"),
        ("hi", "the field 'messages' is a str, not a list of messages"),
        ("[hi", "the field 'messages' is not JSON"),
        (["hi"], "message 1 is a str, not an object"),
        ([USER, {"content": "a"}], "message 2 has no 'role'"),
        ([USER, {"role": "assistant"}], "message 2 has no 'content'"),
        ([{"role": 3, "content": "a"}], "the role of message 1 is a int, not a string"),
        ([{"role": "user", "content": 3}], "the content of message 1 is a int, not a string"),
        ([{**SAID, "loss_mask": 2}], "message 1 has loss_mask 2"),
        ([{**SAID, "weight": -1}], "message 1 has weight -1"),
        ([{**SAID, "weight": "much"}], "message 1 has weight 'much'"),
        ([{**SAID, "loss_mask": 1, "weight": 0}], "message 1 has loss_mask 1 and weight 0"),
        ([{**SAID, "content": "\ud800"}], "half a surrogate pair at character 1"),
        ([{**SAID, "content": [{"type": "picture"}]}], "a part of type 'picture'.*use one of text"),
        ([{**SAID, "content": ["x"]}], "message 1 has a part of type 'a str'"),
        ([{**SAID, "content": [{"type": "image"}]}], "1 places for images from a column.* 0"),
        ([{**SAID, "content": None, "tool_calls": [1]}], "a tool call without a function's name"),
        ([{**SAID, "tool_calls": "f"}], "the tool_calls of message 1 is not JSON"),
        ([{**SAID, "tool_calls": {"a": 1}}], "the tool_calls of message 1 is a dict, not a list"),
        ([{**SAID, "reasoning": 3}], "the reasoning of message 1 is a int, not a string"),
    ],
)
def test_a_malformed_conversation_is_refused(record: Make, messages: object, message: str):
    with pytest.raises(DataError, match=message) as caught:
        to_conversation(record(messages=messages), None)
    assert str(caught.value).startswith("d.jsonl:7: ")


def test_tools_must_be_a_list_of_objects(record: Make):
    with pytest.raises(DataError, match="'tools' is not a list of objects"):
        to_conversation(record(messages=[SAID], tools=["f"]), None)
