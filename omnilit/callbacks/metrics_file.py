"""A file of one JSON object a step that survives being killed and resumed."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Iterable, Mapping
from itertools import count
from pathlib import Path
from typing import TextIO

from omnilit.logging import get_logger

log = get_logger(__name__)

Number = int | float
Line = Mapping[str, Number | str | list[list[int]] | None]


class MetricsFile:
    """Appends lines that are on the operating system's side as soon as `append` returns.

    Args:
        path: Made with its folder when it is first opened.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._file: TextIO | None = None

    def open_at(self, step: int) -> None:
        """Open for the lines that follow `step`; later ones move to `<name>.<k>`.

        A line that cannot be read, such as one that was torn when the run was killed, moves too.
        """
        self.close()
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self._move_later_lines(step)
        self._file = self.path.open("a", buffering=1, encoding="utf-8")

    def append(self, line: Line) -> None:
        """Write one object; a number that is not finite becomes null, so that it stays JSON."""
        assert self._file is not None, "the file is open while a run goes on"
        self._file.write(to_json(line) + "\n")

    def close(self) -> None:
        """Close the file; once is enough."""
        if self._file is not None:
            self._file.close()
        self._file = None

    def _move_later_lines(self, step: int) -> None:
        if not self.path.exists():
            return
        lines = self.path.read_text(encoding="utf-8", errors="replace").splitlines(keepends=True)
        kept = [line for line in lines if _is_up_to(line, step)]
        moved = [line for line in lines if not _is_up_to(line, step)]
        if not moved:
            return
        aside = _first_free(self.path)
        _write_synced(aside, moved)
        shortened = self.path.with_name(f".{self.path.name}.new")
        _write_synced(shortened, kept)
        shortened.replace(self.path)
        log.info("%s: %d lines after step %d moved to %s", self.path, len(moved), step, aside.name)


def append_lines(path: Path, lines: Iterable[Line]) -> None:
    """Add lines to a file that no run keeps open; it is made with its folder."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a", encoding="utf-8") as file:
        file.writelines(to_json(line) + "\n" for line in lines)


def to_json(line: Line) -> str:
    """One line of valid JSON; what is not finite becomes null."""
    finite = {key: None if _is_odd(value) else value for key, value in line.items()}
    return json.dumps(finite, allow_nan=False)


def _is_odd(value: object) -> bool:
    return isinstance(value, float) and not math.isfinite(value)


def _is_up_to(line: str, step: int) -> bool:
    if not line.endswith("\n"):
        return False
    try:
        found = json.loads(line)
    except json.JSONDecodeError:
        return False
    return isinstance(found, dict) and isinstance(n := found.get("step"), int) and n <= step


def _first_free(path: Path) -> Path:
    names = (path.with_name(f"{path.name}.{k}") for k in count(1))
    return next(name for name in names if not name.exists())


def _write_synced(path: Path, lines: list[str]) -> None:
    with path.open("w", encoding="utf-8") as file:
        file.writelines(lines)
        file.flush()
        os.fsync(file.fileno())
