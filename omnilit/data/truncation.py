"""What becomes of a conversation that is too long."""

from __future__ import annotations

from typing import Protocol

import numpy as np

from omnilit.data.encode import Encoder, Tokens
from omnilit.data.messages import refuse
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


def fit_length(
    tokens: Tokens, record: Record, settings: LengthSettings, encoder: Encoder
) -> tuple[Tokens | None, bool]:
    """The tokens cut to `max_seq_len`.

    On the right the text ends behind the last trained turn that fits whole, so that no answer
    loses its end and no question its answer. On the left it begins behind a trained turn, with
    a whole message, such that a trained turn stays. Where no trained turn fits whole, the text
    is cut at the limit, within the turn.

    Args:
        tokens: Of a whole conversation.
        record: For messages.
        settings: Length, and what to do beyond it.
        encoder: Tells white space between turns.

    Returns:
        The tokens, or None for a record that is to be left out; and whether they end or begin
        within a turn.

    Raises:
        DataError: The record is longer and `overlong` is `error`.
    """
    size, limit = len(tokens.ids), settings.max_seq_len
    if size <= limit:
        return tokens, False
    if settings.overlong == "error":
        raise refuse(
            record,
            f"the record has {size} tokens, data.max_seq_len is {limit}",
            "raise data.max_seq_len, or set data.overlong to truncate or drop",
        )
    if settings.overlong == "drop":
        return None, False
    edges = np.flatnonzero(np.diff(tokens.is_label, prepend=False, append=False)).tolist()
    ends = edges[1::2]
    if settings.truncation_side == "right":
        fitting = [end for end in ends if end <= limit]
        return _cut(tokens, 0, fitting[-1] if fitting else limit), not fitting
    starts = (_skip_space(tokens, end, encoder) for end in ends[:-1])
    fitting = [start for start in starts if size - start <= limit]
    return _cut(tokens, fitting[0] if fitting else size - limit, size), not fitting


def _skip_space(tokens: Tokens, start: int, encoder: Encoder) -> int:
    """The first token at or behind `start` that is not white space."""
    while start < len(tokens.ids) and encoder.decode(tokens.ids[start : start + 1]).isspace():
        start += 1
    return start


def _cut(tokens: Tokens, start: int, end: int) -> Tokens:
    kept = slice(start, end)
    weights = None if tokens.weights is None else tokens.weights[kept]
    return Tokens(tokens.ids[kept], tokens.is_label[kept], weights)
