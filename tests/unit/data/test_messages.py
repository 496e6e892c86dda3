"""What a conversation may look like, and what is said of one that does not."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from omnilit.data.messages import Turn, read_turns
from omnilit.errors import DataError
from omnilit.types import Record

USER = {"role": "user", "content": "q"}
SAID = {"role": "assistant", "content": "a"}


def test_the_assistant_is_trained_unless_loss_mask_says_otherwise(record: Callable[..., Record]):
    messages = [USER, SAID, {**USER, "loss_mask": 1}, {**SAID, "loss_mask": 0}]
    assert read_turns(record(messages=messages), "messages") == [
        Turn("user", "q", False),
        Turn("assistant", "a", True),
        Turn("user", "q", True),
        Turn("assistant", "a", False),
    ]


def test_text_parts_are_joined(record: Callable[..., Record]):
    parts = [{"type": "text", "text": "one "}, {"type": "text", "text": "two"}]
    turns = read_turns(record(m=[{"role": "assistant", "content": parts}]), "m")
    assert turns[0].content == "one two"


@pytest.mark.parametrize(
    ("messages", "message"),
    [
        ([USER], r"no assistant message \(roles: user\)"),
        ([], r"no assistant message \(roles: no message\)"),
        ("hi", "the field 'messages' is a str, not a list of messages"),
        (["hi"], "message 1 is a str, not an object"),
        ([USER, {"content": "a"}], "message 2 has no 'role'"),
        ([USER, {"role": "assistant"}], "message 2 has no 'content'"),
        ([{"role": 3, "content": "a"}], "the role of message 1 is a int, not a string"),
        ([{"role": "user", "content": 3}], "the content of message 1 is a int, not a string"),
        ([{**SAID, "loss_mask": 2}], "message 1 has loss_mask 2"),
        ([{**SAID, "content": "\ud800"}], "half a surrogate pair at character 1"),
        ([{**SAID, "content": [{"type": "image"}]}], "part of type 'image', which is not avail"),
        ([{**SAID, "content": ["x"]}], "part of type 'a str', which is not available"),
        ([{**SAID, "content": None, "tool_calls": [1]}], "'tool_calls' is not available yet"),
        ([{**SAID, "reasoning_content": "hm"}], "'reasoning_content' is not available yet"),
    ],
)
def test_a_malformed_conversation_is_refused(
    record: Callable[..., Record], messages: object, message: str
):
    with pytest.raises(DataError, match=message) as caught:
        read_turns(record(messages=messages), "messages")
    assert str(caught.value).startswith("d.jsonl:7: ")


def test_tools_are_refused_until_they_are_rendered(record: Callable[..., Record]):
    with pytest.raises(DataError, match="'tools' is not available yet"):
        read_turns(record(messages=[SAID], tools=[{"name": "f"}]), "messages")


def test_a_record_without_its_field_says_which_it_has(record: Callable[..., Record]):
    with pytest.raises(DataError, match=r"no field 'messages'; its fields are: 'text', 'id'"):
        read_turns(record(text="x", id=1), "messages")
    with pytest.raises(DataError, match=r"set data\.text_keys to"):
        read_turns(record(), "messages")
