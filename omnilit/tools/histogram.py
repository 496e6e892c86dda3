"""Histograms of whole numbers: as text for a terminal, as SVG for a page, as a PNG."""

from __future__ import annotations

from dataclasses import dataclass
from html import escape
from pathlib import Path
from typing import Final

import numpy as np
import numpy.typing as npt

from omnilit.errors import ConfigError

Ints = npt.NDArray[np.int64]
MAX_BINS: Final = 24
MAX_CLASSES: Final = 40  # bars that can still be told apart
BAR_WIDTH: Final = 50


@dataclass(frozen=True, slots=True)
class Histogram:
    """Counts by range of a whole number.

    Args:
        title: What is counted.
        labels: Name of each bar, such as `1-64`.
        counts: Height of each bar.
    """

    title: str
    labels: tuple[str, ...]
    counts: tuple[int, ...]


def bin_lengths(values: Ints, title: str, *, max_bins: int = MAX_BINS) -> Histogram:
    """Count positive whole numbers in ranges of one width: 1, 2 or 5 times a power of ten.

    Args:
        values: At least one, none negative; [n].
        title: What they are.
        max_bins: The width is the least that needs no more ranges than these.
    """
    low, high = int(values.min()), int(values.max())
    width = next(w for w in _widths() if high // w - low // w < max_bins)
    first = low // width
    counts = np.bincount(values // width - first)
    edges = (np.arange(len(counts)) + first) * width
    labels = [str(a) if width == 1 else f"{a}-{a + width - 1}" for a in edges.tolist()]
    return Histogram(title, tuple(labels), tuple(counts.tolist()))


def count_classes(values: Ints, title: str) -> Histogram:
    """Count every value; of many, the most frequent ones and all others together."""
    classes, counts = np.unique(values, return_counts=True)
    if len(classes) <= MAX_CLASSES:
        return Histogram(title, tuple(map(str, classes.tolist())), tuple(counts.tolist()))
    order = np.argsort(-counts, kind="stable")
    kept, rest = np.sort(order[: MAX_CLASSES - 1]), order[MAX_CLASSES - 1 :]
    labels = (*map(str, classes[kept].tolist()), f"{len(rest)} others")
    return Histogram(title, labels, (*counts[kept].tolist(), int(counts[rest].sum())))


def draw_text(histogram: Histogram, *, width: int = BAR_WIDTH) -> str:
    """One line a bar; a bar that stands for anything has at least one mark.

    Args:
        histogram: At least one bar.
        width: Characters of the longest bar.
    """
    longest = max(map(len, histogram.labels))
    digits = max(len(f"{count:,}") for count in histogram.counts)
    lines = [
        f"  {label:>{longest}}  {count:>{digits},}  {'#' * size}".rstrip()
        for label, count, size in zip(
            histogram.labels, histogram.counts, _sizes(histogram, width), strict=True
        )
    ]
    return "\n".join([histogram.title, *lines])


def draw_svg(histogram: Histogram) -> str:
    """A bar chart that takes its colours from the page, so that it reads in light and dark."""
    step, height, base = 28, 220, 180
    total = step * len(histogram.labels) + 20
    sizes = _sizes(histogram, base - 30)
    parts = []
    bars = zip(histogram.labels, histogram.counts, sizes, strict=True)
    for index, (label, count, size) in enumerate(bars):
        x, name = 10 + index * step, escape(label)
        parts.append(
            f'<rect class="bar" x="{x}" y="{base - size}" width="{step - 6}" height="{size}">'
            f"<title>{name}: {count:,}</title></rect>"
            f'<text transform="translate({x + 14},{base + 8}) rotate(45)">{name}</text>'
        )
        if count:
            middle, top = x + (step - 6) // 2, base - size - 4
            parts.append(f'<text class="count" x="{middle}" y="{top}">{short_count(count)}</text>')
    return (
        f'<svg role="img" aria-label="{escape(histogram.title, quote=True)}" '
        f'viewBox="0 0 {total + 50} {height + 40}" width="{total + 50}" height="{height + 40}">'
        f"{''.join(parts)}</svg>"
    )


def save_png(histograms: list[Histogram], path: Path) -> None:
    """Draw the histograms one below the other into a PNG file; folders are made.

    Raises:
        ConfigError: The file cannot be written.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 3.6 * len(histograms)), layout="constrained")
    FigureCanvasAgg(figure)
    all_axes = figure.subplots(len(histograms), squeeze=False)[:, 0]
    for axes, histogram in zip(all_axes, histograms, strict=True):
        places = range(len(histogram.labels))
        axes.bar(places, histogram.counts, width=0.9)
        axes.set_xticks(places, histogram.labels, rotation=45, ha="right", fontsize=8)
        axes.set_title(histogram.title)
        axes.set_ylabel("samples")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        figure.savefig(path, format="png", dpi=120)
    except OSError as error:
        raise ConfigError(
            key="--png",
            problem=f"{path} cannot be written: {error.strerror}",
            fix="name a file in a folder that can be written",
        ) from error


def short_count(count: int) -> str:
    """A count in at most four characters: 999, 1.2k, 35k, 2.1M."""
    value, units = float(count), ["", "k", "M", "G"]
    while value >= 999.5 and len(units) > 1:
        value /= 1000
        units.pop(0)
    if units[0] and round(value, 1) < 10:
        return f"{value:.1f}{units[0]}"
    return f"{value:.0f}{units[0]}"


def _sizes(histogram: Histogram, largest: int) -> list[int]:
    """Lengths of the bars: proportional, but never 0 for what is there."""
    top = max(histogram.counts) or 1
    return [max(round(count / top * largest), int(count > 0)) for count in histogram.counts]


def _widths() -> list[int]:
    return [factor * 10**power for power in range(10) for factor in (1, 2, 5)]
