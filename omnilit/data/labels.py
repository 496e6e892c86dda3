"""Arithmetic on the labels of a sample."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from omnilit.types import IGNORE, Sample


def label_spans(labels: npt.NDArray[np.int32]) -> list[tuple[int, int]]:
    """Token ranges [start, end) that are trained, ascending and apart."""
    edges = np.flatnonzero(np.diff(labels != IGNORE, prepend=False, append=False)).tolist()
    return list(zip(edges[::2], edges[1::2], strict=True))


def count_targets(sample: Sample) -> int:
    """Trained tokens that something precedes; a sample's first token is never predicted."""
    return int((sample.labels[1:] != IGNORE).sum())
