"""Budgets that warm up, balance, padding, weights and sources of a micro-batch."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from omnilit.data.balance import balance
from omnilit.data.batches import WorkerSettings
from omnilit.data.collate import CollateSettings, collate, filler
from omnilit.data.epochs import EpochLength
from omnilit.data.evaluation import EvalLoader
from omnilit.data.items import WindowLayout
from omnilit.data.packing import PlanSettings
from omnilit.data.planned import PlannedItems
from omnilit.data.pool import map_in_order
from omnilit.data.quarantine import check_bad_fraction
from omnilit.data.warmup import BudgetSchedule
from omnilit.data.window import TrainLoader
from omnilit.errors import ConfigError, DataError
from omnilit.types import IGNORE, Origin, Sample
from tests.helpers.samples import CountingSource


def test_the_budget_grows_as_the_closed_form_says():
    schedule = BudgetSchedule(2048, init=200, num_steps=10, items_per_step=4)
    budgets = [schedule.budget(step * 4 + 3) for step in (0, 5, 9, 10, 99)]
    assert budgets == [200, 1124, 200 + 1848 * 9 // 10, 2048, 2048]
    assert schedule.num_items == 40
    assert BudgetSchedule(64).budget(0) == 64


@settings(max_examples=60, deadline=None)
@given(st.lists(st.integers(0, 50), min_size=4, max_size=40), st.integers(1, 4))
def test_balance_deals_every_item_once_and_waits_least(costs: list[int], ranks: int):
    costs = costs[: len(costs) // ranks * ranks]
    dealt = balance(costs, ranks)
    assert sorted(item for mine in dealt for item in mine) == list(range(len(costs)))
    assert len({len(mine) for mine in dealt}) == 1
    waits = sum(max(costs[item] for item in turn) for turn in zip(*dealt, strict=True))
    assert waits == sum(sorted(costs, reverse=True)[::ranks])


def sample(*ids: int, source: str = "a", **over: object) -> Sample:
    row = np.asarray(ids, np.int32)
    return Sample(row, row, Origin(source, "f", 1), **over)  # type: ignore[arg-type]


def test_padding_is_a_segment_of_its_own_without_labels():
    batch = collate([sample(5, 6, 7), sample(8, 9)], CollateSettings(pad_to=9))
    assert batch.bounds == [0, 3, 5, 9]
    assert batch.input_ids[0].tolist() == [5, 6, 7, 8, 9, 0, 0, 0, 0]
    assert batch.labels[0].tolist() == [6, 7, IGNORE, 9] + [IGNORE] * 5
    assert batch.position_ids[0].tolist() == [0, 1, 2, 0, 1, 0, 1, 2, 3]
    assert (batch.num_tokens, batch.num_padding, len(batch.origins)) == (5, 4, 2)
    assert filler(CollateSettings(pad_to=9)).input_ids.shape == (1, 9)
    assert collate([sample(1, 2)], CollateSettings(pad_to=2)).num_padding == 0


def test_weights_are_shifted_with_their_labels_and_added_up():
    weighted = sample(1, 2, 3, weights=np.asarray([9, 0.5, 2], np.float32))
    batch = collate([weighted, sample(4, 5)], CollateSettings(has_weights=True, pad_to=6))
    assert batch.weights is not None
    is_label = batch.labels[0] != IGNORE
    assert batch.weights[0][is_label].tolist() == [0.5, 2.0, 1.0]
    assert batch.counts == {"tokens": 3, "weight": 3.5}
    assert filler(CollateSettings(has_weights=True)).counts == {"tokens": 0, "weight": 0}


def test_tokens_are_counted_for_each_source():
    settings = CollateSettings(sources=("a", "b", "c"))
    batch = collate([sample(1, 2, 3), sample(4, 5, source="b")], settings)
    assert batch.counts == {"tokens": 3, "tokens/a": 2, "tokens/b": 1, "tokens/c": 0}
    assert filler(settings).counts == dict.fromkeys(batch.counts, 0)


def test_a_pair_is_two_segments_that_do_not_see_each_other():
    batch = collate([sample(1, 2, 3, 4, 5, pair_start=2)])
    assert batch.bounds == [0, 2, 5]
    assert batch.labels[0].tolist() == [2, IGNORE, 4, 5, IGNORE]
    assert batch.position_ids[0].tolist() == [0, 1, 0, 1, 2]
    assert len(batch.origins) == 2


def planned(lengths: list[int], num_items: int = 4, **over: object) -> PlannedItems:
    plan = PlanSettings(0, BudgetSchedule(8), **over)  # type: ignore[arg-type]
    return PlannedItems(
        CountingSource(lengths),
        plan,
        workers=WorkerSettings(),
        fingerprint="x",
        num_items=num_items,
    )


def read(items: PlannedItems, *, epochs: int = 1) -> list[list[list[int]]]:
    loader = TrainLoader(items, layout=WindowLayout(0, 1, 4), epochs=EpochLength(None))
    return [[[origin.row for origin in batch.origins] for batch in loader] for _ in range(epochs)]


@pytest.mark.parametrize(("samples", "accumulation"), [(1, 8), (2, 4), (8, 1)])
def test_drop_last_leaves_out_the_same_samples_however_a_step_is_cut(
    samples: int, accumulation: int
):
    items = planned([5] * 41, accumulation, samples_per_item=samples, drop_last=True)
    layout = WindowLayout(0, 1, accumulation)
    batches = list(TrainLoader(items, layout=layout, epochs=EpochLength(None)))
    assert len(batches) == 5 * accumulation
    trained = [origin.row for batch in batches for origin in batch.origins]
    assert trained == items.plan(0).samples.tolist()[:40]


def test_without_dyn_bsz_drop_last_leaves_out_the_last_incomplete_step():
    (kept,) = read(planned([5] * 22, samples_per_item=2, drop_last=False))
    assert [len(rows) for rows in kept] == [2] * 11 + [0]
    assert sorted(row for rows in kept for row in rows) == list(range(22))
    one, two = read(planned([5] * 22, samples_per_item=2, drop_last=True), epochs=2)
    assert [len(rows) for rows in one] == [len(rows) for rows in two] == [2] * 8
    # another pass leaves out others
    assert {row for rows in one for row in rows} != {row for rows in two for row in rows}


def test_a_sample_beyond_the_budget_is_refused_with_what_to_raise():
    with pytest.raises(ConfigError, match=r"of 8 tokens cannot hold the longest sample, .* 9"):
        planned([9])


def test_a_resume_within_the_warm_up_keeps_its_plan_at_another_step_size():
    lengths = np.random.default_rng(0).integers(1, 9, 120).tolist()

    def make(window: int, schedule: BudgetSchedule) -> TrainLoader:
        items = PlannedItems(
            CountingSource(lengths),
            PlanSettings(0, schedule),
            workers=WorkerSettings(),
            fingerprint="x",
            num_items=window,
        )
        layout = WindowLayout(0, 1, window)
        return TrainLoader(items, layout=layout, epochs=EpochLength(None))

    whole = [b.origins for b in make(4, BudgetSchedule(8, 2, 6, 4))]
    loader = make(4, BudgetSchedule(8, 2, 6, 4))
    running = iter(loader)
    first = [next(running).origins for _ in range(8)]
    resumed = make(2, BudgetSchedule(8, 2, 12, 2))
    resumed.load_state_dicts([loader.state_dict()])
    rest = [b.origins for b in resumed]
    while rest and not rest[-1]:
        rest.pop()
    while whole and not whole[-1]:
        whole.pop()
    assert first + rest == whole


def square(state: int, number: int) -> int:
    if number == 13:
        raise DataError(problem="unlucky", fix="skip it", file="f", row=13)
    if number == 17:
        os.kill(os.getpid(), signal.SIGKILL)
    return state * number * number


@pytest.mark.parametrize("num_workers", [0, 2])
def test_a_pool_keeps_the_order_and_raises_what_a_worker_raises(num_workers: int):
    def run(numbers: list[int]) -> Iterator[int]:
        return map_in_order(
            square, 2, numbers, num_workers=num_workers, preload=["omnilit.data.pool"]
        )

    assert list(run(list(range(12)))) == [2 * i * i for i in range(12)]
    with pytest.raises(DataError, match="f:13: unlucky") as caught:
        list(run([1, 13, 2]))
    assert caught.value.row == 13


def test_a_dead_process_of_a_pool_is_an_error_at_once():
    found = map_in_order(square, 1, [1, 17, 2, 3], num_workers=2, preload=["omnilit.data.pool"])
    with pytest.raises(DataError, match="a process that tokenises died"):
        list(found)


def test_workers_end_with_a_parent_that_is_killed():
    program = """
