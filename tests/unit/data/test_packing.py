"""Plans: every sample once, within the budget, as tight as promised."""

from __future__ import annotations

from bisect import bisect_left, insort

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from omnilit.data.packing import (
    Ints,
    PassPlan,
    PlanSettings,
    best_fit,
    first_fit_buffered,
    make_generator,
    plan_pass,
)
from omnilit.data.warmup import BudgetSchedule

BUDGET = 32
LENGTHS = st.lists(st.integers(1, BUDGET), min_size=1, max_size=80)


def _plan(
    lengths: np.ndarray, settings: PlanSettings, pass_index: int, *, first_item: int = 0
) -> PassPlan:
    rng = make_generator(settings.seed, pass_index)
    order: Ints = rng.permutation(len(lengths))
    return plan_pass(lengths, order, settings, rng, first_item=first_item)


def _bins(plan: PassPlan) -> list[list[int]]:
    return [plan.get(i) for i in range(plan.size)]


@settings(max_examples=150, deadline=None)
@given(LENGTHS, st.integers(0, 5), st.sampled_from([None, 1, 4, 200]))
def test_a_plan_holds_every_sample_once_and_keeps_the_budget(
    lengths: list[int], pass_index: int, buffer_size: int | None
):
    plan = _plan(
        np.asarray(lengths, np.int32),
        PlanSettings(3, BudgetSchedule(BUDGET), buffer_size),
        pass_index,
    )
    bins = _bins(plan)
    assert sorted(i for members in bins for i in members) == list(range(len(lengths)))
    assert all(members and sum(lengths[i] for i in members) <= BUDGET for members in bins)
    assert plan.get(plan.size) == []


def _best_fit_one_by_one(lengths: list[int]) -> list[int]:
    """Fill of each bin when every sample in turn goes where it leaves least room."""
    rooms: list[int] = []
    for size in sorted(lengths, reverse=True):
        place = bisect_left(rooms, size)
        insort(rooms, (rooms.pop(place) if place < len(rooms) else BUDGET) - size)
    return sorted(BUDGET - room for room in rooms)


@settings(max_examples=150, deadline=None)
@given(LENGTHS)
def test_best_fit_fills_as_placing_one_sample_at_a_time(lengths: list[int]):
    plan = best_fit(np.asarray(lengths, np.int32), np.arange(len(lengths)), budget=BUDGET)
    fills = sorted(sum(lengths[i] for i in members) for members in _bins(plan))
    assert fills == _best_fit_one_by_one(lengths)


def _reference_first_fit(lengths: list[int], buffer_size: int) -> list[list[int]]:
    buffer: list[int] = []
    bins: list[list[int]] = []

    def emit() -> None:
        used, picked = 0, []
        for sample in buffer:
            if used >= BUDGET:
                break
            if used == 0 or lengths[sample] <= BUDGET - used:
                picked.append(sample)
                used += lengths[sample]
        for sample in picked:
            buffer.remove(sample)
        bins.append(picked)

    for sample in range(len(lengths)):
        if len(buffer) >= buffer_size and sum(lengths[i] for i in buffer) >= BUDGET:
            emit()
        buffer.append(sample)
    while buffer:
        emit()
    return bins


@settings(max_examples=100, deadline=None)
@given(LENGTHS, st.integers(1, 20))
def test_first_fit_packs_as_the_reference_does(lengths: list[int], buffer_size: int):
    plan = first_fit_buffered(
        np.asarray(lengths, np.int32),
        np.arange(len(lengths)),
        budget=BUDGET,
        buffer_size=buffer_size,
    )
    assert _bins(plan) == _reference_first_fit(lengths, buffer_size)


