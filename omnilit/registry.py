"""Names that a user may choose, each standing for code that is imported when it is chosen."""

from __future__ import annotations

from collections.abc import Iterator
from importlib import import_module
from typing import Any

from omnilit.errors import ConfigError, suggest


class Registry:
    """Short names for one kind of thing; the only module-level state there is.

    Args:
        key: The YAML path of the field that names one, for messages.
    """

    def __init__(self, key: str) -> None:
        self.key = key
        self._targets: dict[str, str] = {}

    def __contains__(self, name: str) -> bool:
        """Whether the name is registered, or is itself a path to an attribute."""
        return name in self._targets or _is_path(name)

    def __iter__(self) -> Iterator[str]:
        """The registered names."""
        return iter(self._targets)

    def register(self, name: str, target: str) -> None:
        """Give `target` a short name.

        Registering the same twice changes nothing.

        Args:
            name: What the YAML says.
            target: `package.module:attribute`, imported when it is first asked for.

        Raises:
            ConfigError: The name stands for something else.
        """
        if self._targets.setdefault(name, target) != target:
            raise ConfigError(
                key=self.key,
                problem=f"{name!r} is registered for {self._targets[name]}, not for {target}",
                fix="choose another name",
            )

    def load(self, name: str) -> Any:
        """What `name` stands for: a registered name, or `package.module:attribute`.

        Raises:
            ConfigError: There is no such name, or its target cannot be imported.
        """
        target = self._targets.get(name, name if _is_path(name) else None)
        if target is None:
            hint, known = suggest(name, self._targets), ", ".join(self._targets)
            raise ConfigError(
                key=self.key,
                problem=f"{name!r} is not known{f'.{hint}' if hint else ''}",
                fix=f"use one of {known}, or package.module:attribute",
            )
        module, _, attribute = target.partition(":")
        try:
            return getattr(import_module(module), attribute)
        except (ImportError, AttributeError) as error:
            raise ConfigError(
                key=self.key,
                problem=f"{name!r} stands for {target}, which cannot be imported ({error})",
                fix="correct the name, or install the package that it is in",
            ) from error


def _is_path(name: str) -> bool:
    module, colon, attribute = name.partition(":")
    return bool(colon and attribute.isidentifier()) and all(
        part.isidentifier() for part in module.split(".")
    )
