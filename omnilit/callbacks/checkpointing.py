"""Checkpoints at fixed steps and epochs, and the export at the end."""

from __future__ import annotations

import time
from pathlib import Path
from typing import cast

from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import Checkpoint
from lightning.pytorch.trainer.states import TrainerFn
from lightning.pytorch.utilities.types import STEP_OUTPUT
from typing_extensions import override

from omnilit.callbacks.evaluation import is_evaluation_due
from omnilit.callbacks.protocols import TrainedModule
from omnilit.callbacks.trainer_view import is_trial_run
from omnilit.checkpoint.layout import HF_FOLDER, check_writable, step_folder
from omnilit.checkpoint.manifest import COMPLETE
from omnilit.checkpoint.together import run_together
from omnilit.config import CheckpointConfig

NUM_MOMENTS = 2  # of Adam, in the type of its parameter


class CheckpointSaver(Checkpoint):
    """Save whole steps inside `fit`, where the loader's position is still true.

    A step is saved when it is due by `save_steps` or `save_epochs` or is the run's last one, once,
    after its evaluation; with both options 0 no step is. Nothing is saved after an exception, nor
    in a `fast_dev_run`. The epoch of a save is always stored as open: whether it is over is
    decided at load, from the limits given then. A disk without room for the first save is an
    error before the first step.

    Lightning runs subclasses of `Checkpoint` after all other callbacks, so what these changed at
    this step is in the save.

    Args:
        config: `train.checkpoint`.

    Attributes:
        finished_at: `time.monotonic()` at the end of the last save.
    """

    def __init__(self, config: CheckpointConfig) -> None:
        self.config = config
        self.output_dir = Path(config.output_dir)
        self.finished_at = 0.0
        self._done_step = 0
        self._is_exported = False

    @override
    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        # the first moment at which the model, and with it the size of what is saved, is there
        num_bytes = 0 if is_trial_run(trainer) else self._num_bytes(pl_module)
        if num_bytes:
            run_together(
                lambda: check_writable(self.output_dir, num_bytes=num_bytes),
                name=f"looking for room in {self.output_dir}",
                on_first=True,
            )

    @override
    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._done_step = trainer.global_step  # what was loaded is not saved again

    @override
    def on_train_batch_end(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        outputs: STEP_OUTPUT,
        batch: object,
        batch_idx: int,
    ) -> None:
        if not is_evaluation_due(trainer):
            self._save_if_due(trainer)

    @override
    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if trainer.state.fn == TrainerFn.FITTING:
            self._save_if_due(trainer)

    @override
    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        # a stop that was asked for after this callback's hook of the last micro-batch
        self._save_if_due(trainer)

    @override
    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._export(trainer, pl_module)

    @override
    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        # a complete run that was killed before its export ends, resumed, without on_train_end
        folder = step_folder(self.output_dir, trainer.global_step)
        if not self._is_exported and not (folder / HF_FOLDER / COMPLETE).is_file():
            self._export(trainer, pl_module)

    def _export(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if self.config.save_hf_weights and not is_trial_run(trainer):
            folder = step_folder(self.output_dir, trainer.global_step)
            cast("TrainedModule", pl_module).export_weights(folder / HF_FOLDER)
            self._is_exported = True

    def _num_bytes(self, pl_module: LightningModule) -> int:
        """Size of the first thing that will be written: a checkpoint, an export, or nothing."""
        config = self.config
        has_moments = bool(config.save_steps or config.save_epochs)
        if not has_moments and not config.save_hf_weights:
            return 0
        return sum(
            parameter.numel()  # of all ranks, also where it is sharded
            * parameter.dtype.itemsize
            * (1 + (NUM_MOMENTS if has_moments and parameter.requires_grad else 0))
            for parameter in pl_module.parameters()
        )

    def _save_if_due(self, trainer: Trainer) -> None:
        step = trainer.global_step
        if step == self._done_step or is_trial_run(trainer) or not self._is_due(trainer):
            return
        trainer.save_checkpoint(step_folder(self.output_dir, step), weights_only=False)
        self._done_step = step
        self.finished_at = time.monotonic()

    def _is_due(self, trainer: Trainer) -> bool:
        every_steps, every_epochs = self.config.save_steps, self.config.save_epochs
        if not every_steps and not every_epochs:
            return False
        step, epoch = trainer.global_step, trainer.current_epoch
        at_step = every_steps and step % every_steps == 0
        at_epoch = every_epochs and trainer.is_last_batch and (epoch + 1) % every_epochs == 0
        return bool(at_step or at_epoch or _is_last_step(trainer))


def _is_last_step(trainer: Trainer) -> bool:
    stops = trainer.should_stop and trainer.fit_loop._can_stop_early  # noqa: SLF001 - min_epochs
    ends_last_epoch = trainer.is_last_batch and trainer.current_epoch + 1 == trainer.max_epochs
    return stops or trainer.global_step == trainer.max_steps or ends_last_epoch
