"""Learning rates as absolute values of the step, so that a rate of 0 and any floor work."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

from torch import Tensor
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler
from typing_extensions import override

from omnilit.config import OptimizerConfig
from omnilit.errors import ConfigError, suggest


def _linear(lr: float, lr_min: float, progress: float) -> float:
    return lr_min + (lr - lr_min) * (1.0 - progress)


def _cosine(lr: float, lr_min: float, progress: float) -> float:
    return lr_min + (lr - lr_min) * (1.0 + math.cos(math.pi * progress)) / 2.0


def _constant(lr: float, lr_min: float, progress: float) -> float:
    del lr_min, progress
    return lr


def lr_at(step: int, *, total: int, config: OptimizerConfig, lr: float) -> float:
    """The learning rate of a step.

    The rate climbs from `lr_start` to `lr` over the first int(total * lr_warmup_ratio) steps and
    reaches `lr_min` after int(total * lr_decay_ratio), both counted from the start. A rate below
    `lr_min`, such as 0, stays where it is.

    Args:
        step: Steps already taken: 0 for the first one.
        total: Steps of the whole run.
        config: `train.optimizer`.
        lr: The group's own highest rate, which stands in for `config.lr`.

    Raises:
        ConfigError: `lr_decay_style` is not known.
    """
    decay = _decay_of(config.lr_decay_style)
    num_warmup = int(total * config.lr_warmup_ratio)
    if step < num_warmup:
        return config.lr_start + (lr - config.lr_start) * step / num_warmup
    num_decay = max(num_warmup, int(total * config.lr_decay_ratio)) - num_warmup
    progress = min((step - num_warmup) / num_decay, 1.0) if num_decay else 1.0
    return decay(lr, min(config.lr_min, lr), progress)


def _decay_of(style: str) -> Callable[[float, float, float], float]:
    known = {"constant": _constant, "linear": _linear, "cosine": _cosine}
    if style not in known:
        raise ConfigError(
            key="train.optimizer.lr_decay_style",
            problem=f"{style!r} is not a schedule.{suggest(style, known)}",
            fix=f"use one of {', '.join(known)}",
        )
    return known[style]


class AbsoluteSchedule(LRScheduler):
    """Sets each group's rate to `lr_at` its step; step once an optimizer step, skipped or not.

    Only the step is stored: a resumed run may have another length or other rates.

    Args:
        optimizer: Its groups' `lr` at this moment are their highest rates.
        config: `train.optimizer`.
        total_steps: Steps of the whole run.
    """

    def __init__(self, optimizer: Optimizer, config: OptimizerConfig, *, total_steps: int) -> None:
        self.config = config
        self.total_steps = total_steps
        super().__init__(optimizer)

    @override
    def get_lr(self) -> list[float | Tensor]:
        """The rate of each group for the coming step."""
        return [
            lr_at(
                self.last_epoch, total=self.total_steps, config=self.config, lr=group["initial_lr"]
            )
            for group in self.optimizer.param_groups
        ]

    @override
    def step(self, epoch: int | None = None) -> None:
        """Go on by one step.

        Args:
            epoch: Only None; torch's signature has it.
        """
        assert epoch is None, "the schedule counts its own steps"
        self._set_step(self.last_epoch + 1)

    @override
    def state_dict(self) -> dict[str, Any]:
        """The number of steps taken."""
        return {"step": self.last_epoch}

    @override
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Set the rates to those of the stored step, under the present length and rates."""
        self._set_step(int(state_dict["step"]))

    def _set_step(self, step: int) -> None:
        self.last_epoch = step
        self._last_lr = self.get_lr()
        for group, rate in zip(self.optimizer.param_groups, self._last_lr, strict=True):
            group["lr"] = rate
