"""Statistics and samples of a data set as one HTML page."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from html import escape
from typing import Final

from omnilit.tools.data_report import PartReport, build_histograms, build_tables
from omnilit.tools.data_view import ShownSample
from omnilit.tools.histogram import draw_svg
from omnilit.tools.page import SAMPLES_LEGEND, build_document, render_sample, render_table

WORDY: Final = frozenset({"what", "where"})  # tables of words, by their first column


def build_page(title: str, parts: Iterable[PartReport], samples: Sequence[ShownSample]) -> str:
    """The page.

    Args:
        title: Its heading, as plain text.
        parts: Training data, evaluation data.
        samples: Shown below the statistics.
    """
    body = [f"<h1>{escape(title)}</h1>"]
    for part in parts:
        body += [
            render_table(table, kind="words" if table.header[0] in WORDY else "")
            for table in build_tables(part)
        ]
        body += [
            f'<h2>{escape(h.title)}</h2><div class="wide">{draw_svg(h)}</div>'
            for h in build_histograms(part)
        ]
        body += [f"<p>Note: {escape(note)}</p>" for note in part.notes]
    if samples:
        body.append(f"<h2>Samples</h2><p>{SAMPLES_LEGEND}</p>")
        body += [render_sample(sample) for sample in samples]
    return build_document(title, "\n".join(body))
