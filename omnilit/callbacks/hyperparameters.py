"""The run's configuration, handed to every logger."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer
from typing_extensions import override


class HyperparameterLog(Callback):
    """Give all loggers the configuration of the run once, before its first step.

    Args:
        tree: Every setting; what came from the environment as it was written, since loggers
            hand on to services what they are given.
    """

    def __init__(self, tree: Mapping[str, Any]) -> None:
        self.tree = tree

    @override
    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        for logger in trainer.loggers:  # each writes on rank 0 alone
            logger.log_hyperparams(dict(self.tree))
            logger.save()
