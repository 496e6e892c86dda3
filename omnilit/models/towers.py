"""Where the parts of a model lie that see and hear, beside the one that reads and writes.

transformers names them alike in all its models: `get_encoder` and `get_decoder` find them, and
`get_image_features` of the base model runs them. What it does not say of a family stands in
`models.families.towers`.
"""

from __future__ import annotations

import inspect
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Final

from torch import nn
from transformers import PreTrainedModel

from omnilit.errors import ConfigError
from omnilit.models.families.towers import GRID_FAMILIES, KEPT_PARTS
from omnilit.types import MODALITIES

BACKBONE: Final = "backbone"
PROJECTOR: Final = "projector"
VISION: Final = "vision_tower"
AUDIO: Final = "audio_tower"


def features_name(kind: str) -> str:
    """The method of a base model that turns one kind of media into embeddings."""
    return f"get_{kind}_features"


def asked_of_features(base: PreTrainedModel, kind: str) -> Mapping[str, inspect.Parameter]:
    """What a base model's own code wants to know of one kind of media."""
    code: Any = getattr(type(base), features_name(kind))
    return inspect.signature(inspect.unwrap(code)).parameters


def source_of_forward(base: PreTrainedModel) -> str:
    """The code of a base model's forward, and of those of its own methods that it calls."""
    known: Any = type(base)
    source = inspect.getsource(inspect.unwrap(known.forward))
    called = [getattr(known, name, None) for name in re.findall(r"self\.(\w+)\(", source)]
    methods = [inspect.unwrap(one) for one in called if inspect.isfunction(one)]
    return "".join([source, *map(inspect.getsource, methods)])


def base_of(model: PreTrainedModel) -> PreTrainedModel:
    """The model without its head: what holds the towers, and runs them."""
    base: Any = model.base_model
    return base


def media_kinds(model: PreTrainedModel) -> frozenset[str]:
    """The kinds of media that a model takes; none for a language model."""
    base = base_of(model)
    return frozenset(kind for kind in MODALITIES if hasattr(base, features_name(kind)))


def grid_kinds(model: PreTrainedModel) -> frozenset[str]:
    """The kinds of media whose items can be looked at one by one, on any rank."""
    has_grids = model.config.model_type in GRID_FAMILIES
    return media_kinds(model) & {"image", "video"} if has_grids else frozenset()


def language_part(model: PreTrainedModel) -> PreTrainedModel:
    """What reads and writes text: the decoder beside towers, else the whole model."""
    return model.get_decoder() if media_kinds(model) else model


@dataclass(frozen=True, slots=True)
class Towers:
    """The parts of a model by the names of their modules, each with a dot behind it.

    Args:
        vision: What makes features of pixels.
        audio: What makes features of sounds.
        projectors: What lies between towers and language model, outside of the towers.
        kept: What lies between them inside of the towers, and is trained where they are frozen.
    """

    vision: tuple[str, ...]
    audio: tuple[str, ...]
    projectors: tuple[str, ...]
    kept: tuple[str, ...]

    @classmethod
    def of(cls, model: PreTrainedModel) -> Towers:
        """Find the towers of a whole model.

        Args:
            model: As transformers built it.
        """
        base = base_of(model)
        names: dict[nn.Module, str] = {m: f"{name}." for name, m in model.named_modules()}
        kinds = media_kinds(model)
        vision = _found(base, names, "image") if kinds & {"image", "video"} else ()
        audio = _found(base, names, "audio") if "audio" in kinds else ()
        decoder = names[model.get_decoder()]
        known = (*vision, *audio, decoder)
        beside = tuple(
            names[child]
            for child in base.children()
            if names[child] not in known and any(True for _ in child.parameters())
        )
        inside = KEPT_PARTS.get(model.config.model_type, ())
        kept = tuple(f"{names[base]}{part}." for part in inside)
        return cls(vision, audio, beside if kinds else (), kept)

    def part_of(self, name: str) -> str:
        """The part that a parameter belongs to, by its full name."""
        for part, prefixes in (
            (VISION, self.vision),
            (AUDIO, self.audio),
            (PROJECTOR, self.projectors),
        ):
            if name.startswith(prefixes):
                return part
        return BACKBONE

    def freeze(self, model: PreTrainedModel, *, vision: bool, audio: bool) -> None:
        """Take parameters out of training.

        Args:
            model: Whole.
            vision: Those of the vision tower.
            audio: Those of the audio tower.

        Raises:
            ConfigError: The model has no such tower.
        """
        for key, asked, found in (
            ("train.freeze_vit", vision, self.vision),
            ("train.freeze_audio_tower", audio, self.audio),
        ):
            if asked and not found:
                problem = f"{type(model).__name__} has no such tower"
                raise ConfigError(key=key, problem=problem, fix="leave it out")
        for name, parameter in model.named_parameters():
            if self.is_frozen(name, vision=vision, audio=audio):
                parameter.requires_grad_(False)

    def is_frozen(self, name: str, *, vision: bool, audio: bool) -> bool:
        """Whether a parameter is not trained.

        Args:
            name: Its full name.
            vision: The vision tower is frozen.
            audio: The audio tower is frozen.
        """
        frozen = (self.vision if vision else ()) + (self.audio if audio else ())
        return name.startswith(frozen) and not name.startswith(self.kept)


def _found(base: PreTrainedModel, names: dict[nn.Module, str], kind: str) -> tuple[str, ...]:
    encoder = base.get_encoder(kind)
    return () if encoder is base else (names[encoder],)
