"""Where a run stood when it was saved, told to Lightning's loops anew at load."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from copy import deepcopy
from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

from omnilit.data.epochs import EpochSteps


@runtime_checkable
class ResumableData(Protocol):
    """A data module that goes on inside an epoch and knows what is left of it."""

    @property
    def epoch_steps(self) -> EpochSteps:
        """Steps of the epoch at hand, at today's ranks, accumulation and limits."""
        ...

    def load_state_dicts(self, states: Sequence[Mapping[str, Any]]) -> None:
        """Go on from what `state_dict` gave: one that all ranks share, or one of each rank."""
        ...


@dataclass(frozen=True, slots=True)
class Position:
    """A place between two steps of a run.

    Args:
        step: Steps done in the whole run.
        epoch: 0-based epoch of the next step.
        steps_in_epoch: Steps done in that epoch.
    """

    step: int
    epoch: int
    steps_in_epoch: int


def read_place(loops: Mapping[str, Any], *, step: int) -> dict[str, int]:
    """What a checkpoint says of its place; how far its epoch is, the loader's own state says.

    Args:
        loops: The state of Lightning's loops, after a whole step, at the end of an epoch too.
        step: Steps done in the whole run.
    """
    begun = loops["fit_loop"]["epoch_progress"]["current"]["started"]
    return {"step": step, "epoch": max(begun - 1, 0)}


def resume_at(*, step: int, epoch: int, steps: EpochSteps) -> Position:
    """The place to go on at: inside the saved epoch, or at the next where that one is over.

    Args:
        step: Steps done in the whole run.
        epoch: The epoch that the last step belonged to.
        steps: Of that epoch, as the loader counts them now.
    """
    is_over = steps.done > 0 and not steps.left
    return Position(step, epoch + 1, 0) if is_over else Position(step, epoch, steps.done)


def resume_loops(loops: dict[str, Any], position: Position, *, accumulation: int) -> dict[str, Any]:
    """The loops' saved state, rewritten so that training goes on exactly at `position`.

    Lightning infers what was interrupted from differences between its counters, and its saved
    `is_last_batch` ends an epoch whose limit was raised since. All counters are set here to what
    they are between two steps, for the number of micro-batches in a step as configured now.

    Args:
        loops: The checkpoint's `loops`.
        position: From `resume_at`.
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
