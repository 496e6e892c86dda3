"""Which model of a configuration a run builds: its language model alone, or with its towers.

Several configurations of transformers belong to two classes, and most say in their files which one
was saved. So `architectures` is where a task states its choice, and everything that builds a model
of the configuration afterwards, for weights, exports or adapters, builds the same.
"""

from __future__ import annotations

from typing import Any, Final

from transformers import (
    MODEL_FOR_CAUSAL_LM_MAPPING,
    MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING,
    PreTrainedConfig,
    PreTrainedModel,
)

from omnilit.errors import ConfigError

KEY: Final = "model.config_path"


def takes_media(config: PreTrainedConfig) -> bool:
    """Whether the class that a configuration names takes media beside text."""
    kind = _tower_class(config)
    return kind is not None and (config.architectures or [""])[0] == kind.__name__


def has_towers(config: PreTrainedConfig) -> bool:
    """Whether a configuration names its class with towers, and that is not its language model."""
    return takes_media(config) and _tower_class(config) is not _language_class(config)


def choose_language_model(config: PreTrainedConfig) -> None:
    """Make the configuration name its language model, or nothing where it has none of its own."""
    if has_towers(config):
        kind = _language_class(config)
        config.architectures = None if kind is None else [kind.__name__]


def choose_towers(config: PreTrainedConfig) -> PreTrainedConfig:
    """Make the configuration name its class that takes images, videos or sounds beside text.

    Returns:
        The same, or of a whole the part that is trained: an omni model's thinker.

    Raises:
        ConfigError: It has none.
    """
    config = _trained_part(config)
    kind = _tower_class(config)
    if kind is None:
        raise ConfigError(
            key=KEY,
            problem=f"{name_of(config)} takes neither images nor videos nor sounds",
            fix="choose a model of transformers' image-text-to-text models, or train its text "
            "with model.class_path: SFTModule",
        )
    config.architectures = [kind.__name__]
    return config


def part_of_whole(config: PreTrainedConfig) -> PreTrainedConfig:
    """What is trained of a whole whose other parts speak, with its class; others as they are."""
    return config if _trained_part(config) is config else choose_towers(config)


def _trained_part(config: PreTrainedConfig) -> PreTrainedConfig:
    found: PreTrainedConfig | None = getattr(config, "thinker_config", None)
    return config if found is None else found


def name_of(config: PreTrainedConfig) -> str:
    """What a message calls the model of a configuration."""
    names = ", ".join(config.architectures or []) or type(config).__name__
    return f"{names} ({config.model_type})"


def _language_class(config: PreTrainedConfig) -> type[PreTrainedModel] | None:
    return _class_in(MODEL_FOR_CAUSAL_LM_MAPPING, config)


def _tower_class(config: PreTrainedConfig) -> type[PreTrainedModel] | None:
    return _class_in(MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING, config)


def _class_in(mapping: Any, config: PreTrainedConfig) -> type[PreTrainedModel] | None:
    found = mapping.get(type(config), None)
    return found if isinstance(found, type) else None
