"""Data sets of samples that need no tokenizer."""

from __future__ import annotations

import os
import signal
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from omnilit.types import Origin, Sample


class CountingSource:
    """Sample i has the given length, all its tokens are i, and its row is i.

    Args:
        lengths: Tokens of each sample.
        fatal: Sample that kills the process which reads it.
        faulty: Sample that cannot be read.
    """

    def __init__(self, lengths: Sequence[int], *, fatal: int = -1, faulty: int = -1) -> None:
        self.lengths: npt.NDArray[np.int32] = np.asarray(lengths, np.int32)
        self.fatal = fatal
        self.faulty = faulty

    def __getitem__(self, index: int) -> Sample:
        if index == self.fatal:
            os.kill(os.getpid(), signal.SIGKILL)
        if index == self.faulty:
            raise OSError(f"sample {index} cannot be read")
        ids = np.full(self.lengths[index], index, np.int32)
        return Sample(ids, ids, Origin("train", "f", index))
