"""Attributes that Lightning gives a trainer without declaring them, with their types."""

from __future__ import annotations

from typing import TypeVar, cast

from lightning.pytorch import Callback, LightningDataModule, Trainer

C = TypeVar("C", bound=Callback)


def callbacks_of_type(trainer: Trainer, kind: type[C]) -> list[C]:
    """The trainer's callbacks of one class, in their order."""
    callbacks = cast("list[Callback]", vars(trainer)["callbacks"])
    return [callback for callback in callbacks if isinstance(callback, kind)]


def datamodule_of(trainer: Trainer) -> LightningDataModule | None:
    """The data module of the run, None where plain loaders were given."""
    return cast("LightningDataModule | None", vars(trainer)["datamodule"])


def is_trial_run(trainer: Trainer) -> bool:
    """True under `fast_dev_run`, which leaves nothing behind."""
    return bool(vars(trainer)["fast_dev_run"])
