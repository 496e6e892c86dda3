"""Adds up what a step or an evaluation comes to, over micro-batches and then over ranks."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Mapping

import torch
from torch import Tensor

from omnilit.types import LossTerm, MicroBatch

Reduce = Callable[[Mapping[str, float]], dict[str, float]]


class TermMeter:
    """Sums of loss terms, kept on the device until they are read: one synchronisation a step."""

    def __init__(self) -> None:
        self._sums: dict[str, Tensor] = {}
        self._count_names: dict[str, str] = {}
        self._counts: defaultdict[str, float] = defaultdict(float)

    def add(self, terms: Mapping[str, LossTerm], batch: MicroBatch) -> None:
        """Add the terms of one micro-batch and its counts of targets."""
        for name, term in terms.items():
            value = term.sum.detach().double()
            self._sums[name] = self._sums[name] + value if name in self._sums else value
            self._count_names[name] = term.count
        for name, count in batch.counts.items():
            self._counts[name] += count

    def reset(self) -> None:
        """Forget everything."""
        self._sums.clear()
        self._count_names.clear()
        self._counts.clear()

    def read_means(self, reduce: Reduce) -> tuple[dict[str, float], dict[str, float]]:
        """Each term's mean over its targets on all ranks, and the counts of targets.

        Args:
            reduce: Sums values over ranks; every rank calls with the same names.
        """
        sums = torch.stack(list(self._sums.values())).tolist() if self._sums else []
        values = {f"sum/{name}": s for name, s in zip(self._sums, sums, strict=True)}
        values |= {f"count/{name}": count for name, count in self._counts.items()}
        total = reduce(values)
        counts = {name: total[f"count/{name}"] for name in self._counts}
        means = {
            name: total[f"sum/{name}"] / max(counts[self._count_names[name]], 1.0)
            for name in self._sums
        }
        return means, counts