import itertools, os, signal
from omnilit.data.pool import map_in_order
from tests.unit.data.test_batching import own_id

found = map_in_order(own_id, 0, itertools.count(), num_workers=2, preload=["omnilit.data.pool"])
print(next(found), flush=True)
os.kill(os.getpid(), signal.SIGKILL)
"""
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=False
    )
    worker = Path("/proc") / done.stdout.strip()
    end = time.monotonic() + 30
    while worker.exists() and time.monotonic() < end:
        time.sleep(0.05)
    assert done.returncode == -signal.SIGKILL
    assert worker.name.isdecimal()
    assert not worker.exists()


def own_id(_: int, number: int) -> int:
    return os.getpid()


def test_too_many_bad_records_stop_the_run():
    check_bad_fraction(1, 100, limit=0.01)
    check_bad_fraction(5, 999, limit=0.0, is_final=False)
    for numbers in ((2, 100), (1, 1)):
        with pytest.raises(DataError, match=r"more than data\.max_bad_fraction: 0\.01"):
            check_bad_fraction(*numbers, limit=0.01)
    with pytest.raises(DataError, match="20 of 1000 records are bad"):
        check_bad_fraction(20, 1000, limit=0.01, is_final=False)


def test_a_sample_beyond_the_budget_is_refused_in_evaluation_too():
    with pytest.raises(ConfigError, match=r"of 8 tokens cannot hold the longest sample, .* 9"):
        EvalLoader(CountingSource([9]), budget=8, layout=WindowLayout(), workers=WorkerSettings())
