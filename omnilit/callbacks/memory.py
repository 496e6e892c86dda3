"""Memory given back at fixed steps: Python's garbage, and what a device's allocator keeps."""

from __future__ import annotations

import gc

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.utilities.types import STEP_OUTPUT
from typing_extensions import override

from omnilit.callbacks.every import EverySteps


class GarbageCollector(Callback):
    """Collect garbage at fixed steps on all ranks together, so no rank stalls the others.

    While `fit` runs, Python collects nothing by itself. What was on before is on again after it,
    also after one that failed.

    Args:
        every_n_steps: Optimizer steps between two collections; 0 leaves Python's schedule on.
    """

    def __init__(self, every_n_steps: int = 500) -> None:
        self._every = EverySteps(every_n_steps)
        self._must_enable = False

    @override
    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if self._every.num_steps and gc.isenabled():
            self._must_enable = True
            gc.disable()

    @override
    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._every.begin_after(trainer.global_step)

    @override
    def on_train_batch_end(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        outputs: STEP_OUTPUT,
        batch: object,
        batch_idx: int,
    ) -> None:
        if self._every.is_due(trainer.global_step):
            gc.collect()

    @override
    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._restore()

    @override
    def on_exception(
        self, trainer: Trainer, pl_module: LightningModule, exception: BaseException
    ) -> None:
        self._restore()

    def _restore(self) -> None:
        if self._must_enable:
            gc.enable()
        self._must_enable = False


class CacheRelease(Callback):
    """Give the device what its allocator keeps for later; a CPU's keeps nothing of that kind.

    Args:
        every_n_steps: Optimizer steps between two releases; 0 for none.
    """

    def __init__(self, every_n_steps: int = 500) -> None:
        self._every = EverySteps(every_n_steps)

    @override
    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._every.begin_after(trainer.global_step)

    @override
    def on_train_batch_end(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        outputs: STEP_OUTPUT,
        batch: object,
        batch_idx: int,
    ) -> None:
        device = trainer.strategy.root_device
        if self._every.is_due(trainer.global_step) and device.type != "cpu":
            torch.get_device_module(device).empty_cache()
