"""What the HTML pages are made of: one document without anything beside itself, and its parts."""

from __future__ import annotations

import base64
import hashlib
from collections.abc import Sequence
from html import escape
from itertools import groupby
from pathlib import Path
from typing import Final

from omnilit.data.media.pictures import Picture, encode_picture, find_factor
from omnilit.errors import ConfigError
from omnilit.tools.data_report import Table
from omnilit.tools.data_view import Piece, ShownSample, escape_controls

STYLE: Final = """\
:root { color-scheme: light dark; --text: #1b1f24; --back: #ffffff; --soft: #5b6570;
  --line: #d5dae0; --bar: #2f6fb4; --trained: #c4ecc8; --mark: #1c6b2a; --panel: #f6f7f9; }
@media screen and (prefers-color-scheme: dark) { :root { --text: #e3e7eb; --back: #15181c;
  --soft: #98a2ad; --line: #363d45; --bar: #6fa8e0; --trained: #1f4d29; --mark: #8fdb9b;
  --panel: #1d2126; } }
body { color: var(--text); background: var(--back); margin: 2rem auto; max-width: 72rem;
  padding: 0 1rem; font: 15px/1.5 system-ui, sans-serif; }
h1 { font-size: 1.5rem; } h2 { font-size: 1.1rem; margin-top: 2rem; }
h3 { font-size: 0.85rem; margin: 0.4rem 0; color: var(--soft); }
.wide { overflow-x: auto; }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; }
th, td { padding: 0.2rem 0.8rem 0.2rem 0; text-align: right; border-bottom: 1px solid var(--line); }
th { color: var(--soft); font-weight: 600; }
th:first-child, td:first-child, .words th, .words td { text-align: left; overflow-wrap: anywhere; }
svg { font: 10px sans-serif; } svg text { fill: var(--soft); }
svg .bar { fill: var(--bar); } svg .count { text-anchor: middle; }
.sample { border: 1px solid var(--line); border-radius: 6px; margin: 1rem 0; padding: 0.6rem 1rem;
  background: var(--panel); }
pre { white-space: pre-wrap; overflow-wrap: anywhere; margin: 0.4rem 0; color: var(--soft);
  font: 13px/1.6 ui-monospace, monospace; }
mark { color: inherit; background: var(--trained); color: var(--text); border-radius: 3px;
  box-shadow: 0 0 0 1px var(--mark); }
.media { display: flex; flex-wrap: wrap; gap: 0.6rem 1rem; align-items: end; margin: 0.4rem 0; }
.media img { display: block; max-width: 100%; height: auto; border-radius: 3px; }
.media .tiny { image-rendering: pixelated; }
.media p { margin: 0; max-width: 24rem; color: var(--soft); font-size: 0.8rem;
  overflow-wrap: anywhere; }
.special { font-style: italic; opacity: 0.75; } .weight { color: var(--mark); }
"""
SAMPLES_LEGEND: Final = (
    "<mark>Marked text</mark> is supervised; a weight other than 1 stands behind it."
)


def build_document(title: str, body: str, *, style: str = "", script: str = "") -> str:
    """A whole page; its own policy keeps it from loading, and from running, anything else.

    Args:
        title: Plain text.
        body: HTML.
        style: CSS beside the common style.
        script: JavaScript, run when the page is there.
    """
    run = f"'sha256-{_digest(script)}'" if script else "'none'"
    policy = (
        f"default-src 'none'; style-src 'unsafe-inline'; script-src {run}; img-src data:; "
        "base-uri 'none'"
    )
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">\n'
        f'<meta http-equiv="Content-Security-Policy" content="{policy}">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>{escape(title)}</title>\n<style>\n{STYLE}{style}</style></head>\n"
        f"<body>\n{body}\n{f'<script>{script}</script>' if script else ''}</body></html>\n"
    )


def save_page(page: str, path: Path, *, key: str) -> None:
    """Write a page; its folder is made.

    Args:
        page: From `build_document`.
        path: Where to; what stands there is replaced.
        key: The flag that named `path`.

    Raises:
        ConfigError: It cannot be written.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        # half a character, as scraped text has them, is written as one that cannot be shown
        path.write_text(page, encoding="utf-8", errors="xmlcharrefreplace")
    except OSError as error:
        raise ConfigError(
            key=key,
            problem=f"{path} cannot be written: {error.strerror}",
            fix="name a file in a folder that can be written",
        ) from error


def render_table(table: Table, *, kind: str = "") -> str:
    """A table under its title.

    Args:
        table: Plain text.
        kind: `words` for columns that are no numbers, or another class of the page's style.
    """
    head = "".join(f'<th scope="col">{escape(name)}</th>' for name in table.header)
    rows = "\n".join(
        f"<tr>{''.join(f'<td>{escape(cell)}</td>' for cell in row)}</tr>" for row in table.rows
    )
    named = f' class="{kind}"' if kind else ""
    return (
        f'<h2>{escape(table.title)}</h2>\n<div class="wide"><table{named}>\n'
        f"<thead><tr>{head}</tr></thead>\n<tbody>{rows}</tbody></table></div>"
    )


def render_sample(sample: ShownSample) -> str:
    """A sample with what is trained of it marked."""
    parts = [
        (f"<h3>{escape(title)}</h3>" if title else "")
        # a parser drops the first line break of <pre>, so one of ours goes before the text's own
        + f"<pre>\n{_text(pieces)}</pre>"
        for title, pieces in sample.parts
    ]
    head = f"<h3>{escape(sample.heading)}</h3>{render_pictures(sample.pictures)}"
    return f'<div class="sample">{head}{"".join(parts)}</div>'


def render_pictures(pictures: Sequence[Picture]) -> str:
    """Pictures with their captions beside each other; nothing of none."""
    shown = "".join(
        f"<div>{_image(one)}<p>{escape(escape_controls(one.caption))}</p></div>" for one in pictures
    )
    return f'<div class="media">{shown}</div>' if shown else ""


def _image(picture: Picture) -> str:
    """The picture within the page itself; small ones enlarged, as squares."""
    if picture.image is None:
        return ""
    data, ending = encode_picture(picture.image)
    factor = find_factor(picture.image)
    kind = ' class="tiny"' if factor > 1 else ""
    width, height = (factor * side for side in picture.image.size)
    source = f"data:image/{ending};base64,{base64.b64encode(data).decode()}"
    return f'<img{kind} src="{source}" width="{width}" height="{height}" alt="">'


def _text(pieces: Sequence[Piece]) -> str:
    """The pieces, stretches of one weight marked together."""
    found = []
    for weight, group in groupby(pieces, key=lambda piece: piece.weight):
        text = "".join(_piece(piece) for piece in group)
        is_usual = weight in (0, 1)
        behind = "" if is_usual else f'<span class="weight">{{{weight:g}}}</span>'
        found.append(f"<mark>{text}</mark>{behind}" if weight else text)
    return "".join(found)


def _piece(piece: Piece) -> str:
    text = escape(escape_controls(piece.text))
    return f'<span class="special">{text}</span>' if piece.is_special else text


def _digest(script: str) -> str:
    return base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
