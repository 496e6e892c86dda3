"""Sums over the segments of a packed row."""

from __future__ import annotations

from typing import Final

import torch
from torch import Tensor

from omnilit.types import MicroBatch

WITH_FLOAT64: Final = ("cpu", "cuda")  # kinds of devices


def sum_dtype(device: torch.device) -> torch.dtype:
    """The type that long sums are made in: float64 where the device has it."""
    return torch.float64 if device.type in WITH_FLOAT64 else torch.float32


def sum_by_segment(values: Tensor, batch: MicroBatch) -> Tensor:
    """Values of the supervised tokens, added up for each segment of the row.

    In float64 where the device has it: the log-probability of a thousand tokens is some -10,000,
    of which float32 keeps three digits behind the point, and losses are of differences of such.

    Args:
        values: [R], in the order of the supervised tokens.
        batch: The row.

    Returns:
        [S] for S segments, padding included; of this rank's tokens where it holds a part.
    """
    wide = sum_dtype(values.device)
    sums = values.new_zeros(len(batch.bounds) - 1, dtype=wide)
    return sums.index_add(0, batch.target_segments(), values.to(wide))
