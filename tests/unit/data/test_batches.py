"""Loaders whose workers die."""

from __future__ import annotations

import gc
import multiprocessing
import os
import signal
import sys
import time
from collections.abc import Iterator

import pytest

from omnilit.data.batches import Made, WorkerSettings, load_batches
from omnilit.errors import DataError
from omnilit.types import Sample
from tests.helpers.samples import CountingSource


def load(number: int = 40) -> Iterator[Made]:
    bins = ([i] for i in range(number))
    return load_batches(CountingSource([4] * number), bins, workers=WorkerSettings(2))


def kill_worker() -> None:
    """Kill one worker, and see that its end has reached this process."""
    first, *_ = multiprocessing.active_children()
    assert first.pid is not None
    os.kill(first.pid, signal.SIGKILL)
    os.waitid(os.P_PID, first.pid, os.WEXITED | os.WNOWAIT)  # and leave it for torch to find
    for _ in range(50):
        time.sleep(0.001)  # here a step would be at work


@pytest.mark.usefixtures("workers_end")
def test_a_worker_that_dies_amid_a_step_is_told_when_data_is_next_asked_for():
    running = load()
    next(running)
    kill_worker()
    with pytest.raises(DataError, match=r"a data worker died \(DataLoader worker .+Killed"):
        next(running)
    # what was told of one loader is not told of the next
    running = load()
    next(running)
    kill_worker()
    assert len(list(load(8))) == 8


class Fatal(CountingSource):
    """A source whose second sample ends its worker while that asks torch whether it should end."""

    def __getitem__(self, index: int) -> Sample:
        if index == 1:
            frame = sys._getframe()
            while "done_event" not in frame.f_locals:
                assert frame.f_back is not None
                frame = frame.f_back
            frame.f_locals["done_event"]._cond.acquire()  # as its is_set() does
            os.kill(os.getpid(), signal.SIGKILL)
        return super().__getitem__(index)


def test_a_worker_that_dies_with_the_lock_of_the_loaders_end_hangs_nothing():
    before = set(multiprocessing.active_children())
    running = load_batches(Fatal([4] * 9), ([i] for i in range(9)), workers=WorkerSettings(2))
    with pytest.raises(DataError, match="a data worker died"):
        list(running)
    del running
    gc.collect()
    assert set(multiprocessing.active_children()) == before


@pytest.mark.usefixtures("workers_end")
def test_another_error_of_a_signal_is_raised_as_it_is():
    def fail(*_: object) -> None:
        raise RuntimeError("of somebody else")

    before = signal.signal(signal.SIGCHLD, fail)
    try:
        running = load_batches(CountingSource([4]), iter([[0]]), workers=WorkerSettings(0))
        next(running)
        with pytest.raises(RuntimeError, match="of somebody else"):
            os.kill(os.getpid(), signal.SIGCHLD)
    finally:
        signal.signal(signal.SIGCHLD, before)
