"""Which segment of a packed row each supervised token belongs to."""

from __future__ import annotations

import torch
from torch import Tensor

from omnilit.types import IGNORE, MicroBatch


def find_segments(batch: MicroBatch) -> Tensor:
    """The segment of each supervised token, by its number in `batch.bounds`.

    Args:
        batch: A whole row, or one rank's part of it.

    Returns:
        int64 [R], in the order of the R supervised tokens.
    """
    positions = (batch.labels[0] != IGNORE).nonzero()[:, 0]
    if batch.row_index is not None:
        positions = batch.row_index[0, positions]
    ends = torch.tensor(batch.bounds[1:], device=positions.device)
    return torch.bucketize(positions, ends, right=True)


def sum_by_segment(values: Tensor, batch: MicroBatch) -> Tensor:
    """Values of the supervised tokens, added up for each segment of the row.

    Args:
        values: [R], in the order of the supervised tokens.
        batch: The row.

    Returns:
        [S] for S segments, padding included; of this rank's tokens where it holds a part.
    """
    sums = values.new_zeros(len(batch.bounds) - 1)
    return sums.index_add(0, find_segments(batch), values)
