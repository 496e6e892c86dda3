"""The configurations of runs, and where they differ."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

import yaml

from omnilit.cli.raw import walk_leaves

FILE: Final = "config.resolved.yaml"
NOT_SET: Final = "-"


@dataclass(frozen=True, slots=True)
class Settings:
    """The configuration that a run was started with.

    Args:
        values: By path, as text.
        text: The file as it is.
        problem: Why there are no values; None where there are.
    """

    values: Mapping[str, str] = field(default_factory=dict)
    text: str = ""
    problem: str | None = None


def read_settings(folder: Path) -> Settings:
    """The resolved configuration of a run; values from the environment are masked in it."""
    file = folder / FILE
    try:
        text = file.read_text(encoding="utf-8")
        tree = yaml.safe_load(text)
    except FileNotFoundError:
        return Settings(problem=f"{FILE} is missing")
    except (OSError, ValueError, yaml.YAMLError) as error:
        reason = " ".join(str(error).split())
        return Settings(problem=f"{FILE} cannot be read: {reason}")
    if not isinstance(tree, dict):
        return Settings(text=text, problem=f"{FILE} holds no settings")
    return Settings({path: format_setting(value) for path, value in walk_leaves(tree)}, text)


def find_differences(all_settings: Sequence[Settings]) -> list[tuple[str, ...]]:
    """A row of path and values for every setting in which runs differ.

    Args:
        all_settings: One a run; those without values are not compared.

    Returns:
        Rows in the order of the files. A run that does not have the setting shows a dash.
    """
    compared = [s.values for s in all_settings if s.problem is None]
    paths = dict.fromkeys(path for values in compared for path in values)
    different = [path for path in paths if len({values.get(path) for values in compared}) > 1]
    return [(path, *(s.values.get(path, NOT_SET) for s in all_settings)) for path in different]


def format_setting(value: Any) -> str:
    """A value as a configuration file would have it, on one line."""
    return value if isinstance(value, str) else json.dumps(value, default=str, ensure_ascii=False)
