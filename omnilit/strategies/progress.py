"""Where a run stood when it was saved, told to Lightning's loops anew at load."""

from __future__ import annotations

from copy import deepcopy
from dataclasses import asdict, dataclass
from typing import Any


@dataclass(frozen=True, slots=True)
class Position:
    """A place in a run, in optimizer steps.

    Args:
        step: Steps done in the whole run.
        epoch: 0-based epoch that the last step belonged to.
        steps_in_epoch: Steps done in that epoch; whether it is over is decided at load.
    """

    step: int
    epoch: int
    steps_in_epoch: int

    @classmethod
    def read(cls, loops: dict[str, Any], *, step: int, epoch: int, accumulation: int) -> Position:
        """The position from the state of Lightning's loops, after a whole step."""
        ready = loops["fit_loop"]["epoch_loop.batch_progress"]["current"]["ready"]
        return cls(step=step, epoch=epoch, steps_in_epoch=ready // accumulation)

    def as_dict(self) -> dict[str, int]:
        """For the checkpoint's meta."""
        return asdict(self)

    def open_epoch(self, steps_per_epoch: int) -> Position:
        """The same position, at the start of the next epoch where this one is over.

        Args:
            steps_per_epoch: As configured now; it may differ from when the run was saved.
        """
        if self.steps_in_epoch < steps_per_epoch:
            return self
        return Position(self.step, self.epoch + 1, 0)


def resume_loops(loops: dict[str, Any], position: Position, *, accumulation: int) -> dict[str, Any]:
    """The loops' saved state, rewritten so that training goes on exactly at `position`.

    Lightning infers what was interrupted from differences between its counters, and its saved
    `is_last_batch` ends an epoch whose limit was raised since. All counters are set here to what
    they are between two steps, for the number of micro-batches in a step as configured now.

    Args:
        loops: The checkpoint's `loops`.
        position: With its epoch open, see `Position.open_epoch`.
        accumulation: Micro-batches of a step.
    """
    loops = deepcopy(loops)
    fit = loops["fit_loop"]
    fit["state_dict"].pop("combined_loader", None)  # rank 0's; each data rank has its own entry
    in_epoch, total = position.steps_in_epoch * accumulation, position.step * accumulation
    batches = fit["epoch_loop.batch_progress"]
    batches.update(is_last_batch=False)
    for scope, count in (("current", in_epoch), ("total", total)):
        batches[scope] = dict.fromkeys(batches[scope], count)
    is_inside = position.steps_in_epoch > 0
    for scope in ("current", "total"):
        counts = fit["epoch_progress"][scope]
        for name in counts:
            is_begun = name in ("ready", "started")
            counts[name] = position.epoch + 1 if is_inside and is_begun else position.epoch
    optimizer = fit["epoch_loop.automatic_optimization.optim_progress"]["optimizer"]
    for progress in (optimizer["step"], optimizer["zero_grad"]):
        for scope, steps in (("current", position.steps_in_epoch), ("total", position.step)):
            progress[scope] = dict.fromkeys(progress[scope], steps)
    fit["epoch_loop.state_dict"]["_batches_that_stepped"] = position.step
    return loops
