"""Every so many optimizer steps, once a step."""

from __future__ import annotations


class EverySteps:
    """Says at which steps something is due; a step's other micro-batches find it done.

    Args:
        num_steps: Optimizer steps between two times; 0 for never.
    """

    def __init__(self, num_steps: int) -> None:
        self.num_steps = num_steps
        self._done_step = 0

    def begin_after(self, step: int) -> None:
        """Take `step` as done: a resumed run does nothing for what was saved."""
        self._done_step = step

    def is_due(self, step: int) -> bool:
        """True once, the first time that a due step is asked for.

        Args:
            step: Lightning's `global_step`, the same in all micro-batches of the next window.
        """
        if not self.num_steps or step == self._done_step:
            return False
        self._done_step = step
        return step % self.num_steps == 0
