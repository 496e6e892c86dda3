"""Names that configuration files choose from."""

from __future__ import annotations

from collections.abc import Iterator
from importlib import import_module
from typing import Generic, TypeVar, cast

from omnilit.errors import ConfigError, suggest

T = TypeVar("T")


class Registry(Generic[T]):
    """Short names for targets `package.module:attribute`, imported only when asked for.

    Registering a name twice with the same target does nothing, with another target is an error.

    Args:
        key: The YAML path whose value is looked up here, for messages.
        targets: The names known from the start.
    """

    def __init__(self, key: str, targets: dict[str, str] | None = None) -> None:
        self.key = key
        self._targets = dict(targets or {})

    def __iter__(self) -> Iterator[str]:
        """All registered names, in order of registration."""
        return iter(self._targets)

    def register(self, name: str, target: str) -> None:
        """Add `name` for `target`.

        Raises:
            ConfigError: The name already stands for another target.
        """
        if self._targets.setdefault(name, target) != target:
            raise ConfigError(
                key=self.key,
                problem=f"{name!r} is already registered for {self._targets[name]}",
                fix="register it under another name",
            )

    def get(self, name: str) -> T:
        """Import and return what `name` stands for.

        Raises:
            ConfigError: No such name; the message lists the known ones.
        """
        if name not in self._targets:
            raise ConfigError(
                key=self.key,
                problem=f"{name!r} is not known.{suggest(name, self)}",
                fix=f"use one of {', '.join(self)}",
            )
        module, _, attribute = self._targets[name].partition(":")
        return cast("T", getattr(import_module(module), attribute))
