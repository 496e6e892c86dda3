"""Rules on pipeline stages: pure functions of the values."""

from __future__ import annotations

from typing import Final

from omnilit.config.parallel_rules import SCHEDULE, STAGES, data_ranks
from omnilit.config.parallel_sizes import ACCELERATOR
from omnilit.config.view import View
from omnilit.errors import Problem

PER_RANK: Final = f"{ACCELERATOR}.pp_stages_per_rank"
INTERLEAVED: Final = "interleaved"
LOAD: Final = "train.log_expert_load_steps"
BATCH: Final = "train.global_batch_size"
MICRO: Final = "train.micro_batch_size"


def stages_have_their_schedule(view: View) -> list[Problem]:
    """A problem where a rank gets several stages without `interleaved`, or that with one."""
    number, schedule = view[PER_RANK], view[SCHEDULE]
    if schedule == INTERLEAVED and number == 1:
        problem = "interleaved runs several stages a rank, and pp_stages_per_rank is 1"
        return [Problem(SCHEDULE, problem, "set pp_stages_per_rank to 2 or more, or leave it out")]
    if schedule != INTERLEAVED and number > 1:
        problem = f"{number} has no effect, because pp_schedule: {schedule} runs one stage a rank"
        return [Problem(PER_RANK, problem, "set pp_schedule: interleaved, or leave it out")]
    return []


def dealing_problem(schedule: str, *, num_micro_batches: int, size: int) -> str | None:
    """Why a schedule cannot deal a step's micro-batches to `size` ranks; None where it can."""
    number, held = num_micro_batches, f"a step has {num_micro_batches} micro-batches"
    if schedule == INTERLEAVED and number % max(1, number // size):
        return f"{held}, which {size} stages cannot take in even rounds"
    if schedule == "1f1b" and number < size:
        return f"{held}, and 1f1b takes at least one for each of {size} stages"
    return None


def micro_batches_are_dealt(view: View) -> list[Problem]:
    """A problem where the schedule cannot deal a step's micro-batches to the stages."""
    size, schedule, ranks = view[STAGES], view[SCHEDULE], data_ranks(view)
    if size == 1 or ranks is None:
        return []
    at_once = view[MICRO] * ranks
    number = 1 if view[BATCH] is None else view[BATCH] // at_once
    problem = dealing_problem(schedule, num_micro_batches=number, size=size)
    if not number or problem is None:  # none at all: no multiple of what is taken at once
        return []
    fix = f"use a multiple of {at_once * size}"
    if schedule != INTERLEAVED:
        fix = f"use {at_once * size} or more, or set pp_schedule: gpipe"
    return [Problem(BATCH, f"{view[BATCH] or 'null'}: {problem}", fix)]


def load_is_not_logged(view: View) -> list[Problem]:
    """A problem where the experts' load is to be logged, and each stage knows of its own alone."""
    if view[STAGES] == 1 or not view[LOAD]:
        return []
    problem = f"{view[LOAD]} is not possible with pp_size: {view[STAGES]}"
    return [Problem(LOAD, problem, "leave it out, or leave pp_size out")]
