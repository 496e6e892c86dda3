"""Pixels get to the ranks that look at them, and features to the ranks of their tokens."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import accumulate
from math import prod

import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from omnilit.models.media.plan import plan_towers
from omnilit.models.media.routes import RowPlaces, Seat, build_route
from omnilit.parallel.sequence import SequenceLayout
from omnilit.types import Grid, MediaRoute, RowCounts

MERGED = 4
GRIDS = st.tuples(st.integers(1, 2), st.sampled_from([2, 4]), st.sampled_from([2, 4, 6]))
ROWS = st.lists(st.lists(GRIDS, max_size=4), min_size=1, max_size=3)
LAYOUTS = st.sampled_from([SequenceLayout(), SequenceLayout(1, 2), SequenceLayout(2, 2)])


@dataclass
class Rank:
    """One rank of those that share the work, in this process."""

    route: MediaRoute
    rows: Tensor  # what it holds, each a number that says whose it is


def trade(ranks: Sequence[Rank], counts_of: Callable[[MediaRoute], RowCounts | None]) -> None:
    """What `trade_rows` does, among ranks in one process."""
    counts = [counts_of(rank.route) for rank in ranks]
    if counts[0] is None:
        return
    parts = [rank.rows.split(own.sent) for rank, own in zip(ranks, counts, strict=True) if own]
    for at, (rank, own) in enumerate(zip(ranks, counts, strict=True)):
        assert own is not None
        assert own.received == tuple(len(part[at]) for part in parts)
        rank.rows = torch.cat([part[at] for part in parts])


def row_of(grids: Sequence[Grid], layout: SequenceLayout) -> tuple[Tensor, list[int]]:
    """Where features take the place of tokens, with text between, and the ends of segments."""
    runs = [[False, *[True] * (prod(grid) // MERGED)] for grid in grids]
    ends = list(accumulate(map(len, runs), initial=0))
    is_place = [place for run in runs for place in run]
    more = -len(is_place) % layout.multiple or layout.multiple
    return torch.tensor([*is_place, *[False] * more]), [*ends, len(is_place) + more]


@settings(max_examples=60, deadline=None)
@given(ROWS, LAYOUTS)
def test_each_rank_gets_the_features_of_its_tokens_in_their_order(
    grids: list[list[Grid]], layout: SequenceLayout
):
    per_row = layout.num_parts
    plan = plan_towers(grids, per_row=per_row)
    ranks: list[Rank] = []
    expected: list[Tensor] = []
    for row, own in enumerate(grids):
        is_place, bounds = row_of(own, layout)
        patches = torch.arange(sum(map(prod, own))) + 1000 * row
        features = patches[::MERGED]
        for place in range(per_row):
            places = RowPlaces.of(is_place, layout, bounds, place) if per_row > 1 else None
            seat = Seat(row, place, per_row)
            route, kept = build_route(grids, plan, seat, merged=MERGED, places=places)
            ranks.append(Rank(route, patches[kept]))
            mine = layout.index(place, bounds)
            whole = torch.full((len(is_place),), -1)
            whole[is_place] = features
            expected.append(whole[mine][is_place[mine]])
    data = [ranks[place::per_row] for place in range(per_row)]
    for group in data:
        trade(group, lambda route: route.pixels)
    for number, rank in enumerate(ranks):
        looked_at = [
            grid
            for own, to in zip(grids, plan.ranks, strict=True)
            for grid, at in zip(own, to, strict=True)
            if at == number
        ]
        assert rank.route.grids is not None
        assert rank.route.grids.tolist() == [list(grid) for grid in looked_at]
        assert len(rank.rows) == sum(map(prod, looked_at))
        rank.rows = rank.rows[::MERGED]  # the tower
    for group in data:
        trade(group, lambda route: route.features)
    for rank in ranks:
        rank.rows = rank.rows[rank.route.order]
    for row in range(len(grids)):
        trade(ranks[row * per_row :][:per_row], lambda route: route.spread)
    for rank, own in zip(ranks, expected, strict=True):
        found = rank.rows if rank.route.own is None else rank.rows[rank.route.own]
        assert torch.equal(found, own)


def test_ranks_that_gain_nothing_send_each_other_nothing():
    alike: list[list[Grid]] = [[(1, 4, 4), (1, 8, 4)], [(1, 8, 4), (1, 4, 4)]]
    plan = plan_towers(alike, per_row=1)
    for row in range(2):
        route, kept = build_route(alike, plan, Seat(row, 0, 1), merged=MERGED, places=None)
        assert route.pixels is None
        assert route.features is None
        assert kept.tolist() == list(range(48))
        assert route.order.tolist() == list(range(12))