def test_a_plan_depends_on_seed_and_pass_and_on_nothing_else():
    lengths = np.random.default_rng(0).integers(1, BUDGET, 200).astype(np.int32)
    plan = _plan(lengths, PlanSettings(0, BudgetSchedule(BUDGET)), 0)
    np.random.default_rng().random()
    assert _bins(plan) == _bins(_plan(lengths, PlanSettings(0, BudgetSchedule(BUDGET)), 0))
    assert _bins(plan) != _bins(_plan(lengths, PlanSettings(0, BudgetSchedule(BUDGET)), 1))
    assert _bins(plan) != _bins(_plan(lengths, PlanSettings(1, BudgetSchedule(BUDGET)), 0))


def test_best_fit_has_equally_many_micro_batches_in_every_pass():
    lengths = np.random.default_rng(0).integers(1, BUDGET, 500).astype(np.int32)
    sizes = {_plan(lengths, PlanSettings(0, BudgetSchedule(BUDGET)), i).size for i in range(8)}
    assert len(sizes) == 1


def test_micro_batches_of_long_samples_do_not_cluster():
    lengths = np.asarray([BUDGET] * 500 + [1] * BUDGET * 500, np.int32)
    plan = _plan(lengths, PlanSettings(0, BudgetSchedule(BUDGET)), 0)
    is_long = np.asarray([len(members) == 1 for members in _bins(plan)])
    assert is_long.sum() == 500
    # Of 500 among 1,000, the first half holds 250, give or take 8 (standard deviation).
    assert abs(int(is_long[:500].sum()) - 250) < 50


def test_best_fit_wastes_less_than_a_third_of_a_percent_on_a_usual_spread_of_lengths():
    rng = np.random.default_rng(0)
    lengths = np.clip(rng.lognormal(np.log(153), 0.9, 20_000), 4, 2048).astype(np.int32)
    plan = _plan(lengths, PlanSettings(0, BudgetSchedule(2048)), 0)
    assert 1 - lengths.sum() / (plan.size * 2048) < 0.0035


@pytest.mark.parametrize("lengths", [[0, 1], [BUDGET + 1]])
def test_a_length_outside_the_budget_is_our_own_mistake(lengths: list[int]):
    with pytest.raises(AssertionError):
        best_fit(np.asarray(lengths, np.int32), np.arange(len(lengths)), budget=BUDGET)


def test_a_fixed_number_of_samples_makes_a_micro_batch_of_any_length():
    lengths = np.asarray([1, 50, 2, 60, 3], np.int32)
    plan = _plan(lengths, PlanSettings(0, BudgetSchedule(4), samples_per_item=2), 0)
    bins = _bins(plan)
    assert [len(members) for members in bins] == [2, 2, 1]
    assert sorted(i for members in bins for i in members) == [0, 1, 2, 3, 4]


@pytest.mark.parametrize("buffer_size", [None, 1, 5])
@pytest.mark.parametrize("first_item", [0, 3, 100])
def test_a_warm_up_keeps_its_growing_budget_and_loses_no_sample(
    buffer_size: int | None, first_item: int
):
    schedule = BudgetSchedule(BUDGET, init=4, num_steps=5, items_per_step=2)
    lengths = np.random.default_rng(0).integers(1, BUDGET + 1, 90).astype(np.int32)
    plan = _plan(lengths, PlanSettings(0, schedule, buffer_size), 0, first_item=first_item)
    bins = _bins(plan)
    assert sorted(i for members in bins for i in members) == list(range(90))
    for index, members in enumerate(bins):
        budget = schedule.budget(first_item + index)
        assert lengths[members].sum() <= budget or len(members) == 1
    if first_item < 10:  # the warm-up's items hold less than the others
        warm = [lengths[members].sum() for members in bins[: 10 - first_item]]
        assert np.mean(warm) < np.mean([lengths[members].sum() for members in bins])


def test_a_pass_may_hold_a_sample_more_than_once():
    lengths = np.asarray([3, 4], np.int32)
    order = np.asarray([0, 1, 0, 0, 1])
    rng = make_generator(0, 0)
    plan = plan_pass(lengths, order, PlanSettings(0, BudgetSchedule(8)), rng)
    assert sorted(plan.samples.tolist()) == [0, 0, 0, 1, 1]
