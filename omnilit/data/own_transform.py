"""A look at what a transform of the user's own gives, before anything is built on it."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from omnilit.errors import DataError
from omnilit.types import IGNORE, Sample

KEY = "data.transform"


def check_samples(samples: Sequence[object], *, max_seq_len: int) -> None:
    """See that samples are what packing, the cache and the collator take them for.

    Args:
        samples: What `encode` gave.
        max_seq_len: Tokens that each sequence may have; a pair is two.

    Raises:
        DataError: The first sample that is not, with its record and the reason.
    """
    for sample in samples:
        if not isinstance(sample, Sample):
            raise DataError(
                problem=f"{KEY} gave a {type(sample).__name__}, not a Sample",
                fix="return Outcome([Sample(...), ...]) of omnilit.types",
            )
        if reason := _find_fault(sample, max_seq_len):
            raise DataError(
                problem=f"{KEY} gave a sample {reason}",
                fix="correct encode",
                file=sample.origin.file,
                row=sample.origin.row,
            )


def _find_fault(sample: Sample, max_seq_len: int) -> str:
    ids, labels, weights = sample.input_ids, sample.labels, sample.weights
    limit = max_seq_len * (1 if sample.pair_start is None else 2)
    if ids.dtype != np.int32 or labels.dtype != np.int32 or ids.ndim != 1:
        return f"whose ids are {ids.dtype} {ids.shape} and labels {labels.dtype}, not int32 [T]"
    if not len(ids) or labels.shape != ids.shape:
        return f"with {len(ids)} ids and {len(labels)} labels"
    if len(ids) > limit:
        return f"of {len(ids)} tokens, more than the {limit} of data.max_seq_len"
    if weights is not None and (weights.dtype != np.float32 or weights.shape != ids.shape):
        return f"whose weights are {weights.dtype} {weights.shape}, not float32 [T]"
    # the last label may be a class
    if ((labels != IGNORE) & (labels != ids))[:-1].any():
        return f"with labels that are neither its ids nor {IGNORE}; they are shifted later"
    return ""
