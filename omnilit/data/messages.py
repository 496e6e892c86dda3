"""The messages of a conversation, checked before any template sees them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

from omnilit.errors import DataError
from omnilit.types import Record

ASSISTANT = "assistant"
LATER_FIELDS = ("tool_calls", "reasoning_content", "reasoning", "thinking")


class Turn(NamedTuple):
    """One message.

    Args:
        role: Who speaks, such as `user`.
        content: What is said.
        is_trained: True where the model learns to say it: by default the assistant's turns.
    """

    role: str
    content: str
    is_trained: bool


def refuse(record: Record, problem: str, fix: str) -> DataError:
    """An error that names the record's file and line."""
    return DataError(problem=problem, fix=fix, file=record.origin.file, row=record.origin.row)


def get_field(record: Record, text_key: str) -> object:
    """The field of the record that holds its text or messages.

    Raises:
        DataError: The record lacks it; says which fields it has.
    """
    if text_key in record.fields:
        return record.fields[text_key]
    has = ", ".join(map(repr, record.fields)) or "none"
    raise refuse(
        record,
        f"the record has no field {text_key!r}; its fields are: {has}",
        "set data.text_keys to the field that holds the text or messages",
    )


def check_text(record: Record, text: object, what: str) -> str:
    """`text`, when it is a string that can be written in UTF-8.

    Raises:
        DataError: It is something else, or holds half of a surrogate pair.
    """
    if not isinstance(text, str):
        raise refuse(record, f"{what} is {_kind(text)}, not a string", "write it as a string")
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise refuse(
            record,
            f"{what} holds half a surrogate pair at character {error.start + 1}",
            "write the character whole, or leave it out",
        ) from error
    return text


def read_turns(record: Record, text_key: str) -> list[Turn]:
    """The messages of a record, each with whether it is trained.

    A message is an object with `role` and `content` (a string, or a list of parts of type
    `text`), and optionally `loss_mask`, 0 or 1, which says whether it is trained.

    Raises:
        DataError: A message is malformed, uses what is not available yet, or the assistant
            never speaks.
    """
    messages = get_field(record, text_key)
    if not isinstance(messages, list):
        raise refuse(
            record,
            f"the field {text_key!r} is {_kind(messages)}, not a list of messages",
            'write it as [{"role": "user", "content": "..."}, ...]',
        )
    if record.fields.get("tools"):
        raise refuse(record, "'tools' is not available yet", "leave it out")
    turns = [_read_turn(record, i, message) for i, message in enumerate(messages, start=1)]
    if all(turn.role != ASSISTANT for turn in turns):
        roles = ", ".join(turn.role for turn in turns) or "no message"
        raise refuse(
            record,
            f"the conversation has no assistant message (roles: {roles})",
            "add one, or remove the record",
        )
    return turns


def _read_turn(record: Record, number: int, message: object) -> Turn:
    what = f"message {number}"
    if not isinstance(message, Mapping):
        raise refuse(
            record, f"{what} is {_kind(message)}, not an object", "give it role and content"
        )
    for name in ("role", "content"):
        if message.get(name) is None and not (name == "content" and message.get("tool_calls")):
            raise refuse(record, f"{what} has no {name!r}", "give it role and content")
    for name in LATER_FIELDS:
        if message.get(name):
            raise refuse(record, f"{what}: {name!r} is not available yet", "leave it out")
    role = check_text(record, message["role"], f"the role of {what}")
    content = check_text(
        record, _join_parts(record, what, message["content"]), f"the content of {what}"
    )
    return Turn(role, content, _is_trained(record, what, message, role))


def _join_parts(record: Record, what: str, content: object) -> object:
    if not isinstance(content, list):
        return content
    texts: list[str] = []
    for part in content:
        if not isinstance(part, Mapping) or part.get("type") != "text":
            kind = part.get("type") if isinstance(part, Mapping) else _kind(part)
            raise refuse(
                record,
                f"{what} has a part of type {kind!r}, which is not available yet",
                "use parts of type 'text'",
            )
        texts.append(check_text(record, part.get("text"), f"a part of {what}"))
    return "".join(texts)


def _is_trained(record: Record, what: str, message: Mapping[str, object], role: str) -> bool:
    given = message.get("loss_mask")
    if given is None:
        return role == ASSISTANT
    if given not in (0, 1):
        raise refuse(record, f"{what} has loss_mask {given!r}", "use 0 or 1")
    return bool(given)


def _kind(value: object) -> str:
    return "null" if value is None else f"a {type(value).__name__}"
