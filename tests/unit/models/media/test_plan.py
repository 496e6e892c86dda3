"""Which rank looks at which image."""

from __future__ import annotations

from itertools import product

from hypothesis import given
from hypothesis import strategies as st

from omnilit.models.media.plan import attention_work, plan_towers, spread_longest_first
from omnilit.types import TowerWork


def loads_of(costs: list[int], ranks: list[int], num_ranks: int) -> list[int]:
    return [sum(c for c, at in zip(costs, ranks, strict=True) if at == r) for r in range(num_ranks)]


def test_the_dearest_goes_first_and_to_the_rank_with_least_to_do():
    #                           7 -> 0, 6 -> 1, 5 -> 1 (6 < 7), 4 -> 0, 3 -> 0 (a tie: 11, 11)
    assert spread_longest_first([3, 5, 7, 4, 6], 2) == [0, 1, 0, 0, 1]
    assert spread_longest_first([1, 1, 1], 5) == [0, 1, 2]
    assert spread_longest_first([], 2) == []


@given(st.lists(st.integers(1, 60), max_size=6), st.integers(1, 3))
def test_no_rank_has_more_than_four_thirds_of_what_is_best(costs: list[int], num_ranks: int):
    spread = max(loads_of(costs, spread_longest_first(costs, num_ranks), num_ranks))
    ways = product(range(num_ranks), repeat=len(costs))
    best = min(max(loads_of(costs, list(way), num_ranks)) for way in ways)
    assert 3 * num_ranks * spread <= (4 * num_ranks - 1) * best


def test_patches_of_a_video_see_their_own_frame():
    assert attention_work((1, 4, 6)) == 24**2
    assert attention_work((3, 4, 6)) == 3 * 24**2


def test_images_go_to_ranks_without_and_the_plan_says_what_that_changes():
    plan = plan_towers([[(1, 8, 4), (1, 4, 4)], [], [(1, 4, 4)]], per_row=1)
    assert plan.ranks == ((0, 1), (), (2,))
    assert plan.work == TowerWork(before=1280, after=1024, even=1536 / 3)


def test_nothing_moves_where_the_busiest_rank_gains_nothing():
    alike = [[(1, 4, 4), (1, 8, 4)], [(1, 8, 4), (1, 4, 4)]]
    plan = plan_towers(alike, per_row=1)
    assert plan.ranks == ((0, 0), (1, 1))
    assert plan.work == TowerWork(1280, 1280, 1280.0)


def test_ranks_that_share_a_row_look_at_its_images_in_turn():
    plan = plan_towers([[(1, 4, 4), (1, 8, 4), (1, 4, 4)]], per_row=2)
    assert plan.ranks == ((1, 0, 1),)
    assert plan.work == TowerWork(before=1536, after=1024, even=768.0)


def test_rows_without_anything_make_no_work():
    assert plan_towers([[], []], per_row=2).work == TowerWork(0, 0, 0.0)
