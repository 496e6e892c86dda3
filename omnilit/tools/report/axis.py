"""Axes: where a value lies in the picture, which values are marked, and how they are written."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Final

import numpy as np

from omnilit.tools.report.metrics import Floats, Ints

MIN_TICKS: Final = 4
MARGIN: Final = 0.05  # of the range, free above and below the curves
UNITS: Final = ((1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k"))


@dataclass(frozen=True, slots=True)
class Axis:
    """A range of values along a range of the picture.

    Args:
        low: The least value.
        high: The greatest, above `low`.
        start: Where `low` lies, in units of the picture.
        end: Where `high` lies.
        is_log: Equal ratios are equally long; `low` is above 0.
        is_whole: Only whole numbers are marked.
    """

    low: float
    high: float
    start: float
    end: float
    is_log: bool = False
    is_whole: bool = False

    def place(self, values: Floats | Ints) -> Floats:
        """Where values lie, in units of the picture."""
        low, high = self.low, self.high
        if self.is_log:
            values, low, high = np.log10(values), math.log10(low), math.log10(high)
        share = (values - low) / (high - low)
        return np.asarray(self.start + share * (self.end - self.start), np.float64)

    def ticks(self) -> list[float]:
        """The values to mark."""
        if not self.is_log:
            return linear_ticks(self.low, self.high, is_whole=self.is_whole)
        for factors in ((1,), (1, 3), (1, 2, 5)):
            found = _decades(self.low, self.high, factors)
            if len(found) >= 3:
                return found[:: -(-len(found) // (2 * MIN_TICKS))]
        return linear_ticks(self.low, self.high)


def fit_values(values: Floats, *, has_zero: bool) -> tuple[float, float]:
    """The range that an axis needs.

    Args:
        values: Finite ones.
        has_zero: The axis begins at 0 where no value is below.
    """
    low, high = float(values.min()), float(values.max())
    if has_zero and low >= 0:
        return 0.0, high * (1 + MARGIN) or 1.0
    if math.isclose(low, high, rel_tol=1e-9, abs_tol=1e-300):
        room = abs(low) * MARGIN or 1.0
    else:
        room = (high - low) * MARGIN
    return low - room, high + room


def fit_ratios(values: Floats) -> tuple[float, float]:
    """The range that a logarithmic axis needs for values above 0."""
    low, high = math.log10(values.min()), math.log10(values.max())
    room = max((high - low) * MARGIN, 0.02)
    return 10 ** (low - room), 10 ** (high + room)


def linear_ticks(low: float, high: float, *, is_whole: bool = False) -> list[float]:
    """Multiples of 1, 2 or 5 times a power of ten between `low` and `high`: four to ten of them."""
    most = (high - low) / MIN_TICKS
    power = 10.0 ** math.floor(math.log10(most))
    step = next(f * power for f in (5, 2, 1) if f * power <= most * (1 + 1e-9))
    if is_whole:
        step = max(step, 1.0)
    first, last = math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9)
    return [n * step for n in range(first, last + 1)]


def format_value(value: float, *, digits: int = 4) -> str:
    """A number in few characters: 0.25, 1.5k, 3e-5."""
    size = abs(value)
    for unit, letter in UNITS:
        if size >= unit and (size >= 1e4 or value % 100 == 0):
            return f"{value / unit:.{digits}g}{letter}"
    if value and size < 1e-3:
        mantissa, _, power = f"{value:.{digits - 1}e}".partition("e")
        return f"{mantissa.rstrip('0').rstrip('.')}e{int(power)}"
    return f"{value:.{digits}g}"


def _decades(low: float, high: float, factors: tuple[int, ...]) -> list[float]:
    first, last = math.floor(math.log10(low)), math.ceil(math.log10(high))
    marks = (f * 10.0**power for power in range(first, last + 1) for f in factors)
    return [mark for mark in marks if low <= mark <= high]
