"""Where training is in its trips through the data, and which micro-batches come next."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from omnilit.data.packing import PassPlan, PlanSettings, plan_pass


class Position(NamedTuple):
    """How far training is, the same on every rank and for any number of ranks.

    Args:
        pass_index: 0-based trip through the data.
        items: Micro-batches of that pass that were consumed.
    """

    pass_index: int = 0
    items: int = 0


class EpochProgress(NamedTuple):
    """What was run of an epoch, in numbers that outlive a change of ranks or accumulation.

    Args:
        steps: Optimizer steps, whatever each held.
        items: Micro-batches of these steps on all ranks, those that fill a last window too.
    """

    steps: int = 0
    items: int = 0


class EpochSteps(NamedTuple):
    """Optimizer steps of the epoch at hand; an epoch with `done` and nothing `left` is over.

    Args:
        done: Steps that were run, whatever each held.
        left: Steps still to run, at today's ranks, accumulation and limits.
    """

    done: int
    left: int


class Passes:
    """The plans of all passes, each made when it is reached.

    Args:
        lengths: Tokens of each sample, [n].
        settings: What the plans depend on.
    """

    def __init__(self, lengths: npt.NDArray[np.int32], settings: PlanSettings) -> None:
        self._lengths = lengths
        self._settings = settings
        self._plans: dict[int, PassPlan] = {}

    def plan(self, pass_index: int) -> PassPlan:
        """The plan of a pass; those of the last two passes asked for are kept."""
        if pass_index not in self._plans:
            # Workers fetch ahead into the next pass while this one is still consumed.
            self._plans = {k: v for k, v in self._plans.items() if k == pass_index - 1}
            self._plans[pass_index] = plan_pass(self._lengths, self._settings, pass_index)
        return self._plans[pass_index]

    def count_windows(self, start: Position, num_items: int) -> int:
        """Windows of `num_items` micro-batches from `start` to the end of its pass."""
        return math.ceil((self.plan(start.pass_index).size - start.items) / num_items)

    def open(self, position: Position) -> Position:
        """The same place, as the beginning of the next pass where a pass is used up."""
        if position.items < self.plan(position.pass_index).size:
            return position
        return Position(position.pass_index + 1, 0)

    def advance(self, start: Position, num_items: int) -> Position:
        """Where a window that begins at `start` ends; never beyond the end of its pass."""
        end = min(start.items + num_items, self.plan(start.pass_index).size)
        return Position(start.pass_index, end)

    def walk(self, start: Position, num_windows: int, num_items: int) -> Iterator[Position]:
        """Where each of the next `num_windows` windows begins."""
        position = start
        for _ in range(num_windows):
            position = self.open(position)
            yield position
            position = self.advance(position, num_items)
