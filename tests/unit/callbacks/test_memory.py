"""Garbage and cached memory go at fixed steps, and Python's own schedule comes back."""

from __future__ import annotations

import gc
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback

from omnilit.callbacks.memory import CacheRelease, GarbageCollector


class Cycle:
    """Garbage that only a collection finds, and that says so."""

    def __init__(self, gone: list[int], step: int) -> None:
        self.gone, self.step, self.me = gone, step, self

    def __del__(self) -> None:
        self.gone.append(self.step)


class Litter(Callback):
    """Leaves a cycle at the beginning of every step, and notes what is gone by then."""

    def __init__(self) -> None:
        self.gone: list[int] = []
        self.gone_at: dict[int, list[int]] = {}
        self.was_enabled: set[bool] = set()

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        self.was_enabled.add(gc.isenabled())
        if batch_idx % 2 == 0:
            self.gone_at[trainer.global_step] = sorted(self.gone)
            Cycle(self.gone, trainer.global_step + 1)


@pytest.fixture(autouse=True)
def _clean_schedule():
    gc.collect()
    yield
    gc.enable()


def test_garbage_goes_at_every_nth_step_and_only_there(make_module, make_trainer):
    litter = Litter()
    make_trainer(litter, GarbageCollector(2), max_epochs=2).fit(make_module())
    assert litter.was_enabled == {False}
    gone = litter.gone_at
    assert gone[0] == gone[1] == []
    assert gone[2] == gone[3] == [1, 2]
    assert gone[6] == gone[7] == [1, 2, 3, 4, 5, 6]


def test_zero_leaves_pythons_own_schedule(make_module, make_trainer):
    litter = Litter()
    make_trainer(litter, GarbageCollector(0)).fit(make_module())
    assert litter.was_enabled == {True}


@pytest.mark.parametrize("was_enabled", [True, False])
@pytest.mark.parametrize("error", [None, RuntimeError, KeyboardInterrupt])
def test_what_was_on_before_is_on_after(make_module, make_trainer, stop_at, was_enabled, error):
    if not was_enabled:
        gc.disable()
    try:
        make_trainer(GarbageCollector(3), stop_at(2, error=error)).fit(make_module())
    except (RuntimeError, SystemExit):
        assert error
    assert gc.isenabled() is was_enabled


@pytest.mark.parametrize(("device", "expected"), [("cuda", [4, 6]), ("cpu", [])])
def test_the_cache_of_the_device_is_released_at_every_nth_step(monkeypatch, device, expected):
    released = []
    root_device = torch.device(device)
    trainer: Any = SimpleNamespace(strategy=SimpleNamespace(root_device=root_device), global_step=2)

    def get_module(asked):
        assert asked == root_device
        return SimpleNamespace(empty_cache=lambda: released.append(trainer.global_step))

    monkeypatch.setattr(torch, "get_device_module", get_module)
    module: Any = None
    release = CacheRelease(2)
    release.on_train_start(trainer, module)  # resumed at step 2, which is done
    for step in (2, 2, 3, 3, 4, 4, 5, 5, 6, 6):  # two micro-batches a step
        trainer.global_step = step
        release.on_train_batch_end(trainer, module, None, None, 0)
    assert released == expected
