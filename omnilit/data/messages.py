"""The messages of a conversation, checked before any template sees them."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping
from typing import Any, NamedTuple

from omnilit.data.references import KINDS, MARK, MARKS, read_part
from omnilit.data.refusals import kind_of, refuse
from omnilit.types import Medium, Record

ASSISTANT = "assistant"
REASONING = ("reasoning_content", "reasoning", "thinking")
ROLES = frozenset({"system", "developer", "user", ASSISTANT, "tool"})


class Turn(NamedTuple):
    """One message.

    Args:
        role: Who speaks, such as `user`.
        content: What is said, with one of `MARKS` in the place of each of `media`.
        weight: How much the model learns to say it: by default 1 for the assistant's turns.
        reasoning: What was thought before it was said.
        tool_calls: In the form of OpenAI: type, function with name and arguments, id.
        name: Of the tool or person that speaks.
        tool_call_id: The call that a tool answers.
        media: Images, videos and sounds among the words, in order.
    """

    role: str
    content: str
    weight: float
    reasoning: str = ""
    tool_calls: tuple[Mapping[str, Any], ...] = ()
    name: str = ""
    tool_call_id: str = ""
    media: tuple[Medium, ...] = ()

    @property
    def is_trained(self) -> bool:
        """Whether the model learns to say it."""
        return self.weight > 0


class Conversation(NamedTuple):
    """Turns, and the tools that may be called in them."""

    turns: tuple[Turn, ...]
    tools: tuple[Mapping[str, Any], ...] = ()

    @property
    def media(self) -> tuple[Medium, ...]:
        """Those of all turns, in order."""
        return tuple(medium for turn in self.turns for medium in turn.media)


def check_text(record: Record, text: object, what: str) -> str:
    """`text`, when it is a string that can be written in UTF-8.

    Raises:
        DataError: It is something else, or holds half of a surrogate pair.
    """
    if not isinstance(text, str):
        raise refuse(record, f"{what} is {kind_of(text)}, not a string", "write it as a string")
    if text.isascii():
        return text
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise refuse(
            record,
            f"{what} holds half a surrogate pair at character {error.start + 1}",
            "write the character whole, or leave it out",
        ) from error
    return text


def read_messages(record: Record, messages: object, *, what: str) -> tuple[Turn, ...]:
    """The turns that a list of messages says.

    A message is an object with `role` and `content` (a string, or a list of parts of the types
    `text`, `image`, `image_url`, `video` and `audio`), and optionally `tool_calls`,
    `reasoning_content`, `name`, `tool_call_id`, and `loss_mask` (0 or 1) or `weight` (a number),
    which say how much it is trained.

    Args:
        record: For messages.
        messages: The list, or its JSON.
        what: How to call it in messages.

    Raises:
        DataError: One of them is malformed.
    """
    if isinstance(messages, str) and messages.lstrip().startswith("["):
        messages = parse_json(record, messages, what)
    if not isinstance(messages, list):
        raise refuse(
            record,
            f"{what} is {kind_of(messages)}, not a list of messages",
            'write it as [{"role": "user", "content": "..."}, ...]',
        )
    return tuple(_read_turn(record, i, message) for i, message in enumerate(messages, start=1))


def read_tools(record: Record) -> tuple[Mapping[str, Any], ...]:
    """The tools of a record: a list of objects, or its JSON; none where the field is missing.

    Raises:
        DataError: It is something else.
    """
    tools = record.fields.get("tools")
    if not tools:
        return ()
    if isinstance(tools, str):
        tools = parse_json(record, tools, "'tools'")
    if not isinstance(tools, list) or not all(isinstance(tool, Mapping) for tool in tools):
        raise refuse(record, "'tools' is not a list of objects", "give a list of JSON schemas")
    return tuple(tools)


def check_trained(record: Record, conversation: Conversation) -> Conversation:
    """The conversation, when there is something to train in it.

    Raises:
        DataError: The assistant never speaks, or every message has the weight 0.
    """
    if any(turn.weight > 0 for turn in conversation.turns):
        return conversation
    roles = [turn.role for turn in conversation.turns]
    if ASSISTANT in roles:
        problem, fix = "no message is trained: all have the weight 0", "give one a weight"
    else:
        shown = ", ".join(roles) or "no message"
        problem, fix = f"the conversation has no assistant message (roles: {shown})", "add one"
    raise refuse(record, problem, f"{fix}, or remove the record")


def keep_images(conversation: Conversation, limit: int) -> Conversation:
    """The conversation with its first images, at most `limit`; the others lose their places."""
    turns, left = [], limit
    for turn in conversation.turns:
        pieces, media, given = [], [], iter(turn.media)
        for piece in re.split(f"({MARK.pattern})", turn.content):
            if piece not in KINDS:
                pieces.append(piece)
                continue
            medium = next(given)
            is_image = medium.kind == "image"
            if is_image and not left:
                continue
            left -= is_image
            pieces.append(piece)
            media.append(medium)
        turns.append(turn._replace(content="".join(pieces), media=tuple(media)))
    return conversation._replace(turns=tuple(turns))


def parse_json(record: Record, text: str, what: str) -> object:
    """What a field that holds JSON says.

    Raises:
        DataError: It is not JSON.
    """
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        raise refuse(record, f"{what} is not JSON ({error})", "write a list") from error


def _read_turn(record: Record, number: int, message: object) -> Turn:
    if not isinstance(message, Mapping):
        problem = f"message {number} is {kind_of(message)}, not an object"
        raise refuse(record, problem, "give it role and content")
    role, content = message.get("role"), message.get("content")
    if isinstance(role, str) and isinstance(content, str) and len(message) == 2:
        role = _name_role(role)
        if not (role.isascii() and content.isascii()):
            check_text(record, role, f"the role of message {number}")
            check_text(record, content, f"the content of message {number}")
        return Turn(role, content, 1.0 if role == ASSISTANT else 0.0)
    return _read_full(record, f"message {number}", message)


def _name_role(role: str) -> str:
    """A known role as templates name it: an `Assistant` would be neither headed nor trained."""
    if role in ROLES:
        return role
    known = role.strip().lower()
    return known if known in ROLES else role


def _read_full(record: Record, what: str, message: Mapping[str, Any]) -> Turn:
    calls = _read_calls(record, what, message.get("tool_calls"))
    content = message.get("content")
    for name in ("role", "content"):
        if message.get(name) is None and not (name == "content" and calls):
            raise refuse(record, f"{what} has no {name!r}", "give it role and content")
    role = _name_role(check_text(record, message["role"], f"the role of {what}"))
    thought = next((message[name] for name in REASONING if message.get(name)), "")
    joined, media = ("", ()) if content is None else _join_parts(record, what, content)
    return Turn(
        role,
        check_text(record, joined, f"the content of {what}"),
        _read_weight(record, what, message, role),
        check_text(record, thought, f"the reasoning of {what}"),
        calls,
        check_text(record, message.get("name") or "", f"the name of {what}"),
        check_text(record, message.get("tool_call_id") or "", f"the tool_call_id of {what}"),
        media,
    )


def _join_parts(record: Record, what: str, content: object) -> tuple[object, tuple[Medium, ...]]:
    if not isinstance(content, list):
        return content, ()
    texts: list[str] = []
    media: list[Medium] = []
    for part in content:
        kind = part.get("type") if isinstance(part, Mapping) else None
        if isinstance(part, Mapping) and kind == "text":
            texts.append(check_text(record, part.get("text"), f"a part of {what}"))
            continue
        medium = read_part(record, part, what)
        texts.append(MARKS[medium.kind])
        media.append(medium)
    return "".join(texts), tuple(media)


def _read_calls(record: Record, what: str, calls: object) -> tuple[Mapping[str, Any], ...]:
    if not calls:
        return ()
    fix = 'write it as [{"type": "function", "function": {"name": "...", "arguments": {...}}}]'
    if isinstance(calls, str):
        calls = parse_json(record, calls, f"the tool_calls of {what}")
    if not isinstance(calls, list):
        raise refuse(record, f"the tool_calls of {what} is {kind_of(calls)}, not a list", fix)
    return tuple(_read_call(record, what, call, fix) for call in calls)


def _read_call(record: Record, what: str, call: object, fix: str) -> Mapping[str, Any]:
    function = call.get("function", call) if isinstance(call, Mapping) else None
    if not isinstance(function, Mapping) or not isinstance(function.get("name"), str):
        raise refuse(record, f"{what} has a tool call without a function's name", fix)
    arguments = function.get("arguments", {})
    if isinstance(arguments, str):
        # templates write an object; what is no JSON stays the text that the model said
        try:
            arguments = json.loads(arguments)
        except (ValueError, RecursionError):
            arguments = function["arguments"]
    assert isinstance(call, Mapping)
    extra = {"id": call["id"]} if call.get("id") else {}
    named = {"name": function["name"], "arguments": arguments}
    return {"type": "function", "function": named, **extra}


def _read_weight(record: Record, what: str, message: Mapping[str, Any], role: str) -> float:
    given = [message[name] for name in ("loss_mask", "weight") if message.get(name) is not None]
    if not given:
        return 1.0 if role == ASSISTANT else 0.0
    mask = message.get("loss_mask")
    if mask is not None and mask not in (0, 1):
        raise refuse(record, f"{what} has loss_mask {mask!r}", "use 0 or 1")
    weight = given[-1]
    if not isinstance(weight, int | float) or not math.isfinite(weight) or weight < 0:
        raise refuse(record, f"{what} has weight {weight!r}", "use a number of at least 0")
    if len(given) == 2 and bool(given[0]) != bool(given[1]):
        problem = f"{what} has loss_mask {given[0]!r} and weight {given[1]!r}"
        raise refuse(record, problem, "give one of the two")
    return float(weight)
