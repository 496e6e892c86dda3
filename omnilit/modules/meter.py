"""Adds up what a step or an evaluation comes to, over micro-batches and then over ranks."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor

from omnilit.types import OF_SOURCE, LossTerm, MicroBatch

Reduce = Callable[[Mapping[str, float]], dict[str, float]]


@dataclass(frozen=True, slots=True)
class Totals:
    """What was added up, over all ranks.

    Args:
        means: Each loss term's mean over its targets.
        shown: Likewise of terms that are only shown.
        counts: Targets of each kind.
        source_means: Mean loss of the tokens of each data source, where there are several and
            the source has any.
    """

    means: dict[str, float]
    counts: dict[str, float]
    shown: dict[str, float] = field(default_factory=dict)
    source_means: dict[str, float] = field(default_factory=dict)

    @property
    def source_tokens(self) -> dict[str, int]:
        """Supervised tokens of each data source, where there are several."""
        return {name: round(self.counts[OF_SOURCE + name]) for name in source_names(self.counts)}

    def of_evaluation(self) -> dict[str, float]:
        """The numbers of an evaluation, by the names of `metrics.jsonl`."""
        result = {"eval_loss": sum(self.means.values())}
        if len(self.means) > 1:
            result |= {f"eval_{name}": mean for name, mean in self.means.items()}
        result |= {f"eval_loss/{name}": mean for name, mean in self.source_means.items()}
        return result | {f"eval_{name}": mean for name, mean in self.shown.items()}


class TermMeter:
    """Sums of loss terms, kept on the device until they are read: one synchronisation a step."""

    def __init__(self) -> None:
        self._sums: dict[str, Tensor] = {}
        self._count_names: dict[str, str] = {}
        self._shown: set[str] = set()
        self._counts: defaultdict[str, float] = defaultdict(float)

    def add(self, terms: Mapping[str, LossTerm], batch: MicroBatch) -> None:
        """Add the terms of one micro-batch and its counts of targets."""
        for name, term in terms.items():
            self._add(f"sum/{name}", term.sum.detach())
            self._count_names[name] = term.count
            if not term.is_trained:
                self._shown.add(name)
        for name, count in batch.counts.items():
            self._counts[name] += count
        names = source_names(batch.counts)
        losses = next((t.by_token for t in terms.values() if t.by_token is not None), None)
        if names and losses is not None:
            for name, value in zip(names, sum_by_source(losses, batch, names), strict=True):
                self._add(f"source/{name}", value)

    def count(self, name: str, number: float) -> None:
        """Add to a count that is none of a micro-batch's targets."""
        self._counts[name] += number

    def reset(self) -> None:
        """Forget everything."""
        self._sums.clear()
        self._count_names.clear()
        self._shown.clear()
        self._counts.clear()

    def read_totals(self, reduce: Reduce) -> Totals:
        """Means and counts over all ranks.

        Args:
            reduce: Sums values over ranks; every rank calls with the same names.
        """
        sums = torch.stack(list(self._sums.values())).tolist() if self._sums else []
        values = dict(zip(self._sums, sums, strict=True))
        values |= {f"count/{name}": count for name, count in self._counts.items()}
        total = reduce(values)
        counts = {name: total[f"count/{name}"] for name in self._counts}
        means = {
            name: total[f"sum/{name}"] / (counts[count] or 1.0)
            for name, count in self._count_names.items()
        }
        source_means = {
            name: total[f"source/{name}"] / counts[OF_SOURCE + name]
            for name in source_names(counts)
            if f"source/{name}" in total and counts[OF_SOURCE + name]
        }
        shown = {name: means.pop(name) for name in list(means) if name in self._shown}
        return Totals(means, counts, shown, source_means)

    def _add(self, name: str, value: Tensor) -> None:
        value = value.double()
        self._sums[name] = self._sums[name] + value if name in self._sums else value


def source_names(counts: Mapping[str, float]) -> list[str]:
    """The data sources that counts are kept of."""
    return [name.removeprefix(OF_SOURCE) for name in counts if name.startswith(OF_SOURCE)]


def sum_by_source(losses: Tensor, batch: MicroBatch, names: list[str]) -> Tensor:
    """The losses of a micro-batch's tokens, added up for each data source.

    Args:
        losses: Of its R supervised tokens in order, [R].
        batch: Says where the segment of each record ends and which source it is from.
        names: The sources.

    Returns:
        One sum a source, float64 [len(names)].
    """
    device = losses.device
    place = {name: index for index, name in enumerate(names)}
    # padding, and what fills a window, has no origin and no label
    of_segment = [place[origin.source] for origin in batch.origins]
    of_segment += [0] * (len(batch.bounds) - 1 - len(of_segment))
    sources = torch.tensor(of_segment, device=device)[batch.target_segments()]
    sums = torch.zeros(len(names), dtype=torch.float64, device=device)
    return sums.index_add(0, sources, losses.double())
