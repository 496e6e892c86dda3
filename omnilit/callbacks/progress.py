"""How far a run is: a bar on a terminal, one plain line a step elsewhere."""

from __future__ import annotations

import math
from collections.abc import Mapping

from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import ProgressBar, TQDMProgressBar
from lightning.pytorch.callbacks.progress.tqdm_progress import Tqdm
from lightning.pytorch.utilities.types import STEP_OUTPUT
from typing_extensions import override

from omnilit.callbacks.evaluation import is_evaluation_due
from omnilit.callbacks.metrics import newest_numbers
from omnilit.callbacks.metrics_file import Number
from omnilit.callbacks.trainer_view import datamodule_of
from omnilit.logging import get_logger

log = get_logger(__name__)


def progress_callback(*, is_terminal: bool) -> Callback:
    """What shows progress; add it only where `trainer.enable_progress_bar` is true.

    Both kinds are Lightning progress bars, so Lightning adds none of its own. Both show the
    numbers of the trainer's `MetricsRecorder`, which stands before them.

    Args:
        is_terminal: True gives a bar, false one line of the log a step.
    """
    return StepBar() if is_terminal else StepLines()


class StepBar(TQDMProgressBar):
    """A bar an epoch that counts optimizer steps, with loss, learning rate and speed."""

    @property
    @override
    def total_train_batches(self) -> int | float:
        return _count_steps(self.trainer, super().total_train_batches)

    @override
    def on_train_start(self, *_: object) -> None:
        super().on_train_start()
        # Lightning does not call this hook in the epoch that a run is resumed in
        self.on_train_epoch_start(self.trainer)

    @override
    def init_train_tqdm(self) -> Tqdm:
        bar = super().init_train_tqdm()
        bar.unit = "step"
        return bar

    @override
    def on_train_batch_end(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        outputs: STEP_OUTPUT,
        batch: object,
        batch_idx: int,
    ) -> None:
        done = _count_steps(trainer, batch_idx + 1)
        is_whole = (batch_idx + 1) % trainer.accumulate_grad_batches == 0 or trainer.is_last_batch
        if is_whole:
            super().on_train_batch_end(trainer, pl_module, outputs, batch, int(done) - 1)

    @override
    def get_metrics(
        self, trainer: Trainer, pl_module: LightningModule
    ) -> dict[str, int | str | float | dict[str, float]]:
        return dict(_shown(newest_numbers(trainer)))


class StepLines(ProgressBar):
    """One plain line of the log a step: for files, pipes and job systems."""

    def __init__(self) -> None:
        super().__init__()
        self._is_enabled = True
        self._done_step = 0
        self._is_pending = False
        self._total = ""

    @override
    def disable(self) -> None:
        self._is_enabled = False

    @override
    def enable(self) -> None:
        self._is_enabled = True

    @override
    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._done_step, self._is_pending = trainer.global_step, False
        # epochs may differ in length, which only the data module knows
        total = getattr(datamodule_of(trainer), "num_steps", trainer.estimated_stepping_batches)
        self._total = f"/{total}" if math.isfinite(total) and total > 0 else ""

    @override
    def on_train_batch_end(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        outputs: STEP_OUTPUT,
        batch: object,
        batch_idx: int,
    ) -> None:
        if trainer.global_step == self._done_step:
            return
        self._done_step, self._is_pending = trainer.global_step, True
        if not is_evaluation_due(trainer):
            self._show(trainer)

    @override
    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if self._is_pending:
            self._show(trainer)

    def _show(self, trainer: Trainer) -> None:
        self._is_pending = False
        if self._is_enabled:
            parts = [f"{name} {text}" for name, text in _shown(newest_numbers(trainer)).items()]
            log.info("%s", "  ".join([f"step {self._done_step}{self._total}", *parts]))


def _count_steps(trainer: Trainer, num_batches: float) -> float:
    if math.isinf(num_batches):
        return num_batches
    return math.ceil(num_batches / trainer.accumulate_grad_batches)


def _shown(numbers: Mapping[str, Number]) -> dict[str, str]:
    """The numbers that fit a line, as text."""
    formats = {"loss": ".4f", "grad_norm": ".3g", "lr": ".1e", "tokens_per_second": ".0f"}
    shown = {
        name.replace("tokens_per_second", "tokens/s"): format(numbers[name], spec)
        for name, spec in formats.items()
        if name in numbers
    }
    return shown | {
        name: format(value, ".4f") for name, value in numbers.items() if name.startswith("eval_")
    }
