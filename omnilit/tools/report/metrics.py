"""The numbers of a run, read from its `metrics.jsonl` whatever state that is in."""

from __future__ import annotations

import json
import math
import re
from array import array
from collections import defaultdict
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final, NamedTuple

import numpy as np
import numpy.typing as npt

from omnilit.checkpoint.layout import METRICS

Ints = npt.NDArray[np.int64]
Floats = npt.NDArray[np.float64]
# What a chart can be reckoned with: the axis is wider than its values, and has ticks between them
LARGEST: Final = 1e300
SMALLEST: Final = 1e-300
LAST_STEP: Final = 2**53  # the last one that a chart, and the browser's numbers, tell from the next


class Series(NamedTuple):
    """One number over the steps that have it.

    Args:
        steps: Rising; int64 [n].
        values: NaN where the number was not finite or as good as infinite; float64 [n].
    """

    steps: Ints
    values: Floats

    @property
    def is_finite(self) -> npt.NDArray[np.bool_]:
        """Where there is a number; [n]."""
        return np.isfinite(self.values)


@dataclass(frozen=True, slots=True)
class Metrics:
    """All numbers of a run.

    Args:
        series: By name, in the order in which the file first has them.
        num_unreadable: Lines that are no step, such as one that a killed run left half written.
    """

    series: dict[str, Series] = field(default_factory=dict)
    num_unreadable: int = 0

    @property
    def last_step(self) -> int:
        """The newest step; 0 of none."""
        return max((int(one.steps[-1]) for one in self.series.values()), default=0)

    def finite(self, name: str) -> Series | None:
        """The finite values of a number; None where there are none."""
        if name not in self.series:
            return None
        one = self.series[name]
        kept = Series(one.steps[one.is_finite], one.values[one.is_finite])
        return kept if len(kept.steps) else None


class SetAside(NamedTuple):
    """Lines that are no longer the run's, in `metrics.jsonl.<k>`.

    Args:
        first_step: The first step in there; None where no line can be read.
        num_lines: How many there are.
    """

    first_step: int | None
    num_lines: int

    @property
    def is_resume(self) -> bool:
        """Whether the run went on from the step before; else another run began anew."""
        return self.first_step != 1


def read_metrics(file: Path) -> Metrics:
    """The numbers of every step; of a step that stands there twice, the later line's."""
    if not file.is_file():
        return Metrics()
    steps: defaultdict[str, array[int]] = defaultdict(lambda: array("q"))
    values: defaultdict[str, array[float]] = defaultdict(lambda: array("d"))
    num_unreadable = 0
    with file.open(encoding="utf-8", errors="replace") as lines:
        for text in lines:
            line = _parse(text)
            if line is None:
                num_unreadable += 1
                continue
            step = line["step"]
            for name, value in line.items():
                if name != "step" and _is_number(value):
                    steps[name].append(step)
                    values[name].append(_to_float(value))
    return Metrics({name: _tidy(steps[name], values[name]) for name in steps}, num_unreadable)


def read_set_aside(folder: Path) -> list[SetAside]:
    """What earlier starts left in a run's folder, oldest first."""
    paths = folder.glob(f"{METRICS}.*")
    numbers = {int(path.suffix[1:]): path for path in paths if re.fullmatch(r"\.\d+", path.suffix)}
    return [_read_aside(numbers[number]) for number in sorted(numbers)]


def _read_aside(path: Path) -> SetAside:
    first, number = None, 0
    with path.open(encoding="utf-8", errors="replace") as lines:
        for text in lines:
            number += 1
            line = _parse(text) if first is None else None
            first = line["step"] if line is not None else first
    return SetAside(first, number)


def _parse(text: str) -> dict[str, Any] | None:
    """A line as an object with a step; None of anything else."""
    try:
        line = json.loads(text)
    except (ValueError, RecursionError):  # torn, or nothing of ours
        return None
    if not isinstance(line, dict) or type(step := line.get("step")) is not int:
        return None
    return line if 0 <= step <= LAST_STEP else None


def _is_number(value: object) -> bool:
    return value is None or (isinstance(value, int | float) and not isinstance(value, bool))


def _to_float(value: float | None) -> float:
    try:
        return math.nan if value is None else float(value)
    except OverflowError:  # a whole number of any length
        return math.nan


def _tidy(steps: Iterable[int], values: Iterable[float]) -> Series:
    """Rising steps, each once."""
    step_array, value_array = np.array(steps, np.int64), np.array(values, np.float64)
    order = np.argsort(step_array, kind="stable")
    step_array, value_array = step_array[order], value_array[order]
    is_last = np.append(step_array[1:] != step_array[:-1], True)
    size = np.abs(value_array)
    value_array[~(size <= LARGEST)] = np.nan
    value_array[size < SMALLEST] = 0.0
    return Series(step_array[is_last], value_array[is_last])
