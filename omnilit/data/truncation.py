"""What becomes of a conversation that is too long."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple, Protocol

import numpy as np

from omnilit.data.encode import Tokens
from omnilit.data.messages import ASSISTANT, Turn, refuse
from omnilit.types import Record


class LengthSettings(Protocol):
    """The settings that matter here; see `TransformSettings`."""

    @property
    def max_seq_len(self) -> int:
        """Tokens that a sample may have."""
        ...

    @property
    def overlong(self) -> str:
        """truncate, drop or error."""
        ...

    @property
    def truncation_side(self) -> str:
        """Left or right."""
        ...


class Fitted(NamedTuple):
    """What is kept of a conversation.

    Args:
        tokens: None for a record that is to be left out.
        is_cut: They end or begin within a turn.
        start: The first of them.
    """

    tokens: Tokens | None
    is_cut: bool = False
    start: int = 0

    @property
    def end(self) -> int:
        """Behind the last of them."""
        return self.start + (0 if self.tokens is None else len(self.tokens.ids))


def fit_length(
    tokens: Tokens,
    record: Record,
    settings: LengthSettings,
    find_starts: Callable[[], Sequence[int]],
    blocks: Sequence[tuple[int, int]] = (),
) -> Fitted:
    """The tokens cut to `max_seq_len`.

    On the right the text ends behind the last trained turn that fits whole, so that no answer
    loses its end and no question its answer. On the left it begins with the first whole message
    that fits with all that follows. Where there is none, the text is cut at the limit, within a
    message, but never within a block: there it loses the whole of it.

    Args:
        tokens: Of a whole conversation.
        record: For messages.
        settings: Length, and what to do beyond it.
        find_starts: Says where it may begin, ascending; asked only for what is cut on the left.
        blocks: Tokens [start, end) that stay together: those of an image.

    Raises:
        DataError: The record is longer and `overlong` is `error`.
    """
    size, limit = len(tokens.ids), settings.max_seq_len
    if size <= limit:
        return Fitted(tokens)
    if settings.overlong == "error":
        raise refuse(
            record,
            f"the record has {size} tokens, data.max_seq_len is {limit}",
            "raise data.max_seq_len, or set data.overlong to truncate or drop",
        )
    if settings.overlong == "drop":
        return Fitted(None)
    if settings.truncation_side == "right":
        edges = np.flatnonzero(np.diff(tokens.is_label, prepend=False, append=False)).tolist()
        fitting = [end for end in edges[1::2] if end <= limit]
        end = fitting[-1] if fitting else min([limit, *(a for a, b in blocks if a < limit < b)])
        return Fitted(_cut(tokens, 0, end) if end else None, not fitting)
    fitting = [start for start in find_starts() if size - start <= limit]
    first = size - limit
    start = fitting[0] if fitting else max([first, *(b for a, b in blocks if a < first < b)])
    return Fitted(_cut(tokens, start, size) if start < size else None, not fitting, start)


def list_starts(turns: Sequence[Turn], places: Sequence[int]) -> list[int]:
    """Where a conversation may begin that loses its first messages.

    Something trained must stay, and what is trained of the assistant keeps the message that it
    answers.

    Args:
        turns: Of the conversation.
        places: Where each of them begins; -1 where that is not known.
    """
    last = max(index for index, turn in enumerate(turns) if turn.is_trained)
    return [
        places[index]
        for index in range(1, last + 1)
        if places[index] >= 0 and not _is_answer(turns, index)
    ]


def _is_answer(turns: Sequence[Turn], index: int) -> bool:
    turn = turns[index]
    return turn.role == ASSISTANT and turn.is_trained and not turns[index - 1].is_trained


def _cut(tokens: Tokens, start: int, end: int) -> Tokens:
    kept = slice(start, end)
    weights = None if tokens.weights is None else tokens.weights[kept]
    return Tokens(tokens.ids[kept], tokens.is_label[kept], weights)
