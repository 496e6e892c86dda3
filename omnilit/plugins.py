"""Code of the user's own that registers something: `imports:` and the plug-ins of packages."""

from __future__ import annotations

import os
import traceback
from collections.abc import Iterable, Iterator, Mapping
from importlib import import_module
from importlib.metadata import EntryPoint, entry_points
from typing import Final, NamedTuple

from omnilit.errors import ConfigError, Problem, suggest

GROUP: Final = "omnilit.plugins"
KEY: Final = "imports"
OFF: Final = "OMNILIT_PLUGINS_OFF"
ALL: Final = "all"
# What the body of somebody else's module may raise; the last two come from what it registers
BROKEN: Final = (
    ImportError,
    SyntaxError,
    ArithmeticError,
    AssertionError,
    AttributeError,
    LookupError,
    NameError,
    OSError,
    RuntimeError,
    TypeError,
    ValueError,
    ConfigError,
)


class ImportedModules:
    """Names of the modules that were imported for what they register, in order.

    A registry of names: worker processes that do not inherit this process's modules import the
    same ones.
    """

    def __init__(self) -> None:
        self._names: dict[str, None] = {}

    def __iter__(self) -> Iterator[str]:
        """The names, in the order of their import."""
        return iter(self._names)

    def add(self, name: str) -> None:
        """Import a module and remember it; one that is known already is left alone."""
        if name not in self._names:
            import_module(name)
            self._names[name] = None


IMPORTED: Final = ImportedModules()


class Plugin(NamedTuple):
    """A plug-in that an installed distribution announces.

    Args:
        name: Its entry point's.
        module: What is imported.
        distribution: Name and version.
        is_on: Whether it is loaded.
    """

    name: str
    module: str
    distribution: str
    is_on: bool


def find_plugins(environment: Mapping[str, str] = os.environ) -> list[Plugin]:
    """The plug-ins of all installed distributions, by name.

    Args:
        environment: `OMNILIT_PLUGINS_OFF` in it names those that are off, separated by commas;
            `all` is all of them.

    Raises:
        ConfigError: It names a plug-in that is not installed.
    """
    found = sorted(entry_points(group=GROUP), key=lambda entry: entry.name)
    off = {name.strip() for name in environment.get(OFF, "").split(",")} - {""}
    names = {entry.name for entry in found}
    if unknown := sorted(off - names - {ALL}):
        known = ", ".join(sorted(names)) or "no plug-in"
        raise ConfigError(
            key=OFF,
            problem=f"{unknown[0]!r} is no plug-in that is installed.{suggest(unknown[0], names)}",
            fix=f"take it out; installed: {known}",
        )
    return [
        Plugin(entry.name, entry.module, _distribution(entry), not off & {entry.name, ALL})
        for entry in found
    ]


def load_plugins(environment: Mapping[str, str] = os.environ) -> None:
    """Import every plug-in that is installed and not switched off, each once.

    The command line calls this before it does anything else; Python code of your own may.

    Args:
        environment: See `find_plugins`.

    Raises:
        ConfigError: A plug-in cannot be imported; all such, each with its distribution.
    """
    problems = [
        Problem(
            f"plug-in {plugin.name}",
            f"{plugin.distribution} announces {plugin.module}, which cannot be imported: {reason}",
            f"mend or uninstall the package, or switch the plug-in off by {OFF}={plugin.name}",
        )
        for plugin in find_plugins(environment)
        if plugin.is_on and (reason := _try_import(plugin.module))
    ]
    if problems:
        raise ConfigError.of(problems)


def import_modules(names: Iterable[str]) -> list[Problem]:
    """Import the modules that `imports:` lists; a problem for each that cannot be."""
    return [
        Problem(
            KEY,
            f"{name!r} cannot be imported: {reason}",
            "correct the name or the module, and name the folder of a module that is not "
            "installed in PYTHONPATH",
        )
        for name in names
        if (reason := _try_import(name))
    ]


def import_again(names: Iterable[str]) -> None:
    """In a worker process: import what the process that started it has imported."""
    for name in names:
        IMPORTED.add(name)


def _try_import(name: str) -> str:
    """Why a module cannot be imported; empty where it was."""
    try:
        IMPORTED.add(name)
    except BROKEN as error:
        where = traceback.extract_tb(error.__traceback__)[-1]
        place = "" if "importlib" in where.filename else f" ({where.filename}:{where.lineno})"
        return f"{type(error).__name__}: {' '.join(str(error).split())}{place}"
    return ""


def _distribution(entry: EntryPoint) -> str:
    if entry.dist is None:
        return "an unknown distribution"
    return f"{entry.dist.name} {entry.dist.version}"
