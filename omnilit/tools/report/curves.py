"""Curves that are small enough to draw: means over a window, and the points that show."""

from __future__ import annotations

from typing import Final

import numpy as np

from omnilit.tools.report.metrics import Floats, Ints, Series

# Share of the steps that a window of a mean covers, and how many steps it covers at least
SMOOTHINGS: Final = ((0.01, 5), (0.05, 15))


def choose_windows(num_steps: int) -> tuple[int, ...]:
    """Steps of each window to smooth over, for runs of so many steps; all of them odd."""
    wanted = (max(round(share * num_steps), least) for share, least in SMOOTHINGS)
    return tuple(size + 1 - size % 2 for size in wanted)


def smooth(series: Series, window: int) -> Series:
    """The mean of the values around each step.

    Args:
        series: Its gaps stay gaps, and count in no mean.
        window: Odd; the steps from `window // 2` before to as many after, of those there are.
    """
    half, is_finite = window // 2, series.is_finite
    sums = np.concatenate([[0.0], np.cumsum(np.where(is_finite, series.values, 0.0))])
    counts = np.concatenate([[0], np.cumsum(is_finite)])
    first = np.searchsorted(series.steps, series.steps - half, side="left")
    end = np.searchsorted(series.steps, series.steps + half, side="right")
    num_values = np.maximum(counts[end] - counts[first], 1)
    means = (sums[end] - sums[first]) / num_values
    return Series(series.steps, np.where(is_finite, means, np.nan))


def clip(series: Series, low: float, high: float) -> Series:
    """The steps from `low` to `high`, both included."""
    first = int(np.searchsorted(series.steps, low, side="left"))
    end = int(np.searchsorted(series.steps, high, side="right"))
    return Series(series.steps[first:end], series.values[first:end])


def thin_out(series: Series, num_columns: int) -> Series:
    """At most two points a column of the picture: the least and the greatest, in their order.

    So no peak is lost, and every point that is left was measured. A column without a finite value
    keeps one gap. The first and the last point always stay.

    Args:
        series: Of any length; a short one is returned as it is.
        num_columns: Columns of equal width, in steps.
    """
    if len(series.steps) <= 2 * num_columns:
        return series
    low, high = int(series.steps[0]), int(series.steps[-1])
    columns = (series.steps - low) * num_columns // (high - low + 1)
    starts = np.flatnonzero(np.diff(columns, prepend=-1))
    kept = {0, len(series.steps) - 1}
    for start, end in zip(starts, [*starts[1:], len(series.steps)], strict=True):
        kept.update(_extremes(series.values[start:end], int(start)))
    chosen: Ints = np.array(sorted(kept))
    return Series(series.steps[chosen], series.values[chosen])


def _extremes(values: Floats, start: int) -> set[int]:
    if np.isnan(values).all():
        return {start}
    return {start + int(np.nanargmin(values)), start + int(np.nanargmax(values))}
