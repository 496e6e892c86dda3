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


def rounds_are_whole(view: View) -> list[Problem]:
    """A problem where an interleaved schedule cannot deal a step's micro-batches in rounds."""
    size, ranks = view[STAGES], data_ranks(view)
    if size == 1 or view[SCHEDULE] != INTERLEAVED or ranks is None or view[BATCH] is None:
        return []
    number = view[BATCH] // (view[MICRO] * ranks)
    if not number or number % max(1, number // size) == 0:
        return []
    at_once = view[MICRO] * ranks * size
    problem = f"a step has {number} micro-batches, which {size} stages cannot take in even rounds"
    return [Problem(BATCH, f"{view[BATCH]}: {problem}", f"use a multiple of {at_once}")]


def load_is_not_logged(view: View) -> list[Problem]:
    """A problem where the experts' load is to be logged, and each stage knows of its own alone."""
    if view[STAGES] == 1 or not view[LOAD]:
        return []
    problem = f"{view[LOAD]} is not possible with pp_size: {view[STAGES]}"
    return [Problem(LOAD, problem, "leave it out, or leave pp_size out")]
