"""The first pass over a configuration: every key known, every value of its field's type."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from difflib import get_close_matches
from typing import Any

from omnilit.config.coerce import CoercionError, coerce, is_interpolation
from omnilit.config.schema import Field
from omnilit.errors import Problem


@dataclass(frozen=True, slots=True)
class Checked:
    """What a configuration gives, and what is wrong with it.

    Args:
        values: The good values, coerced, nested as in the file; only what was given.
        problems: Everything found wrong, in the order of the file.
        doubtful: Paths that later checks must not judge: those with a problem or an unresolved
            interpolation, and those that a misspelled key probably meant.
    """

    values: dict[str, Any] = field(default_factory=dict)
    problems: list[Problem] = field(default_factory=list)
    doubtful: frozenset[str] = frozenset()


def check_values(
    given: Mapping[str, Any],
    fields: Sequence[Field],
    *,
    others: Collection[str] = (),
    tasks: Mapping[str, str] | None = None,
) -> Checked:
    """Check a raw configuration against the fields of the chosen task.

    Args:
        given: Files and flags merged, nested; interpolations like `${oc.env:NAME}` pass as text.
        fields: Every field that the task knows.
        others: Further root keys that somebody else checks, e.g. `trainer`; not looked into and
            left out of the result.
        tasks: Paths of fields that only other tasks have, with the name of one that does.

    Returns:
        The good values and all problems; nothing is raised.
    """
    walk = _Walk(
        leaves={entry.path: entry for entry in fields}, others=others, tasks=dict(tasks or {})
    )
    values = walk.group(given, "")
    return Checked(values, walk.problems, frozenset(walk.doubtful))


@dataclass(slots=True)
class _Walk:
    leaves: Mapping[str, Field]
    others: Collection[str]
    tasks: Mapping[str, str]
    problems: list[Problem] = field(default_factory=list)
    doubtful: set[str] = field(default_factory=set)

    def group(self, raw: Mapping[str, Any], path: str) -> dict[str, Any]:
        """The good values of one group; an empty one (`train:` alone) gives nothing."""
        known = _children(self.leaves, path)
        values: dict[str, Any] = {}
        for key, value in raw.items():
            here = f"{path}.{key}" if path else str(key)
            if not path and key in self.others:
                continue
            if str(key) not in known:
                self._unknown(path, str(key), value)
            elif here in self.leaves:
                self._leaf(here, value, values)
            elif isinstance(value, Mapping):
                values[str(key)] = self.group(value, here)
            elif value is not None:
                names = ", ".join(_children(self.leaves, here))
                self._report(here, f"{value!r} is not a group", f"write keys under it: {names}")
        return values

    def _leaf(self, path: str, value: object, into: dict[str, Any]) -> None:
        if is_interpolation(value):
            self.doubtful.add(path)
        try:
            into[path.rpartition(".")[2]] = coerce(value, self.leaves[path].annotation)
        except CoercionError as error:
            self._report(path, error.problem, error.fix)

    def _unknown(self, group: str, key: str, value: object) -> None:
        path = f"{group}.{key}" if group else key
        if owner := _owner(self.tasks, path):
            self._report(
                path,
                f"only {owner} reads it, and this run is another task",
                f"leave it out, or set model.class_path: {owner}",
            )
            return
        places = _groups(self.leaves) if isinstance(value, Mapping) else self.leaves
        if namesakes := [place for place in places if place.rpartition(".")[2] == key]:
            self.doubtful.update(namesakes)
            self._report(path, f"{key} is not a key here", f"write it as {' or '.join(namesakes)}")
            return
        names = [*_children(self.leaves, group), *(() if group else self.others)]
        near = get_close_matches(key, names, n=1)
        self.doubtful.update(f"{group}.{name}" if group else name for name in near)
        closest = f" (did you mean {near[0]!r}?)" if near else ""
        where = f"under {group}" if group else "at the top"
        fix = f"use one of the keys {where}: {', '.join(names)}"
        self._report(path, f"unknown key {key!r}{closest}", fix)

    def _report(self, path: str, problem: str, fix: str) -> None:
        self.doubtful.add(path)
        self.problems.append(Problem(path, problem, fix))


def _children(leaves: Collection[str], group: str) -> list[str]:
    """The names directly under `group`, in order, nested groups included."""
    start = f"{group}." if group else ""
    names = (leaf[len(start) :].partition(".")[0] for leaf in leaves if leaf.startswith(start))
    return list(dict.fromkeys(names))


def _groups(leaves: Collection[str]) -> list[str]:
    """Paths of all groups, in order."""
    groups: dict[str, None] = {}
    for leaf in leaves:
        parts = leaf.split(".")
        groups.update((".".join(parts[:end]), None) for end in range(1, len(parts)))
    return list(groups)


def _owner(tasks: Mapping[str, str], path: str) -> str | None:
    """The task that knows `path`, as a field or as a group."""
    for known, task in tasks.items():
        if known == path or known.startswith(f"{path}."):
            return task
    return None
