"""One chart as SVG: every view that can be chosen is drawn here, and the page shows one of them.

So a page needs no script for its curves, and a view of the last steps is drawn from all of them.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from html import escape
from itertools import pairwise
from typing import Final

import numpy as np

from omnilit.tools.report.axis import Axis, fit_ratios, fit_values, format_value
from omnilit.tools.report.curves import choose_windows, clip, smooth, thin_out
from omnilit.tools.report.metrics import Series

WIDTH: Final = 560
HEIGHT: Final = 240
LEFT: Final = 56
RIGHT: Final = 548
TOP: Final = 10
BOTTOM: Final = 212
SCALE: Final = 10  # curves are drawn in tenths of a unit, in whole numbers, which are short
RANGES: Final = (("all steps", 1.0), ("last half", 0.5), ("last tenth", 0.1))
FAR: Final = 10**6  # units from the picture at which a mean that has left it stays
MAX_DOTS: Final = 60  # more points than these lie too close for dots


@dataclass(frozen=True, slots=True)
class Curve:
    """A number of one run.

    Args:
        run: The run's place on the page; its colour follows from it.
        series: At least one finite value.
        resumed_at: Steps after which the run went on from a checkpoint.
    """

    run: int
    series: Series
    resumed_at: tuple[int, ...] = ()


@dataclass(frozen=True, slots=True)
class Chart:
    """A number of several runs, laid over each other.

    Args:
        title: What it is.
        curves: One a run that has it; at least one.
        unit: Of the values.
        has_zero: The axis begins at 0.
        has_log: The reader may choose a logarithmic axis.
        is_noisy: The reader may smooth it.
        is_sparse: Every value gets a dot, where there are not too many.
    """

    title: str
    curves: tuple[Curve, ...]
    unit: str = ""
    has_zero: bool = False
    has_log: bool = False
    is_noisy: bool = False
    is_sparse: bool = False


@dataclass(frozen=True, slots=True)
class Frame:
    """What all charts of a page have in common.

    Args:
        low: The first step of all runs.
        high: The last step.
        num_columns: Columns of a curve that is thinned out.
    """

    low: int
    high: int
    num_columns: int

    @property
    def windows(self) -> tuple[int, ...]:
        """Steps of the windows that the reader may smooth over."""
        return choose_windows(self.high - self.low + 1)

    def limits(self, share: float) -> tuple[float, float]:
        """The steps that the last `share` of all steps runs over."""
        span = max(self.high - self.low, 1)
        return self.high - share * span, self.high


@dataclass(frozen=True, slots=True)
class Lines:
    """What is drawn of a curve.

    Args:
        curve: Whose lines they are.
        by_class: The values as they are and their means, by the name that the style has for them.
    """

    curve: Curve
    by_class: dict[str, Series]

    @property
    def raw(self) -> Series:
        """The values as they are."""
        return self.by_class["raw"]


def draw_chart(chart: Chart, frame: Frame) -> str:
    """A figure with all its views, and the points that a reader can point at."""
    views = []
    points: dict[int, set[int]] = {curve.run: set() for curve in chart.curves}
    whole = [_prepare_lines(chart, frame, curve) for curve in chart.curves]
    for index, (_, share) in enumerate(RANGES):
        low, high = frame.limits(share)
        kept = [_cut_lines(lines, low, high, frame.num_columns) for lines in whole]
        for lines in kept:
            points[lines.curve.run].update(lines.raw.steps[lines.raw.is_finite].tolist())
        views += [
            _draw_view(kept, x_axis, y_axis, name=f"v{index}", has_dots=chart.is_sparse)
            for x_axis, y_axis in _choose_axes(chart, kept, low, high)
        ]
    label = escape(f"{chart.title} over steps, {len(chart.curves)} curves", quote=True)
    return (
        f'<figure class="chart"><figcaption>{_caption(chart)}</figcaption>'
        f'<svg role="img" aria-label="{label}" viewBox="0 0 {WIDTH} {HEIGHT}" '
        f'data-plot="{LEFT} {RIGHT} {TOP} {BOTTOM}">{"".join(views)}'
        f'</svg><script type="application/json">{_encode_points(chart, points)}</script></figure>'
    )


def draw_path(series: Series, x_axis: Axis, y_axis: Axis) -> str:
    """The curve as SVG path data in tenths of a unit: one move a stretch, then relative lines.

    A gap ends a stretch; a point between two gaps is drawn as a dot by its round ends.
    """
    x = np.rint(x_axis.place(series.steps) * SCALE)
    y = np.rint(np.clip(y_axis.place(series.values), -FAR, FAR) * SCALE)
    is_finite = series.is_finite
    edges = np.flatnonzero(np.diff(is_finite, prepend=False, append=False))
    stretches = []
    for start, end in zip(edges[::2], edges[1::2], strict=True):
        places = list(zip(x[start:end].astype(int), y[start:end].astype(int), strict=True))
        lines = " ".join(f"{b[0] - a[0]} {b[1] - a[1]}" for a, b in pairwise(places))
        stretches.append(f"M{places[0][0]} {places[0][1]}l{lines or '0 0'}")
    return "".join(stretches)


def _prepare_lines(chart: Chart, frame: Frame, curve: Curve) -> Lines:
    """The curve over all steps, with its means where it is noisy."""
    by_class = {"raw": curve.series}
    if chart.is_noisy:
        for level, window in enumerate(frame.windows, start=1):
            by_class[f"mean m{level}"] = smooth(curve.series, window)
    return Lines(curve, by_class)


def _cut_lines(lines: Lines, low: float, high: float, num_columns: int) -> Lines:
    """What shows of the steps from `low` to `high`; means are smooth and need half as much."""
    cut = {name: clip(series, low, high) for name, series in lines.by_class.items()}
    thin = {
        name: thin_out(series, num_columns if name == "raw" else num_columns // 2)
        for name, series in cut.items()
    }
    return Lines(lines.curve, thin)


def _choose_axes(
    chart: Chart, kept: Iterable[Lines], low: float, high: float
) -> list[tuple[Axis, Axis]]:
    """The axes of each scale of a range: a linear one, and a logarithmic one where it has any."""
    values = np.concatenate([lines.raw.values[lines.raw.is_finite] for lines in kept])
    x_axis = Axis(low, high, LEFT, RIGHT, is_whole=True)
    if not len(values):
        return [(x_axis, Axis(0, 1, BOTTOM, TOP))]
    found = [(x_axis, Axis(*fit_values(values, has_zero=chart.has_zero), BOTTOM, TOP))]
    above = values[values > 0]
    if chart.has_log and len(above):
        found.append((x_axis, Axis(*fit_ratios(above), BOTTOM, TOP, is_log=True)))
    return found


def _draw_view(
    kept: Iterable[Lines], x_axis: Axis, y_axis: Axis, *, name: str, has_dots: bool
) -> str:
    scale = "logarithmic" if y_axis.is_log else "linear"
    curves = "".join(_draw_lines(lines, x_axis, y_axis, has_dots=has_dots) for lines in kept)
    return (
        f'<g class="view {name} {scale}" data-x="{x_axis.low!r} {x_axis.high!r}" '
        f'data-y="{y_axis.low!r} {y_axis.high!r}">{_draw_grid(x_axis, y_axis)}{curves}</g>'
    )


def _draw_lines(lines: Lines, x_axis: Axis, y_axis: Axis, *, has_dots: bool) -> str:
    drawn = [
        f'<path class="{name}" d="{draw_path(_drawable(series, y_axis), x_axis, y_axis)}"/>'
        for name, series in lines.by_class.items()
    ]
    if has_dots and len(lines.raw.steps) <= MAX_DOTS:
        dots = _draw_dots(_drawable(lines.raw, y_axis), x_axis, y_axis)
        drawn.append(f'<path class="dots" d="{dots}"/>')
    for step in lines.curve.resumed_at:
        if x_axis.low <= step <= x_axis.high:
            x = round(x_axis.place(np.array([step]))[0] * SCALE)
            drawn.append(f'<path class="resumed" d="M{x} {TOP * SCALE}V{BOTTOM * SCALE}"/>')
    noisy = " noisy" if len(lines.by_class) > 1 else ""
    return f'<g class="curve r{lines.curve.run}{noisy}" transform="scale(.1)">{"".join(drawn)}</g>'


def _draw_dots(series: Series, x_axis: Axis, y_axis: Axis) -> str:
    """Every point as a stretch of its own, which round ends make a dot."""
    pairs = zip(series.steps, series.values, strict=True)
    return "".join(
        draw_path(Series(step[None], value[None]), x_axis, y_axis) for step, value in pairs
    )


def _drawable(series: Series, y_axis: Axis) -> Series:
    """The series with gaps where a logarithmic axis has no place."""
    if not y_axis.is_log:
        return series
    return Series(series.steps, np.where(series.values > 0, series.values, np.nan))


def _draw_grid(x_axis: Axis, y_axis: Axis) -> str:
    x_ticks, y_ticks = x_axis.ticks(), y_axis.ticks()
    x_places = x_axis.place(np.array(x_ticks, np.float64)).tolist()
    y_places = y_axis.place(np.array(y_ticks, np.float64)).tolist()
    lines = "".join(f"M{LEFT} {y:.1f}H{RIGHT}" for y in y_places)
    lines += "".join(f"M{x:.1f} {BOTTOM}v4" for x in x_places)
    labels = [
        f'<text class="y" x="{LEFT - 6}" y="{y + 3.5:.1f}">{format_value(tick)}</text>'
        for tick, y in zip(y_ticks, y_places, strict=True)
    ]
    labels += [
        f'<text class="x" x="{x:.1f}" y="{BOTTOM + 17}">{format_value(tick)}</text>'
        for tick, x in zip(x_ticks, x_places, strict=True)
    ]
    labels.append(f'<text class="y" x="{LEFT - 6}" y="{BOTTOM + 17}">step</text>')
    return f'<path class="grid" d="{lines}M{LEFT} {BOTTOM}H{RIGHT}"/>{"".join(labels)}'


def _caption(chart: Chart) -> str:
    unit = f' <span class="unit">{escape(chart.unit)}</span>' if chart.unit else ""
    switch = '<label class="switch"><input type="checkbox" class="log"> log scale</label>'
    return f"<b>{escape(chart.title)}</b>{unit}{switch if chart.has_log else ''}"


def _encode_points(chart: Chart, points: dict[int, set[int]]) -> str:
    """The points of each curve as JSON: run, steps as differences, values in six digits."""
    found: list[Sequence[object]] = []
    for curve in chart.curves:
        is_kept = np.isin(curve.series.steps, sorted(points[curve.run]))
        steps = np.diff(curve.series.steps[is_kept], prepend=0).tolist()
        values = [float(f"{value:.6g}") for value in curve.series.values[is_kept].tolist()]
        found.append((curve.run, steps, values))
    return json.dumps(found, separators=(",", ":"), allow_nan=False)
