"""A question with its pictures, the expected answer and the model's, drawn as one picture."""

from __future__ import annotations

import textwrap
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Final

from PIL import Image, ImageDraw, ImageFont

from omnilit.data.media.pictures import find_factor

WIDTH: Final = 380  # pixels
PADDING: Final = 12
FONT_SIZE: Final = 15
LINE: Final = 20  # pixels from one line of text to the next
COLUMNS: Final = 40  # characters of a line
MAX_LINES: Final = 6  # of one text
BACK: Final = "white"
INK, SOFT, RIGHT, WRONG = "#1b1f24", "#5b6570", "#1c6b2a", "#b3261e"


def draw_card(
    pictures: Sequence[Image.Image], texts: Mapping[str, str], *, is_right: bool
) -> Image.Image:
    """Pictures in a column, beside them the texts under their names.

    Args:
        pictures: Of the media of the question.
        texts: By their names, at least two: first what was asked, last the model's.
        is_right: Whether that is what was expected.
    """
    shown = [_enlarge(picture) for picture in pictures]
    lines = list(_lay_out(texts, is_right=is_right))
    left = max((picture.width for picture in shown), default=-PADDING)
    heights = sum(picture.height for picture in shown) + PADDING * max(len(shown) - 1, 0)
    size = (left + WIDTH + 2 * PADDING, max(heights, len(lines) * LINE) + 2 * PADDING)
    card = Image.new("RGB", size, BACK)
    y = PADDING
    for picture in shown:
        card.paste(picture, (PADDING, y))
        y += picture.height + PADDING
    draw, font = ImageDraw.Draw(card), _load_font()
    for number, (text, colour) in enumerate(lines):
        draw.text((left + 2 * PADDING, PADDING + number * LINE), text, fill=colour, font=font)
    return card


def _enlarge(picture: Image.Image) -> Image.Image:
    factor = find_factor(picture)
    size = (picture.width * factor, picture.height * factor)
    return picture if factor == 1 else picture.resize(size, Image.Resampling.NEAREST)


def _lay_out(texts: Mapping[str, str], *, is_right: bool) -> Iterator[tuple[str, str]]:
    """Lines and their colours."""
    first, *_, last = texts
    for name, text in texts.items():
        yield name, SOFT
        lines = [
            line for part in text.strip().splitlines() for line in textwrap.wrap(part, COLUMNS)
        ]
        if len(lines) > MAX_LINES:  # of what was asked, the end says the question
            kept = MAX_LINES - 1
            lines = ["...", *lines[-kept:]] if name == first else [*lines[:kept], "..."]
        colour = INK if name != last else RIGHT if is_right else WRONG
        yield from ((line, colour) for line in lines or ["-"])


def _load_font() -> ImageFont.FreeTypeFont:
    """Matplotlib's own, which has the letters of most alphabets."""
    from matplotlib import get_data_path

    return ImageFont.truetype(Path(get_data_path()) / "fonts/ttf/DejaVuSans.ttf", FONT_SIZE)
