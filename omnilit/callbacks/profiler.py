"""A trace of some optimizer steps, to be opened in Perfetto or chrome://tracing."""

from __future__ import annotations

import time
from pathlib import Path

from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.utilities.types import STEP_OUTPUT
from typing_extensions import override

from omnilit.callbacks.step_trace import StepTrace
from omnilit.callbacks.trainer_view import is_trial_run
from omnilit.checkpoint.together import run_together
from omnilit.config import ProfileConfig
from omnilit.logging import get_logger

log = get_logger(__name__)


class StepProfiler(Callback):
    """Record the steps of `train.profile` and write one trace a recording rank.

    A step is recorded from the end of the one before, its wait for data included. A run that
    ends or fails inside the range leaves what it recorded; one that is resumed inside it records
    the rest; one that is resumed behind it, and a `fast_dev_run`, record nothing.

    Args:
        config: `train.profile`, whose `enable` is not looked at.

    Attributes:
        finished_at: `time.monotonic()` when the trace was written; 0 before.
    """

    def __init__(self, config: ProfileConfig) -> None:
        self.config = config
        self.finished_at = 0.0
        self._trace: StepTrace | None = None
        self._done_step = 0

    @override
    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if not is_trial_run(trainer):
            run_together(
                lambda: Path(self.config.trace_dir).mkdir(parents=True, exist_ok=True),
                name="making train.profile.trace_dir",
            )

    @override
    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._done_step = trainer.global_step
        is_recorder = trainer.is_global_zero or not self.config.rank0_only
        if is_trial_run(trainer) or not is_recorder:
            return
        start, end = self.config.start_step, self.config.end_step
        if max(start, self._done_step + 1) >= end:
            log.warning(
                "train.profile: nothing is recorded: the run goes on from step %d, and the range "
                "is [%d, %d)",
                self._done_step,
                start,
                end,
            )
            return
        self._trace = StepTrace(
            self.config, rank=trainer.global_rank, device=trainer.strategy.root_device
        )
        self._trace.enter(self._done_step + 1)

    @override
    def on_train_batch_start(
        self, trainer: Trainer, pl_module: LightningModule, batch: object, batch_idx: int
    ) -> None:
        if self._trace is not None:
            self._trace.mark(self._done_step + 1)

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
            return  # a micro-batch inside a window
        self._done_step = trainer.global_step
        if self._trace is not None and self._trace.enter(self._done_step + 1):
            self.finished_at = time.monotonic()

    @override
    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._stop(last=self._done_step)

    @override
    def on_exception(
        self, trainer: Trainer, pl_module: LightningModule, exception: BaseException
    ) -> None:
        self._stop(last=self._done_step + 1)  # the step that failed is in the trace

    def _stop(self, *, last: int) -> None:
        if self._trace is None:
            return
        if self._done_step + 1 < self.config.end_step:
            log.warning(
                "train.profile: the run ends after step %d, inside or before the range [%d, %d)",
                self._done_step,
                self.config.start_step,
                self.config.end_step,
            )
        self._trace.stop(last)
        self._trace = None
