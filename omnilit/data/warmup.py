"""The token budget of a micro-batch, which may grow over the first steps of a run."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class BudgetSchedule:
    """Tokens that the items of a run may hold.

    The growth is measured in items, as many a step as when the run was started: a resume with
    another number of items a step goes on along the same line.

    Args:
        full: Tokens of an item after the warm-up.
        init: Tokens of an item in the first step.
        num_steps: Steps of the warm-up; 0 for none.
        items_per_step: Items of a step on all ranks when the run was started.
    """

    full: int
    init: int = 0
    num_steps: int = 0
    items_per_step: int = 1

    @property
    def num_items(self) -> int:
        """Items of the warm-up, counted from the beginning of the run."""
        return self.num_steps * self.items_per_step

    def budget(self, item: int) -> int:
        """Tokens of item `item` of the run: init + (full - init) * step // num_steps.

        Args:
            item: 0-based, counted over all passes.
        """
        step = item // self.items_per_step
        if step >= self.num_steps:
            return self.full
        return self.init + (self.full - self.init) * step // self.num_steps
