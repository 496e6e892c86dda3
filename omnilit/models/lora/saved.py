"""What a checkpoint says of its adapters beside their values."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict
from typing import Any

from omnilit.config.lora import LoraArguments
from omnilit.config.lora_rules import GROUP
from omnilit.errors import ConfigError, Problem
from omnilit.models.lora.plan import same_strength


def describe_adapters(lora: LoraArguments, *, base: str | None) -> dict[str, Any] | None:
    """Plain values that tell what was trained and beside which model; None without adapters."""
    return {"arguments": asdict(lora), "base": base} if lora.enable else None


def refuse_other_adapters(saved: Mapping[str, Any] | None, lora: LoraArguments) -> None:
    """Refuse to go on with adapters that would be another model under this run's settings.

    Raises:
        ConfigError: They were trained with another strength.
    """
    if saved is None or not lora.enable:
        return
    before = saved["arguments"]
    problems = [
        Problem(f"{GROUP}.{name}", f"the checkpoint is of {before[name]}", "set the same")
        for name in same_strength(before, lora)
    ]
    if problems:
        raise ConfigError.of(problems)
