"""Where a model stands before its weights are there."""

from __future__ import annotations

from typing import Final

import torch
from transformers import PreTrainedConfig, PreTrainedModel

from omnilit.errors import ConfigError, Problem
from omnilit.kernels.machine import why_absent
from omnilit.logging import get_logger
from omnilit.models.build import build_meta, build_on

KEY: Final = "train.init_device"
ANYWHERE: Final = frozenset({"meta", "cpu"})
log = get_logger(__name__)


def check_init_device(init_device: str, *, trains_on: str) -> list[Problem]:
    """A problem where a model is to be built on a device that the run does not train on.

    Args:
        init_device: `train.init_device`.
        trains_on: Kind of device of this run: `cpu`, `cuda` or `npu`.
    """
    if init_device in ANYWHERE or init_device == trains_on:
        return []
    reasons = [f"this run trains on {trains_on}", *why_absent(init_device)]
    return [
        Problem(
            KEY,
            f"no model can be built on {init_device}: {', and '.join(reasons)}",
            f"leave it out for meta, which needs no memory, or use {trains_on}",
        )
    ]


def build_initial(
    config: PreTrainedConfig,
    *,
    init_device: str,
    trains_on: str,
    dtype: torch.dtype,
    trust_remote_code: bool = False,
) -> PreTrainedModel:
    """Build a model where `train.init_device` says; its values come later, and are the same.

    Args:
        config: Not changed.
        init_device: `meta` takes no memory; anywhere else each rank first holds the whole model.
        trains_on: Kind of device of this run.
        dtype: Type of the parameters.
        trust_remote_code: Whether Python code beside the configuration may run.

    Raises:
        ConfigError: The device is not one of this run, or the model is not one of transformers.
    """
    if problems := check_init_device(init_device, trains_on=trains_on):
        raise ConfigError.of(problems)
    if init_device == "meta":
        return build_meta(config, dtype=dtype, trust_remote_code=trust_remote_code)
    model = build_on(init_device, config, dtype=dtype, trust_remote_code=trust_remote_code)
    size_mib = sum(p.numel() * p.element_size() for p in model.parameters()) / 2**20
    log.info(
        "init_device: %s: each rank first holds the whole model, %.1f MiB; meta would only ever "
        "take what the rank keeps",
        init_device,
        size_mib,
    )
    return model
