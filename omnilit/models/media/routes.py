"""The way of pixels to the ranks that look at them, and of features to the tokens' ranks.

An item that another row's rank looks at goes by the rank of its own row that has the same place
there, and its features come back to it. So pixels move among data ranks alone; from there each
feature goes to the rank of the row that has its token, which only that row has to know.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from itertools import accumulate
from math import prod
from typing import NamedTuple

import torch
from torch import Tensor

from omnilit.models.media.plan import TowerPlan
from omnilit.parallel.sequence import SequenceLayout
from omnilit.types import Grid, MediaRoute, RowCounts


class Seat(NamedTuple):
    """A rank's place among those that share the work of towers.

    Args:
        row: Its row, of one each data rank.
        place: Among the ranks that share the row.
        per_row: As many as share one.
    """

    row: int
    place: int
    per_row: int


@dataclass(frozen=True, slots=True)
class RowPlaces:
    """Which rank of a row has the token of each feature.

    Args:
        owners: That rank, by feature of the row, int64.
        own: The features of this rank, in the order of its tokens, int64 [R].
    """

    owners: Tensor
    own: Tensor

    @classmethod
    def of(
        cls, is_place: Tensor, layout: SequenceLayout, bounds: Sequence[int], place: int
    ) -> RowPlaces:
        """Find them.

        Args:
            is_place: True for the tokens of a whole row that features take the place of, [T].
            layout: Who holds what.
            bounds: Ends of the row's segments.
            place: This rank's, among those that share the row.
        """
        owners = torch.empty(len(is_place), dtype=torch.int64)
        parts = [layout.index(rank, bounds) for rank in range(layout.num_parts)]
        for rank, part in enumerate(parts):
            owners[part] = rank
        number = is_place.cumsum(0) - 1
        mine = parts[place]
        return cls(owners[is_place], number[mine[is_place[mine]]])


class _Item(NamedTuple):
    row: int
    number: int
    rank: int
    grid: Grid

    @property
    def num_patches(self) -> int:
        return prod(self.grid)


def build_route(
    grids: Sequence[Sequence[Grid]],
    plan: TowerPlan,
    seat: Seat,
    *,
    merged: int,
    places: RowPlaces | None,
) -> tuple[MediaRoute, Tensor]:
    """The route of one kind of media at one rank.

    Args:
        grids: Of the items of each row.
        plan: Who looks at them.
        seat: This rank.
        merged: Patches that become one feature.
        places: Where the features of this rank's row belong; None where it holds all of it.

    Returns:
        The route, and which rows of its row's pixels this rank keeps or sends, int64.
    """
    items = [
        _Item(row, number, rank, grid)
        for row, (ranks, own) in enumerate(zip(plan.ranks, grids, strict=True))
        for number, (rank, grid) in enumerate(zip(ranks, own, strict=True))
    ]
    here = seat.row * seat.per_row + seat.place
    looked_at = [item for item in items if item.rank == here]
    of_row = [item for item in items if item.row == seat.row]
    passed = [item for item in of_row if item.rank % seat.per_row == seat.place]
    passed.sort(key=lambda item: item.rank)  # a stable one
    starts = list(accumulate((item.num_patches for item in of_row), initial=0))
    spans = [(starts[item.number], item.num_patches) for item in passed]
    pixels = None
    if any(item.rank // seat.per_row != item.row for item in items):  # all ranks find the same
        by_target = ((item.rank // seat.per_row, item.num_patches) for item in passed)
        by_source = ((item.row, item.num_patches) for item in looked_at)
        pixels = RowCounts(_add_up(by_target, len(grids)), _add_up(by_source, len(grids)))
    held = _join((start // merged, size // merged) for start, size in spans)
    route = MediaRoute(
        order=held.argsort(),
        grids=torch.tensor([item.grid for item in looked_at], dtype=torch.int64).view(-1, 3),
        pixels=pixels,
        features=None if pixels is None else _returned(pixels, merged),
    )
    if places is not None:
        holders = torch.tensor([item.rank % seat.per_row for item in of_row], dtype=torch.int64)
        sizes = torch.tensor([item.num_patches // merged for item in of_row], dtype=torch.int64)
        route = _spread(route, held, places, holders.repeat_interleave(sizes), seat.per_row)
    return route, _join(spans)


def _spread(
    route: MediaRoute, held: Tensor, places: RowPlaces, holders: Tensor, per_row: int
) -> MediaRoute:
    """Add the way from the ranks that hold features of a row to those that have their tokens.

    Each pair of ranks sends features in the order of the row.

    Args:
        route: Its `order` becomes that of sending.
        held: The features that this rank holds, in the order in which they are.
        places: Where they belong.
        holders: Which rank of the row holds each.
        per_row: Ranks that share the row.
    """
    targets, sources = places.owners[held], holders[places.own]
    num_features = len(holders)
    arrival = (sources * num_features + places.own).argsort()
    return replace(
        route,
        order=(targets * num_features + held).argsort(),
        spread=RowCounts(_count(targets, per_row), _count(sources, per_row)),
        own=arrival.argsort(),
    )


def _returned(counts: RowCounts, merged: int) -> RowCounts:
    """Of features, on the way back of the patches that they are made of."""
    sent, received = (tuple(number // merged for number in part) for part in counts)
    return RowCounts(received, sent)


def _count(ranks: Tensor, num_ranks: int) -> tuple[int, ...]:
    return tuple(torch.bincount(ranks, minlength=num_ranks).tolist())


def _add_up(pairs: Iterable[tuple[int, int]], num_ranks: int) -> tuple[int, ...]:
    """The sum of the numbers of each rank."""
    sums = [0] * num_ranks
    for rank, number in pairs:
        sums[rank] += number
    return tuple(sums)


def _join(spans: Iterable[tuple[int, int]]) -> Tensor:
    """The places in spans, each given by its start and size, one after the other."""
    parts = [torch.arange(start, start + size) for start, size in spans]
    return torch.cat(parts) if parts else torch.empty(0, dtype=torch.int64)
