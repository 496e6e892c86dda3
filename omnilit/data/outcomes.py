"""What became of a batch of records."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from omnilit.data.quarantine import BadRecord
from omnilit.types import Sample


class Outcome(NamedTuple):
    """What became of a batch of records.

    Args:
        samples: Of all records, in order.
        num_truncated: Records that lost tokens.
        num_cut: Those of them that end or begin within a message.
        num_dropped: Records left out for their length.
        num_unsupervised: Records left out because truncation left nothing to train.
        bad: Records that cannot be used.
    """

    samples: list[Sample]
    num_truncated: int = 0
    num_cut: int = 0
    num_dropped: int = 0
    num_unsupervised: int = 0
    bad: tuple[BadRecord, ...] = ()


def join_outcomes(parts: Sequence[Outcome]) -> Outcome:
    """What became of several batches, as of one."""
    return Outcome(
        [sample for part in parts for sample in part.samples],
        sum(part.num_truncated for part in parts),
        sum(part.num_cut for part in parts),
        sum(part.num_dropped for part in parts),
        sum(part.num_unsupervised for part in parts),
        tuple(bad for part in parts for bad in part.bad),
    )
