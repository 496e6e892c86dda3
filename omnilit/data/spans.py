"""Where a trained turn stands in a text whose template does not say it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final, Protocol

from omnilit.data.messages import ASSISTANT, Turn, refuse
from omnilit.errors import DataError
from omnilit.types import Record

THOUGHTS: Final = ("<think>", "</think>")  # special tokens that may stand in an answer
SENTINEL: Final = "zqxSENTINELxqz"  # words that no conversation says


class Write(Protocol):
    """Renders some turns."""

    def __call__(self, turns: Sequence[Turn], /, *, is_prompt: bool = False) -> str:
        """The text of the turns, with the generation prompt behind them if asked for."""
        ...


@dataclass(frozen=True, slots=True)
class Writer:
    """A template with the tools of one record.

    Args:
        write: Renders turns.
        record: For messages.
    """

    write: Write
    record: Record


def find_by_prefix(
    writer: Writer, turns: Sequence[Turn], index: int, text: str
) -> tuple[int, int] | None:
    """The range of a turn by what a rendering up to it adds to one that ends before it.

    Args:
        writer: The template.
        turns: Of the conversation.
        index: The trained one.
        text: All turns rendered.

    Returns:
        None where the template writes a turn otherwise when others follow it.

    Raises:
        DataError: The turn is changed, or has no end token.
    """
    turn, number = turns[index], index + 1
    is_assistant = turn.role == ASSISTANT
    before = writer.write(turns[:index], is_prompt=is_assistant)
    after = writer.write(turns[:number]) if number < len(turns) else text
    if not (text.startswith(after) and after.startswith(before)):
        return None
    piece = after[len(before) :].rstrip()
    words = turn.content.strip()
    if words not in piece or (not turn.tool_calls and ends_bare(piece, words)):
        raise _no_end(writer.record, number)
    if not words and not piece:
        raise _no_end(writer.record, number)
    start = len(before) + (0 if is_assistant else piece.rfind(words))
    return start, len(before) + len(piece)


def find_by_sentinel(
    writer: Writer, turns: Sequence[Turn], index: int, text: str, *, end_tokens: Sequence[str]
) -> tuple[int, int]:
    """The range of a turn in the whole text, by writing other words in its place.

    What comes before and behind these words is the same with the turn's own. In front of them
    stands the header, as the generation prompt writes it, and what the model writes between it
    and the words, such as an empty thought; behind them the end token.

    Args:
        writer: The template.
        turns: Of the conversation.
        index: The trained one.
        text: All turns rendered.
        end_tokens: Special tokens, one of which ends the turn.

    Raises:
        DataError: The range cannot be told for certain.
    """
    turn, number = turns[index], index + 1
    other = [*turns[:index], turn._replace(content=SENTINEL), *turns[number:]]
    head, found, tail = writer.write(other).partition(SENTINEL)
    if not found or SENTINEL in tail or len(head) + len(tail) > len(text):
        raise _hidden(writer.record, number)
    if not (text.startswith(head) and text.endswith(tail)):
        raise _hidden(writer.record, number)
    body = text[len(head) : len(text) - len(tail)]
    if body.strip() != turn.content.strip():
        raise _hidden(writer.record, number)
    end = len(head) + len(body) + _end_of(writer, index, tail, end_tokens)
    if turn.role != ASSISTANT:
        return len(head) + len(body) - len(body.lstrip()), end
    header = _header(writer, turns[:index])
    start = head.rfind(header) + len(header)
    others = [token for token in end_tokens if token not in THOUGHTS]
    if not header or header not in head or any(token in head[start:] for token in others):
        raise _hidden(writer.record, number)
    return start, end


def ends_bare(piece: str, content: str) -> bool:
    """True where `piece` holds the words of a turn and nothing after them."""
    words = content.strip()
    return bool(words) and words in piece and not piece.rpartition(words)[2].strip()


def _header(writer: Writer, turns: Sequence[Turn]) -> str:
    """What the generation prompt adds to the turns before it."""
    without = writer.write(turns)
    prompt = writer.write(turns, is_prompt=True)
    return prompt[len(without) :] if prompt.startswith(without) else ""


def _end_of(writer: Writer, index: int, tail: str, end_tokens: Sequence[str]) -> int:
    """Characters of the end token behind a turn's words."""
    lead = len(tail) - len(tail.lstrip())
    for token in sorted(end_tokens, key=len, reverse=True):
        if tail[lead:].startswith(token):
            return lead + len(token)
    raise _no_end(writer.record, index + 1)


def _no_end(record: Record, number: int) -> DataError:
    return refuse(
        record,
        f"the chat template writes no end token after message {number}, or changes it",
        "use a template with {% generation %}, or data.chat_template: plain",
    )


def _hidden(record: Record, number: int) -> DataError:
    return refuse(
        record,
        f"the chat template rewrites message {number} when others follow it, or begins it "
        "otherwise than its generation prompt",
        "use a template with {% generation %}, or data.chat_template: plain",
    )
