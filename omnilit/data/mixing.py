"""Several prepared data sets as one, and in which order a pass takes their samples."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import numpy.typing as npt

from omnilit.data.batches import SampleSource
from omnilit.data.multisource import Mixture, Stopping
from omnilit.data.packing import Ints
from omnilit.types import Sample

DRAWS, ORDERS = 1, 2  # what random numbers of a mixture are for


class MixedSamples:
    """The samples of several data sets behind each other, as one.

    Args:
        datasets: By index, with their lengths.
        names: Of the sources, which samples carry in their origins.
    """

    def __init__(self, datasets: Sequence[SampleSource], names: Sequence[str]) -> None:
        self._datasets, self._names = list(datasets), list(names)
        self._ends = np.cumsum([len(dataset.lengths) for dataset in datasets])
        self.lengths: npt.NDArray[np.int32] = np.concatenate([d.lengths for d in datasets])

    def __getitem__(self, index: int) -> Sample:
        """Sample `index` of all."""
        place = int(np.searchsorted(self._ends, index, side="right"))
        dataset = self._datasets[place]
        sample = dataset[index - int(self._ends[place]) + len(dataset.lengths)]
        return replace(sample, origin=sample.origin._replace(source=self._names[place]))


@dataclass(frozen=True, slots=True)
class MixOrder:
    """In which order the passes of a mixture take samples; pure in its fields and the pass.

    Each source is shuffled anew every time it begins again. With `never_exhausted` a pass is as
    many draws as there are samples, and each source goes on where the pass before stopped; with
    the others every pass begins each source anew.

    Args:
        sizes: Samples of each source.
        shares: How likely each source is drawn; they add up to 1.
        stopping: When a pass is over.
        seed: Of everything random.
    """

    sizes: tuple[int, ...]
    shares: tuple[float, ...]
    stopping: Stopping
    seed: int

    @classmethod
    def of(
        cls, mixture: Mixture, lengths: Sequence[npt.NDArray[np.int32]], *, seed: int
    ) -> MixOrder:
        """The order of a mixture of data sets with these lengths of samples.

        With `level: token` a source is drawn the less often the longer its samples are, so that
        the weights are shares of the tokens.
        """
        shares = np.array([source.weight for source in mixture.sources])
        if mixture.level == "token":
            shares = shares / [size.mean() for size in lengths]
        sizes = tuple(len(size) for size in lengths)
        return cls(sizes, tuple((shares / shares.sum()).tolist()), mixture.stopping, seed)

    def __call__(self, pass_index: int) -> Ints:
        """The samples of a pass, as indices of `MixedSamples`."""
        draws = self._draw(pass_index)
        order = np.empty(len(draws), np.int64)
        offset = 0
        for source, size in enumerate(self.sizes):
            places = np.flatnonzero(draws == source)
            order[places] = offset + self._samples(source, pass_index, len(places))
            offset += size
        return order

    def _draw(self, pass_index: int) -> Ints:
        """The source of each sample of a pass."""
        rng = self._generator(DRAWS, pass_index)
        total, num_sources = sum(self.sizes), len(self.sizes)
        if self.stopping == "never_exhausted":
            return rng.choice(num_sources, size=total, p=self.shares)
        draws = np.empty(0, np.int64)
        while True:
            draws = np.append(draws, rng.choice(num_sources, size=total, p=self.shares))
            ends = [self._find_end(draws, source) for source in range(num_sources)]
            if self.stopping == "first_exhausted":
                if known := [end for end in ends if end is not None]:
                    return draws[: min(known)]
            elif all(end is not None for end in ends):
                return draws[: max(end for end in ends if end is not None)]

    def _find_end(self, draws: Ints, source: int) -> int | None:
        """How many draws use a source up."""
        places = np.flatnonzero(draws == source)
        size = self.sizes[source]
        return int(places[size - 1]) + 1 if len(places) >= size else None

    def _samples(self, source: int, pass_index: int, number: int) -> Ints:
        """The next samples of a source, through as many shuffled rounds as it takes."""
        size, start = self.sizes[source], 0
        is_endless = self.stopping == "never_exhausted"
        if is_endless:
            start = sum(int((self._draw(p) == source).sum()) for p in range(pass_index))
        rounds = range(start // size, (start + number - 1) // size + 1) if number else ()
        # a pass that begins every source anew has rounds of its own
        keys = [(0, r) if is_endless else (pass_index + 1, r) for r in rounds]
        found = [self._generator(ORDERS, source, *key).permutation(size) for key in keys]
        begin = start % size
        return np.concatenate([np.empty(0, np.int64), *found])[begin : begin + number]

    def _generator(self, *key: int) -> np.random.Generator:
        sequence = np.random.SeedSequence([self.seed, *key])
        return np.random.Generator(np.random.Philox(sequence))
