"""Packed micro-batches: shifts stay within a sample."""

from __future__ import annotations

import numpy as np
import torch

from omnilit.data.collate import collate, filler
from omnilit.types import IGNORE, Origin, Sample

X = IGNORE


def _sample(ids: list[int], labels: list[int], row: int = 1) -> Sample:
    return Sample(np.asarray(ids, np.int32), np.asarray(labels, np.int32), Origin("s", "f", row))


def test_labels_are_shifted_within_each_sample_and_positions_restart():
    batch = collate([
        _sample([1, 2, 3], [X, 2, 3], row=4),
        _sample([4], [4], row=5),
        _sample([5, 6], [5, 6], row=6),
    ])  # fmt: skip
    assert batch.input_ids.tolist() == [[1, 2, 3, 4, 5, 6]]
    assert batch.labels.tolist() == [[2, 3, X, X, 6, X]]
    assert batch.position_ids.tolist() == [[0, 1, 2, 0, 0, 1]]
    assert batch.bounds == [0, 3, 4, 6]
    assert [origin.row for origin in batch.origins] == [4, 5, 6]
    assert (batch.counts, batch.num_tokens) == ({"tokens": 3}, 6)
    assert {t.dtype for t in (batch.input_ids, batch.labels, batch.position_ids)} == {torch.int64}


def test_a_filler_has_tokens_to_run_on_and_nothing_to_learn():
    batch = filler()
    assert batch.bounds == [0, batch.input_ids.shape[1]]
    assert batch.input_ids.shape == batch.labels.shape == batch.position_ids.shape
    assert (batch.labels == IGNORE).all()
    assert (batch.counts, batch.num_tokens, batch.origins) == ({"tokens": 0}, 0, ())
