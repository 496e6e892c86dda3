"""Windows over ranks and passes: nothing lost, nothing twice, the same steps for any layout."""

from __future__ import annotations

import pickle
from collections import Counter
from collections.abc import Iterable, Mapping
from itertools import islice

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from omnilit.data.batches import WorkerSettings
from omnilit.data.epochs import EpochLength, EpochProgress
from omnilit.data.evaluation import EvalLoader
from omnilit.data.items import WindowLayout
from omnilit.data.packing import PlanSettings
from omnilit.data.planned import PlannedItems
from omnilit.data.warmup import BudgetSchedule
from omnilit.data.window import TrainLoader
from omnilit.errors import ConfigError, DataError
from omnilit.types import MicroBatch
from tests.helpers.samples import CountingSource

BUDGET = 16
LENGTHS = np.random.default_rng(5).integers(1, BUDGET + 1, 61).tolist()
PLAN = PlanSettings(7, BudgetSchedule(BUDGET))


def _loader(
    rank: int = 0,
    ranks: int = 1,
    window: int = 1,
    *,
    steps: int | None = None,
    max_steps: int | None = None,
    num_workers: int = 0,
    plan: PlanSettings = PLAN,
    source: CountingSource | None = None,
) -> TrainLoader:
    layout = WindowLayout(rank, ranks, window)
    data = source or CountingSource(LENGTHS)
    items = PlannedItems(
        data,
        plan,
        workers=WorkerSettings(num_workers),
        fingerprint=str(data.lengths.tolist()),
        num_items=layout.num_items,
    )
    size = steps * items.budget * layout.num_items if steps else None
    return TrainLoader(items, layout=layout, epochs=EpochLength(size, max_steps))


def _planned(loader: TrainLoader) -> PlannedItems:
    assert isinstance(loader.items, PlannedItems)
    return loader.items


def _rows(batches: Iterable[MicroBatch]) -> list[tuple[int, ...]]:
    return [tuple(origin.row for origin in batch.origins) for batch in batches]


def _read(ranks: int, window: int, *, steps: int | None = None) -> list[list[tuple[int, ...]]]:
    """One epoch as windows, each with the micro-batches of all ranks."""
    dealt = [_rows(_loader(r, ranks, window, steps=steps)) for r in range(ranks)]
    assert len({len(rows) for rows in dealt}) == 1
    return [
        [row for rows in dealt for row in rows[start : start + window]]
        for start in range(0, len(dealt[0]), window)
    ]


def _samples(windows: Iterable[Iterable[tuple[int, ...]]]) -> Counter[int]:
    return Counter(row for window in windows for rows in window for row in rows)


@pytest.mark.parametrize(("ranks", "window"), [(1, 1), (1, 4), (2, 2), (4, 1), (3, 5), (1, 999)])
def test_a_pass_holds_every_sample_once_on_any_layout(ranks: int, window: int):
    assert _samples(_read(ranks, window)) == Counter(range(len(LENGTHS)))


