"""Which rank's vision tower looks at which image: known to all ranks alike, without a word."""

from __future__ import annotations

import heapq
from collections.abc import Sequence
from dataclasses import dataclass

from omnilit.types import Grid, TowerWork


@dataclass(frozen=True, slots=True)
class TowerPlan:
    """Who looks at the images or videos of one micro-batch of several data ranks.

    Args:
        ranks: By row, the rank of each of its items. Ranks that share a row follow each other.
        work: What that comes to.
    """

    ranks: tuple[tuple[int, ...], ...]
    work: TowerWork


def plan_towers(grids: Sequence[Sequence[Grid]], *, per_row: int) -> TowerPlan:
    """Spread images or videos over all ranks, unless the busiest one gains nothing by it.

    Then they stay with the ranks of their row, which spread them among themselves.

    Args:
        grids: Of the items of each row, of which every data rank has one.
        per_row: Ranks that share a row.
    """
    costs = [[attention_work(grid) for grid in row] for row in grids]
    flat = [cost for row in costs for cost in row]
    num_ranks = len(grids) * per_row
    apart = [
        number * per_row + place
        for number, row in enumerate(costs)
        for place in spread_longest_first(row, per_row)
    ]
    together = spread_longest_first(flat, num_ranks)
    work = {name: _busiest(flat, ranks) for name, ranks in (("apart", apart), ("all", together))}
    chosen = iter(together if work["all"] < work["apart"] else apart)
    return TowerPlan(
        ranks=tuple(tuple(next(chosen) for _ in row) for row in costs),
        work=TowerWork(max(map(sum, costs)), min(work.values()), sum(flat) / num_ranks),
    )


def attention_work(grid: Grid) -> int:
    """Pairs of patches that attend to each other: a patch sees its own frame."""
    frames, rows, columns = grid
    return frames * (rows * columns) ** 2


def spread_longest_first(costs: Sequence[int], num_ranks: int) -> list[int]:
    """The rank of each item: the dearest first, each to the rank that has least to do so far.

    No rank has more than 4/3 of what the busiest one has at best (Graham, 1969). Of ranks with
    as much to do the lowest gets the item, of items that cost the same the first goes first.

    Args:
        costs: Of each item.
        num_ranks: Some get nothing where there are fewer items.
    """
    loads = [(0, rank) for rank in range(num_ranks)]  # a heap already
    found = [0] * len(costs)
    for item in sorted(range(len(costs)), key=lambda item: -costs[item]):
        load, found[item] = loads[0]
        heapq.heapreplace(loads, (load + costs[item], found[item]))
    return found


def _busiest(costs: Sequence[int], ranks: Sequence[int]) -> int:
    loads: dict[int, int] = {}
    for cost, rank in zip(costs, ranks, strict=True):
        loads[rank] = loads.get(rank, 0) + cost
    return max(loads.values(), default=0)
