"""A callback for runs of the command line, named in `trainer.callbacks`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer

from tests.helpers.training import weights_of


class StopAfter(Callback):
    """Ends a run after some steps of its schedule, and keeps the weights that it began with.

    Args:
        steps: Steps to run.
        weights: File for the full weights before the first step.
    """

    def __init__(self, steps: int, weights: str) -> None:
        self.steps = steps
        self.weights = Path(weights)

    def on_train_start(self, trainer: Trainer, pl_module: Any) -> None:
        weights = weights_of(pl_module)
        if trainer.is_global_zero:
            torch.save(weights, self.weights)

    def on_train_batch_end(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
    ) -> None:
        trainer.should_stop = trainer.global_step >= self.steps