def test_equal_windows_are_the_same_steps_on_any_layout():
    one, two, four = (_read(ranks, 4 // ranks, steps=40) for ranks in (1, 2, 4))
    assert len(one) == 40
    assert [sorted(w) for w in one] == [sorted(w) for w in two] == [sorted(w) for w in four]


def test_ranks_that_wait_for_each_other_have_alike_costs():
    ranks, window = 3, 4
    plan = _planned(_loader(window=12)).plan(0)
    dealt = [_rows(_loader(rank, ranks, window)) for rank in range(ranks)]
    for start in range(0, 12, 12):
        items = [tuple(plan.get(start + i)) for i in range(12)]
        costs = {item: sum(LENGTHS[row] ** 2 for row in item) for item in items}
        turns = [[rows[i] for rows in dealt] for i in range(window)]
        assert sorted(item for turn in turns for item in turn) == sorted(items)
        waits = sum(max(costs[item] for item in turn) for turn in turns)
        in_order = sum(max(costs[items[i * 3 + r]] for r in range(3)) for i in range(window))
        dearest_first = sorted(costs.values(), reverse=True)
        assert waits == sum(dearest_first[::3]) <= in_order


def test_only_the_last_window_of_a_pass_is_filled():
    num_items = len(_rows(_loader()))
    windows = _read(3, 3)
    assert num_items % 9, "the case must be uneven"
    fillers = [window.count(()) for window in windows]
    assert fillers == [0] * (num_items // 9) + [9 - num_items % 9]


def test_an_epoch_of_given_steps_goes_on_where_the_last_one_stopped():
    loader, short = _loader(window=4, steps=100), _loader(window=4, steps=7)
    whole = _rows(loader)
    assert len(loader) == 400
    assert [row for _ in range(14) for row in _rows(short)] == whole[: 14 * 7 * 4]


def test_every_pass_is_in_another_order_and_whole():
    loader = _loader(window=2)
    passes = [_rows(loader) for _ in range(3)]
    assert loader.position.pass_index == 2
    assert passes[0] != passes[1] != passes[2]
    for rows in passes:
        assert _samples([rows]) == Counter(range(len(LENGTHS)))


@pytest.mark.parametrize("buffer_size", [None, 3])
def test_without_a_budget_an_epoch_is_a_pass_and_its_length_is_known(buffer_size: int | None):
    loader = _loader(window=3, plan=PlanSettings(7, BudgetSchedule(BUDGET), buffer_size))
    total = loader.count_windows(5)
    windows = 0
    for _ in range(5):
        expected = len(loader)
        iterator = iter(loader)
        first = next(iterator)
        assert len(loader) == expected, "while it runs"
        rows = _rows([first, *iterator])
        assert len(rows) == expected
        assert _samples([rows]) == Counter(range(len(LENGTHS)))
        windows += len(rows) // 3
    assert windows == total


def test_max_steps_caps_an_epoch_and_the_next_goes_on_behind_it():
    whole = _rows(_loader(window=2, steps=12))
    loader = _loader(window=2, steps=5, max_steps=3)
    assert (len(loader), loader.count_windows(4)) == (6, 12)
    assert [row for _ in range(4) for row in _rows(loader)] == whole
    raised = _loader(window=2, steps=5, max_steps=4)
    loader = _loader(window=2, steps=5, max_steps=3)
    seen = _rows(loader)
    raised.load_state_dicts([loader.state_dict()])
    assert raised.epoch_steps == (3, 1)
    assert seen + _rows(raised) == whole[:8], "a raised limit goes on with the same epoch"


def test_an_iterator_that_is_never_read_changes_nothing():
    loader = _loader(window=2)
    list(loader)
    before = loader.state_dict()
    iter(loader)
    assert loader.state_dict() == before


def test_order_is_the_same_bit_for_bit_with_workers():
    alone, helped = _loader(window=2, steps=20), _loader(window=2, steps=20, num_workers=2)
    for _ in range(2):  # epochs
        for a, b in zip(alone, helped, strict=True):
            assert a.origins == b.origins
            assert torch.equal(a.input_ids, b.input_ids)
            assert torch.equal(a.labels, b.labels)
            assert a.bounds == b.bounds
            assert a.stamp is not None
            assert b.stamp is not None
            assert a.stamp.counts == b.stamp.counts


def test_stamps_hold_the_sums_of_the_window_over_ranks_reduced_once():
    calls: list[Mapping[str, float]] = []

    def double(values: Mapping[str, float], error: BaseException | None) -> Mapping[str, float]:
        assert error is None
        calls.append(dict(values))
        return {name: 2 * value for name, value in values.items()}

    loader = _loader(window=3)
    loader.reduce_counts = double
    batches = list(loader)
    assert len(calls) == len(batches) // 3
    for start in range(0, len(batches), 3):
        window = batches[start : start + 3]
        tokens = sum(b.num_tokens for b in window)
        targets = sum(int((b.labels != -100).sum()) for b in window)
        stamps = [b.stamp for b in window if b.stamp is not None]
        assert [(s.index, s.size) for s in stamps] == [(0, 3), (1, 3), (2, 3)]
        assert {(s.counts["tokens"], s.num_tokens) for s in stamps} == {(2 * targets, 2 * tokens)}
        assert all(s.data_wait_s >= 0 for s in stamps)
        assert all(set(s.counts) == {"tokens"} for s in stamps)


def test_stamps_say_which_media_any_rank_has_at_each_place_of_the_window():
    def reduce(values: Mapping[str, float], error: BaseException | None) -> Mapping[str, float]:
        assert error is None
        return {name: value + (name == "media/1/video") for name, value in values.items()}

    loader = _loader(window=3)
    loader.reduce_counts = reduce
    found = [batch.stamp.media for batch in islice(loader, 3) if batch.stamp is not None]
    assert found == [frozenset(), {"video"}, frozenset()]


@settings(max_examples=40, deadline=None)
@given(
    st.sampled_from([(1, 1), (1, 4), (2, 2), (4, 1), (3, 2)]),
    st.sampled_from([(1, 1), (1, 4), (2, 3), (4, 1), (5, 2)]),
    st.integers(0, 12),
)
def test_a_resume_on_another_layout_loses_and_repeats_nothing(
    before: tuple[int, int], after: tuple[int, int], windows: int
):
    (ranks, window), seen, states = before, [], []
    for rank in range(ranks):
        loader = _loader(rank, ranks, window)
        windows = min(windows, loader.num_windows)
        seen += _rows(islice(loader, windows * window))
        states.append(loader.state_dict())
    assert all(state == states[0] for state in states)
    rest = []
    for rank in range(after[0]):
        resumed = _loader(rank, *after)
        resumed.load_state_dicts([states[0]])
        done, left = resumed.epoch_steps
        assert done == windows
        if left:
            assert len(resumed) == (done + left) * after[1]
            rows = _rows(resumed)
            assert len(rows) == left * after[1]
            rest += rows
    assert _samples([seen, rest]) == Counter(range(len(LENGTHS)))


@pytest.mark.parametrize("num_workers", [0, 2])
def test_a_resumed_run_continues_at_the_next_window_whatever_was_fetched_ahead(num_workers: int):
    whole = _rows(_loader(window=2, steps=50))
    stopped = _loader(window=2, steps=50, num_workers=num_workers)
    iterator = iter(stopped)
    seen = _rows(islice(iterator, 2 * 23))
    state = pickle.loads(pickle.dumps(stopped.state_dict()))
    del iterator
    resumed = _loader(window=2, steps=50, num_workers=num_workers)
    resumed.load_state_dicts([state])
    assert len(resumed) == 100
    assert seen + _rows(resumed) == whole
    assert len(_rows(resumed)) == 100, "the epoch after it is whole again"


def _stop(loader: TrainLoader, windows: int) -> tuple[list[tuple[int, ...]], dict[str, object]]:
    """What `windows` steps read, over as many epochs as they take, and the state then."""
    read: list[tuple[int, ...]] = []
    size = loader.layout.window_size
    while len(read) < windows * size:
        read += _rows(islice(loader, windows * size - len(read)))
    return read, loader.state_dict()


def test_larger_steps_end_an_epoch_that_is_a_pass_where_the_pass_ends():
    num_items = len(_rows(_loader()))
    stop = num_items * 5 // 8  # more steps than the epoch has at two items a step
    seen, state = _stop(_loader(), stop)
    resumed = _loader(window=2)
    resumed.load_state_dicts([state])
    left = -(-(num_items - stop) // 2)
    assert resumed.epoch_steps == (stop, left)
    assert len(resumed) == (stop + left) * 2
    rest = _rows(resumed)
    assert _samples([seen, rest]) == Counter(range(len(LENGTHS)))
    assert resumed.epoch_steps == (stop + left, 0)
    assert len(resumed) == -(-num_items // 2) * 2, "the next epoch has its own length"
    assert _samples([_rows(resumed)]) == Counter(range(len(LENGTHS)))


@pytest.mark.parametrize("epochs", [0, 1])
@pytest.mark.parametrize(
    ("before", "after", "expected"),
    [
        (1, 2, (30, 5)),  # 40 items an epoch
        (1, 4, (30, 3)),  # 10 items are no whole steps of 4: rounded up, as an epoch is
        (2, 1, (15, 10)),
        (4, 1, (7, 12)),
    ],
)
def test_a_token_budget_holds_over_another_size_of_steps(
    epochs: int, before: int, after: int, expected: tuple[int, int]
):
    loader = _loader(window=before, steps=40 // before)
    _, state = _stop(loader, epochs * 40 // before + expected[0])
    resumed = _loader(window=after, steps=40 // after)
    resumed.load_state_dicts([state])
    assert resumed.epoch_steps == expected
    assert len(_rows(resumed)) == expected[1] * after
    assert len(_rows(resumed)) == 40, "the next epoch is whole"


def test_another_budget_is_measured_against_the_tokens_of_the_epoch_so_far():
    _, state = _stop(_loader(window=2, steps=20), 15)
    for steps, left in ((16, 1), (15, 0), (10, 0)):
        resumed = _loader(window=2, steps=steps)
        resumed.load_state_dicts([state])
        assert resumed.epoch_steps == (15, left)
        assert len(_rows(resumed)) == (left or steps) * 2


@pytest.mark.parametrize(("max_steps", "left"), [(8, 3), (6, 1), (5, 0), (3, 0)])
def test_max_steps_is_compared_with_the_steps_that_were_run(max_steps: int, left: int):
    _, state = _stop(_loader(window=1, steps=40, max_steps=5), 5)
    resumed = _loader(window=2, steps=20, max_steps=max_steps)
    resumed.load_state_dicts([state])
    assert resumed.epoch_steps == (5, left)
    assert len(_rows(resumed)) == (left or max_steps) * 2


def test_passes_of_unequal_length_keep_their_own_length_over_a_resume():
    plan = PlanSettings(0, BudgetSchedule(BUDGET), 5)
    loader = _loader(plan=plan)
    sizes = [len(_rows(loader)) for _ in range(6)]
    longer = next(i for i in range(1, 6) if sizes[i] > sizes[0])
    _, state = _stop(_loader(plan=plan), sum(sizes[:longer]) + sizes[0])
    resumed = _loader(plan=plan)
    resumed.load_state_dicts([state])
    assert resumed.epoch_steps == (sizes[0], sizes[longer] - sizes[0])
    assert len(_rows(resumed)) == sizes[longer] - sizes[0]


def test_passes_per_epoch_do_not_depend_on_what_a_resume_left_behind():
    _, state = _stop(_loader(), 20)
    resumed = _loader(window=4)
    resumed.load_state_dicts([state])
    assert resumed.passes_per_epoch == 1.0


def test_a_resume_with_another_size_of_steps_says_so(caplog: pytest.LogCaptureFixture):
    _, state = _stop(_loader(steps=40), 30)
    with caplog.at_level("INFO", logger="omnilit"):
        _loader(steps=40).load_state_dicts([state])
        assert not caplog.records
        _loader(window=2, steps=20).load_state_dicts([state])
    (record,) = caplog.records
    assert "held 1 micro-batches when it was saved and holds 2 now" in record.getMessage()
    assert "30 steps behind it and 5 of today's size to go" in record.getMessage()


def test_a_window_counts_when_its_last_micro_batch_is_handed_out():
    loader = _loader(window=3)
    iterator = iter(loader)
    items = []
    for _ in range(7):
        next(iterator)
        items.append(loader.state_dict()["items"])
    assert items == [0, 0, 3, 3, 3, 6, 6]


def test_the_end_of_a_pass_is_a_position_of_its_own_until_the_next_begins():
    loader = _loader(window=4)
    list(loader)
    state = loader.state_dict()
    assert (state["pass_index"], state["items"]) == (0, len(_rows(_loader())))
    resumed = _loader(window=4)
    resumed.load_state_dicts([state])
    assert resumed.epoch_steps == (-(-len(_rows(_loader())) // 4), 0)
    assert _samples([_rows(resumed)]) == Counter(range(len(LENGTHS)))
    assert resumed.position.pass_index == 1


def test_starting_loaders_leaves_the_random_state_alone():
    before = torch.get_rng_state()
    list(islice(_loader(num_workers=1), 3))
    list(EvalLoader(CountingSource([3, 4]), budget=8, layout=WindowLayout(), workers=WORKERS))
    assert torch.equal(torch.get_rng_state(), before)


def test_a_position_for_other_data_or_packing_is_refused_with_every_reason():
    state = _loader().state_dict()
    other = _loader(
        plan=PlanSettings(8, BudgetSchedule(BUDGET + 1), 200), source=CountingSource([1, 2, 3])
    )
    with pytest.raises(ConfigError) as caught:
        other.load_state_dicts([state])
    text = str(caught.value)
    for part in (
        "train.seed (seed 7, now 8)",
        "train.micro_batch_size * data.max_seq_len (budget 16, now 17)",
        "data.dyn_bsz_buffer_size (buffer_size None, now 200)",
        "data.train_path or how it is tokenised",
    ):
        assert part in text


@pytest.mark.usefixtures("workers_end")
def test_a_worker_that_dies_is_an_error():
    loader = _loader(num_workers=1, source=CountingSource(LENGTHS, fatal=LENGTHS.index(BUDGET)))
    with pytest.raises(DataError, match=r"a data worker died \(DataLoader worker .+\.num_workers"):
        list(loader)


@pytest.mark.usefixtures("workers_end")
def test_an_error_in_a_worker_is_raised_in_the_training_process():
    loader = _loader(num_workers=1, source=CountingSource(LENGTHS, faulty=3))
    with pytest.raises(OSError, match="sample 3 cannot be read"):
        list(loader)


@pytest.mark.parametrize(
    ("size", "ratio", "index", "steps"),
    [
        (1_000_000, 0.0, 0, 62),
        (1_000_000, 0.1, 0, 65),  # 1,050,000 tokens
        (1_000_000, 0.1, 1, 62),  # the warm-up runs once
        (16_384, 0.0, 0, 1),
    ],
)
def test_an_epoch_of_tokens_has_the_steps_of_the_closed_form(size, ratio, index, steps):
    length = EpochLength(size, warm_up_ratio=ratio)
    epoch = EpochProgress(number=index)
    left = length.count_left(epoch, num_items=8, item_size=2048, left_of_pass=None)
    assert left == steps


WORKERS = WorkerSettings()


@pytest.mark.parametrize("ranks", [1, 2, 3, 7, 100])
def test_evaluation_reads_everything_once_on_any_number_of_ranks(ranks: int):
    loaders = [
        EvalLoader(
            CountingSource(LENGTHS),
            budget=BUDGET,
            layout=WindowLayout(rank, ranks),
            workers=WORKERS,
        )
        for rank in range(ranks)
    ]
    for _ in range(2):
        dealt = [list(loader) for loader in loaders]
        assert {len(rows) for rows in dealt} == {len(loaders[0])}
        assert all(batch.stamp is None for rows in dealt for batch in rows)
        assert _samples(map(_rows, dealt)) == Counter(range(len(LENGTHS)))


def test_evaluation_keeps_the_order_of_the_files():
    loader = EvalLoader(CountingSource([4] * 8), budget=8, layout=WindowLayout(), workers=WORKERS)
    assert _rows(loader) == [(0, 1), (2, 3), (4, 5), (6, 7)]
