"""What the micro-batches of a step come to."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import pytest
import torch

from omnilit.losses.lm import lm_terms
from omnilit.modules.step import StepAccount
from omnilit.types import MicroBatch, StepStamp

IDS = torch.tensor([[1, 2]])
STAMP = StepStamp({"tokens": 8}, 8, 0, 2)
BATCH = MicroBatch(IDS, IDS, IDS, bounds=[0, 2], origins=(), counts={"tokens": 2}, stamp=STAMP)


def flops_of(by_rank: Sequence[Sequence[float | None]]) -> float | None:
    """Of a step whose micro-batches cost so much on each rank, as far as that is known."""
    told: list[Mapping[str, float]] = []

    def add_up(values: Mapping[str, float]) -> dict[str, float]:
        """One all-reduce: every rank has to call with the same names, in the same order."""
        told.append(values)
        assert list(values) == list(told[0])
        return {name: sum(rank[name] for rank in told) for name in values}

    result = None
    for costs in by_rank:
        account = StepAccount()
        for cost in costs:
            account.add(lm_terms(torch.ones(2)), BATCH, flops=cost)
        totals = account.meter.read_totals(add_up)  # over all ranks, for the last of them
        result = account.result(totals, step=1, epoch=0, lr={})
    assert result is not None
    return result.flops


@pytest.mark.parametrize(
    ("by_rank", "expected"),
    [
        ([[3.0, 4.0], [5.0, 0.0]], 12.0),
        ([[3.0, None], [5.0, 0.0]], None),  # of one micro-batch they are not known
        ([[None, None], [5.0, 0.0]], None),  # of one rank
        ([[None], [None]], None),
    ],
)
def test_operations_of_a_step_are_told_where_those_of_all_its_parts_are_known(by_rank, expected):
    assert flops_of(by_rank) == expected
