"""Names of the data group that stand for code, some of it the user's own."""

from __future__ import annotations

from collections.abc import Callable, Collection
from functools import partial
from typing import Final

from omnilit.config.view import View
from omnilit.data.collate import COLLATORS
from omnilit.data.files import BUILT_IN_TYPES, DATASET_TYPES
from omnilit.data.templates import check_template_name
from omnilit.data.transforms import TRANSFORMS
from omnilit.errors import ConfigError, Problem
from omnilit.registry import Registry

REGISTRIES: Final = (DATASET_TYPES, TRANSFORMS, COLLATORS)


def check_names(view: View, wrong: Collection[str]) -> list[Problem]:
    """A problem for each name that stands for nothing, or for what cannot be imported.

    Args:
        view: The values.
        wrong: Fields that have a problem already.
    """
    checks: dict[str, Callable[[str], object]] = {"data.chat_template": check_template_name}
    checks |= {registry.key: partial(_load, registry) for registry in REGISTRIES}
    problems: list[Problem] = []
    for path, check in checks.items():
        if path in view and path not in wrong and view[path] is not None:
            try:
                check(view[path])
            except ConfigError as error:
                problems += error.problems
    return problems


def _load(registry: Registry, name: str) -> None:
    if registry is not DATASET_TYPES or name not in BUILT_IN_TYPES:
        registry.load(name)
