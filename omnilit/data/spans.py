"""Where a trained turn stands in a text whose template does not say it."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from typing import Final

from omnilit.data.anchors import SENTINEL, Anchor, Written, find_anchors, mark_calls, try_write
from omnilit.data.messages import ASSISTANT, Turn, refuse
from omnilit.data.references import MARK
from omnilit.errors import DataError
from omnilit.types import Record

ANSWER: Final = "zqxANSWERxqz"  # another word that no conversation says
THOUGHT: Final = r"(?:\w+:)?(?:think|thinking|thought|reasoning)"
# What stands around a thought, and what may stand between a header and words without one
THOUGHT_TAGS: Final = re.compile(rf"</?{THOUGHT}>|\[/?THINK\]")
THOUGHT_START: Final = re.compile(rf"(?:<{THOUGHT}>|\[THINK\])\s*")
THOUGHT_END: Final = re.compile(rf"</{THOUGHT}>|\[/THINK\]")
UNITS: Final = r"</?[\w:|]+>|\[/?\w+\]|\w+|[\s\S]"  # tags, words, single characters


def find_span(written: Written, index: int) -> tuple[int, int]:
    """The characters [start, end) of a turn that are trained.

    An assistant's turn begins where the generation prompt ends, any other with its words. It
    ends with what the template writes behind it when it is the last one: the end token.

    Args:
        written: The conversation.
        index: The trained turn.

    Raises:
        DataError: The range cannot be told for certain, lacks a part of what the turn says, or
            does not end in an end token.
    """
    number, record = index + 1, written.record
    start, end = _search(_find_start, written, index), find_end(written, index)
    if start is None or end is None:
        raise _hidden(record, number)
    piece = written.text[start:end].rstrip()
    if not says_all(written, index, piece):
        raise _incomplete(record, number, piece)
    if not is_ended(written, index, piece):
        raise _no_end(record, number)
    return start, start + len(piece)


def find_end(written: Written, index: int) -> int | None:
    """Where a turn ends, white space behind its end token included.

    Returns:
        None where that cannot be told, or the turn has no end of its own: such as that of a tool
        whose answer the template joins with the next one.
    """
    return _search(_find_end, written, index)


def says_all(written: Written, index: int, piece: str) -> bool:
    """Whether a turn's text has its words and all of its calls.

    Its thoughts may be missing, or written otherwise: templates leave out those that are past.
    """
    turn = written.turns[index]
    words = _words_in(piece, turn.content)
    if words is None or not turn.tool_calls:
        return words is not None
    names = [call["function"]["name"] for call in turn.tool_calls]
    if not all(name in piece for name in names):
        return False
    # A template may write calls in place of words, or one call of several
    before, after = written.turns[:index], written.turns[index + 1 :]
    if words:
        marked = turn._replace(content=turn.content.rstrip() + SENTINEL)
        if SENTINEL not in (try_write(written, [*before, marked, *after]) or ""):
            return False
    if len(names) > 1:
        text = try_write(written, [*before, mark_calls(turn)]) or ""
        return text.count(SENTINEL) == len(names)
    return True


def is_ended(written: Written, index: int, piece: str) -> bool:
    """Whether a turn's text ends in an end token.

    That is what stands behind its words; where it ends with a call, or has no words, it is a
    special token, or what ends an ordinary turn.
    """
    turn = written.turns[index]
    words = _words_in(piece, turn.content)
    if words and not turn.tool_calls:
        return bool(piece.rpartition(words)[2].strip())
    if written.end_tokens and piece.endswith(written.end_tokens):
        return True
    ordinary = turn._replace(content=SENTINEL, reasoning="", tool_calls=())
    end = (_behind(written, SENTINEL, [*written.turns[:index], ordinary]) or "").strip()
    return bool(end) and piece.endswith(end)


def _words_in(piece: str, content: str) -> str | None:
    """The words of a turn as `piece` has them: whole, or those behind a thought.

    The prompt may have written the tag that they begin with.
    """
    if MARK.search(content):
        return _words_around(piece, MARK.split(content))
    words = content.strip()
    if words in piece:
        return words
    *thoughts, answer = THOUGHT_END.split(words)
    for said in (words, answer.strip()) if thoughts else (words,):
        opened = THOUGHT_START.match(said)
        for rest in (said, said[opened.end() :] if opened else said):
            if rest in piece:
                return rest
    return None


def _words_around(piece: str, texts: Sequence[str]) -> str | None:
    """The last words of a turn with media in it, where `piece` has all of them in order."""
    place, words = 0, ""
    for text in filter(None, map(str.strip, texts)):
        place = piece.find(text, place)
        if place < 0:
            return None
        place, words = place + len(text), text
    return words


def _find_end(written: Written, index: int) -> int | None:
    turns, text = written.turns, written.text
    cut = text if index + 1 == len(turns) else try_write(written, turns[: index + 1])
    if cut is None:
        return None
    if text.startswith(cut):
        return len(cut)
    for anchor in find_anchors(written, index):
        tail = _behind(written, anchor.word, [*turns[:index], anchor.turn])
        if tail is None or not cut.endswith(tail):
            continue
        end = _match_end(written, index, tail, anchor.position)
        if end is not None:
            return end
    return None


def _find_start(written: Written, index: int) -> int | None:
    turns, text = written.turns, written.text
    if turns[index].role != ASSISTANT:
        return _find_words(written, index)
    prompt = try_write(written, turns[:index], is_prompt=True)
    if prompt is None:
        return None
    if text.startswith(prompt):
        return len(prompt)
    # Templates leave out messages of some roles; the last one that can be seen decides
    for before in range(index - 1, -1, -1):
        is_seen = False
        for anchor in find_anchors(written, before):
            is_seen = True
            if (start := _align(written, before, anchor, index, prompt)) is not None:
                return start
        if is_seen:
            break
    return None


def _find_words(written: Written, index: int) -> int | None:
    content, text = written.turns[index].content, written.text
    lead, words = len(content) - len(content.lstrip()), content.strip()
    for anchor in find_anchors(written, index):
        at = anchor.turn.content.find(SENTINEL)
        start = anchor.position - max(at - lead, 0)
        if at >= 0 and text.startswith(words, start):
            return len(text) - len(text[start:].lstrip())
    return None


def _search(find: Callable[[Written, int], int | None], written: Written, index: int) -> int | None:
    """What `find` says of a turn, or of the same turn in a conversation that is longer in front."""
    found = find(written, index)
    if found is not None:
        return found
    for longer in _lengthen(written):
        found = find(longer, index + 1)
        if found is not None:
            return found + len(written.text) - len(longer.text)
    return None


def _lengthen(written: Written) -> Iterator[Written]:
    """The same conversation behind one turn more, where the assistant begins it.

    Templates may refuse to write nothing, or a text without a question, and so hide where such a
    turn begins or ends. Behind another turn all must be written as it was.
    """
    if written.turns[0].role != ASSISTANT:
        return
    for role in ("user", "system"):
        ahead = Turn(role, "Hello", 0.0)
        shown = try_write(written, [ahead])
        longer = try_write(written, [ahead, *written.turns])
        if shown is None or longer is None or not longer.startswith(shown):
            continue
        if written.text.endswith(longer[len(shown) :]):
            yield replace(written, turns=[ahead, *written.turns], text=longer)


def _align(written: Written, before: int, anchor: Anchor, index: int, prompt: str) -> int | None:
    """Where the prompt of a turn ends in the whole text, both seen from a turn before it."""
    marked = [*written.turns[:before], anchor.turn, *written.turns[before + 1 : index]]
    tail = _behind(written, anchor.word, marked, is_prompt=True)
    if tail is None or not prompt.endswith(tail):
        return None
    rest = written.text[anchor.position :]
    if rest.startswith(tail):
        return anchor.position + len(tail)
    # The prompt opens a thought and the turn shows none: it begins where the two part. That is
    # no header only if a turn without thoughts has nothing but an empty one in front of it.
    shared = _share(tail, rest, written.end_tokens)
    answered = [*marked, Turn(ASSISTANT, ANSWER, 0.0), Turn("user", ANSWER, 0.0)]
    header, found, _ = (_behind(written, anchor.word, answered) or "").partition(ANSWER)
    if not found or not (header.startswith(shared) or shared.startswith(header)):
        return None
    is_whole = not THOUGHT_TAGS.sub("", header[len(shared) :]).strip()
    return anchor.position + len(shared) if is_whole else None


def _match_end(written: Written, index: int, tail: str, position: int) -> int | None:
    """Where a turn ends that has `tail` behind `position` when it is the last one."""
    text, tokens = written.text, written.end_tokens
    if text.startswith(tail, position):
        return position + len(tail)
    # What the two do not share may only be a token that ends the whole conversation: one more,
    # or another one, such as <|return|> in place of <|end|>
    shared = _share(tail, text[position:], tokens)
    left = tail[len(shared) :].strip()
    if left and left not in tokens:
        return None
    end = position + len(shared)
    if shared.rstrip().endswith(tokens):
        return end
    other = next((token for token in tokens if text.startswith(token, end)), None)
    if not left or other is None or not _begins_next(written, index, end + len(other)):
        return None
    return end + len(other)


def _begins_next(written: Written, index: int, start: int) -> bool:
    """Whether the header of the turn behind begins there, with a token that begins all headers.

    Else the token before it could be a part of that header, and the turn have no end.
    """
    asked = [Turn("user", ANSWER, 0.0)]
    shown = try_write(written, asked)
    prompt = try_write(written, asked, is_prompt=True)
    if shown is None or prompt is None or not prompt.startswith(shown):
        return False
    header = prompt[len(shown) :]
    first = next((token for token in written.end_tokens if header.startswith(token)), None)
    anchor = next(find_anchors(written, index + 1), None)
    if first is None or anchor is None:
        return False
    return written.text[start : anchor.position].startswith(first)


def _behind(
    written: Written, word: str, turns: Sequence[Turn], *, is_prompt: bool = False
) -> str | None:
    """What the template writes behind a word; None where it does not write it."""
    text = try_write(written, turns, is_prompt=is_prompt)
    return text.partition(word)[2] if text is not None and word in text else None


def _share(one: str, other: str, tokens: Sequence[str]) -> str:
    """What two texts begin with alike, in whole tokens, tags and words."""
    longest = sorted(tokens, key=len, reverse=True)
    units = re.compile("|".join([*map(re.escape, longest), UNITS]))
    size = 0
    for a, b in zip(units.finditer(one), units.finditer(other), strict=False):
        if a[0] != b[0]:
            break
        size = a.end()
    return one[:size]


def _no_end(record: Record, number: int) -> DataError:
    return refuse(
        record,
        f"the chat template writes no end token after message {number}",
        "use a template with {% generation %}, or data.chat_template: plain",
    )


def _incomplete(record: Record, number: int, piece: str) -> DataError:
    return refuse(
        record,
        f"the chat template leaves out a part of message {number}, or changes it: it writes "
        f"{piece[:80]!r}",
        "use another template, or change the record",
    )


def _hidden(record: Record, number: int) -> DataError:
    return refuse(
        record,
        f"the chat template rewrites message {number} when others follow it, or begins it "
        "otherwise than its generation prompt",
        "use a template with {% generation %}, or data.chat_template: plain",
    )
