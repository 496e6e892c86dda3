"""The repeated blocks of a model: what is sharded, recomputed and compiled one at a time."""

from __future__ import annotations

from torch import nn
from transformers.modeling_layers import GradientCheckpointingLayer


def decoder_blocks(model: nn.Module) -> list[nn.Module]:
    """The outermost repeated layers of a transformers model, in forward order.

    transformers marks them by their base class, so no family is named here.
    """
    blocks: list[nn.Module] = []
    inside: set[nn.Module] = set()
    for module in model.modules():
        if isinstance(module, GradientCheckpointingLayer) and module not in inside:
            blocks.append(module)
            inside.update(module.modules())
    return blocks
