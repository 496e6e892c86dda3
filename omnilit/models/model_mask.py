"""Masks that a model's own code makes, for tokens that see some of those behind them.

Packed attention needs no mask: bounds and causality take its place. In some models the tokens of an
image see each other, and their code says so to transformers' mask builders. Ours makes nothing of
what it is told but keeps it, so that attention can ask within a segment.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Final

from torch import Tensor
from transformers import PreTrainedModel

from omnilit.models.towers import base_of, source_of_forward

# Under which names models are told which tokens stand for images, videos and sounds
TYPES_NAMES: Final = ("token_type_ids", "mm_token_type_ids")
_BLOCKS: Final = "block_sequence_ids"  # what transformers calls the tokens that see each other
_PREFIX: Final = "token_type_ids == 0"  # a whole prompt sees itself, which types of tokens tell


@dataclass(frozen=True, slots=True)
class ModelMask:
    """Which keys a query sees, asked place by place.

    Args:
        function: Of transformers: row, head, query and key to whether it is seen.
        offset: The place of the first key in its sequence.
    """

    function: Callable[..., Tensor]
    offset: int = 0

    def sees(self, query: Tensor, key: Tensor) -> Tensor:
        """Whether queries see keys, by their places among the keys; shapes are broadcast."""
        return self.function(0, 0, query + self.offset, key + self.offset)


def keep_mask(*, mask_function: Callable[..., Tensor], kv_offset: int = 0, **_: Any) -> ModelMask:
    """A mask builder of transformers, whose interface fixes the names.

    A mask of padding is refused before the model runs.
    """
    return ModelMask(mask_function, kv_offset)


def sees_ahead(model: PreTrainedModel) -> bool:
    """Whether some tokens see those behind them, as the model's code tells transformers."""
    return _BLOCKS in source_of_forward(base_of(model))


def sees_prompts(model: PreTrainedModel) -> bool:
    """Whether all tokens of a prompt see each other, which records do not tell from answers."""
    return _PREFIX in source_of_forward(base_of(model))
