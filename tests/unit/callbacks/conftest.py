"""A module and a trainer small enough that a whole `fit` takes a blink."""

from __future__ import annotations

import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import Checkpoint
from torch import Tensor
from torch.utils.data import DataLoader

from omnilit.types import Confusion, StepResult


class Row(torch.nn.Module):
    """One weight; its gradient is the mean of the inputs."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(()))


class TinyModule(LightningModule):
    """Sets `step_result` and `eval_result` as the tasks do, and notes what happened when."""

    def __init__(self, *, micro_batches: int = 8, val_batches: int = 2) -> None:
        super().__init__()
        self.net = Row()
        self.micro_batches, self.val_batches = micro_batches, val_batches
        self.step_result: StepResult | None = None
        self.eval_result: dict[str, float] | None = None
        self.eval_confusion: Confusion | None = None
        self.losses: dict[str, float] = {"tokens": 1.0}
        self.grad_norm = 0.5
        self.flops: float | None = None
        self.events: list[str] = []
        self.draws: list[tuple[float, float, float]] = []
        self.export_dtype = torch.float32

    def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
        return (self.net.weight * batch).sum()

    def optimizer_step(self, epoch: int, *args: Any, **kwargs: Any) -> None:
        super().optimizer_step(epoch, *args, **kwargs)
        self.draws.append((random.random(), float(np.random.rand()), torch.rand(()).item()))  # noqa: NPY002
        self.step_result = StepResult(
            step=self.trainer.global_step + 1,
            epoch=epoch,
            losses=self.losses,
            loss=sum(self.losses.values()),
            grad_norm=self.grad_norm,
            lr={"backbone": 0.1, "backbone/no_decay": 0.2},
            tokens=10,
            num_tokens=12,
            data_wait_s=0.25,
            skipped_steps=0,
            flops=self.flops,
        )

    def validation_step(self, batch: Tensor, batch_idx: int) -> None:
        self.draws_in_evaluation = random.random(), np.random.rand(), torch.rand(3)  # noqa: NPY002

    def on_validation_epoch_end(self) -> None:
        self.events.append(f"eval {self.trainer.global_step}")
        self.eval_result = {"eval_loss": 2.0 + self.trainer.global_step}
        self.log_dict(self.eval_result, logger=False)

    def export_weights(self, destination: Path) -> None:
        self.events.append(f"export {destination}")

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD([{"params": list(self.parameters()), "name": "backbone"}], lr=0.1)

    def train_dataloader(self) -> DataLoader[Any]:
        return DataLoader(torch.ones(self.micro_batches), batch_size=1)  # pyright: ignore[reportArgumentType]

    def val_dataloader(self) -> DataLoader[Any]:
        return DataLoader(torch.ones(self.val_batches), batch_size=1)  # pyright: ignore[reportArgumentType]


class StopAt(Callback):
    """Ask for a stop, or fail, in the last micro-batch of a step."""

    def __init__(self, step: int, *, error: type[BaseException] | None = None) -> None:
        self.step, self.error = step, error

    def on_train_batch_end(self, trainer: Trainer, *args: Any, **kwargs: Any) -> None:
        if trainer.global_step == self.step:
            if self.error is not None:
                raise self.error("as asked")
            trainer.should_stop = True


@pytest.fixture
def make_module() -> type[TinyModule]:
    return TinyModule


@pytest.fixture
def stop_at() -> type[StopAt]:
    return StopAt


@pytest.fixture
def make_trainer(tmp_path: Path) -> Callable[..., Trainer]:
    """A CPU trainer of one process: `callbacks`, then any of Trainer's own arguments."""

    def make(*callbacks: Callback, **settings: Any) -> Trainer:
        defaults: dict[str, Any] = {
            "accelerator": "cpu",
            "devices": 1,
            "max_epochs": 1,
            "accumulate_grad_batches": 2,
            "logger": False,
            "enable_model_summary": False,
            "enable_progress_bar": False,
            "enable_checkpointing": any(isinstance(c, Checkpoint) for c in callbacks),
            "num_sanity_val_steps": 0,
            "default_root_dir": tmp_path,
        }
        return Trainer(callbacks=list(callbacks), **(defaults | settings))

    return make
