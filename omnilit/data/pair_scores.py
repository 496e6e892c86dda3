"""Numbers of preference pairs, kept on disk and found by the record that a pair is made of."""

from __future__ import annotations

from pathlib import Path
from typing import Final

import numpy as np
import numpy.typing as npt
from safetensors.numpy import load_file, save_file

from omnilit.data.cache import COMPLETE, TokenDataset, publish
from omnilit.errors import ConfigError
from omnilit.types import Origin

KEY: Final = "dpo_config.precompute_reference"
FILE: Final = "scores.safetensors"
NAME: Final = "scores"
ROW_BITS: Final = 40  # of a number that stands for a file and a row of it


class PairScoreTable:
    """Two numbers for each pair of prepared data: of the chosen and of the rejected answer.

    Args:
        dataset: Pairs, one a record.

    Raises:
        ConfigError: A record has several pairs.
    """

    def __init__(self, dataset: TokenDataset) -> None:
        first: dict[str, int] = {}
        for index, path in enumerate(dataset.files):
            first.setdefault(path, index)  # a file that is named twice is one
        self.source = dataset.source
        self._files = first
        same = np.asarray([first[path] for path in dataset.files], np.int64)
        keys = (same[dataset.column("file")] << ROW_BITS) + dataset.column("row")
        self._keys, places = np.unique(keys, return_inverse=True)
        digests = dataset.column("digest")
        of_key = np.empty(len(self._keys), digests.dtype)
        of_key[places] = digests
        if (of_key[places] != digests).any():
            raise ConfigError(
                key=KEY,
                problem=f"data.transform makes several pairs of a record of {dataset.source}, and "
                "what is computed before training is kept by record",
                fix="leave it out, or make one pair of each record",
            )
        self.values: npt.NDArray[np.float64] = np.full((len(self._keys), 2), np.nan)

    def find(self, origin: Origin) -> int | None:
        """The row of `values` for the pair of a record; None where it is not among these."""
        file = self._files.get(origin.file)
        if file is None or origin.source != self.source:
            return None
        key = (file << ROW_BITS) + origin.row
        row = int(np.searchsorted(self._keys, key))
        return row if row < len(self._keys) and self._keys[row] == key else None

    def save(self, folder: Path) -> None:
        """Write the numbers; the folder appears whole or not at all."""
        assert not np.isnan(self.values).any(), "every pair was scored"
        with publish(folder) as staged:
            save_file({NAME: self.values}, staged / FILE)

    def load(self, folder: Path) -> None:
        """Read what `save` wrote."""
        self.values = load_file(folder / FILE)[NAME]


def is_saved(folder: Path) -> bool:
    """Whether `PairScoreTable.save` has written `folder`."""
    return (folder / COMPLETE).is_file()
