"""Statistics and samples in a terminal: supervised tokens in colour, or in brackets in a file."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import groupby, pairwise
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import numpy.typing as npt
from rich.console import Console
from rich.text import Text

from omnilit.data.media.pictures import Picture, draw_media
from omnilit.data.media.places import show_places
from omnilit.data.media.processor import MediaProcessor
from omnilit.logging import format_table
from omnilit.tools.data_report import (
    BAD_HEADER,
    PartReport,
    Table,
    build_histograms,
    build_tables,
)
from omnilit.tools.histogram import draw_text
from omnilit.types import IGNORE, Origin, Sample

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

TRAINED = "bold black on green"
REST = "dim"


class Piece(NamedTuple):
    """A stretch of a sample, all of it trained alike.

    Args:
        text: Decoded, special tokens included.
        weight: How much each of its tokens counts in the loss; 0 where none is trained.
        is_special: True for a single special token.
    """

    text: str
    weight: float
    is_special: bool


@dataclass(frozen=True, slots=True)
class ShownSample:
    """A sample, ready to be shown.

    Args:
        number: Its 1-based place in the data.
        origin: The record it came from.
        num_tokens: All of its tokens.
        num_targets: Those that are trained.
        parts: Title and pieces; two parts for a preference pair, else one without a title.
        label: The class, for classification.
        pictures: Of its images, videos and sounds.
    """

    number: int
    origin: Origin
    num_tokens: int
    num_targets: int
    parts: tuple[tuple[str, tuple[Piece, ...]], ...]
    label: int | None = None
    pictures: tuple[Picture, ...] = ()

    @property
    def heading(self) -> str:
        """Where the sample is from, and how long it is."""
        where = f"{self.origin.source}, {self.origin.file}:{self.origin.row}"
        what = f"{self.num_targets:,} supervised" if self.label is None else f"class {self.label}"
        return f"sample {self.number:,}: {where}; {self.num_tokens:,} tokens, {what}"


def spread(num_shown: int, num_samples: int) -> list[int]:
    """Indices of `num_shown` samples, evenly over the data, the first sample among them."""
    count = min(num_shown, num_samples)
    return [index * num_samples // count for index in range(count)]


def describe_sample(
    number: int,
    sample: Sample,
    tokenizer: PreTrainedTokenizerBase,
    *,
    has_class: bool = False,
    media: MediaProcessor | None = None,
) -> ShownSample:
    """Decode a sample for showing.

    Args:
        number: Its 1-based place in the data.
        sample: What training would get.
        tokenizer: Of the model.
        has_class: True where the last label is a class and no token.
        media: Of a model that takes media, which are drawn; the first place of each is shown.
    """
    shown = sample if media is None or not sample.media else show_places(sample, media)
    pieces = _pieces(shown, tokenizer)
    if sample.pair_start is None:
        parts = (("", tuple(piece for _, piece in pieces)),)
    else:
        edge = sample.pair_start
        parts = (
            ("chosen", tuple(piece for start, piece in pieces if start < edge)),
            ("rejected", tuple(piece for start, piece in pieces if start >= edge)),
        )
    num_targets = int((token_weights(sample) > 0).sum())
    label = int(sample.labels[-1]) if has_class else None
    pictures = draw_media(sample.media, sample.origin)
    return ShownSample(number, sample.origin, len(sample), num_targets, parts, label, pictures)


def token_weights(sample: Sample) -> npt.NDArray[np.float32]:
    """How much each token counts in the loss: 0 where it has no label; float32 [T].

    The first token of a sequence is never predicted, so it counts nothing.
    """
    weights = (sample.labels != IGNORE).astype(np.float32)
    if sample.weights is not None:
        weights *= sample.weights
    for start in (0, sample.pair_start):
        if start is not None and start < len(weights):
            weights[start] = 0
    return weights


def show_parts(parts: Iterable[PartReport], console: Console) -> None:
    """Print the tables, the histograms and the notes of every part."""
    for part in parts:
        for table in build_tables(part):
            _say(console, _format(table) + "\n")
        for histogram in build_histograms(part):
            _say(console, draw_text(histogram) + "\n")
        for note in part.notes:
            _say(console, f"note: {note}")


def show_samples(samples: Sequence[ShownSample], console: Console) -> None:
    """Print samples: trained text on green in a terminal, else in [[double brackets]]."""
    if not samples:
        return
    marked = "on green" if _has_colour(console) else "in [[double brackets]]"
    _say(console, f"supervised text is {marked}; {{0.5}} behind it is a weight other than 1\n")
    for sample in samples:
        _say(console, sample.heading, style="bold")
        for picture in sample.pictures:
            _say(console, f"({escape_controls(picture.caption)})")
        for title, pieces in sample.parts:
            if title:
                _say(console, f"--- {title} ---", style="bold")
            console.print(render(pieces, has_colour=_has_colour(console)), soft_wrap=True)
        _say(console, "")


def render(pieces: Sequence[Piece], *, has_colour: bool) -> Text:
    """The pieces of a sample as one text, stretches of one weight marked together."""
    text = Text()
    for weight, group in groupby(pieces, key=lambda piece: piece.weight):
        is_trained = weight > 0
        is_bracketed = is_trained and not has_colour
        text.append("[[" if is_bracketed else "")
        for piece in group:
            style = f"{TRAINED if is_trained else REST}{' italic' if piece.is_special else ''}"
            text.append(escape_controls(piece.text), style=style if has_colour else None)
        text.append("]]" if is_bracketed else "")
        if is_trained and weight != 1:
            text.append(f"{{{weight:g}}}", style="bold yellow" if has_colour else None)
    return text


def escape_controls(text: str) -> str:
    """`text` with control characters spelled out, so that data cannot steer a terminal."""
    return "".join(
        c if c in "\n\t" or not (c < " " or "\x7f" <= c <= "\x9f") else ascii(c)[1:-1] for c in text
    )


def _pieces(sample: Sample, tokenizer: PreTrainedTokenizerBase) -> list[tuple[int, Piece]]:
    """First token and piece of every stretch between changes of weight and special tokens."""
    weights = token_weights(sample)
    specials = [i for i, token in tokenizer.added_tokens_decoder.items() if token.special]
    is_special = np.isin(sample.input_ids, specials)
    changes = np.diff(weights, prepend=weights[:1]) != 0
    edges = changes | is_special | np.roll(is_special, 1)
    starts = set(np.flatnonzero(edges).tolist()) | {0, sample.pair_start or 0}
    bounds = [*sorted(starts), len(sample)]
    found: list[tuple[int, Piece]] = []
    before = sample.input_ids[:0]
    for start, end in pairwise(bounds):
        ids = sample.input_ids[start:end]
        text = _decode_after(before, ids, tokenizer)
        found.append((start, Piece(text, float(weights[start]), bool(is_special[start]))))
        before = ids
    return found


def _decode_after(
    before: npt.NDArray[np.int32], ids: npt.NDArray[np.int32], tokenizer: PreTrainedTokenizerBase
) -> str:
    """The text of `ids` behind `before`: some tokenizers strip the space that begins a text."""
    whole = _decode(tokenizer, np.concatenate([before, ids]))
    first = _decode(tokenizer, before) if len(before) else ""
    if whole.startswith(first):
        return whole[len(first) :]
    return _decode(tokenizer, ids)  # a character's bytes lie on both sides


def _decode(tokenizer: PreTrainedTokenizerBase, ids: npt.NDArray[np.int32]) -> str:
    text = tokenizer.decode(
        ids.tolist(), skip_special_tokens=False, clean_up_tokenization_spaces=False
    )
    assert isinstance(text, str)
    return text


def _format(table: Table) -> str:
    """A table in plain text; one of long sentences as a list."""
    if table.header != BAD_HEADER:
        return format_table(*table)
    lines = [f"  {where}: {reason}. To fix: {fix}." for where, reason, fix in table.rows]
    return "\n".join([table.title, *lines])


def _has_colour(console: Console) -> bool:
    return console.is_terminal and console.color_system is not None and not console.no_color


def _say(console: Console, text: str, *, style: str | None = None) -> None:
    console.print(Text(text, style=style or ""), soft_wrap=True)
