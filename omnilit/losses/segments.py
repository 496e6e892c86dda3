"""Sums over the segments of a packed row."""

from __future__ import annotations

from torch import Tensor

from omnilit.types import MicroBatch


def sum_by_segment(values: Tensor, batch: MicroBatch) -> Tensor:
    """Values of the supervised tokens, added up for each segment of the row.

    Args:
        values: [R], in the order of the supervised tokens.
        batch: The row.

    Returns:
        [S] for S segments, padding included; of this rank's tokens where it holds a part.
    """
    sums = values.new_zeros(len(batch.bounds) - 1)
    return sums.index_add(0, batch.target_segments(), values)
