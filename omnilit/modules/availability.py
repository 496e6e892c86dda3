"""What a later release brings is refused in Python as it is on the command line."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import fields, is_dataclass
from typing import Any

from omnilit.config import TrainingArguments
from omnilit.config.schema import Field, constructor_fields, dataclass_fields
from omnilit.config.status import load_status, refuse_later
from omnilit.config.view import View
from omnilit.errors import ConfigError, Problem


def refuse_unavailable(group: object, prefix: str) -> None:
    """Check a dataclass of the argument tree.

    Args:
        group: Such as `TrainingArguments`.
        prefix: Where it stands, such as `train`.

    Raises:
        ConfigError: Values that this release cannot honour, all of them.
    """
    _refuse(dataclass_fields(type(group), prefix), _leaves(group, prefix))


def refuse_arguments(kind: type, prefix: str, values: Mapping[str, Any]) -> None:
    """Check a constructor's own arguments; those that are not in `values` are not looked at.

    Args:
        kind: A class whose keyword arguments are fields of the group `prefix`.
        prefix: `model` or `data`.
        values: Argument name to value.

    Raises:
        ConfigError: Values that this release cannot honour, all of them.
    """
    hidden = frozenset({"train", "dpo_config"})
    named = {f"{prefix}.{name}": value for name, value in values.items()}
    _refuse(constructor_fields(kind, prefix, hidden=hidden), named)


def _refuse(known: list[Field], values: Mapping[str, Any]) -> None:
    view = View({field.path: field for field in known}, values)
    if problems := refuse_later(view, load_status()):
        raise ConfigError.of(problems)


def _leaves(group: Any, prefix: str) -> dict[str, Any]:
    """Every value of a dataclass by path, nested groups walked."""
    found: dict[str, Any] = {}
    for field in fields(group):
        value, path = getattr(group, field.name), f"{prefix}.{field.name}"
        found |= _leaves(value, path) if is_dataclass(value) else {path: value}
    return found


def refuse_train_settings(train: TrainingArguments, task: str, *, takes_media: bool) -> None:
    """Check the `train` group for a task.

    Args:
        train: The group.
        task: Its class, for the message.
        takes_media: Whether it trains towers; else what is about them is refused.

    Raises:
        ConfigError: Values that this release or the task cannot honour.
    """
    refuse_unavailable(train, "train")
    default = TrainingArguments()
    fix = "train a model that takes images with model.class_path: VLMModule, or leave it out"
    problems = [
        Problem(f"train.{name}", f"{task} trains no tower that sees or hears", fix)
        for name in ("freeze_vit", "freeze_audio_tower", "vit_lr")
        if not takes_media and getattr(train, name) != getattr(default, name)
    ]
    if problems:
        raise ConfigError.of(problems)
