"""The elements of a JSON array that is too large to be held at once."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from typing import IO, Final

from omnilit.errors import DataError

CHUNK: Final = 1 << 20  # characters that are read at a time
SNIFFED: Final = 4096  # bytes
SPACE: Final = re.compile(r"[ \t\n\r]*")
DECODER: Final = json.JSONDecoder()
BEHIND_VALUE: Final = (*" \t\n\r,]",)
# An element of which the rest is not read yet is found wrong, or its number cut, at most so far
# from the end: amid a literal, an escape or an exponent
LONGEST_WORD: Final = 16


def is_array(data: IO[bytes]) -> bool:
    """Whether JSON is an array, by its first bytes that are no space."""
    while piece := data.read(SNIFFED):
        if found := piece.removeprefix(b"\xef\xbb\xbf").lstrip():
            return found[:1] == b"["
    return False


def read_elements(text: IO[str], path: str) -> Iterator[str]:
    """The source of each element of an array, read piece by piece.

    Time grows with the length of the array, and memory with that of an element.

    Args:
        text: From the beginning.
        path: Of its file, for messages.

    Raises:
        DataError: An element is not JSON, the array has no end, or something comes behind it.
    """
    held = _Held(text)
    mark = held.mark()
    assert mark == "[", "asked for something that is no array"
    held.place += 1
    number = 0
    while (mark := held.mark()) != "]":
        if mark == ",":
            held.place += 1
            held.mark()
        number += 1
        yield _take(held, path, number)
    held.place += 1
    if held.mark():
        raise _damaged(path, number, "something comes behind the end of the array")


class _Held:
    """The part of a text that is held."""

    def __init__(self, text: IO[str]) -> None:
        self._text = text
        self.text, self.place, self.is_over = "", 0, False

    def read_on(self) -> None:
        """Drop what is behind `place`, and hold at least twice of what is left."""
        rest = self.text[self.place :]
        more = self._text.read(max(CHUNK, len(rest)))
        self.text, self.place, self.is_over = rest + more, 0, not more

    def mark(self) -> str:
        """The next character that is no space, which is where `place` is then; "" at the end."""
        while True:
            space = SPACE.match(self.text, self.place)
            assert space is not None, "matches nothing, too"
            self.place = space.end()
            if self.place < len(self.text):
                return self.text[self.place]
            if self.is_over:
                return ""
            self.read_on()


def _take(held: _Held, path: str, number: int) -> str:
    """The source of the value at `place`, which goes behind it."""
    while True:
        try:
            _, end = DECODER.raw_decode(held.text, held.place)
        except (ValueError, RecursionError) as error:
            if held.is_over and held.place == len(held.text):
                raise _damaged(path, number, "the array has no end") from error
            if held.is_over or not _may_go_on(error, len(held.text)):
                reason = error.msg if isinstance(error, json.JSONDecodeError) else error
                problem = f"element {number} of the array is not JSON ({reason})"
                raise _damaged(path, number, problem) from error
        else:
            if held.text[end : end + 1] in BEHIND_VALUE or held.is_over:
                found, held.place = held.text[held.place : end], end
                return found
            if end + LONGEST_WORD < len(held.text):
                raise _damaged(
                    path, number, f"no comma stands behind element {number} of the array"
                )
        held.read_on()


def _may_go_on(error: Exception, size: int) -> bool:
    """Whether what is wrong may be that the rest is not read yet."""
    if not isinstance(error, json.JSONDecodeError):
        return False
    return error.msg.startswith("Unterminated string") or error.pos + LONGEST_WORD > size


def _damaged(path: str, number: int, problem: str) -> DataError:
    fix = "mend the file; nothing behind that place can be read"
    return DataError(problem=problem, fix=fix, file=path, row=number)
