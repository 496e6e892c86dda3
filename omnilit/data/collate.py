"""From samples to a packed micro-batch."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch

from omnilit.types import IGNORE, MicroBatch, Sample

NUM_FILLER_TOKENS = 2


def collate(samples: Sequence[Sample]) -> MicroBatch:
    """Pack samples one after another, without padding.

    Labels are shifted within each sample: position t predicts token t + 1, and the last
    position nothing, so that no sample is trained to foresee the next.

    Args:
        samples: At least one, none empty.
    """
    input_ids = np.concatenate([s.input_ids for s in samples]).astype(np.int64)
    labels = np.append(np.concatenate([s.labels for s in samples])[1:], IGNORE).astype(np.int64)
    position_ids = np.concatenate([np.arange(len(s), dtype=np.int64) for s in samples])
    bounds = np.cumsum([len(s) for s in samples])
    labels[bounds - 1] = IGNORE
    return MicroBatch(
        input_ids=torch.from_numpy(input_ids)[None],
        labels=torch.from_numpy(labels)[None],
        position_ids=torch.from_numpy(position_ids)[None],
        bounds=[0, *bounds.tolist()],
        origins=tuple(s.origin for s in samples),
        counts={"tokens": int((labels != IGNORE).sum())},
    )


def filler() -> MicroBatch:
    """A micro-batch without labels or origins, where a rank has none in a last window.

    It has tokens, so that a rank runs the same collectives as the others.
    """
    return MicroBatch(
        input_ids=torch.zeros((1, NUM_FILLER_TOKENS), dtype=torch.int64),
        labels=torch.full((1, NUM_FILLER_TOKENS), IGNORE),
        position_ids=torch.arange(NUM_FILLER_TOKENS)[None],
        bounds=[0, NUM_FILLER_TOKENS],
        origins=(),
        counts={"tokens": 0},
    )
