"""What the callbacks ask of the module, strategy and data module that they run beside."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Protocol

import torch

from omnilit.types import Confusion, StepResult

Table = tuple[Sequence[str], Iterable[Sequence[object]]]  # header, rows


class HasRows(Protocol):
    """Anything that describes itself as a table in the log."""

    def rows(self) -> Table:
        """Header and rows."""
        ...


class TrainedModule(Protocol):
    """The side of the LightningModule that the callbacks read.

    `step_result` is set once an optimizer step, before the callbacks' `on_train_batch_end` of
    the step's last micro-batch; `eval_result`, and of a classifier `eval_confusion`, at the latest
    in `on_validation_epoch_end`, since Lightning calls the callbacks' `on_validation_end` before
    the module's own.
    """

    step_result: StepResult | None
    eval_result: dict[str, float] | None
    eval_confusion: Confusion | None

    @property
    def binding(self) -> HasRows:
        """What was bound where."""
        ...

    @property
    def export_dtype(self) -> torch.dtype:
        """The type that exported weights are written in."""
        ...

    def export_weights(self, destination: Path) -> None:
        """Write a Hugging Face folder; every rank calls."""
        ...


class SavingStrategy(Protocol):
    """The side of the strategy that writes checkpoints in the background."""

    def check_save(self) -> None:
        """Raise on all ranks where the one being written has failed; every rank calls."""
        ...

    def finish_save(self) -> None:
        """Wait for the one being written; raise where it failed; every rank calls."""
        ...


class MeshStrategy(Protocol):
    """The side of the strategy that the callbacks read."""

    @property
    def topology(self) -> HasRows:
        """The meshes of the run."""
        ...


class DescribedData(Protocol):
    """The side of the data module that the callbacks read."""

    @property
    def steps_per_epoch(self) -> int:
        """Optimizer steps of the epoch at hand."""
        ...

    @property
    def passes_per_epoch(self) -> float | None:
        """Trips through the data in an epoch."""
        ...

    def rows(self) -> Table:
        """What is trained on: sources, samples, steps and passes of an epoch."""
        ...

    def first_sample_text(self) -> str:
        """The first sample decoded, with what is supervised marked."""
        ...
