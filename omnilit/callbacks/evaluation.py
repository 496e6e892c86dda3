"""Evaluation at fixed optimizer steps and epochs, inside Lightning's own loop."""

from __future__ import annotations

import random
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from typing_extensions import override


class EvaluationSchedule(Callback):
    """Decide when `fit` evaluates, and leave every random state as it was.

    Lightning's trigger counts micro-batches and knows one interval; ours counts optimizer steps
    and joins two. It takes the trigger's place on this one trainer while `fit` runs, so
    Lightning's own loop evaluates and stock callbacks see what they always see. Stock
    `EarlyStopping` and `ModelCheckpoint` follow every evaluation where the trainer has
    `val_check_interval=1, check_val_every_n_epoch=None`; with Lightning's defaults they look at
    the ends of epochs only. Other values of `check_val_every_n_epoch` than None and 1 make
    Lightning load the evaluation data late, and the schedule evaluates nothing.

    A stop that was asked for does not bring on an evaluation of its own.

    Callbacks that draw random numbers in `on_validation_end` stand before this one.

    Args:
        eval_steps: Optimizer steps between two evaluations; 0 for none.
        eval_epochs: Epochs between two evaluations, each at its epoch's end; 0 for none.

    Attributes:
        finished_at: `time.monotonic()` at the end of the last evaluation, saves in it included.
    """

    def __init__(self, *, eval_steps: int, eval_epochs: int) -> None:
        self.eval_steps = eval_steps
        self.eval_epochs = eval_epochs
        self.finished_at = 0.0
        self._done_step = 0
        self._states: RandomStates | None = None
        self._restore_loops: Callable[[], None] | None = None

    def is_due(self, trainer: Trainer) -> bool:
        """True at a step whose evaluation is still to run.

        Args:
            trainer: In or after the `on_train_batch_end` of a micro-batch.
        """
        step = trainer.global_step  # the same in all micro-batches of the next window
        if step == self._done_step or trainer.fit_loop.epoch_loop.val_loop.skip:
            return False
        if self.eval_steps and step % self.eval_steps == 0:
            return True
        ends_epoch = trainer.is_last_batch
        return bool(
            ends_epoch and self.eval_epochs and (trainer.current_epoch + 1) % self.eval_epochs == 0
        )

    @override
    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._restore()
        epoch_loop = trainer.fit_loop.epoch_loop
        val_loop = epoch_loop.val_loop
        run = val_loop.run

        def should_check_val(_: object) -> bool:
            return self.is_due(trainer)

        def run_isolated() -> list[Any]:
            # Around all of it: making the loader's iterator draws a seed before any hook runs.
            self._done_step = trainer.global_step
            self._states = RandomStates.capture(trainer.strategy.root_device)
            try:
                return run()
            finally:
                self._put_back_random_states()
                self.finished_at = time.monotonic()

        def restore_loops() -> None:
            del vars(epoch_loop)["_should_check_val_fx"], vars(val_loop)["run"]

        # On the instances, where no other trainer sees it. Lightning has no hook for either.
        vars(epoch_loop)["_should_check_val_fx"] = should_check_val
        vars(val_loop)["run"] = run_isolated
        self._restore_loops = restore_loops

    @override
    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._done_step = trainer.global_step  # a resumed run never evaluates the saved step again

    @override
    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if self._states is not None:  # a save that follows stores what the next step goes on from
            self._states.restore()

    @override
    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._restore()

    @override
    def on_exception(
        self, trainer: Trainer, pl_module: LightningModule, exception: BaseException
    ) -> None:
        self._restore()

    def _put_back_random_states(self) -> None:
        if self._states is not None:
            self._states.restore()
        self._states = None

    def _restore(self) -> None:
        if self._restore_loops is not None:
            self._restore_loops()
        self._restore_loops = None


def is_evaluation_due(trainer: Trainer) -> bool:
    """True where an evaluation of the step that has just ended is still to come.

    It asks the loop itself, so it also holds for Lightning's own trigger.

    Args:
        trainer: In the `on_train_batch_end` of a micro-batch.
    """
    fit_loop = trainer.fit_loop
    if fit_loop.epoch_loop.val_loop.skip:
        return False
    fetcher = fit_loop._data_fetcher  # noqa: SLF001 - what Lightning itself hands over
    assert fetcher is not None, "there is one while training"
    return fit_loop.epoch_loop._should_check_val_fx(fetcher)  # noqa: SLF001


@dataclass(frozen=True)
class RandomStates:
    """The states of all generators that a process draws from by default."""

    python: tuple[Any, ...]
    numpy: dict[str, Any]
    cpu: torch.Tensor
    device: torch.device
    on_device: torch.Tensor | None

    @classmethod
    def capture(cls, device: torch.device) -> RandomStates:
        """Read the states of Python, numpy, torch on the CPU and torch on `device`."""
        has_own = device.type != "cpu"
        return cls(
            python=random.getstate(),
            numpy=np.random.get_state(legacy=False),  # noqa: NPY002 - what libraries draw from
            cpu=torch.get_rng_state(),
            device=device,
            on_device=torch.get_device_module(device).get_rng_state(device) if has_own else None,
        )

    def restore(self) -> None:
        """Put all of them back."""
        random.setstate(self.python)
        np.random.set_state(self.numpy)  # noqa: NPY002 - what libraries draw from
        torch.set_rng_state(self.cpu)
        if self.on_device is not None:
            torch.get_device_module(self.device).set_rng_state(self.on_device, self.device)
