"""Loaders whose workers die."""

from __future__ import annotations

import multiprocessing
import os
import signal
import time
from collections.abc import Iterator

import pytest

from omnilit.data.batches import Made, WorkerSettings, load_batches
from omnilit.errors import DataError
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
