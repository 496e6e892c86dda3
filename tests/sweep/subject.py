"""What a sweep goes through: one mapping of transformers, from architectures to classes."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Final

from transformers.models.auto.modeling_auto import (
    MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
    MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES,
)

PACKED, SHARDED, EXPORT = "packed", "FSDP2", "export"
LAYOUTS: Final[dict[str, dict[str, Any]]] = {
    SHARDED: {},
    "EP": {"ep_size": 2},
    "TP": {"tp_size": 2},
    "Ulysses": {"ulysses_size": 2},
    "PP": {"pp_size": 2},
}


@dataclass(frozen=True, slots=True, eq=False)
class Subject:
    """The architectures of one mapping, and in which layouts they are judged.

    Args:
        page: File in docs that says what was found.
        classes: Names of classes by `model_type`.
        layouts: Names of `LAYOUTS`.
        takes_media: Rows hold images, videos and sounds beside tokens.
    """

    page: str
    classes: Mapping[str, str | tuple[str, ...]]
    layouts: tuple[str, ...]
    takes_media: bool = False

    @property
    def columns(self) -> tuple[str, ...]:
        """Of the page's table."""
        return (PACKED, *self.layouts, EXPORT)

    def architectures(self) -> list[str]:
        """What transformers has, in order."""
        return sorted(self.classes)

    def class_of(self, model_type: str) -> str:
        """The class of models of an architecture."""
        name = self.classes[model_type]
        return name if isinstance(name, str) else name[0]


LANGUAGE: Final = Subject("models.md", MODEL_FOR_CAUSAL_LM_MAPPING_NAMES, tuple(LAYOUTS))
TOWERS: Final = Subject(
    "vision-language-models.md",
    MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES,
    tuple(name for name in LAYOUTS if name != "PP"),  # which is refused for all of them
    takes_media=True,
)
SUBJECTS: Final = (LANGUAGE, TOWERS)
