"""Activations recomputed in the backward pass, a decoder block at a time."""

from __future__ import annotations

from typing import Any, Final

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves
from transformers import PreTrainedModel

from omnilit.config import GradientCheckpointingConfig
from omnilit.errors import ConfigError
from omnilit.models.blocks import decoder_blocks

ENABLE: Final = "train.gradient_checkpointing.enable"
KEY: Final = "train.gradient_checkpointing.enable_reentrant"


def enable_recomputation(model: PreTrainedModel, config: GradientCheckpointingConfig) -> None:
    """Make every decoder block forget its activations and compute them again when needed.

    Args:
        model: Kernels are bound already; not yet sharded.
        config: `train.gradient_checkpointing`; nothing happens where `enable` is false.

    Raises:
        ConfigError: The model cannot do it, or its reentrant form would lose gradients.
    """
    if not config.enable:
        return
    if not model.supports_gradient_checkpointing:
        raise ConfigError(
            key=ENABLE,
            problem=f"{type(model).__name__} has no blocks that could be computed again",
            fix=f"set {ENABLE}: false",
        )
    options: dict[str, Any] = {"use_reentrant": config.enable_reentrant}
    if config.debug:
        options["debug"] = True
    if config.enable_reentrant:
        _refuse_router_loss(model)
        for block in decoder_blocks(model):
            block.register_forward_pre_hook(_refuse_lost_gradients, with_kwargs=True)
    model.activation_checkpointing_enable(activation_checkpointing_kwargs=options)


def _refuse_router_loss(model: PreTrainedModel) -> None:
    """The reentrant form runs a block without a graph: what leaves it sideways has no gradient."""
    if getattr(model.config.get_text_config(), "output_router_logits", False):
        raise ConfigError(
            key=KEY,
            problem="the router's balance loss reads logits from inside the blocks, and the "
            "reentrant form keeps no graph there, so the routers would not learn from it",
            fix="set enable_reentrant: false, or output_router_logits: false in the model's "
            "configuration",
        )


def _refuse_lost_gradients(module: nn.Module, _: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    """The reentrant form sends gradients back to positional arguments only."""
    if not torch.is_grad_enabled():
        return
    lost = [
        name
        for name, value in kwargs.items()
        if any(isinstance(leaf, Tensor) and leaf.requires_grad for leaf in tree_leaves(value))
    ]
    if lost:
        raise ConfigError(
            key=KEY,
            problem=f"{type(module).__name__} is given {', '.join(lost)} by keyword, whose "
            "gradient the reentrant form would drop",
            fix="set enable_reentrant: false",
        )
