"""The optimizer that `train.optimizer` asks for."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Final

import torch
from torch import nn
from torch.distributed import ProcessGroup
from torch.optim import AdamW, Optimizer

from omnilit.config import OptimizerConfig
from omnilit.config.optimizer_rules import optimizer_problems
from omnilit.errors import ConfigError
from omnilit.optim.anyprecision import AnyPrecisionAdamW
from omnilit.optim.groups import BACKBONE, parameter_groups

# One kernel over all parameters: on a CPU half the time of the loop, and it takes DTensors.
# Elsewhere (NPU) torch chooses between its loop over lists and the plain one.
FUSED_DEVICES: Final = frozenset({"cpu", "cuda"})


def build_optimizer(
    model: nn.Module,
    config: OptimizerConfig,
    *,
    part_of: Callable[[str], str] = lambda _: BACKBONE,
    rates: Mapping[str, float] = {},
    stages: ProcessGroup | None = None,
) -> Optimizer:
    """Build the optimizer over the trainable parameters of `model`, sharded or not.

    Args:
        model: On its device; its parameters must not be replaced afterwards.
        config: `train.optimizer`.
        part_of: Name of the part that a parameter, given by its full name, belongs to.
        rates: Highest learning rates of parts that have one of their own.
        stages: See `parameter_groups`.

    Raises:
        ConfigError: A decay pattern matches nothing, or a setting does not fit the type or the
            weights.
    """
    is_wide = all(p.dtype == torch.float32 for p in model.parameters() if p.requires_grad)
    master_dtype = "float32" if is_wide else "bfloat16"
    if problems := optimizer_problems(config, master_dtype=master_dtype):
        raise ConfigError.of(problems)
    groups = parameter_groups(
        model,
        lr=config.lr,
        weight_decay=config.weight_decay,
        no_decay_modules=config.no_decay_modules,
        no_decay_params=config.no_decay_params,
        part_of=part_of,
        rates=rates,
        stages=stages,
    )
    devices = {parameter.device.type for group in groups for parameter in group["params"]}
    is_fused = True if devices <= FUSED_DEVICES else None
    if config.type == "anyprecision_adamw":
        return AnyPrecisionAdamW(
            groups,
            betas=config.betas,
            eps=config.eps,
            use_kahan_summation=config.use_kahan_summation,
            fused=is_fused,
        )
    return AdamW(groups, betas=config.betas, eps=config.eps, fused=is_fused)


def refuse_other_type(saved: str | None, config: OptimizerConfig) -> None:
    """Refuse to go on with moments that another type of optimizer has left.

    Args:
        saved: The type that the checkpoint names; one that names none is of adamw.
        config: `train.optimizer` of the run that goes on.

    Raises:
        ConfigError: The types differ.
    """
    before = saved or "adamw"
    if before != config.type:
        raise ConfigError(
            key="train.optimizer.type",
            problem=f"the checkpoint's moments are those of {before}, not of {config.type}",
            fix=f"set type: {before}, or start a new run from the exported weights",
        )
