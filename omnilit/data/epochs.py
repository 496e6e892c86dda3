"""How long an epoch is, and how much of it is run."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import NamedTuple


class EpochProgress(NamedTuple):
    """What was run of an epoch, in numbers that outlive a change of ranks or accumulation.

    Args:
        steps: Optimizer steps, whatever each held.
        items: Micro-batches of these steps on all ranks, those that fill a last window too.
        number: Of the epoch, 0-based.
    """

    steps: int = 0
    items: int = 0
    number: int = 0


class EpochSteps(NamedTuple):
    """Optimizer steps of the epoch at hand; an epoch with `done` and nothing `left` is over.

    Args:
        done: Steps that were run, whatever each held.
        left: Steps still to run, at today's ranks, accumulation and limits.
    """

    done: int
    left: int


@dataclass(frozen=True, slots=True)
class EpochLength:
    """How an epoch is measured.

    Args:
        size: Tokens of an epoch, or samples where a micro-batch is a number of samples; each
            micro-batch counts as full. None ends an epoch where its pass ends.
        max_steps: Most steps of an epoch, however it is measured; the next epoch goes on.
        warm_up_ratio: Share of the run's steps in which the budget grows. The first epoch is
            longer by half of it, since micro-batches are half as large then in the mean.
    """

    size: int | None
    max_steps: int | None = None
    warm_up_ratio: float = 0.0

    def count_left(
        self, epoch: EpochProgress, *, num_items: int, item_size: int, left_of_pass: int | None
    ) -> int:
        """Steps of an epoch that are still to run.

        Args:
            epoch: What is run of it.
            num_items: Micro-batches of a step on all ranks.
            item_size: Tokens or samples of a full micro-batch.
            left_of_pass: Steps to the end of the pass; None where its length is not known.
        """
        left = left_of_pass
        if self.size is not None:
            ratio = self.warm_up_ratio if epoch.number == 0 else 0.0
            size = int(self.size * (1 + ratio / 2)) - epoch.items * item_size
            left = math.ceil(max(size, 0) / (item_size * num_items))
        if self.max_steps is not None:
            rest = self.max_steps - epoch.steps
            left = rest if left is None else min(left, rest)
        assert left is not None, "a stream needs train_size or max_steps"
        return max(left, 0)
