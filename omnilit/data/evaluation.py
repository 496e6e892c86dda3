"""The evaluation loader: every sample once, in the order of the files."""

from __future__ import annotations

import math
from collections.abc import Iterator

import numpy as np

from omnilit.data.batches import SampleSource, WorkerSettings, load_batches
from omnilit.data.collate import PLAIN, CollateSettings
from omnilit.data.items import WindowLayout
from omnilit.data.packing import first_fit_buffered
from omnilit.data.planned import check_budget
from omnilit.types import MicroBatch

BUFFER_SIZE = 200


class EvalLoader:
    """One pass over the data, dealt to the ranks in turn, without stamps.

    Samples are packed by first fit in their order. Fillers give every rank equally many
    micro-batches. Each `iter` starts from the beginning.

    Args:
        dataset: Samples by index, with their lengths.
        budget: Tokens that a micro-batch may hold.
        layout: This rank and the number of ranks.
        workers: Processes that collate.
        settings: What micro-batches hold.

    Raises:
        ConfigError: A sample does not fit in a micro-batch.
    """

    def __init__(
        self,
        dataset: SampleSource,
        *,
        budget: int,
        layout: WindowLayout,
        workers: WorkerSettings,
        settings: CollateSettings = PLAIN,
    ) -> None:
        self.settings = settings
        self.dataset = dataset
        self.layout = layout
        self.workers = workers
        check_budget(dataset, budget)
        order = np.arange(len(dataset.lengths))
        self._plan = first_fit_buffered(
            dataset.lengths, order, budget=budget, buffer_size=BUFFER_SIZE
        )

    def __len__(self) -> int:
        """Micro-batches of each rank."""
        return math.ceil(self._plan.size / self.layout.data_size)

    def __iter__(self) -> Iterator[MicroBatch]:
        """The micro-batches of this rank."""
        rank, size = self.layout.data_rank, self.layout.data_size
        bins = [self._plan.get(i * size + rank) for i in range(len(self))]
        return load_batches(self.dataset, bins, workers=self.workers, settings=self.settings)
