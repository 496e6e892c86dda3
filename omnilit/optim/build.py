"""The optimizer that `train.optimizer` asks for."""

from __future__ import annotations

from collections.abc import Callable
from typing import Final

from torch import nn
from torch.optim import AdamW, Optimizer

from omnilit.config import OptimizerConfig
from omnilit.errors import ConfigError
from omnilit.optim.groups import BACKBONE, parameter_groups

# One kernel over all parameters: on a CPU half the time of the loop, and it takes DTensors.
# Elsewhere (NPU) torch chooses between its loop over lists and the plain one.
FUSED_DEVICES: Final = frozenset({"cpu", "cuda"})


def build_optimizer(
    model: nn.Module,
    config: OptimizerConfig,
    *,
    part_of: Callable[[str], str] = lambda _: BACKBONE,
) -> Optimizer:
    """Build AdamW over the trainable parameters of `model`, sharded or not.

    Args:
        model: On its device; its parameters must not be replaced afterwards.
        config: `train.optimizer`.
        part_of: Name of the part that a parameter, given by its full name, belongs to.

    Raises:
        ConfigError: The type is not available, or a decay pattern matches nothing.
    """
    if config.type != "adamw":
        raise ConfigError(
            key="train.optimizer.type",
            problem=f"{config.type!r} is not available yet",
            fix="use adamw",
        )
    groups = parameter_groups(
        model,
        lr=config.lr,
        weight_decay=config.weight_decay,
        no_decay_modules=config.no_decay_modules,
        no_decay_params=config.no_decay_params,
        part_of=part_of,
    )
    devices = {parameter.device.type for group in groups for parameter in group["params"]}
    is_fused = True if devices <= FUSED_DEVICES else None
    return AdamW(groups, betas=config.betas, eps=config.eps, fused=is_fused)
