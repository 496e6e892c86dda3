"""The smallest image, video or sound that a model's tower takes.

What a tower is given is read from what the model's own code asks for: patches in a list with the
rows and columns of each image, in a strip, padded to the longest image, or whole pictures.
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from typing import Any, Final

import torch
from torch import Tensor
from transformers import PreTrainedModel
from transformers.models.llava_next.modeling_llava_next import image_size_to_num_patches

from omnilit.errors import ConfigError
from omnilit.models.families.towers import NESTED_IMAGES, SIZED_IMAGES, SQUARE_PATCHES
from omnilit.models.towers import asked_of_features
from omnilit.types import MODALITIES

_FRAMES: Final = 16  # of a sound: enough for any tower to be left with something
_SIDE: Final = 16  # of a picture in pixels, where the configuration names none
_PARTS: Final = ("vision_config", "vq_config")
_CHANNELS: Final = ("num_channels", "in_channels", "in_chans")
_MERGES: Final = ("spatial_merge_size", "merge_kernel_size", "downsample_factor")


def blank_media(
    base: PreTrainedModel, kind: str, *, device: torch.device | str
) -> dict[str, Tensor]:
    """What the forward of a model takes, with nothing to see or hear in it.

    Args:
        base: The base model, whose configuration tells sizes.
        kind: One of `MODALITIES`.
        device: Of the tensors.

    Raises:
        ConfigError: Nothing here says how such a medium looks.
    """
    asked = asked_of_features(base, kind)
    config: Any = base.config
    try:
        if kind == "audio":
            made = _sound(config, asked)
        else:
            found = (getattr(config, name, None) for name in _PARTS)
            vision = next((part for part in found if part is not None), config)
            made = _make_seen(config, vision, kind, asked)
    except (AttributeError, TypeError) as error:
        raise _unknown(base, kind, str(error)) from error
    if lacking := [name for name in _needed(asked) if name not in made]:
        raise _unknown(base, kind, f"it asks for {' and '.join(lacking)}")
    return {name: value.to(device) for name, value in made.items()}


def _needed(asked: Mapping[str, inspect.Parameter]) -> list[str]:
    """What a model's own code takes beside the pixels, which have other names there at times."""
    taken = list(asked.values())[2:]  # behind itself and the pixels
    return [
        one.name
        for one in taken
        if one.kind is one.POSITIONAL_OR_KEYWORD and one.default is one.empty
    ]


def _unknown(base: PreTrainedModel, kind: str, reason: str) -> ConfigError:
    return ConfigError(
        key="model.config_path",
        problem=f"nothing says how {kind}s look to {type(base).__name__} ({reason})",
        fix="train on data without them, or report this model",
    )


def _make_seen(
    config: Any, vision: Any, kind: str, asked: Mapping[str, inspect.Parameter]
) -> dict[str, Tensor]:
    name = MODALITIES[kind]
    if f"{kind}_grid_thw" in asked:
        return _grid(config, vision, kind, asked)
    for sizes in ("target_sizes", "target_sizes_videos"):
        if sizes in asked:
            return _strip(config, vision, name, sizes)
    if "spatial_shapes" in asked:
        return _padded(config, vision, name)
    if vision is config:  # patches are embedded by one matrix
        return {name: torch.zeros(1, 1, _width(vision))}
    return _picture(config, vision, kind, asked)


def _sound(config: Any, asked: Mapping[str, inspect.Parameter]) -> dict[str, Tensor]:
    bins = config.audio_config.num_mel_bins
    mask = next(name for name in ("feature_attention_mask", "input_features_mask") if name in asked)
    return {
        MODALITIES["audio"]: torch.zeros(1, bins, _FRAMES),
        mask: torch.ones(1, _FRAMES, dtype=torch.int64),
    }


def _grid(
    config: Any, vision: Any, kind: str, asked: Mapping[str, inspect.Parameter]
) -> dict[str, Tensor]:
    """Patches of all images in one list."""
    merge = _merge(config, vision)
    times = getattr(vision, "temporal_merge_size", 1) if kind == "video" else 1
    number = times * merge**2
    square = (_channels(vision), vision.patch_size, vision.patch_size)
    shape = square if config.model_type in SQUARE_PATCHES else (_width(vision),)
    found = {
        MODALITIES[kind]: torch.zeros(number, *shape),
        f"{kind}_grid_thw": torch.tensor([[times, merge, merge]]),
    }
    if f"{kind}_merge_sizes" in asked:
        found[f"{kind}_merge_sizes"] = torch.tensor([merge])
    return found


def _strip(config: Any, vision: Any, name: str, sizes: str) -> dict[str, Tensor]:
    """Patches of all images beside each other, as high as one."""
    side = _merge(config, vision) ** 2
    patch = vision.patch_size
    pixels = torch.zeros(1, _channels(vision), patch, side**2 * patch)
    return {name: pixels, sizes: torch.tensor([[side, side]], dtype=torch.int32)}


def _padded(config: Any, vision: Any, name: str) -> dict[str, Tensor]:
    """A list of patches an image, of which a mask says how many there are."""
    side = _merge(config, vision)
    return {
        name: torch.zeros(1, side**2, _width(vision)),
        "spatial_shapes": torch.tensor([[side, side]]),
        "pixel_attention_mask": torch.ones(1, side**2, dtype=torch.int64),
    }


def _picture(
    config: Any, vision: Any, kind: str, asked: Mapping[str, inspect.Parameter]
) -> dict[str, Tensor]:
    """Whole pictures, or tiles of them."""
    name, channels = MODALITIES[kind], _channels(vision)
    height, width = _sides(vision)
    pixels = torch.ones(1, channels, height, width)
    found: dict[str, Tensor] = {}
    mask = asked.get("pixel_attention_mask")
    sizes = asked.get("image_sizes")
    if sizes is not None and (sizes.default is sizes.empty or vision.model_type in SIZED_IMAGES):
        found["image_sizes"] = torch.tensor([[height, width]])
    if kind == "video" or config.model_type in NESTED_IMAGES:
        pixels = pixels[None]
    elif pinpoints := getattr(config, "image_grid_pinpoints", None):
        tiles = image_size_to_num_patches((height, width), pinpoints, height)
        pixels = pixels.expand(1, tiles, channels, height, width)
    elif mask is not None and mask.default is mask.empty:  # which of its tiles are there
        pixels = pixels[None]
        found["pixel_attention_mask"] = torch.ones(1, 1, dtype=torch.bool)
    if "high_res_pixel_values" in asked:
        high, wide = _sides(config.high_res_vision_config)
        found["high_res_pixel_values"] = torch.ones(1, channels, high, wide)
    return {name: pixels.contiguous(), **found}


def _sides(vision: Any) -> tuple[int, int]:
    size: Any = getattr(vision, "image_size", _SIDE)
    height, width = size if isinstance(size, list | tuple) else (size, size)
    return height, width


def _channels(vision: Any) -> int:
    return next((getattr(vision, name) for name in _CHANNELS if hasattr(vision, name)), 3)


def _width(vision: Any) -> int:
    """Numbers of one patch."""
    return _channels(vision) * getattr(vision, "temporal_patch_size", 1) * vision.patch_size**2


def _merge(config: Any, vision: Any) -> int:
    """Patches along a side that become one place; 1 where none are merged."""
    found = (getattr(part, name, None) for part in (vision, config) for name in _MERGES)
    size: Any = next((value for value in found if value is not None), 1)
    return size if isinstance(size, int) else size[0]
