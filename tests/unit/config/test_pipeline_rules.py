"""Which schedules of a pipeline fit which stages and steps."""

from __future__ import annotations

from typing import Any

import pytest

from omnilit.config.parallel_rules import SCHEDULE, SHARD, STAGES
from omnilit.config.pipeline_rules import BATCH, LOAD, PER_RANK
from omnilit.config.schema import Field
from tests.helpers.rules import problems

INTERLEAVED = {STAGES: 2, SCHEDULE: "interleaved", PER_RANK: 2}


@pytest.mark.parametrize(
    "given",
    [
        {STAGES: 4, BATCH: 4},
        {STAGES: 2, SCHEDULE: "gpipe"},
        INTERLEAVED,
        {**INTERLEAVED, BATCH: 2},
        {**INTERLEAVED, BATCH: 6},  # three micro-batches on each of two data ranks: one round
        {**INTERLEAVED, BATCH: 16},
        {STAGES: 2, BATCH: 10},
        {LOAD: 5},
    ],
)
def test_what_a_pipeline_can_do_is_good(given: dict[str, Any], fields: list[Field]):
    assert not problems(fields, given, world_size=4)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({SCHEDULE: "gpipe"},
         (f"{SCHEDULE}: gpipe has no effect, because pp_size is 1. To fix: leave it out, or set "
          "pp_size above 1.")),
        ({STAGES: 2, SCHEDULE: "interleaved"},
         (f"{SCHEDULE}: interleaved runs several stages a rank, and pp_stages_per_rank is 1. To "
          "fix: set pp_stages_per_rank to 2 or more, or leave it out.")),
        ({STAGES: 2, PER_RANK: 2, BATCH: 4},
         (f"{PER_RANK}: 2 has no effect, because pp_schedule: 1f1b runs one stage a rank. To fix: "
          "set pp_schedule: interleaved, or leave it out.")),
        ({STAGES: 2, PER_RANK: 0, BATCH: 4},
         (f"{PER_RANK}: 0 is out of range. To fix: use a number at least 1.")),
        ({**INTERLEAVED, BATCH: 10},
         (f"{BATCH}: 10: a step has 5 micro-batches, which 2 stages cannot take in even rounds. To "
          "fix: use a multiple of 4.")),
        ({STAGES: 4},
         (f"{BATCH}: null: a step has 1 micro-batches, and 1f1b takes at least one for each of 4 "
          "stages. To fix: use 4 or more, or set pp_schedule: gpipe.")),
        ({STAGES: 4, BATCH: 3},
         (f"{BATCH}: 3: a step has 3 micro-batches, and 1f1b takes at least one for each of 4 "
          "stages. To fix: use 4 or more, or set pp_schedule: gpipe.")),
        ({STAGES: 2, LOAD: 5, BATCH: 4},
         (f"{LOAD}: 5 is not possible with pp_size: 2. To fix: leave it out, or leave pp_size "
          "out.")),
    ],
)  # fmt: skip
def test_what_has_no_effect_or_cannot_be_dealt_is_an_error(
    given: dict[str, Any], message: str, fields: list[Field]
):
    assert problems(fields, given, world_size=4) == [message]


def test_stages_and_data_ranks_make_up_all_ranks(fields: list[Field]):
    (problem,) = problems(fields, {STAGES: 2, SHARD: 4}, world_size=4)
    assert "dp_shard_size 4 * pp_size 2 = 8 does not make up the 4 ranks" in problem
