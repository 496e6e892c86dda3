"""Places in a text that are known for certain to belong to one turn of a conversation."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final, NamedTuple, Protocol

from omnilit.data.messages import Turn
from omnilit.errors import DataError
from omnilit.types import Record

SENTINEL: Final = "zqxSENTINELxqz"  # a word that no conversation says
NUMBER: Final = 730582946117  # the same for what is no text


class Write(Protocol):
    """Renders some turns."""

    def __call__(self, turns: Sequence[Turn], /, *, is_prompt: bool = False) -> str:
        """The text of the turns, with the generation prompt behind them if asked for."""
        ...


@dataclass(frozen=True, slots=True)
class Written:
    """A conversation and its text.

    Args:
        write: The template, with the tools of the record.
        turns: Of the conversation.
        text: All of them rendered.
        end_tokens: Special tokens, one of which ends a turn.
        record: For messages.
    """

    write: Write
    turns: Sequence[Turn]
    text: str
    end_tokens: tuple[str, ...]
    record: Record


class Anchor(NamedTuple):
    """A turn with one word of its own, and where that stands in the text.

    Args:
        turn: With the word.
        word: As it is written.
        position: Characters of the text in front of it, what it replaces included.
    """

    turn: Turn
    word: str
    position: int


def try_write(written: Written, turns: Sequence[Turn], *, is_prompt: bool = False) -> str | None:
    """The text of other turns; None where the template refuses them."""
    try:
        return written.write(turns, is_prompt=is_prompt)
    except DataError:  # such as a template that reads messages[0] where there is none
        return None


def find_anchors(written: Written, index: int) -> Iterator[Anchor]:
    """Places within a turn, each proved by a rendering in which one word stands there.

    A word is put in places of the turn one after the other: into its calls, its content, its
    thoughts. It counts where the template writes it once, and all else to the letter as without
    it. So nothing is assumed of what the template leaves out, moves, trims or adds.
    """
    for turn, old in _with_word(written.turns[index]):
        word = str(NUMBER) if old else SENTINEL
        if word in written.text:
            continue
        others = [*written.turns[:index], turn, *written.turns[index + 1 :]]
        head, found, tail = (try_write(written, others) or "").partition(word)
        if found and any(head + text + tail == written.text for text in old or ("",)):
            yield Anchor(turn, word, len(written.text) - len(tail))


def mark_calls(turn: Turn) -> Turn:
    """The turn with the word behind the name of each of its calls."""
    calls = [
        {**call, "function": {**call["function"], "name": call["function"]["name"] + SENTINEL}}
        for call in turn.tool_calls
    ]
    return turn._replace(tool_calls=tuple(calls))


def _with_word(turn: Turn) -> Iterator[tuple[Turn, tuple[str, ...]]]:
    """The turn with a word more, or with a number in place of what can be written as `old`."""
    if turn.tool_calls:
        *others, last = turn.tool_calls
        for function, old in _call_with_word(last["function"]):
            yield turn._replace(tool_calls=(*others, {**last, "function": function})), old
    content = turn.content
    end, lead = len(content.rstrip()), len(content) - len(content.lstrip())
    # A template may trim the words, or ask how they begin and end
    for at in dict.fromkeys((end, len(content), lead, 0, len(content) // 2)):
        yield turn._replace(content=content[:at] + SENTINEL + content[at:]), ()
    if turn.reasoning:
        yield turn._replace(reasoning=turn.reasoning + SENTINEL), ()


def _call_with_word(
    function: Mapping[str, Any],
) -> Iterator[tuple[Mapping[str, Any], tuple[str, ...]]]:
    yield {**function, "name": function["name"] + SENTINEL}, ()
    # The answer of a tool may be headed by the name of the call: then only the arguments are apart
    arguments = function["arguments"]
    if isinstance(arguments, Mapping):
        for key, value in arguments.items():
            other, old = _replace_value(value)
            yield {**function, "arguments": {**arguments, key: other}}, old
    other, old = _replace_value(arguments)
    yield {**function, "arguments": other}, old


def _replace_value(value: object) -> tuple[object, tuple[str, ...]]:
    """A text with the word, or the number with what a template may have written instead."""
    if isinstance(value, str):
        return value + SENTINEL, ()
    return NUMBER, (json.dumps(value, ensure_ascii=False), str(value))
