"""Classifiers: which configuration is one, and what its classes are called."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any, Final

from transformers import MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING, PreTrainedConfig

from omnilit.config.class_rules import NUMBER, class_problems
from omnilit.errors import ConfigError

CONFIG_KEY: Final = "model.config_path"
AUTO_CLASS: Final = "AutoModelForSequenceClassification"
ENDING: Final = "ForSequenceClassification"


def is_classifier(config: PreTrainedConfig) -> bool:
    """Whether a configuration describes a classifier of sequences, as its `architectures` say."""
    return bool(config.architectures) and config.architectures[0].endswith(ENDING)


def class_names(config: PreTrainedConfig) -> tuple[str, ...] | None:
    """The names of a classifier's classes by number; None of any other model."""
    if not is_classifier(config):
        return None
    names: Any = config.id2label or {}
    return tuple(names[number] for number in range(len(names)))


def as_classifier(
    config: PreTrainedConfig,
    *,
    num_labels: int | None = None,
    label_names: Sequence[str] | None = None,
    trust_remote_code: bool = False,
) -> PreTrainedConfig:
    """The configuration of a classifier on the model that a configuration describes.

    Classes that were not given are those of a configuration that is a classifier's already.

    Args:
        config: Not changed.
        num_labels: `model.num_labels`; without names the classes are called LABEL_0, LABEL_1, ...
        label_names: `model.label_names`, by number.
        trust_remote_code: Whether Python code beside the configuration may run.

    Raises:
        ConfigError: transformers has no classifier for this model, or its classes are not known
            or not clear.
    """
    if problems := class_problems(num_labels, label_names):
        raise ConfigError.of(problems)
    names = label_names or _known_names(config, num_labels)
    own = copy.deepcopy(config)
    own.architectures = [_class_name(config, trust_remote_code=trust_remote_code)]
    own.id2label = dict(enumerate(names))
    own.label2id = {name: number for number, name in own.id2label.items()}
    own.problem_type = "single_label_classification"
    return own


def _known_names(config: PreTrainedConfig, num_labels: int | None) -> Sequence[str]:
    before = class_names(config)
    if num_labels is None and before is None:
        raise ConfigError(
            key=NUMBER,
            problem="neither num_labels nor label_names is given, and the model is no classifier "
            "that has classes",
            fix="give label_names the names of the classes, or num_labels their number",
        )
    if before is not None and num_labels in (None, len(before)):
        return before
    return [f"LABEL_{number}" for number in range(num_labels or 0)]


def _class_name(config: PreTrainedConfig, *, trust_remote_code: bool) -> str:
    code: dict[str, Any] = getattr(config, "auto_map", {})
    if trust_remote_code and AUTO_CLASS in code:
        return str(code[AUTO_CLASS]).rpartition(".")[2]
    kind: Any = MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING.get(type(config), None)
    if kind is None:
        raise ConfigError(
            key=CONFIG_KEY,
            problem=f"transformers has no {ENDING} for {config.model_type}",
            fix="choose a model that has one, such as those of Qwen3, Llama or Gemma",
        )
    return str(kind.__name__)


def refuse_classifier(config: PreTrainedConfig) -> None:
    """Refuse a classifier where a model that writes text is needed.

    Raises:
        ConfigError: It is one.
    """
    if is_classifier(config):
        raise ConfigError(
            key=CONFIG_KEY,
            problem=f"{(config.architectures or [''])[0]} is a classifier and writes no text",
            fix="set data.data_type: classification, or give a model whose architecture ends in "
            "ForCausalLM",
        )
