"""How a packed row is divided among the ranks of a sequence group, and the division itself."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from math import lcm

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor
from torch.nn.functional import pad

from omnilit.types import IGNORE, OF_SOURCE, TOKENS, WEIGHT, MicroBatch


@dataclass(frozen=True, slots=True)
class SequenceLayout:
    """Which tokens of a row each rank holds.

    The row is first divided among the ranks of context parallelism. For C parts it is cut into
    2C chunks. Early tokens of a sequence see few keys and late ones many, so each part is two
    chunks, the one with the most pairs of a query and a key that it sees beside the one with the
    fewest: of a single sequence the chunks c and 2C - 1 - c, which makes all parts equal work.
    Each part is then divided among the ranks of Ulysses, in order and without gaps.

    Args:
        cp_size: Ranks that exchange keys and values.
        ulysses_size: Ranks that trade tokens for heads.
    """

    cp_size: int = 1
    ulysses_size: int = 1

    @property
    def num_parts(self) -> int:
        """Ranks that share a row."""
        return self.cp_size * self.ulysses_size

    @property
    def multiple(self) -> int:
        """What the number of tokens of a row has to be a multiple of."""
        return self.cp_size * lcm(self._chunks_per_part, self.ulysses_size)

    @property
    def _chunks_per_part(self) -> int:
        return 1 if self.cp_size == 1 else 2

    def chunk_order(self, bounds: Sequence[int]) -> list[int]:
        """The chunks of all parts, part by part; `[0, 3, 1, 2]` for two parts of one sequence.

        Args:
            bounds: Ends of the row's segments.
        """
        if self.cp_size == 1:
            return [0]
        num_chunks = 2 * self.cp_size
        size = bounds[-1] // num_chunks
        pairs = np.diff(_pairs_before(bounds, np.arange(num_chunks + 1) * size))
        ranked = np.argsort(pairs, kind="stable").tolist()
        parts = zip(ranked[: self.cp_size], reversed(ranked[self.cp_size :]), strict=True)
        return [chunk for part in parts for chunk in sorted(part)]

    def unit_order(self, bounds: Sequence[int]) -> list[int]:
        """The row in the order in which ranks hold it, in the largest equal parts that do so.

        Args:
            bounds: Ends of the row's segments.

        Returns:
            Numbers of `multiple` parts of the row without gaps: as many of each rank, in turn.
        """
        per_chunk = self.multiple // (self.cp_size * self._chunks_per_part)
        return [
            chunk * per_chunk + unit
            for chunk in self.chunk_order(bounds)
            for unit in range(per_chunk)
        ]

    def spans(self, cp_rank: int, bounds: Sequence[int]) -> list[tuple[int, int]]:
        """Start and end of the chunks of one part, which its Ulysses ranks hold together.

        Args:
            cp_rank: The part.
            bounds: Ends of the row's segments.
        """
        return self.all_spans(bounds)[cp_rank]

    def all_spans(self, bounds: Sequence[int]) -> list[list[tuple[int, int]]]:
        """The `spans` of every part; the order of the chunks is found once for all.

        Args:
            bounds: Ends of the row's segments.
        """
        per_part = self._chunks_per_part
        size = bounds[-1] // (self.cp_size * per_part)
        spans = [(chunk * size, (chunk + 1) * size) for chunk in self.chunk_order(bounds)]
        return [spans[first : first + per_part] for first in range(0, len(spans), per_part)]

    def index(self, rank: int, bounds: Sequence[int]) -> Tensor:
        """The places in the row of one rank's tokens, int64 [T / parts].

        Args:
            rank: In the sequence group, where Ulysses counts faster.
            bounds: Ends of the row's segments; the last is a multiple of `multiple`.
        """
        cp_rank, ulysses_rank = divmod(rank, self.ulysses_size)
        part = torch.cat([torch.arange(*span) for span in self.spans(cp_rank, bounds)])
        return part.chunk(self.ulysses_size)[ulysses_rank]


def _pairs_before(bounds: Sequence[int], places: npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
    """Pairs of a query and a key that it sees, of the queries before each place in the row."""
    starts = np.asarray(bounds[:-1], np.int64)
    lengths = np.diff(np.asarray(bounds, np.int64))
    whole = np.concatenate(([0], np.cumsum(lengths * (lengths + 1) // 2)))
    segment = np.minimum(np.searchsorted(starts, places, side="right") - 1, len(starts) - 1)
    inside = places - starts[segment]
    return whole[segment] + inside * (inside + 1) // 2


def split_sequence(batch: MicroBatch, layout: SequenceLayout, rank: int) -> MicroBatch:
    """One rank's part of a micro-batch; bounds and origins stay those of the whole row.

    A row that does not divide gets padding first, in a segment of its own, which counts as no
    token anywhere. The counts of targets become those of the part, so that summed over the
    ranks they are the batch's.

    Args:
        batch: A whole one, still on the CPU: counting its labels must not wait for a device.
        layout: Who holds what.
        rank: In the sequence group.
    """
    if layout.num_parts == 1:
        return batch
    batch = pad_row(batch, layout.multiple)
    index = layout.index(rank, batch.bounds)
    part = replace(
        batch,
        input_ids=batch.input_ids[:, index],
        labels=batch.labels[:, index],
        position_ids=batch.position_ids[:, index],
        weights=None if batch.weights is None else batch.weights[:, index],
        row_index=index[None],
    )
    return replace(part, counts=_count(batch, part, is_first=rank == 0))


def pad_row(batch: MicroBatch, multiple: int) -> MicroBatch:
    """The micro-batch with label-free tokens at its end, so that `multiple` divides its length."""
    num_tokens = batch.bounds[-1]
    more = -num_tokens % multiple
    if not more:
        return batch
    before = batch.num_padding
    bounds = batch.bounds[:-1] if before else batch.bounds
    positions = torch.arange(before, before + more).to(batch.position_ids)
    return replace(
        batch,
        input_ids=pad(batch.input_ids, (0, more)),
        labels=pad(batch.labels, (0, more), value=IGNORE),
        position_ids=torch.cat((batch.position_ids, positions[None]), dim=1),
        bounds=[*bounds, num_tokens + more],
        weights=None if batch.weights is None else pad(batch.weights, (0, more)),
        num_padding=before + more,
    )


def _count(whole: MicroBatch, part: MicroBatch, *, is_first: bool) -> dict[str, float]:
    """The targets of a part, under the names that the whole counts."""
    assert part.row_index is not None
    is_label = part.labels[0] != IGNORE
    # what does not belong to a token is counted by one rank
    counts = {name: count if is_first else 0 for name, count in whole.counts.items()}
    counts[TOKENS] = int(is_label.sum())
    if part.weights is not None:
        counts[WEIGHT] = float(part.weights[0, is_label].double().sum())
    names = [name for name in counts if name.startswith(OF_SOURCE)]
    if names:
        place = {name: number for number, name in enumerate(names)}
        numbers = [place[OF_SOURCE + origin.source] for origin in whole.origins]
        sources = torch.tensor(numbers, dtype=torch.int64)[part.target_segments()]
        found = torch.bincount(sources, minlength=len(names)).tolist()
        counts |= dict(zip(names, found, strict=True))
    return counts
