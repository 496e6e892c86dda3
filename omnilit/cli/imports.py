"""The key `imports`: modules that are imported before anything of a configuration is checked."""

from __future__ import annotations

from dataclasses import replace
from typing import Final

from omnilit.cli.raw import RawConfig
from omnilit.config.coerce import CoercionError, coerce
from omnilit.config.schema import Field
from omnilit.plugins import KEY, import_modules

IMPORTS: Final = Field(
    KEY,
    list[str],
    [],
    required=False,
    description="Modules of your own that register kernels, readers and the like; imported before "
    "the configuration is checked, on every process, and run as code.",
)


def import_given(raw: RawConfig) -> RawConfig:
    """Import the modules that a configuration lists.

    Args:
        raw: What was given. A list that is no list of names is left to the check of types.

    Returns:
        The same, with a problem for each module that cannot be imported.
    """
    if any(problem.key.startswith(KEY) for problem in raw.problems):
        return raw
    try:
        names = coerce(raw.resolved.get(KEY, []), IMPORTS.annotation)
    except CoercionError:
        return raw
    return replace(raw, problems=(*raw.problems, *import_modules(names)))
