"""What an optimizer step comes to, from its micro-batches to its line of metrics."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from omnilit.errors import TrainingError
from omnilit.modules.meter import TermMeter, Totals
from omnilit.types import TOKENS, LossTerm, MicroBatch, StepResult, StepStamp

FLOPS = "flops"  # among the counts of a step
WORK = "tower_work/"  # likewise, in front of the names of `TowerWork`


class StepAccount:
    """Keeps what the micro-batches of a step say, and which steps were skipped."""

    def __init__(self) -> None:
        self.meter = TermMeter()
        self._stamp: StepStamp | None = None
        self._grad_norm = 0.0
        self._skipped_steps = self._skipped_in_a_row = 0

    def begin(self, stamp: StepStamp | None) -> StepStamp:
        """Take the counts of the step that a micro-batch is of."""
        assert stamp is not None, "the training loader stamps every micro-batch"
        self._stamp = stamp
        return stamp

    def add(
        self, terms: Mapping[str, LossTerm], batch: MicroBatch, *, flops: float | None
    ) -> Tensor:
        """Add a micro-batch.

        Args:
            terms: Its loss terms.
            batch: With the stamp of its step.
            flops: Operations of training on it, where they are known.

        Returns:
            What it adds to the loss of the step, a scalar.
        """
        stamp = self.begin(batch.stamp)
        self.meter.add(terms, batch)
        # ranks and micro-batches of unknown cost count as well, under the same name on all ranks
        self.meter.count(FLOPS, math.nan if flops is None else flops)
        if batch.tower_work is not None:
            for name, work in batch.tower_work._asdict().items():
                self.meter.count(WORK + name, work)
        parts = [
            term.sum / (stamp.counts[term.count] or 1.0)
            for term in terms.values()
            if term.is_trained
        ]
        return torch.stack(parts).sum()

    def take_norm(self, grad_norm: float) -> bool:
        """Note the gradient norm of the step; returns whether the step is one to take."""
        self._grad_norm = grad_norm
        if math.isfinite(grad_norm):
            self._skipped_in_a_row = 0
            return True
        self._skipped_steps += 1
        self._skipped_in_a_row += 1
        return False

    def refuse_skips(self, limit: int) -> None:
        """Stop a run that takes no step any more.

        Args:
            limit: Skipped steps in a row.

        Raises:
            TrainingError: So many were.
        """
        if self._skipped_in_a_row >= limit:
            raise TrainingError(
                problem=f"the gradient norm was not finite in {limit} steps in a row",
                fix="lower train.optimizer.lr, or look at the data of these steps",
            )

    def result(self, totals: Totals, *, step: int, epoch: int, lr: dict[str, float]) -> StepResult:
        """The step's line.

        Args:
            totals: What the meter added up, over all ranks.
            step: Its number, from 1.
            epoch: Its epoch, from 0.
            lr: Learning rate of each parameter group in this step.
        """
        stamp = self._stamp
        assert stamp is not None, "a step has at least one micro-batch"
        flops = totals.counts[FLOPS]
        return StepResult(
            step=step,
            epoch=epoch,
            losses=totals.means,
            loss=sum(totals.means.values()),
            grad_norm=self._grad_norm,
            lr=lr,
            tokens=round(totals.counts.get(TOKENS, 0.0)),
            num_tokens=stamp.num_tokens,
            data_wait_s=stamp.data_wait_s,
            skipped_steps=self._skipped_steps,
            source_tokens=totals.source_tokens,
            source_losses=totals.source_means,
            flops=None if math.isnan(flops) else flops,
            shown={**totals.shown, **_spread_of_work(totals.counts)},
        )

    def state(self) -> dict[str, int]:
        """What a checkpoint keeps."""
        return {
            "skipped_steps": self._skipped_steps,
            "skipped_in_a_row": self._skipped_in_a_row,
        }

    def load_state(self, saved: Mapping[str, Any]) -> None:
        """Go on from what a checkpoint kept."""
        self._skipped_steps = saved.get("skipped_steps", 0)
        self._skipped_in_a_row = saved.get("skipped_in_a_row", 0)


def _spread_of_work(counts: Mapping[str, float]) -> dict[str, float]:
    """How much more than an even share of the vision tower's work the busiest ranks have.

    Ranks wait for each other in every micro-batch, so it is the busiest of each that counts.
    """
    even = counts.get(f"{WORK}even", 0.0)
    if not even:
        return {}
    name = "encoder_load/max_over_mean"
    return {name: counts[f"{WORK}after"] / even, f"{name}_before": counts[f"{WORK}before"] / even}
