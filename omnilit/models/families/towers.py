"""What transformers does not say of the towers of single families."""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType
from typing import Final

# Parts inside a tower that lead to the language model and are trained where the tower is frozen,
# as paths from the base model. Of Qwen's vision models the merger is frozen with its tower.
KEPT_PARTS: Final[Mapping[str, tuple[str, ...]]] = MappingProxyType(
    {
        "qwen2_5_omni_thinker": ("visual.merger", "audio_tower.proj"),
        "qwen3_omni_moe_thinker": (
            "visual.merger",
            "visual.merger_list",
            "audio_tower.proj1",
            "audio_tower.proj2",
        ),
    }
)

# Families whose pixels have a dimension of the images of a sequence in front: [1, images, ...]
NESTED_IMAGES: Final = frozenset({"idefics2", "idefics3", "smolvlm"})

# Families whose pictures all have one size and cost alike, with those of their towers in which all
# patches see each other, and behind which nothing but matrices comes
PICTURE_TOWERS: Final[Mapping[str, frozenset[str]]] = MappingProxyType(
    {
        "internvl": frozenset({"internvl_vision"}),
        "llava": frozenset({"clip_vision_model", "siglip_vision_model"}),
        "smolvlm": frozenset({"smolvlm_vision"}),
    }
)

# Families whose patches lie in a list, each as a small picture [channels, side, side]
SQUARE_PATCHES: Final = frozenset({"kimi_k25", "paddleocr_vl"})

# Families whose videos take the places of the token of images, so that only types tell them apart
VIDEOS_AS_IMAGES: Final = frozenset({"glm46v", "glm4v", "glm4v_moe", "glm_ocr", "glmga"})

# Towers that are told the sizes of pictures, which not all models ask for that may hold one
SIZED_IMAGES: Final = frozenset({"pixtral"})

# Families whose grids say what an image or a video costs: a patch attends to its own frame, and of
# `spatial_merge_size` squared patches one feature comes, in order. Their items can change ranks.
GRID_FAMILIES: Final = frozenset(
    {
        "qwen2_vl",
        "qwen2_5_vl",
        "qwen3_vl",
        "qwen3_vl_moe",
        "qwen3_5",
        "qwen3_5_moe",
        "qwen2_5_omni_thinker",
        "qwen3_omni_moe_thinker",
    }
)
