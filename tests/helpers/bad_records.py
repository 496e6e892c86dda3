"""A file of conversations with one bad record of every kind among good ones."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Final

USER: Final = {"role": "user", "content": "What is the capital of France?"}
ANSWER: Final = {"role": "assistant", "content": "Paris, of course!"}


def _line(*messages: object) -> bytes:
    return json.dumps({"messages": messages}).encode()


# By what is wrong with them
BAD_LINES: Final[Mapping[str, bytes]] = {
    "malformed JSON": b'{"messages": [{"role": "user"',
    "not an object": b'["messages"]',
    "undecodable bytes": b'{"messages": "caf\xe9"}',
    "wrong type of the messages": json.dumps({"messages": 5}).encode(),
    "wrong type of a message": _line("hello", ANSWER),
    "wrong type of a content": _line(USER, {"role": "assistant", "content": 7}),
    "no assistant message": _line(USER),
    "half a surrogate pair": _line(USER, {"role": "assistant", "content": "\ud83d"}),
    "unknown schema": b'{"question": "What?", "reply": "That."}',
    "no trained tokens": _line(USER, {**ANSWER, "loss_mask": 0}),
    "malformed tool calls": _line(USER, {**ANSWER, "tool_calls": [{"function": "add"}]}),
}


def write_bad_records(file: Path, *, good_each: int = 2) -> dict[int, str]:
    """Write every kind of bad line, each behind some good ones.

    Args:
        file: Where to.
        good_each: Good records in front of each bad one; they differ from each other.

    Returns:
        The kind of each bad record by its 1-based line.
    """
    lines: list[bytes] = []
    kinds: dict[int, str] = {}
    for kind, bad in BAD_LINES.items():
        for _ in range(good_each):
            question = {**USER, "content": f"{USER['content']} {len(lines)}"}
            lines.append(_line(question, ANSWER))
        lines.append(bad)
        kinds[len(lines)] = kind
    file.write_bytes(b"\n".join(lines) + b"\n")
    return kinds
