"""Checkpoints and exports at fixed steps and epochs, and the export at the end."""

from __future__ import annotations

import time
from pathlib import Path
from typing import cast

from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import Checkpoint
from lightning.pytorch.trainer.states import TrainerFn
from lightning.pytorch.utilities.types import STEP_OUTPUT
from torch import nn
from typing_extensions import override

from omnilit.callbacks.evaluation import is_evaluation_due
from omnilit.callbacks.protocols import SavingStrategy, TrainedModule
from omnilit.callbacks.trainer_view import is_trial_run
from omnilit.checkpoint.background import SaveOptions
from omnilit.checkpoint.layout import HF_FOLDER, check_writable, step_folder
from omnilit.checkpoint.manifest import COMPLETE
from omnilit.checkpoint.together import run_together
from omnilit.config import CheckpointConfig
from omnilit.models.lora import saved_tensors
from omnilit.parallel.collectives import run_on_first

NUM_MOMENTS = 2  # of Adam, in the type of its parameter


class CheckpointSaver(Checkpoint):
    """Save whole steps inside `fit`, where the loader's position is still true.

    A step is saved when it is due by `save_steps` or `save_epochs` or is the run's last one, once,
    after its evaluation; with both options 0 no step is. It is exported, after that, when it is
    due by `hf_save_steps` or `hf_save_epochs`, and at the end of the run. Nothing is written after
    an exception, nor in a `fast_dev_run`. The epoch of a save is always stored as open: whether it
    is over is decided at load, from the limits given then. A disk without room for the first thing
    to be written is an error before the first step.

    With `save_async` a save copies what it stores and the run goes on while that is written. The
    write is waited for before the next save, before an export, and at the end of the run; one that
    fails ends the run, on all ranks, at the end of its next step.

    Lightning runs subclasses of `Checkpoint` after all other callbacks, so what these changed at
    this step is in the save.

    Args:
        config: `train.checkpoint`.

    Attributes:
        finished_at: `time.monotonic()` at the end of the last save or export.
    """

    def __init__(self, config: CheckpointConfig) -> None:
        self.config = config
        self.output_dir = Path(config.output_dir)
        self.finished_at = 0.0
        self._loaded_step = self._checked_step = self._saved_step = 0
        self._exported_step: int | None = None

    @override
    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._exported_step = None
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
        # what was loaded is neither saved nor exported again
        self._loaded_step = self._checked_step = self._saved_step = trainer.global_step

    @override
    def on_train_batch_end(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        outputs: STEP_OUTPUT,
        batch: object,
        batch_idx: int,
    ) -> None:
        if self.config.save_async and trainer.global_step != self._checked_step:
            self._checked_step = trainer.global_step
            _saving(trainer).check_save()
        if not is_evaluation_due(trainer):
            self._write_if_due(trainer, pl_module)

    @override
    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if trainer.state.fn == TrainerFn.FITTING:
            self._write_if_due(trainer, pl_module)

    @override
    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        # a stop that was asked for after this callback's hook of the last micro-batch
        self._write_if_due(trainer, pl_module)

    @override
    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._finish_save(trainer)
        if self.config.save_hf_weights and not is_trial_run(trainer):
            self._export(trainer, pl_module)

    @override
    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        # a complete run that was killed before its export ends, resumed, without on_train_end
        step = trainer.global_step
        if not self.config.save_hf_weights or is_trial_run(trainer) or step == self._exported_step:
            return
        export = step_folder(self.output_dir, step) / HF_FOLDER
        if not run_on_first((export / COMPLETE).is_file, name="looking for the export"):
            self._export(trainer, pl_module)

    def _write_if_due(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if is_trial_run(trainer):
            return
        self._save_if_due(trainer)
        config = self.config
        if not config.save_hf_weights or trainer.global_step == self._loaded_step:
            return
        if _is_due(trainer, steps=config.hf_save_steps, epochs=config.hf_save_epochs):
            self._export(trainer, pl_module)

    def _save_if_due(self, trainer: Trainer) -> None:
        step, config = trainer.global_step, self.config
        has_saves = config.save_steps or config.save_epochs
        if not has_saves or step == self._saved_step:
            return
        is_due = _is_due(trainer, steps=config.save_steps, epochs=config.save_epochs)
        if not is_due and not _is_last_step(trainer):
            return
        options = SaveOptions(is_background=config.save_async, keep_last=config.keep_last)
        trainer.save_checkpoint(
            step_folder(self.output_dir, step),
            weights_only=False,
            # the strategies of Lightning refuse any
            storage_options=None if options == SaveOptions() else options,
        )
        self._saved_step = step
        self.finished_at = time.monotonic()

    def _export(self, trainer: Trainer, pl_module: LightningModule) -> None:
        step = trainer.global_step
        if step == self._exported_step:
            return
        self._finish_save(trainer)  # it may be about to publish the folder that this goes into
        folder = step_folder(self.output_dir, step)
        cast("TrainedModule", pl_module).export_weights(folder / HF_FOLDER)
        self._exported_step = step
        self.finished_at = time.monotonic()

    def _finish_save(self, trainer: Trainer) -> None:
        if self.config.save_async:
            _saving(trainer).finish_save()

    def _num_bytes(self, pl_module: LightningModule) -> int:
        """Size of the larger of a checkpoint and an export; of what is never written, 0."""
        config = self.config
        saved = [saved_tensors(child).values() for child in pl_module.children()]
        parameters = [t for tensors in saved for t in tensors if isinstance(t, nn.Parameter)]
        checkpoint = export = 0
        if config.save_steps or config.save_epochs:
            checkpoint = sum(
                parameter.numel()  # of all ranks, also where it is sharded
                * parameter.dtype.itemsize
                * (1 + NUM_MOMENTS * parameter.requires_grad)
                for parameter in parameters
            )
        if config.save_hf_weights:
            dtype = cast("TrainedModule", pl_module).export_dtype
            export = sum(parameter.numel() for parameter in parameters) * dtype.itemsize
        return max(checkpoint, export)


def _saving(trainer: Trainer) -> SavingStrategy:
    return cast("SavingStrategy", trainer.strategy)


def _is_due(trainer: Trainer, *, steps: int, epochs: int) -> bool:
    """Whether a whole number of `steps` or of `epochs` ends with this step; 0 is never."""
    at_step = steps and trainer.global_step % steps == 0
    ends_epoch = epochs and trainer.is_last_batch
    return bool(at_step or (ends_epoch and (trainer.current_epoch + 1) % epochs == 0))


def _is_last_step(trainer: Trainer) -> bool:
    stops = trainer.should_stop and trainer.fit_loop._can_stop_early  # noqa: SLF001 - min_epochs
    ends_last_epoch = trainer.is_last_batch and trainer.current_epoch + 1 == trainer.max_epochs
    return stops or trainer.global_step == trainer.max_steps or ends_last_epoch
