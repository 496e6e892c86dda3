"""Rules on the classes of a classifier: pure functions of the values."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import Final

from omnilit.config.view import View
from omnilit.errors import Problem

NUMBER: Final = "model.num_labels"
NAMES: Final = "model.label_names"


def classes_are_clear(view: View) -> list[Problem]:
    """Number and names of the classes agree."""
    return class_problems(view[NUMBER], view[NAMES])


def class_problems(num_labels: int | None, label_names: Sequence[str] | None) -> list[Problem]:
    """What is wrong with the classes that were given.

    Args:
        num_labels: `model.num_labels`.
        label_names: `model.label_names`.
    """
    if num_labels is not None and num_labels < 2:
        problem = f"{num_labels} leaves nothing to tell apart"
        return [Problem(NUMBER, problem, "give at least 2")]
    if label_names is None:
        return []
    if problem := _fault(label_names):
        return [Problem(NAMES, problem, "give every class, of at least two, a name of its own")]
    if num_labels not in (None, len(label_names)):
        problem = f"{num_labels} classes, but label_names has {len(label_names)}"
        return [Problem(NUMBER, problem, "leave it out: the names say how many there are")]
    return []


def _fault(names: Sequence[str]) -> str:
    twice = [name for name, count in Counter(names).items() if count > 1]
    if len(names) < 2:
        return f"{len(names)} names leave nothing to tell apart"
    if any(not name.strip() for name in names):
        return "a name is empty"
    return f"{twice[0]!r} stands there twice" if twice else ""
