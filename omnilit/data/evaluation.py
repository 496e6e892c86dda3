"""The evaluation loader: every sample once, in the order of the files."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator

import numpy as np

from omnilit.data.batches import Made, SampleSource, WorkerSettings, load_batches
from omnilit.data.collate import PLAIN, CollateSettings
from omnilit.data.items import WindowLayout
from omnilit.data.packing import first_fit_buffered
from omnilit.data.planned import check_budget
from omnilit.data.quarantine import Skipping
from omnilit.errors import OmniError
from omnilit.parallel.collectives import raise_together
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
        skipping: What becomes of samples whose media turn out to be bad.
        agree: Called with every micro-batch that may fail, on all ranks: raises on all of them
            where one gives an error.

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
        skipping: Skipping | None = None,
        agree: Callable[[BaseException | None], object] = raise_together,
    ) -> None:
        self.settings = settings
        self.dataset = dataset
        self.layout = layout
        self.workers = workers
        self.skipping = skipping or Skipping()
        self.agree = agree
        check_budget(dataset, budget)
        order = np.arange(len(dataset.lengths))
        self._plan = first_fit_buffered(
            dataset.lengths, order, budget=budget, buffer_size=BUFFER_SIZE
        )

    def __len__(self) -> int:
        """Micro-batches of each rank."""
        return math.ceil(self._plan.size / self.layout.data_size)

    def __iter__(self) -> Iterator[MicroBatch]:
        """The micro-batches of this rank.

        Raises:
            DataError: The media of a sample on any rank cannot be read.
        """
        rank, size = self.layout.data_rank, self.layout.data_size
        bins = [self._plan.get(i * size + rank) for i in range(len(self))]
        made = load_batches(self.dataset, bins, workers=self.workers, settings=self.settings)
        for _ in bins:
            yield self._next(made)

    def _next(self, made: Iterator[Made]) -> MicroBatch:
        if self.settings.media is None:  # nothing can be bad that was prepared
            return next(made).batch
        try:
            batch, bad = next(made)
        except OmniError as error:
            self.agree(error)
            raise
        self.agree(None)
        if bad:
            self.skipping.on_bad(bad)
        return batch
