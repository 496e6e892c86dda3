"""The flags of a verb that are no settings of a run."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from omnilit.config.coerce import CoercionError, coerce, parse_flag
from omnilit.errors import Problem

Flags = Mapping[str, tuple[str, ...]]


def take_value(own: Flags, name: str, kind: type, problems: list[Problem]) -> Any:
    """The value of a flag.

    Args:
        own: The words after each flag that was given; `name` is one of them.
        name: Of the flag, without dashes.
        kind: The type of its value.
        problems: Takes one where the value is missing or wrong.

    Returns:
        The value, or the type's empty value beside a problem.
    """
    words = own[name]
    if len(words) != 1:
        problems.append(Problem(f"--{name}", "needs one value", f"write --{name} VALUE"))
        return kind()
    try:
        return coerce(parse_flag(words, kind), kind)
    except CoercionError as error:
        problems.append(Problem(f"--{name}", error.problem, error.fix))
        return kind()


def take_count(own: Flags, name: str, problems: list[Problem]) -> int:
    """The value of a flag that says how many samples to show, like `take_value`."""
    count = take_value(own, name, int, problems)
    if count < 0:
        problem = f"{count} is below 0"
        problems.append(Problem(f"--{name}", problem, "give the number of samples"))
    return count
