"""The smallest image, video or sound that a model's tower takes."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from omnilit.models.families.towers import NESTED_IMAGES
from omnilit.types import MODALITIES

_FRAMES = 16  # of a sound: enough for any tower to be left with something


def blank_media(
    base: PreTrainedModel, kind: str, *, device: torch.device | str
) -> dict[str, Tensor]:
    """What the forward of a model takes, with nothing to see or hear in it.

    Args:
        base: The base model, whose configuration tells sizes.
        kind: One of `MODALITIES`.
        device: Of the tensors.
    """
    config, name = base.config, MODALITIES[kind]
    if kind == "audio":
        bins = config.audio_config.num_mel_bins
        return {
            name: torch.zeros(1, bins, _FRAMES, device=device),
            "feature_attention_mask": torch.ones(1, _FRAMES, dtype=torch.int64, device=device),
        }
    vision = config.vision_config
    merge = getattr(vision, "spatial_merge_size", None)
    if merge is not None:
        channels = _first(vision, ("in_channels", "in_chans", "num_channels"))
        width = channels * vision.temporal_patch_size * vision.patch_size**2
        grid = torch.tensor([[1, merge, merge]], device=device)
        pixels = torch.zeros(merge**2, width, device=device)
        return {name: pixels, f"{kind}_grid_thw": grid}
    size: Any = vision.image_size
    height, width = size if isinstance(size, list | tuple) else (size, size)
    pixels = torch.ones(1, vision.num_channels, height, width, device=device)
    return {name: pixels[None] if config.model_type in NESTED_IMAGES else pixels}


def _first(config: Any, names: tuple[str, ...]) -> int:
    return next(getattr(config, name) for name in names if hasattr(config, name))
