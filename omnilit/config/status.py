"""Which fields work in this release, and which are refused until a later one."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from importlib.resources import files
from typing import Any, Final, Literal

from omnilit.config.view import View
from omnilit.errors import Problem

TOPICS: Final[Mapping[str, str]] = {
    "C": "training options",
    "D": "parallelism",
    "E": "kernels and models",
    "G": "vision and audio",
    "omni": "any-to-any models",
    "diffusion": "diffusion",
}


@dataclass(frozen=True, slots=True)
class FieldStatus:
    """How far a field has come.

    Args:
        status: `available`, or `later`.
        issue: What brings the field, or its remaining values; a key of `TOPICS`, or None.
        legal: Values allowed so far beside the default; None for all of an available field.
    """

    status: Literal["available", "later"]
    issue: str | None = None
    legal: tuple[Any, ...] | None = None

    def allows(self, value: object) -> bool:
        """Whether this release does what `value` says; the default is always allowed."""
        return self.issue is None or value in (self.legal or ())


def load_status() -> dict[str, FieldStatus]:
    """The status of every field, by path."""
    text = files("omnilit.config").joinpath("field_status.json").read_text(encoding="utf-8")
    rows: dict[str, dict[str, Any]] = json.loads(text)
    return {
        path: FieldStatus(
            row["status"], row.get("issue"), tuple(row["legal"]) if "legal" in row else None
        )
        for path, row in rows.items()
    }


def refuse_later(view: View, status: Mapping[str, FieldStatus]) -> list[Problem]:
    """A problem for each field set to what only a later release can do.

    Args:
        view: The values; one that equals its default is never refused.
        status: From `load_status`.
    """
    problems: list[Problem] = []
    for path in view.changed():
        row = status.get(path)
        if row is None or row.allows(view[path]):
            continue
        default = view.fields[path].default
        legal = [value for value in (row.legal or ()) if value != default]
        others = f", or use {' or '.join(map(_as_yaml, legal))}" if legal else ""
        topic = TOPICS[str(row.issue)]
        problems.append(
            Problem(
                path,
                f"{_as_yaml(view[path])} is not available yet: "
                f"it comes with a later release ({topic})",
                f"leave it out or set it to its default, {_as_yaml(default)}{others}",
            )
        )
    return problems


def _as_yaml(value: object) -> str:
    return value if isinstance(value, str) else json.dumps(value)
