"""The values of a run as the cross-field rules see them: by path, defaults filled in."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from omnilit.config.check import Checked
from omnilit.config.schema import Field


@dataclass(frozen=True, slots=True)
class View:
    """Values by path, given or default; `view["train.optimizer.lr"]`.

    Args:
        fields: Every field of the chosen task, by path.
        given: The good values that were given, by path.
        world_size: Number of ranks, where it is known.
        verb: What the run is to do.
    """

    fields: Mapping[str, Field]
    given: Mapping[str, Any] = field(default_factory=dict)
    world_size: int | None = None
    verb: Literal["fit", "validate", "infer", "data"] = "fit"

    @classmethod
    def of(
        cls,
        checked: Checked,
        fields: list[Field],
        *,
        world_size: int | None = None,
        verb: Literal["fit", "validate", "infer", "data"] = "fit",
    ) -> View:
        """The view of what `check_values` found good."""
        known = {entry.path: entry for entry in fields}
        given = dict(_leaves(checked.values, known))
        return cls(known, given, world_size, verb)

    def __getitem__(self, path: str) -> Any:
        """The value given, else the default; None for a required field that is missing."""
        return self.given[path] if path in self.given else self.fields[path].default

    def __contains__(self, path: str) -> bool:
        """Whether the chosen task has this field."""
        return path in self.fields

    def is_given(self, path: str) -> bool:
        """Whether a file or flag gives it a good value."""
        return path in self.given

    def is_changed(self, path: str) -> bool:
        """Whether it is given with another value than its default."""
        if path not in self.given:
            return False
        entry = self.fields[path]
        return entry.required or self.given[path] != entry.default

    def changed(self) -> Iterator[str]:
        """Paths of all fields given with another value than their default."""
        return (path for path in self.given if self.is_changed(path))


def _leaves(
    values: Mapping[str, Any], known: Mapping[str, Field], prefix: str = ""
) -> Iterator[tuple[str, Any]]:
    for key, value in values.items():
        path = f"{prefix}{key}"
        if path in known:
            yield path, value
        else:
            yield from _leaves(value, known, f"{path}.")
