"""The page of all settings, from the dataclasses and constructors that the parser reads."""

from __future__ import annotations

import json
from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import Final

from omnilit.cli.plan import task_fields
from omnilit.cli.tasks import TASKS, load_task
from omnilit.config.coerce import describe
from omnilit.config.schema import Field
from omnilit.config.status import TOPICS, FieldStatus, load_status
from omnilit.tools.schema import all_fields

REFERENCE: Final = Path(__file__).parents[2] / "tests" / "data" / "reference_fields.json"


@cache
def every_field() -> dict[str, Field]:
    """All fields of all tasks by path, each once, in the order of a file."""
    fields: dict[str, Field] = {}
    for entry in all_fields():
        fields.setdefault(entry.path, entry)
    return fields


@cache
def only_tasks() -> dict[str, str]:
    """The task of each field that one task alone has."""
    owners: dict[str, list[str]] = {}
    for name in TASKS:
        for entry in task_fields(load_task(name)):
            owners.setdefault(entry.path, []).append(name)
    return {path: names[0] for path, names in owners.items() if len(names) == 1}


def arguments_page() -> str:
    """A section for each group, an entry for each field."""
    fields, status, known = every_field(), load_status(), _reference_paths()
    groups: dict[str, list[Field]] = {}
    for entry in fields.values():
        groups.setdefault(entry.path.rpartition(".")[0], []).append(entry)
    roots = list(dict.fromkeys(group.split(".")[0] for group in groups))
    tasks = only_tasks()
    sections = []
    for group in sorted(groups, key=lambda name: roots.index(name.split(".")[0])):
        title = f"`{group}`" if group else "At the top of a file"
        readers = {tasks.get(entry.path, "") for entry in groups[group]}
        note = f"Read by `{readers.pop()}` only.\n\n" if "" not in readers else ""
        entries = "".join(_entry(entry, status, known) for entry in groups[group])
        sections.append(f"## {title}\n\n{note}{entries}")
    return "\n".join(sections)


def settings_below(prefix: str) -> str:
    """The fields under a prefix, with what they can do in this version."""
    status, known = load_status(), _reference_paths()
    found = [entry for path, entry in every_field().items() if path.startswith(f"{prefix}.")]
    return "".join(_entry(entry, status, known) for entry in found)


def refused_table() -> str:
    """The fields that are refused today, whole or in part, by what will bring them."""
    rows: dict[str, list[str]] = {}
    for path, row in load_status().items():
        if row.issue is not None:
            rest = f" (but {_values(row)})" if row.legal else ""
            rows.setdefault(TOPICS[row.issue], []).append(f"`{path}`{rest}")
    lines = [f"| {topic} | {', '.join(paths)} |\n" for topic, paths in rows.items()]
    return "| comes with | settings |\n|---|---|\n" + "".join(lines)


def _entry(entry: Field, status: Mapping[str, FieldStatus], known: set[str]) -> str:
    """One field, as an item of a list of definitions."""
    default = "required" if entry.required else f"default `{_plain(entry.default)}`"
    title = f"`{entry.path}`: {describe(entry.annotation)}, {default}"
    return f"{title}\n: {entry.description} *{_state(entry, status[entry.path], known)}.*\n\n"


def _state(entry: Field, row: FieldStatus, known: set[str]) -> str:
    """What a field can do today, and where it is not from the reference."""
    if row.issue is None:
        state = "Works"
    elif row.legal:
        state = f"So far {_values(row)}; the rest comes with {TOPICS[row.issue]}"
    else:
        state = f"Refused; comes with {TOPICS[row.issue]}"
    return state if entry.path in known else f"{state}; [added](additions.md)"


def _values(row: FieldStatus) -> str:
    return " and ".join(f"`{_plain(value)}`" for value in row.legal or ())


def _plain(value: object) -> str:
    if isinstance(value, tuple):
        value = list(value)
    return value if isinstance(value, str) and value else json.dumps(value)


def _reference_paths() -> set[str]:
    return {row["path"] for row in json.loads(REFERENCE.read_text(encoding="utf-8"))}
